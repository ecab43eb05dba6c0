"""No code of others is run, no pickle is loaded, nothing is evaluated, and nothing is asked of the network."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sft_runs import DEFAULT, EXAMPLE, ROOT

SOURCES = sorted(path for folder in ("ds_minis", "examples", "scripts") for path in (ROOT / folder).rglob("*.py"))
FORBIDDEN_CALLS = {
    "eval",
    "exec",
    "compile",
    "os.system",
    "os.popen",
    "yaml.load",
    "yaml.unsafe_load",
    "yaml.full_load",
}
FLAGS = (
    "training_args.trust_remote_code",
    "args.trust_remote_code",
    "trust_remote_code",
)  # what the user said, passed on
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}


def offences(source: str) -> list[str]:
    """What in a file could run something that it was given as data."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found += [name for name in names if name.partition(".")[0] in FORBIDDEN_MODULES]
        elif isinstance(node, ast.Call):
            name, keywords = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
            safe_load = keywords.get("weights_only") == "True"
            remote = keywords.get("trust_remote_code", "False") not in ("False", *FLAGS)
            if name in FORBIDDEN_CALLS or (name == "torch.load" and not safe_load) or remote:
                found.append(ast.unparse(node))
            if keywords.get("shell", "False") != "False" or keywords.get("weights_only") == "False":
                found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_nothing_evaluates_or_unpickles(path):
    assert offences(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "line",
    [
        "eval(config['x'])", "exec(open('f').read())", "import pickle", "from pickle import loads", "torch.load('f')",
        "torch.load('f', weights_only=False)", "yaml.load(f, yaml.Loader)", "os.system(name)",
        "subprocess.run(c, shell=True)",
        "AutoModel.from_pretrained(p, trust_remote_code=True)",
    ],
)  # fmt: skip
def test_the_search_finds_what_it_is_for(line):
    assert offences(line)


def test_ds_minis_trusts_no_remote_code_by_itself_and_the_scripts_never_evaluate():
    mentions = [path.name for path in (ROOT / "ds_minis").rglob("*.py") if "trust_remote_code" in path.read_text()]
    assert sorted(mentions) == [
        "check.py",
        "plan.py",
    ]  # a flag of both commands, off by default: tests/check/test_check.py
    for script in [*EXAMPLE.glob("*.sh"), *(ROOT / "scripts").glob("*.sh")]:
        lines = [line.partition("#")[0] for line in script.read_text().splitlines()]
        assert not [line for line in lines if re.search(r"(^|[;&|]\s*)\s*eval\b|trust_remote_code", line)], script


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLE)
    import arguments
    import folders
    import modeling

    return arguments, folders, modeling


def parsed(arguments, model: Path, output: Path):
    argv = ["--model_name_or_path", str(model), "--dataset_name", str(DEFAULT / "data"), "--output_dir", str(output)]
    model_args, _, training_args = arguments.parse_arguments(argv)
    return model_args, training_args


