"""Writes the list of all error messages into docs/troubleshooting.md, from the `raise` statements of ds_minis.

python scripts/messages.py            # rewrite the list
python scripts/messages.py --check    # fail if it is out of date
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from made_blocks import make_block

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "troubleshooting.md"
SHORTEST = 12  # characters; less is a name or a value
TITLES = {  # first part of a module's name: where its messages stand
    "config": "Settings",
    "config_sources": "Settings",
    "environment": "Settings",
    "unread_settings": "Settings",
    "convert": "Conversion",
    "conversion": "Conversion",
    "integrations": "Engines and trainers",
    "run": "Engines and trainers",
    "replicas": "Sequence parallelism",
    "parallel": "Sequence parallelism",
    "loss": "LM head and loss",
    "tiling": "Layers and modules",
    "layer": "Layers and modules",
    "memory": "Layers and modules",
    "context": "Long context",
    "planner": "Planner",
    "check": "Commands",
    "cli": "Commands",
}


def messages() -> dict[str, list[str]]:
    """For each title its messages, sorted; what a message fills in is an ellipsis."""
    found: dict[str, set[str]] = defaultdict(set)
    for path in sorted((ROOT / "ds_minis").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT / "ds_minis").with_suffix("").parts)
        for text in _raised(ast.parse(path.read_text(encoding="utf-8"))):
            found[_title(name)].add(text)
    return {title: sorted(found[title]) for title in dict.fromkeys([*TITLES.values(), "Other"]) if found[title]}


def _title(module: str) -> str:
    return TITLES.get(module.partition(".")[0], "Other")


def _raised(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            for argument in node.exc.args[:1]:
                text = " ".join(_text(argument).split())
                if len(text.replace("…", "").strip(" :;,.")) >= SHORTEST:
                    yield text


def _text(node: ast.expr) -> str:
    match node:
        case ast.Constant(value=str(value)):
            return value
        case ast.JoinedStr():
            return "".join(_text(part) for part in node.values)
        case ast.BinOp(op=ast.Add()):
            return _text(node.left) + _text(node.right)
    return "…"


def listed() -> str:
    parts = []
    for title, texts in messages().items():
        parts += [f"\n### {title}\n\n", *(f"- `{text.replace('`', chr(39))}`\n" for text in texts)]
    return "".join(parts) + "\n"


if __name__ == "__main__":
    make_block(PAGE, "messages", listed, __doc__)
