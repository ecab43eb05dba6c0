import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ds_minis.integrations import autoload

ENGINES = ("deepspeed", "accelerate", "transformers", "peft", "trl")
# Tells how often each engine module that is imported is attached.
FACTS = """
import json, sys
def times_wrapped(function):
    return 1 + times_wrapped(function.__wrapped__) if hasattr(function, "__wrapped__") else 0
def facts():
    found = {}
    if "deepspeed" in sys.modules:
        found["initialize"] = times_wrapped(sys.modules["deepspeed"].initialize)
    if "deepspeed.ops.op_builder.all_ops" in sys.modules:
        found["op"] = int("mini_sequence" in sys.modules["deepspeed.ops.op_builder.all_ops"].ALL_OPS)
    if "deepspeed.runtime.zero.parameter_offload" in sys.modules:
        offload = sys.modules["deepspeed.runtime.zero.parameter_offload"].DeepSpeedZeRoOffload
        found["zero3"] = times_wrapped(offload.setup_zero_stage3_hooks)
    if "accelerate.utils.deepspeed" in sys.modules:
        read = sys.modules["accelerate.utils.deepspeed"].HfDeepSpeedConfig.__init__
        found["config check"] = times_wrapped(read)
    if "accelerate.commands.config.config_args" in sys.modules:
        config_class = sys.modules["accelerate.commands.config.config_args"].BaseConfig
        found["config file"] = times_wrapped(config_class.process_config)
    if "accelerate.accelerator" in sys.modules:
        found["prepare"] = times_wrapped(sys.modules["accelerate.accelerator"].Accelerator.prepare)
    if "transformers.trainer" in sys.modules:
        found["prediction step"] = times_wrapped(sys.modules["transformers.trainer"].Trainer.prediction_step)
    return found
def show(**values):
    print("FACTS", json.dumps(values))
"""
IMPORT_ALL = "import deepspeed, deepspeed.ops.op_builder.all_ops, accelerate.commands.launch, transformers.trainer\n"
ALL = ("initialize", "op", "zero3", "config check", "config file", "prepare", "prediction step")


def run(command: list[str], cwd: Path | str = "/tmp", **env: str) -> subprocess.CompletedProcess:
    inherited = {k: v for k, v in os.environ.items() if k not in ("DS_MINIS_AUTOLOAD", "PYTHONPATH", "RANK")}
    path = os.pathsep.join(
        filter(None, [env.pop("PYTHONPATH", ""), str(Path(__file__).parents[2])])
    )  # this checkout, whatever is installed
    environment = {**inherited, "DS_ACCELERATOR": "cpu", **env, "PYTHONPATH": path}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


def python(code: str, **env: str) -> subprocess.CompletedProcess:
    return run([sys.executable, "-c", code], **env)


def facts(code: str, **env: str) -> dict:
    result = python(FACTS + code, **env)
    assert result.returncode == 0, result.stderr
    assert "ds_minis could not" not in result.stderr
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("FACTS")]
    return json.loads(line.removeprefix("FACTS"))


def test_import_torch_loads_the_hook_and_no_engine():
    found = facts("import torch; show(modules=sorted(sys.modules))")["modules"]
    assert not [name for name in found if name.split(".")[0] in ENGINES]
    assert {name for name in found if name.startswith("ds_minis")} == {
        "ds_minis",
        "ds_minis.environment",
        "ds_minis.integrations",
        "ds_minis.integrations.autoload",
    }


def test_import_torch_costs_less_than_five_milliseconds_more():
    from import_time import milliseconds

    assert min(milliseconds(5)) < 5  # of several: the first one compiles ds_minis


def test_the_configuration_needs_no_torch():
    found = facts(
        "import ds_minis; ds_minis.MiniSequenceConfig(); ds_minis.register(); show(modules=list(sys.modules))"
    )
    assert "torch" not in found["modules"]


@pytest.mark.parametrize("name", ["MiniSequencePlugin", "MiniSequenceCallback", "convert_to_mini_sequence"])
def test_ds_minis_may_be_imported_before_every_engine(name):
    """`from ds_minis import ...` as a script's first line: the engine is imported by it, and attached all the same."""
    found = facts(f"from ds_minis import {name}\nimport torch\n{IMPORT_ALL}show(times=facts())")
    assert found["times"] == dict.fromkeys(ALL, 1)