def test_code_in_a_models_folder_is_run_only_if_asked_for(example, tmp_path, monkeypatch):
    arguments, _, modeling = example
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    model = shutil.copytree(DEFAULT / "model", tmp_path / "model")
    config = json.loads((model / "config.json").read_text()) | {"model_type": "mine"}
    config["auto_map"] = {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}
    (model / "config.json").write_text(json.dumps(config))
    (model / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    model_args, training_args = parsed(arguments, model, tmp_path / "output")
    assert training_args.trust_remote_code is False
    for weights in (False, True):  # made from the config, and loaded
        if weights:
            (model / "model.safetensors").touch()
        modeling.load_tokenizer(model_args, training_args)
        with pytest.raises(ValueError, match="trust_remote_code"):
            modeling.load_model(model_args, training_args, None, deepspeed=False)
        assert not (tmp_path / "ran").exists()

    training_args.trust_remote_code = True  # so that the above is not for want of code to run
    with pytest.raises(AttributeError, match="Config"):
        modeling.load_model(model_args, training_args, None, deepspeed=False)
    assert (tmp_path / "ran").exists()


def test_only_safetensors_are_loaded_and_saved(example, tmp_path):
    arguments, folders, modeling = example
    model_args, training_args = parsed(arguments, DEFAULT / "model", tmp_path / "output")
    tokenizer = modeling.load_tokenizer(model_args, training_args)
    made = modeling.load_model(model_args, training_args, tokenizer, deepspeed=False)
    base = tmp_path / "output" / "base_model"
    assert (base / "model.safetensors").is_file() and not list(base.glob("*.bin"))

    (base / "model.safetensors").unlink()
    torch.save(made.state_dict(), base / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pickled \(pytorch_model.bin\).*Only safetensors.*save_pretrained"):
        folders.require_input("--model_name_or_path", str(base))
    model_args, training_args = parsed(arguments, base, tmp_path / "output2")
    with pytest.raises(OSError, match="safetensors"):  # and should that check be passed by, as with a hub id
        modeling.load_model(model_args, training_args, tokenizer, deepspeed=False)


@pytest.mark.parametrize("name", ["pytorch_model-00001-of-00002.bin", "adapter_model.bin"])
def test_pickled_weights_are_refused_by_name_unless_there_are_safetensors(example, tmp_path, name):
    _, folders, _ = example
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match=f"weights are pickled .{name}"):
        folders.require_input("--model_name_or_path", str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"")  # many hub repositories have both
    folders.require_input("--model_name_or_path", str(tmp_path))


TAG = "!!python/object/apply:os.system ['touch {}']"


def test_a_tag_in_the_arguments_file_is_refused(example, tmp_path):
    arguments, _, _ = example
    (tmp_path / "args.yaml").write_text(f"model_name_or_path: {TAG.format(tmp_path / 'ran')}\ndataset_name: d\n")
    with pytest.raises(Exception, match="could not determine a constructor for the tag"):
        arguments.parse_arguments([str(tmp_path / "args.yaml")])
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("key", ["main_process_port", "mini_sequence"])
def test_a_tag_in_an_accelerate_configuration_is_refused(tmp_path, key):
    (tmp_path / "config.yaml").write_text(f"distributed_type: 'NO'\n{key}: {TAG.format(tmp_path / 'ran')}\n")
    (tmp_path / "script.py").write_text("print('the script ran')\n")
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "config.yaml", "script.py"],
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode != 0 and "could not determine a constructor for the tag" in done.stderr
    assert "the script ran" not in done.stdout and not (tmp_path / "ran").exists()


NO_NETWORK = """
import importlib, pkgutil, socket, sys
seen = []
sys.addaudithook(lambda event, args: seen.append((event, args)) if event.startswith("socket.") else None)
import ds_minis
names = [m.name for m in pkgutil.walk_packages(ds_minis.__path__, "ds_minis.") if not m.name.endswith("__main__")]
for name in names:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:  # the loss's kernel, which is imported where Triton is there alone
        assert error.name == "triton", error
import accelerate, deepspeed, peft, transformers.trainer, trl
sys.path.insert(0, sys.argv[1])
from models import batch, build
model = ds_minis.convert_to_mini_sequence(build("llama"), {"chunk_size": 5})
model(**batch(20)).loss.backward()
ds_minis.revert_mini_sequence(model)
connections = [event for event in seen if event[0] not in ("socket.gethostname", "socket.__new__")]
assert not connections, connections
assert len(names) > 12, names
try:
    socket.create_connection(("localhost", 1), timeout=1)
except OSError:
    pass
assert any(event == "socket.connect" for event, _ in seen), "the watch itself does not work"
print("no connection")
"""


def test_no_network_at_import_and_conversion():
    env = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    done = subprocess.run(
        [sys.executable, "-c", NO_NETWORK, str(ROOT / "tests")],
        env=env | {"DS_ACCELERATOR": "cpu"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0 and "no connection" in done.stdout, done.stderr[-3000:]
