"""The recipes: every one gives a command that `train.py` understands; tiny twins of their models train for two steps."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from support import warm

from ds_minis.planner.inputs.models import known_name

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "examples" / "recipes"
spec = importlib.util.spec_from_file_location("recipe", RECIPES / "recipe.py")
recipe = importlib.util.module_from_spec(spec)
spec.loader.exec_module(recipe)
NAMES = recipe.names()


def run(*arguments: str, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["sh", str(RECIPES / "run.sh"), *arguments],
        cwd=cwd,
        env=os.environ | {"PYTHON": sys.executable} | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )


def test_all_recipes_of_the_list_are_there():
    assert {name.rsplit("-", 1)[0] for name in NAMES} >= {"llama-3.1-8b", "mistral-7b", "qwen2-7b", "gemma-2-9b"}
    assert {"falcon-mamba-7b-32k", "llama-2-70b-fsdp", "llama-2-70b-zero3"} <= set(NAMES)
    assert {f"llama-3-8b-fsdp-{length}" for length in ("8k", "16k", "30k")} <= set(NAMES)


@pytest.fixture(scope="module")
def known_flags() -> set[str]:
    """The flags of train.py."""
    code = "import arguments, dataclasses as d; from trl import SFTConfig as S; print(*(f.name for c in (S, arguments."
    code += "ModelArguments, arguments.DataArguments) for f in d.fields(c)))"
    env = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'examples' / 'sft'}"}
    return set(subprocess.check_output([sys.executable, "-c", code], env=env, text=True).split())


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_a_command_of_known_flags(name, known_flags):
    content = recipe.read(name)
    assert not set(content["flags"]) - known_flags
    assert known_name(content["model"]) is not None  # its dimensions ship, so it is planned offline
    words = recipe.command(name, content, ["--max_steps", "1"])
    assert words[-2:] == ["--max_steps", "1"] and str(content["flags"]["max_length"]) in words
    assert all((ROOT / word).exists() for word in words if word.endswith((".py", ".yaml")))
    text = (RECIPES / f"{name}.yaml").read_text()
    assert f"sh run.sh {name}" in text and "The plan" in text and "{PLAN}" not in text
    planned = recipe.plan_command(content)
    assert planned[planned.index("--seq") + 1] == str(content["flags"]["max_length"])


def test_names_that_are_not_there_and_the_list():
    done = run("nothing")
    assert done.returncode == 2 and "llama-3.1-8b-32k" in done.stdout
    assert all(name in run().stdout for name in NAMES)
    shown = run("llama-2-70b-fsdp", "--show", "--seed", "7").stdout
    assert "accelerate_configs/fsdp.yaml" in shown and shown.strip().endswith("--seed 7")


def test_a_wrong_key_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "HERE", tmp_path)
    content = yaml.safe_load((RECIPES / "qwen2-7b-8k.yaml").read_text())
    (tmp_path / "a.yaml").write_text(yaml.safe_dump({**content, "modell": 1}))
    with pytest.raises(ValueError, match="modell"):
        recipe.read("a")


@pytest.mark.engine
@pytest.mark.parametrize(
    ("name", "engine", "processes"),
    [("gemma-2-9b-8k", "NO, Gemma2ForCausalLM", 1), ("llama-2-70b-fsdp", "FSDP, FSDPPeftModelForCausalLM", 2)],
)
def test_the_tiny_twin_of_a_recipe_trains_for_two_steps(name, engine, processes, tmp_path):
    done = run(name, "--tiny", "--output_dir", str(tmp_path / "out"), **warm.environment())
    assert done.returncode == 0, done.stdout[-5000:]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["engine"], summary["num_processes"]) == (engine, processes)
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert state["global_step"] == 2