@pytest.fixture(scope="module")
def automatic() -> dict:
    code = """
import ds_minis
from ds_minis.integrations.autoload import ATTACH, AttachingFinder
from ds_minis.integrations.deepspeed import MiniSequenceOp
from models import build
modules = [sys.modules[name] for name in ATTACH]
first = facts()
ds_minis.register(), ds_minis.register()
builder = deepspeed.ops.op_builder.MiniSequenceBuilder()
ops = [builder.load(), deepspeed.ops.op_builder.all_ops.ALL_OPS["mini_sequence"].load()]
model = build("llama")
converted = [op.convert(model, {"chunk_size": 4}) is model for op in ops]
reported = ds_minis.mini_sequence_report(model) is not None
show(
    first=first, again=facts(), ops=[op is MiniSequenceOp for op in ops], converted=[*converted, reported],
    loaders=[[type(value).__name__ for value in (m.__spec__, m.__spec__.loader, m.__loader__)] for m in modules],
    finders=sum(isinstance(finder, AttachingFinder) for finder in sys.meta_path),
    reverted=ops[0].revert(model) is model and ds_minis.mini_sequence_report(model) is None,
    compatible=builder.is_compatible(), sources=builder.sources(), name=builder.absolute_name(),
)
"""
    return facts("import torch\n" + IMPORT_ALL + code, PYTHONPATH=str(Path(__file__).parents[1]))


def test_engines_are_attached_once_however_often_register_is_called(automatic):
    assert automatic["first"] == automatic["again"] == dict.fromkeys(ALL, 1) and automatic["finders"] == 1


def test_engines_have_their_own_specs_and_loaders_after_the_import(automatic):
    assert automatic["loaders"] == [["ModuleSpec", "SourceFileLoader", "SourceFileLoader"]] * len(ALL)


def test_builder_loads_an_op_that_converts(automatic):
    assert automatic["ops"] == [True] * 2 and automatic["converted"] == [True] * 3 and automatic["reverted"]
    assert automatic["compatible"] and automatic["sources"] == []
    assert automatic["name"] == "ds_minis.integrations.deepspeed.MiniSequenceOp"


@pytest.mark.parametrize(
    ("first", "attached"),
    [
        ("import deepspeed, deepspeed.ops.op_builder.all_ops", ["initialize", "op"]),
        ("from transformers import Trainer", ["prediction step"]),
        ("import accelerate.utils.deepspeed", ["config check"]),
    ],
)
def test_an_engine_imported_before_torch_is_attached_too(first, attached):
    specs = "[type(m.__spec__).__name__ for name, m in sys.modules.items() if name in autoload.ATTACH]"
    found = facts(f"{first}\nfrom ds_minis.integrations import autoload\nshow(specs={specs}, **facts())")
    assert {name: found[name] for name in attached} == dict.fromkeys(attached, 1)
    assert set(found["specs"]) == {"ModuleSpec"}


def test_autoload_can_be_switched_off_and_register_attaches_what_is_imported_already():
    code = "import torch\n" + IMPORT_ALL + "before = facts()\nimport ds_minis\nds_minis.register()\n"
    found = facts(code + "show(before=before, after=facts())", DS_MINIS_AUTOLOAD="0")
    assert found == {"before": dict.fromkeys(ALL, 0), "after": dict.fromkeys(ALL, 1)}


def test_register_attaches_what_is_imported_later():
    code = "import ds_minis; ds_minis.register()\nimport deepspeed, deepspeed.ops.op_builder.all_ops\nshow(**facts())"
    assert facts(code, DS_MINIS_AUTOLOAD="0") == {"initialize": 1, "op": 1, "zero3": 1}


def fake_deepspeed(folder: Path, code: str) -> str:
    (folder / "deepspeed").mkdir()
    (folder / "deepspeed" / "__init__.py").write_text(code)
    return str(folder)


