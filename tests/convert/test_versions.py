"""Packages that are too old, or older than those that CI tests: said once, on rank 0, at the first conversion."""

import configparser
import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest
from models import assert_same_training, batch, build
from packaging.requirements import Requirement
from support import warm

from ds_minis import convert_to_mini_sequence, mini_sequence_report, versions

ROOT = Path(__file__).resolve().parents[2]
CONVERT_TWICE = """
import sys
sys.path.insert(0, sys.argv[1])
from models import build
from ds_minis import convert_to_mini_sequence
convert_to_mini_sequence(build("llama"))
convert_to_mini_sequence(build("qwen2"))
"""


def pretend(folder: Path, name: str, version: str, *requires: str) -> None:
    """Metadata as an installed package of that version has it, to be found before the real one."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir()
    lines = [
        "Metadata-Version: 2.1",
        f"Name: {name}",
        f"Version: {version}",
        *(f"Requires-Dist: {r}" for r in requires),
    ]
    (info / "METADATA").write_text("\n".join(lines) + "\n")


@pytest.fixture(autouse=True)
def own_bounds(tmp_path):
    """Those of this checkout, whatever ds_minis was installed from."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    pretend(tmp_path, "ds_minis", "0.1.0", *setup["options"]["install_requires"].split())


def convert_twice(folder: Path, **env: str) -> str:
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [warm.python(), "-c", CONVERT_TWICE, str(Path(__file__).parents[1])],
        env=os.environ | warm.environment() | {"PYTHONPATH": path} | env, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


@pytest.mark.parametrize(("name", "bound"), [("transformers", ">=5.1"), ("torch", ">=2.6")])
def test_a_version_that_is_too_old_is_named_once(tmp_path, name, bound):
    pretend(tmp_path, name, "0.1.2")
    said = convert_twice(tmp_path)
    assert said.count(f"not known to work with versions this old: {name} 0.1.2 (needed: {bound})") == 1, said[-2000:]
    assert "not known" not in convert_twice(tmp_path, RANK="1")


@pytest.mark.parametrize(("name", "older"), [("transformers", "5.6.0"), ("peft", "0.18.1"), ("trl", "0.24.0")])
def test_what_ci_does_not_test_is_one_line_without_advice(tmp_path, name, older):
    """Other people's programs pin such versions: to upgrade would break them."""
    pretend(tmp_path, name, older)
    said = convert_twice(tmp_path)
    assert said.count(f"{name} {older} (CI: {versions.TESTED[name]})") == 1 and "not known to work" not in said
    assert "pip install" not in said and "docs/versions.md" in said


def test_the_installed_packages_are_those_that_ci_tests(tmp_path):
    said = convert_twice(tmp_path)
    assert "CI" not in said and "not known" not in said
    assert versions.too_old() == [] and versions.older_than_tested() == []


def test_what_ci_tests_is_what_the_constraints_pin():
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    assert {name: pinned[name] for name in versions.TESTED} == versions.TESTED


def test_bounds_are_not_above_what_ci_tests():
    requirements = [Requirement(line) for line in importlib.metadata.requires("ds_minis")]
    bounded = {r.name: r.specifier for r in requirements if r.name in versions.TESTED}
    assert bounded.keys() == versions.TESTED.keys()
    assert all(bounds.contains(versions.TESTED[name]) for name, bounds in bounded.items())


def test_transformers_without_the_attention_interface_is_named(monkeypatch):
    """Before 5.1 a layer looks its attention up in a dictionary, and nobody can answer for it."""
    model, reference = build("llama"), build("llama")
    monkeypatch.setattr("transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS", {})
    convert_to_mini_sequence(model, {"chunk_size": 8})
    reason = mini_sequence_report(model).untiled["model.layers.0"][1]
    assert reason.startswith("as a whole: transformers ")
    assert "lacks the attention interface that this needs (`get_interface`, since 5.1)" in reason
    assert_same_training(model, reference, batch(23))


def test_a_source_tree_without_metadata(monkeypatch):
    def requires(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", requires)
    assert versions.too_old() == []


def test_nothing_is_looked_up_when_torch_is_imported():
    code = "import torch, sys; assert 'ds_minis' in sys.modules; assert 'ds_minis.versions' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
