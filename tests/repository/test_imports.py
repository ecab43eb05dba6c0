"""The direction of imports (`.importlinter`): lint fails when a wing imports one above it."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LINT = "from importlinter.cli import lint_imports_command as lint; lint()"


@pytest.mark.parametrize(
    ("file", "line", "broken"),
    [
        ("config.py", "", False),
        ("tiling/core/params.py", "from ds_minis.tiling.modules import swap", True),
        ("tiling/memory/offload.py", "from ds_minis.tiling.modules import state", True),
        ("detect.py", "from ds_minis import convert", True),
        ("parallel/ring.py", "from ds_minis import tiling", False),
        ("tiling/core/params.py", "from ds_minis.parallel import ring", True),
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


def test_no_file_and_no_wing_grows_too_long():
    """A wing is one sitting for a reader. All of `tiling/` was to be 5,000 lines and is not: this holds what there is."""
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in (ROOT / "ds_minis").rglob("*.py")}
    assert max(lines.values()) <= 350, max(lines, key=lines.get)
    wings: dict[str, int] = {}
    for path, count in lines.items():
        if path.parent.parent.name == "tiling":
            wings[path.parent.name] = wings.get(path.parent.name, 0) + count
    assert len(wings) == 11 and max(wings.values()) <= 1700, wings