@pytest.mark.parametrize(
    ("first", "own_import"),
    [("import torch", ""), ("import ds_minis; ds_minis.register()", ""), ("", "import torch")],
    ids=["torch first", "register first", "deepspeed first"],
)
def test_an_unknown_deepspeed_gives_one_warning_and_works_as_it_is(tmp_path, first, own_import):
    folder = fake_deepspeed(tmp_path, f"{own_import}\n__version__ = '0.0.7'\nanswer = 42\n")
    code = f"{first}\nimport deepspeed, torch\nimport deepspeed\nprint(deepspeed.answer, 'torch' in dir())"
    result = python(code, PYTHONPATH=folder)
    assert (result.returncode, result.stdout) == (0, "42 True\n")
    assert result.stderr.count("Warning: ") == 1
    assert result.stderr.count("could not attach itself to deepspeed (0.0.7)") == 1
    assert "initialize" in result.stderr and "convert_to_mini_sequence(model) still works" in result.stderr


@pytest.mark.parametrize("first", ["import torch", "import sys"])
def test_a_broken_deepspeed_does_not_break_torch_and_raises_its_own_error(tmp_path, first):
    folder = fake_deepspeed(tmp_path, "import torch\nraise RuntimeError('a broken build')\n")
    code = f"""
{first}
for _ in range(2):
    try:
        import deepspeed
    except RuntimeError as error:
        print(error)
import torch
print(torch.ones(2).sum().item())
import deepspeed
"""
    result = python(code, PYTHONPATH=folder)
    assert (result.returncode, result.stdout) == (1, "a broken build\na broken build\n2.0\n")
    assert result.stderr.splitlines()[-1] == "RuntimeError: a broken build"
    assert "ds_minis could not" not in result.stderr


def test_a_missing_engine_stays_missing(monkeypatch):
    finder = autoload.AttachingFinder()
    monkeypatch.setattr(sys, "meta_path", [finder])
    assert finder.find_spec("deepspeed") is None
    assert finder.find_spec("json") is None


@pytest.mark.parametrize("first", [True, False])
def test_another_finder_that_asks_all_finders(monkeypatch, first):
    class AsksAll:
        def find_spec(self, name, path=None, target=None):
            specs = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
            return next((spec for spec in specs if spec is not None), None)

    own = [autoload.AttachingFinder()]
    finders = [AsksAll(), *own] if first else [*own, AsksAll()]
    monkeypatch.setattr(sys, "meta_path", [*finders, *(f for f in sys.meta_path if type(f) is not type(own[0]))])
    monkeypatch.delitem(sys.modules, "accelerate.utils.deepspeed", raising=False)
    spec = importlib.util.find_spec("accelerate.utils.deepspeed")
    assert isinstance(spec.loader, autoload.AttachingLoader)
    monkeypatch.setitem(autoload.ATTACH, "ds_minis_no_such_engine", "nowhere:nothing")
    assert importlib.util.find_spec("ds_minis_no_such_engine") is None


def test_autoload_warns_when_it_fails_and_never_raises(monkeypatch):
    def register():
        raise ImportError("half installed")

    monkeypatch.setattr(autoload, "register", register)
    monkeypatch.delenv("DS_MINIS_AUTOLOAD", raising=False)
    with pytest.warns(UserWarning, match=r"ds_minis could not attach itself .*half installed"):
        autoload.autoload()
    monkeypatch.setenv("DS_MINIS_AUTOLOAD", "0")
    autoload.autoload()


def test_import_torch_works_when_attaching_fails():
    result = python(
        "import ds_minis.integrations.autoload as a; a.register = lambda: 1 / 0\nimport torch; print(torch.e)"
    )
    assert (result.returncode, result.stdout[:4]) == (0, "2.71")
    assert "ds_minis could not attach itself to the training engines: ZeroDivisionError" in result.stderr


def test_ds_report_lists_mini_sequence():
    result = run([str(Path(sys.executable).with_name("ds_report"))])
    assert result.returncode == 0
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("mini_sequence")]
    assert re.sub(r"\x1b\[\d+m", "", line).endswith("[OKAY]")
