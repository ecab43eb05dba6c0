"""Writes docs/supported_models.md from the results of scripts/census.py."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from ds_minis.check.exactness import LENGTH
from ds_minis.check.tiny import WINDOW

TITLES = {
    "causal": "Causal language models",
    "image-text": "Image-text models",
    "encoder-decoder": "Encoder-decoder models",
}
_FEED_FORWARD = re.compile(r"mlp|ffn|feed_forward|moe|expert|^fc\d|^intermediate|^dense|^ff", re.IGNORECASE)

Results = Mapping[str, Mapping[str, Any]]


def write_page(path: Path, results: Results) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(with_more_columns(page(results)), encoding="utf-8")


def page(results: Results) -> str:
    """The page in Markdown."""
    parts = [_head(results)]
    for kind, title in TITLES.items():
        chosen = {name.split(":", 1)[1]: result for name, result in results.items() if name.startswith(f"{kind}:")}
        runs = {name: result for name, result in chosen.items() if "plain_fails" not in result}
        if not chosen:
            continue
        parts.append(f"## {title}\n\n{_TABLE_HEAD}" + "\n".join(_row(name, runs[name]) for name in sorted(runs)))
        rest = sorted(chosen.keys() - runs.keys())
        if rest:
            lines = [f"- `{name}`: {_short(chosen[name]['plain_fails'])}" for name in rest]
            parts.append(
                "Not run, because the plain model does not train on text and pixels at this size:\n\n"
                + "\n".join(lines)
            )
    return "\n\n".join(parts) + "\n"


def _head(results: Results) -> str:
    totals = [
        _totals(title, {n: r for n, r in results.items() if n.startswith(f"{kind}:")}) for kind, title in TITLES.items()
    ]
    return f"""# Supported models

Made by `python scripts/census.py --write`; do not edit. Versions: transformers {transformers.__version__}, torch
{torch.__version__.split("+")[0]}.

