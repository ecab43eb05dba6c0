"""Virtual environments on top of the Python that runs a script: its packages are there, others are put in front of them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_DEPENDENCIES = """
import importlib.metadata as metadata, sys
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name as name
for line in metadata.requires(sys.argv[1]) or ():
    wanted = Requirement(line)
    applies = wanted.marker is None or wanted.marker.evaluate({"extra": ""})
    if applies and name(wanted.name) not in map(name, sys.argv[2:]):
        wanted.marker = None
        print(wanted)
"""


class CannotInstall(Exception):
    """What pip said, in one line."""


def make(place: Path, package: str, pins: tuple[str, ...], without: tuple[str, ...], stubs: tuple[str, ...]) -> Path:
    """An environment with a package, made unless it is there; returns its Python.

    Args:
        package: with its version.
        pins: further packages, with versions.
        without: dependencies of the package that are not installed; torch never is, as this Python's is there.
        stubs: of those, the names of modules of which empty ones are put there.

    Raises:
        CannotInstall: pip could not.
    """
    python, made = place / "bin" / "python", place / "made"
    if made.exists():
        return python
    shutil.rmtree(place, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", place], check=True)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(place), "platbase": str(place)}))
    (site / "below.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    _pip(python, "--no-deps", "--ignore-installed", package)  # with its programs, if it is below already
    asked = [python, "-c", _DEPENDENCIES, package.partition("==")[0], "torch", *without]
    wanted = subprocess.run(asked, env=_quiet(), capture_output=True, text=True, check=True).stdout.split("\n")
    _pip(python, f"torch=={version(python, 'torch')}", *pins, *filter(None, wanted))
    for name in stubs:
        (site / f"{name}.py").write_text("")
    _pip(python, "--no-deps", "--editable", str(ROOT))
    made.touch()
    return python


def version(python: Path, name: str) -> str:
    """The version of a package in an environment; empty if it has none."""
    code = f"import importlib.metadata as m; print(m.version({name!r}))"
    done = subprocess.run([python, "-c", code], env=_quiet(), capture_output=True, text=True)
    return done.stdout.strip().partition("+")[0]


def _quiet() -> dict[str, str]:
    return os.environ | {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}


def _pip(python: Path, *what: str) -> None:
    command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *what]
    done = subprocess.run(command, env=_quiet(), capture_output=True, text=True)
    if done.returncode != 0:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise CannotInstall(f"not installable here: {(errors or done.stderr.splitlines() or ['pip failed'])[-1]}")
