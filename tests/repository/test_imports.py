"""The direction of imports (`.importlinter`): lint fails when a wing imports one above it."""

import ast
import collections
import configparser
import graphlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parents[2]
LINT = "from importlinter.cli import lint_imports_command as lint; lint()"


@pytest.mark.parametrize(
    ("file", "line", "broken"),
    [
        ("config.py", "", False),
        ("tiling/core/params.py", "from ds_minis.tiling.modules import swap", True),
        ("tiling/modules/state.py", "from ds_minis.memory import offload", True),
        ("memory/offload.py", "from ds_minis.layer.passes import node", True),
        ("loss/heads/chunked_head.py", "from ds_minis.loss.logits import deferred", True),
        ("loss/heads/chunked_head.py", "from ds_minis.layer.passes import node", True),
        ("layer/passes/node.py", "from ds_minis.layer.kept import kept_layer", True),
        ("conversion/detect.py", "from ds_minis import convert", True),
        ("parallel/attention/ring.py", "from ds_minis import tiling", False),
        ("tiling/core/params.py", "from ds_minis.parallel.attention import ring", True),
        ("planner/step/trace.py", "from ds_minis.planner.plan import planner", True),
        ("parallel/communication/cut.py", "from ds_minis.parallel.attention import masks", True),
        ("context/rope.py", "from ds_minis.context.needle import model", True),
    ],
)
def test_an_upward_import_breaks_the_contract(file, line, broken, tmp_path):
    shutil.copytree(ROOT / "ds_minis", tmp_path / "ds_minis", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / ".importlinter", tmp_path)
    with open(tmp_path / "ds_minis" / file, "a", encoding="utf-8") as module:
        module.write(f"\n{line}\n")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {LINT}"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == int(broken), done.stdout
    assert ("BROKEN" in done.stdout) == broken


def test_no_modules_import_each_other_in_a_circle():
    """Those inside of functions count; those for types alone do not."""
    graph = grimp.build_graph("ds_minis", exclude_type_checking_imports=True, cache_dir=None)
    imported = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    assert len(imported) > 150
    assert list(graphlib.TopologicalSorter(imported).static_order())  # raises CycleError with the circle


def test_nothing_goes_by_way_of_the_public_names():
    """The package's own file imports lazily, from above: contracts do not see what goes through it."""
    package = ROOT / "ds_minis"
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module == "ds_minis":
                public = [
                    alias.name
                    for alias in node.names
                    if not (package / alias.name).is_dir() and not (package / f"{alias.name}.py").exists()
                ]
                assert public in ([], ["__version__"]), path


def test_no_file_and_no_wing_grows_too_long():
    """A wing, the modules of one folder, is one sitting for a reader; a part of ds_minis, with its wings, is a day."""
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in (ROOT / "ds_minis").rglob("*.py")}
    assert max(lines.values()) <= 350, max(lines, key=lines.get)
    wings: dict[str, int] = {}
    for path, count in lines.items():
        name = str(path.parent.relative_to(ROOT))
        wings[name] = wings.get(name, 0) + count
    assert {name: count for name, count in wings.items() if count > 1700} == {}
    parts = collections.Counter()
    for path, count in lines.items():
        parts[path.relative_to(ROOT / "ds_minis").parts[0]] += count
    assert {name: count for name, count in parts.items() if count > 5000} == {}


def test_contributing_names_each_file():
    """Who looks for something finds its file in the table of rooms, and each file that is named exists."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rooms = {room: line for line in text.splitlines() for room in re.findall(r"^\| `([\w/]+)/` \|", line)}
    missing = []
    for path in (ROOT / "ds_minis").rglob("*.py"):
        folder = path.parent.relative_to(ROOT / "ds_minis")
        row = next((rooms[str(room)] for room in (folder, *folder.parents) if str(room) in rooms), text)
        if not path.stem.startswith("__") and not re.search(rf"`([\w/]+/)?{path.stem}(\.py)?`", row):
            missing.append(str(path.relative_to(ROOT)))
    assert missing == []
    places = [ROOT, ROOT / "ds_minis", ROOT / "ds_minis/integrations", ROOT / "scripts", ROOT / "scripts/bench"]
    named = re.findall(r"`([\w/]+\.py)`", text)
    assert [name for name in named if not any((place / name).exists() for place in places)] == []


def test_every_folder_with_wings_has_a_contract():
    contracts = configparser.ConfigParser()
    contracts.read(ROOT / ".importlinter", encoding="utf-8")
    held = {section["containers"] for section in contracts.values() if section.get("exhaustive") == "True"}
    modules = [path.parent.relative_to(ROOT).parts for path in (ROOT / "ds_minis").rglob("*.py")]
    assert {".".join(parts[:-1]) for parts in modules if len(parts) > 1} == held


def private_names(source: str) -> list[str]:
    """What a test takes of ds_minis that begins with an underscore: imported, or named in a string, as for a patch."""
    named = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            named += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            named += [alias.name for alias in node.names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            named.append(node.value)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("setattr", "delattr"):
            named += [f"ds_minis.{name.value}" for name in node.args[1:2] if isinstance(name, ast.Constant)]
    return [name for name in named if re.fullmatch(r"ds_minis(\.\w+)*\._(?!_)\w+(\.\w+)*", name)]


def test_no_test_reaches_into_privates():
    private = ".".join(["ds_minis", "layer", "_one"])
    assert private_names("from ds_minis.layer import two, _one") == [private]
    assert private_names(f"monkeypatch.setattr('{private}', 3); import {private}") == [private] * 2
    assert private_names("monkeypatch.setattr(layer, '_one', 3)") == [".".join(["ds_minis", "_one"])]
    files = {path: private_names(path.read_text(encoding="utf-8")) for path in (ROOT / "tests").rglob("*.py")}
    assert {str(path.relative_to(ROOT)): names for path, names in files.items() if names} == {}