Every architecture that transformers maps to a causal, an image-text or an encoder-decoder language model is built at a tiny
size with random weights and trained for one step of 2 x {LENGTH} tokens (windows of {WINDOW}) on the CPU in float32, plain
and converted with small chunks. It is *exact* when the loss,
the gradient of every parameter (relative to its own largest, with a floor of 1% of the model's) and, in mixtures of experts,
the router outputs and the auxiliary loss differ by at most 1e-5, with and without gradient checkpointing. The largest error
of a gradient is shown. `ds-minis check` does the same for one configuration of yours.

| | {" | ".join(totals[0])} |
|---|{"---|" * len(totals[0])}
""" + "\n".join(f"| {title} | {' | '.join(t.values())} |" for title, t in zip(TITLES.values(), totals, strict=True))


def _totals(title: str, results: Results) -> dict[str, str]:
    runs = [result for result in results.values() if "plain_fails" not in result]
    routers = [result for result in runs if result.get("router_error") is not None]
    checkpointed = [result for result in runs if result.get("checkpointing_error") is not None]
    return {
        "architectures": str(len(results)),
        "run": str(len(runs)),
        "exact": f"{sum(bool(r.get('exact')) for r in runs)} of {len(runs)}",
        "of them also with checkpointing": str(sum(bool(r.get("exact")) for r in checkpointed)),
        "with whole layers tiled": f"{sum(_has_whole_layers(r) for r in runs)} of {len(runs)}",
        "full logits never held": f"{sum(not r.get('logits_held', True) for r in runs)} of {len(runs)}",
        "router outputs equal": f"{sum(bool(r.get('exact')) for r in routers)} of {len(routers)}",
    }


def _has_whole_layers(result: Mapping[str, Any]) -> bool:
    return bool(result.get("layers")) or any("output_capturing" in e[1] for e in result.get("layers_left", []))


_COLUMNS = (
    *("model type", "exact", "with checkpointing", "whole layers tiled"),
    *("feed-forward tiled", "norms tiled", "loss", "routers"),
)
_TABLE_HEAD = f"| {' | '.join(_COLUMNS)} |\n|{'---|' * len(_COLUMNS)}\n"


def _row(name: str, result: Mapping[str, Any]) -> str:
    if "crash" in result:
        return f"| `{name}` | **no**: {_short(result['crash'])} | | | | | | |"
    exact = f"yes, {result['grad_error']:.0e}" if result["exact"] else f"**no**, {result['grad_error']:.0e}"
    checkpointing, router = result["checkpointing_error"], result["router_error"]
    norms = str(sum(count for cls, count in result["tiled"].items() if _is_norm(cls)))
    idle = sum(count for cls, count in result.get("idle", {}).items() if _is_norm(cls))
    norms += f" ({idle} not called on text)" if idle else ""
    cells = [
        *(f"`{name}`", exact),
        _number(checkpointing) if checkpointing is not None else _no_checkpointing(result),
        *(_layers(result), _feed_forward(result), norms),
        _loss(result),
        "" if router is None else _number(router),
    ]
    return f"| {' | '.join(cells)} |"


def _number(error: float) -> str:
    return "equal" if error <= 1e-5 else f"**{error:.0e}**"


def _no_checkpointing(result: Mapping[str, Any]) -> str:
    wrong = any(note.startswith("gradient checkpointing") for note in result["notes"])
    return "wrong in plain transformers" if wrong else "none in transformers"


def _layers(result: Mapping[str, Any]) -> str:
    """`2 of 2`, and why not where it is fewer."""
    tiled, left = sum(result.get("layers", {}).values()), result.get("layers_left", [])
    reasons = "; ".join(dict.fromkeys(f"`{cls}`: {_short(_layer_reason(reason))}" for cls, reason, _ in left))
    count = f"{tiled} of {tiled + sum(entry[-1] for entry in left)}"
    return f"{count}; {reasons}" if reasons else count


def _layer_reason(reason: str) -> str:
    """The census asks every mixture of experts for its router outputs."""
    with_router = "output_capturing_hook" in reason
    return "tiled where router outputs are not asked for" if with_router else reason.removeprefix("as a whole: ")


def _feed_forward(result: Mapping[str, Any]) -> str:
    """`2 of 2`, and why not where it is fewer."""
    tiled = sum(count for cls, count in result["tiled"].items() if not _is_norm(cls))
    left = [entry for entry in result["untiled"] if not _is_norm(entry[0])]
    feed_forward = [entry for entry in left if _FEED_FORWARD.search(entry[2])]
    if not feed_forward and not tiled:
        return "none found; left alone: " + (", ".join(dict.fromkeys(f"`{cls}`" for cls, *_ in left)) or "nothing")
    count = f"{tiled} of {tiled + sum(entry[3] for entry in feed_forward)}"
    idle = sum(number for cls, number in result.get("idle", {}).items() if not _is_norm(cls))
    if idle:
        count += f" ({idle} not called on text)"
    reasons = "; ".join(dict.fromkeys(f"`{name}` ({cls}): {_short(reason)}" for cls, reason, name, _ in feed_forward))
    return f"{count}; {reasons}" if reasons else count


def _loss(result: Mapping[str, Any]) -> str:
    if not result["logits_held"]:
        return "tiled"
    why = [note for note in result["notes"] if not note.startswith("gradient checkpointing")]
    if not why and not result["loss"].startswith("tiled"):
        why = [result["loss"]]
    return f"full logits held{': ' if why else ''}{'; '.join(map(_short, why))}"


def _is_norm(class_name: str) -> bool:
    return class_name.endswith("Norm")


def _short(text: str) -> str:
    text = " ".join(text.split()).replace("|", "/")
    return text if len(text) <= 160 else text[:157] + "..."


DOCS = Path(__file__).parent.parent / "docs"
SEQUENCE_PARALLEL = DOCS / "sequence_parallel.json"  # of scripts/census_parallel.py
TRL_HEADS = DOCS / "trl_heads.json"  # of scripts/census_trl.py


def with_more_columns(text: str) -> str:
    """The page with last columns: what sequence parallelism makes of each architecture, and TRL's call."""
    lines, kind, columns = [], "", []
    for line in text.splitlines():
        titles = [k for k, title in TITLES.items() if line == f"## {title}"]
        if titles:
            kind = titles[0]
            columns = [column for column in _more_columns() if any(name.startswith(f"{kind}:") for name in column[1])]
        found = re.match(r"\| `([^`]+)` \|", line)
        if found and kind:
            cells = [in_a_cell(said.get(f"{kind}:{found[1]}", "")) for _, said, in_a_cell in columns]
            line = _with_cells(line, cells)
        elif line.startswith("| model type |"):
            line = _with_cells(line, [title for title, *_ in columns])
        elif kind and line.startswith("|---|"):
            line = f"|{'---|' * (len(_COLUMNS) + len(columns))}"
        lines.append(line)
    return "\n".join(lines) + "\n"


def _more_columns() -> list[tuple[str, dict[str, Any], Callable[[Any], str]]]:
    """Title, what a file says of each architecture, and how that is shown."""
    columns = (("on two ranks", SEQUENCE_PARALLEL, _of_two_ranks), ("TRL's call", TRL_HEADS, _of_trl))
    return [(title, json.loads(file.read_text()), show) for title, file, show in columns if file.exists()]


def _with_cells(line: str, cells: list[str]) -> str:
    own = "|".join(line.split("|")[: len(_COLUMNS) + 1])
    return "|".join([own, *(f" {cell} " for cell in cells), ""])


def _of_two_ranks(said: str) -> str:
    """The reason alone, without the words around it that all refusals share."""
    if said.startswith("exact"):
        return f"yes, {said.removeprefix('exact: ')}"
    reason = re.sub(r"^refused: (convert_to_mini_sequence: )?sequence_parallel[^:]*: ", "", said)
    reason = re.sub(r"^.*? cannot (be run|run) on a part of (each|the) sequence: ", "", reason)
    return (
        f"refused: {reason.removesuffix(' Leave sequence_parallel out for this model').rstrip('.').replace('|', '/')}"
        if said
        else ""
    )


def _of_trl(said: Mapping[str, str] | str) -> str:
    """Whether the call is answered exactly, and what TRL's own answer is where that is not."""
    if not said:
        return ""
    kind, _, rest = said["ds_minis"].partition(": ")
    ours = f"yes, {rest}" if kind == "exact" else _short(rest)
    own, _, error = said["TRL"].partition(": ")
    return ours if own in ("exact", "") else f"{ours} (TRL's own {own}: {_short(error)})"
