"""Packages older than the tested ones: said once, on rank 0, at the first conversion."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import warm

from ds_minis import versions

CONVERT_TWICE = """
import sys
sys.path.insert(0, sys.argv[1])
from models import build
from ds_minis import convert_to_mini_sequence
convert_to_mini_sequence(build("llama"))
convert_to_mini_sequence(build("qwen2"))
"""


def pretend(folder: Path, name: str, version: str) -> None:
    """Metadata as an installed package of that version has it, to be found before the real one."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def convert_twice(folder: Path, **env: str) -> str:
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [warm.python(), "-c", CONVERT_TWICE, str(Path(__file__).parent)],
        env=os.environ | warm.environment() | {"PYTHONPATH": path} | env, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


@pytest.mark.parametrize(("name", "bound"), [("peft", ">=0.21"), ("trl", ">=1.16"), ("deepspeed", ">=0.19.8")])
def test_an_old_package_is_named_once_with_what_was_tested(tmp_path, name, bound):
    pretend(tmp_path, name, "0.1.2")
    said = convert_twice(tmp_path)
    for words in (f"{name} 0.1.2 (tested: {bound})", f"pip install -U {name}"):
        assert said.count(words) == 1, said[-2000:]
    assert "not tested" not in convert_twice(tmp_path, RANK="1")


def test_the_installed_packages_are_not_old(tmp_path):
    assert "not tested" not in convert_twice(tmp_path)
    assert versions.older_than_tested() == []


def test_bounds_are_those_of_the_metadata_for_every_package():
    named = " ".join(importlib.metadata.requires("ds_minis"))
    assert all(f"{name}>=" in named for name in versions.PACKAGES)


def test_a_source_tree_without_metadata(monkeypatch):
    def requires(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", requires)
    assert versions.older_than_tested() == []


def test_nothing_is_looked_up_when_torch_is_imported():
    code = "import torch, sys; assert 'ds_minis' in sys.modules; assert 'ds_minis.versions' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
