"""accelerate's sources, in one process: its configuration files, the plugin, the callback, and python -m ds_minis.run."""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.commands.config import load_config_from_file
from accelerate.commands.config.update import update_config
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedDataParallelKwargs
from models import build
from torch import nn
from trainers import trainer_of
from transformers import TrainerCallback

from ds_minis import (
    MiniSequenceCallback,
    MiniSequenceConfig,
    MiniSequencePlugin,
    convert_to_mini_sequence,
    mini_sequence_report,
)
from ds_minis.config_sources import Request, hand_to_ranks, reconcile, requested_by_environment

SETTINGS = {"chunk_size": 6, "loss_chunk_size": 5, "exclude": ["*.layers.0.mlp"]}
CONFIG = MiniSequenceConfig(**SETTINGS)
VARIABLES = "DS_MINIS_CONFIG", "DS_MINIS_CONFIG_SOURCE", "DS_MINIS_RUN"


@pytest.fixture(autouse=True)
def fresh(monkeypatch, clean_accelerate_state):
    """Neither a state of accelerate's nor a variable of ours, before and after."""
    for variable in VARIABLES:
        monkeypatch.setenv(variable, "")
        monkeypatch.delenv(variable)


def config_file(folder, section=None, name="a config.yaml", key="mini_sequence"):
    content = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "NO"}
    if section is not None:
        content[key] = section
    path = folder / name
    path.write_text(json.dumps(content) if name.endswith(".json") else yaml.safe_dump(content))
    return str(path)


@pytest.mark.parametrize("name", ["a.yaml", "a.json"])
@pytest.mark.parametrize("section", [SETTINGS, True, False, {"exclude": ["a; <b c>"]}])
def test_section_of_a_file_reaches_the_environment_in_a_form_that_other_machines_get(tmp_path, name, section):
    path = config_file(tmp_path, section, name)
    load_config_from_file(path)
    request = requested_by_environment()
    assert request.config == MiniSequenceConfig.from_value(section) and request.source == f"accelerate config {path}"
    assert not set(" ;<>\n") & set(os.environ["DS_MINIS_CONFIG"])  # accelerate drops such variables


def test_a_later_file_replaces_what_an_earlier_one_asked_for(tmp_path):
    load_config_from_file(config_file(tmp_path, SETTINGS))
    load_config_from_file(config_file(tmp_path, {"chunk_size": 7}))
    assert requested_by_environment().config == MiniSequenceConfig(chunk_size=7)
    load_config_from_file(config_file(tmp_path))
    assert requested_by_environment() is None and not any(variable in os.environ for variable in VARIABLES)


def test_what_the_user_set_stays_and_must_agree(tmp_path, monkeypatch):
    monkeypatch.setenv("DS_MINIS_CONFIG", json.dumps(SETTINGS))
    load_config_from_file(config_file(tmp_path, SETTINGS))
    load_config_from_file(config_file(tmp_path))
    assert os.environ["DS_MINIS_CONFIG"] == json.dumps(SETTINGS)
    with pytest.raises(ValueError) as error:
        load_config_from_file(config_file(tmp_path, {"chunk_size": 7}))
    for words in ("environment variable DS_MINIS_CONFIG: {", "a config.yaml: {", "'chunk_size': 6", "'chunk_size': 7"):
        assert words in str(error.value)


@pytest.mark.parametrize(
    ("section", "key", "words"),
    [
        ({"chunk_sise": 3}, "mini_sequence", ["unknown key 'chunk_sise'", '"chunk_size"']),
        ({"chunk_size": -3}, "mini_sequence", ["chunk_size", "from 1", "-3"]),
        ("yes", "mini_sequence", ["true, false or a mapping", "'yes'"]),
        (True, "mini_sequnce", ["unknown key 'mini_sequnce'", '"mini_sequence"']),
    ],
)
def test_wrong_sections_stop_the_launcher_and_name_the_file(tmp_path, section, key, words):
    path = config_file(tmp_path, section, key=key)
    with pytest.raises(ValueError) as error:
        load_config_from_file(path)
    for expected in (f"accelerate config {path}", *words):
        assert expected in str(error.value)
    assert requested_by_environment() is None


def test_a_section_inside_of_another_stops_the_launcher(tmp_path):
    path = config_file(tmp_path, {"fsdp_version": 2, "mini_sequence": True}, key="fsdp_config")
    with pytest.raises(ValueError, match=r"a config.yaml: 'mini_sequence' .value True. stands inside of 'fsdp_config'"):
        load_config_from_file(path)


def test_update_of_a_file_keeps_its_section(tmp_path):
    class Arguments:
        config_file = config_file(tmp_path, SETTINGS)

    update_config(Arguments)
    content = yaml.safe_load(Path(Arguments.config_file).read_text())
    assert content["mini_sequence"] == SETTINGS and "num_processes" in content
    assert not [key for key in content if key.startswith("_")]


@pytest.mark.parametrize("value", ["{chunk: 3}", "maybe"])
def test_a_variable_that_is_not_json_is_an_error(monkeypatch, value):
    monkeypatch.setenv("DS_MINIS_CONFIG", value)
    with pytest.raises(
        ValueError, match=r"environment variable DS_MINIS_CONFIG: true, false or a JSON mapping"
    ) as error:
        Accelerator(cpu=True)
    assert value in str(error.value)


def prepared(model, **kwargs):
    """What became of a model, and the optimizer that was prepared with it."""
    return Accelerator(cpu=True, **kwargs).prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))[0]


def test_the_environment_converts_in_prepare(monkeypatch):
    monkeypatch.setenv("DS_MINIS_CONFIG", json.dumps(SETTINGS))
    monkeypatch.setenv("DS_MINIS_CONFIG_SOURCE", "accelerate config x.yaml")
    report = mini_sequence_report(prepared(build("llama")))
    assert (
        report.config == CONFIG and report.source == "accelerate config x.yaml" and "model.layers.1.mlp" in report.tiled
    )


def test_nothing_is_converted_when_nothing_asks_for_it():
    assert mini_sequence_report(prepared(build("llama"))) is None


@pytest.mark.parametrize(
    "arguments",
    [
        {"kwargs_handlers": [DistributedDataParallelKwargs(), MiniSequencePlugin(**SETTINGS)]},
        {"mini_sequence_plugin": MiniSequencePlugin(**SETTINGS)},
        {"mini_sequence_plugin": SETTINGS},
    ],
    ids=["handler", "argument", "mapping"],
)
def test_plugin(arguments):
    handlers = list(arguments.get("kwargs_handlers", []))
    report = mini_sequence_report(prepared(build("llama"), **arguments))
    assert (
        report.config == CONFIG and type(report.config) is MiniSequenceConfig and report.source == "MiniSequencePlugin"
    )
    assert arguments.get("kwargs_handlers", []) == handlers  # the caller's own list


def test_plugin_has_the_settings_and_the_errors_of_the_configuration():
    plugin = MiniSequencePlugin(chunk_size=8)
    assert plugin.to_kwargs() == {"chunk_size": 8} and plugin.to_dict()["loss"] is True
    with pytest.raises(ValueError, match="chunk_size: a whole number"):
        MiniSequencePlugin(chunk_size=0)


def test_plugin_and_environment_must_agree(monkeypatch):
    monkeypatch.setenv("DS_MINIS_CONFIG", json.dumps(SETTINGS))
    assert mini_sequence_report(prepared(build("llama"), mini_sequence_plugin=SETTINGS)).config == CONFIG
    with pytest.raises(ValueError, match=r"(?s)MiniSequencePlugin: .*environment variable DS_MINIS_CONFIG: "):
        Accelerator(cpu=True, mini_sequence_plugin=True)
    with pytest.raises(ValueError, match="different mini-sequence settings"):
        Accelerator(kwargs_handlers=[MiniSequencePlugin()], mini_sequence_plugin=SETTINGS)


@pytest.mark.parametrize(
    ("args", "settings", "words"),
    [
        (
            [{"chunk_size": 8}],
            {},
            "settings are keywords here, .*got {'chunk_size': 8} .dict.; did you mean MiniSequencePlug",
        ),
        ([True], {}, "settings are keywords here, such as MiniSequencePlugin.chunk_size=4096., got True"),
        ([], {"checkpoint_every": 2}, 'checkpoint_every=2: it was removed .*set "offload"'),
        ([], {"chunksize": 2}, "unknown key 'chunksize' .value 2.; did you mean \"chunk_size\""),
        ([], {"chunk_size": 0}, "chunk_size: a whole number of tokens"),
    ],
)
def test_errors_of_the_plugin_begin_with_its_name(args, settings, words):
    with pytest.raises(ValueError, match=f"^MiniSequencePlugin: {words}"):
        MiniSequencePlugin(*args, **settings)


def test_sources_that_disagree_are_told_before_accelerate_makes_its_state(monkeypatch):
    monkeypatch.setenv("DS_MINIS_CONFIG", json.dumps(SETTINGS))
    with pytest.raises(ValueError, match="different mini-sequence settings"):
        Accelerator(cpu=True, mini_sequence_plugin=True)
    assert not AcceleratorState._shared_state and not PartialState._shared_state


def test_the_third_source_must_agree_too():
    first, second, third = Request(CONFIG, "first"), Request(CONFIG, "second"), Request(MiniSequenceConfig(), "third")
    assert reconcile(None, first, second) is first
    with pytest.raises(ValueError, match=r"(?s)first: .*third: "):
        reconcile(first, second, third)


@pytest.mark.parametrize("source", ["plugin", "environment"])
def test_the_deepspeed_json_must_agree_before_a_model_is_prepared(monkeypatch, source):
    json_section = {"zero_optimization": {"stage": 2}, "mini_sequence": {"chunk_size": 7}}
    if source == "environment":
        monkeypatch.setenv("DS_MINIS_CONFIG", json.dumps(SETTINGS))
        with pytest.raises(ValueError, match=r"(?s)DeepSpeed config: .*environment variable"):
            DeepSpeedPlugin(hf_ds_config=json_section)
    else:
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
        plugin = DeepSpeedPlugin(hf_ds_config=json_section)
        with pytest.raises(ValueError, match=r"(?s)MiniSequencePlugin: .*DeepSpeed config: "):
            Accelerator(deepspeed_plugin=plugin, mini_sequence_plugin=SETTINGS)


def test_prepare_model_converts_too():
    model = Accelerator(cpu=True, mini_sequence_plugin=SETTINGS).prepare_model(build("llama"), evaluation_mode=True)
    assert mini_sequence_report(model).config == CONFIG


def test_an_accelerator_made_before_ds_minis_was_attached_works_as_it_did():
    accelerator = Accelerator(cpu=True)
    del accelerator.__dict__["_mini_sequence"]
    assert mini_sequence_report(accelerator.prepare(build("llama"))) is None


def test_preparing_twice_and_converting_before_change_nothing():
    accelerator = Accelerator(cpu=True, mini_sequence_plugin=SETTINGS)
    model = convert_to_mini_sequence(build("llama"), SETTINGS)
    report = mini_sequence_report(model)
    assert accelerator.prepare(accelerator.prepare(model)) is model
    assert mini_sequence_report(model) == report and report.source == "convert_to_mini_sequence"
    with pytest.raises(ValueError, match="different mini-sequence settings"):
        accelerator.prepare(convert_to_mini_sequence(build("llama")))


def test_a_model_that_cannot_be_tiled_is_an_error_unless_another_can(caplog):
    accelerator = Accelerator(cpu=True, mini_sequence_plugin=True)
    with pytest.raises(ValueError, match="nothing in Linear can be tiled"):
        accelerator.prepare(nn.Linear(3, 3))
    critic, model = accelerator.prepare(nn.Linear(3, 3), build("llama"))
    assert mini_sequence_report(model) is not None and mini_sequence_report(critic) is None
    assert caplog.text.count("nothing in Linear can be tiled") == 1
    accelerator.prepare(nn.Linear(3, 3))
    assert caplog.text.count("nothing in Linear can be tiled") == 2


def test_callback_converts_when_the_trainer_is_made_and_training_is_tiled(tmp_path):
    model = build("llama")
    trainer = trainer_of(model, tmp_path, max_steps=1, callbacks=[MiniSequenceCallback(**SETTINGS)])
    report = mini_sequence_report(model)
    assert report.config == CONFIG and report.source == "MiniSequenceCallback"
    trainer.train()
    after = mini_sequence_report(trainer.model)
    assert after.last_step and dataclasses.replace(after, last_step="", last_loss="") == report


@pytest.mark.parametrize("config", [SETTINGS, CONFIG])
def test_callback_takes_a_configuration(config):
    assert MiniSequenceCallback(config).config == CONFIG


def test_callback_refuses_wrong_settings_and_other_doors(monkeypatch):
    with pytest.raises(ValueError, match="MiniSequenceCallback: unknown key 'chunk'"):
        MiniSequenceCallback(chunk=3)
    with pytest.raises(ValueError, match="not both"):
        MiniSequenceCallback(CONFIG, chunk_size=3)
    monkeypatch.setenv("DS_MINIS_CONFIG", "true")
    with pytest.raises(ValueError, match=r"(?s)DS_MINIS_CONFIG: .*MiniSequenceCallback: "):
        MiniSequenceCallback(**SETTINGS)


@pytest.mark.parametrize("case", ["added later", "model_init"])
def test_callback_refuses_to_train_a_model_that_it_has_not_converted(tmp_path, case):
    if case == "model_init":
        callbacks = [MiniSequenceCallback()]
        trainer = trainer_of(None, tmp_path, max_steps=1, model_init=lambda: build("llama"), callbacks=callbacks)
    else:
        trainer = trainer_of(build("llama"), tmp_path, max_steps=1)
        trainer.add_callback(MiniSequenceCallback())
    stepped = []

    class Steps(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            stepped.append(True)

    trainer.add_callback(Steps)
    with pytest.raises(ValueError, match=r"MiniSequenceCallback: .* LlamaForCausalLM, was not converted: .*model_init"):
        trainer.train()
    assert not stepped


def test_run_asks_for_the_defaults_unless_something_else_asks(monkeypatch):
    monkeypatch.setenv("DS_MINIS_RUN", "1")
    assert requested_by_environment().config == MiniSequenceConfig()
    assert mini_sequence_report(prepared(build("llama"), mini_sequence_plugin=SETTINGS)).config == CONFIG
    hand_to_ranks(None)
    assert "DS_MINIS_CONFIG" not in os.environ
    monkeypatch.setenv("DS_MINIS_CONFIG", "false")
    assert not requested_by_environment().config.enabled


def test_what_the_code_asks_for_stands_where_run_asks_for_the_defaults(monkeypatch, tmp_path):
    monkeypatch.setenv("DS_MINIS_RUN", "1")
    model = prepared(convert_to_mini_sequence(build("llama"), SETTINGS))
    assert mini_sequence_report(model).config == CONFIG
    trainer = trainer_of(build("llama"), tmp_path, max_steps=1, callbacks=[MiniSequenceCallback(**SETTINGS)])
    trainer.train()
    assert mini_sequence_report(trainer.model).config == CONFIG


SCRIPT = """
import sys
from accelerate import Accelerator
from neighbour import build
model = Accelerator(cpu=True).prepare(build("llama"))
print("RESULT", __name__, sys.argv[1:], [type(m).__qualname__ for m in model.modules() if "MLP" in type(m).__name__])
"""


def run(folder, *command: str, **env: str) -> subprocess.CompletedProcess:
    (folder / "script.py").write_text(SCRIPT)
    (folder / "neighbour.py").write_text("from models import build")
    here = str(Path(__file__).parents[1])
    path = os.pathsep.join([here, os.path.dirname(here)])
    environment = os.environ | {"DS_MINIS_AUTOLOAD": "0", "PYTHONPATH": path} | env
    return subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize("command", [["script.py"], ["-m", "script"]], ids=["file", "module"])
@pytest.mark.parametrize(("variable", "tiled"), [("", 2), (json.dumps(SETTINGS), 1), ("false", 0)])
def test_run_turns_mini_sequences_on_where_autoload_is_off(tmp_path, command, variable, tiled):
    done = run(tmp_path, "-m", "ds_minis.run", *command, "--an", "argument", DS_MINIS_CONFIG=variable)
    assert done.returncode == 0, done.stderr
    names = ["MiniSequence[LlamaMLP]"] * tiled + ["LlamaMLP"] * (2 - tiled)
    assert f"RESULT __main__ ['--an', 'argument'] {sorted(names)}" in done.stdout
    assert ("ds_minis (python -m ds_minis.run): all defaults" in done.stdout) == (variable == "")


def test_without_run_a_script_with_autoload_off_is_left_alone(tmp_path):
    done = run(tmp_path, "script.py", DS_MINIS_CONFIG="true")
    assert "RESULT __main__ [] ['LlamaMLP', 'LlamaMLP']" in done.stdout, done.stderr


def test_run_from_another_folder_finds_what_lies_beside_the_script(tmp_path):
    (tmp_path / "neighbour_of_mine.py").write_text("NAME = 'found'")
    (tmp_path / "alone.py").write_text("import neighbour_of_mine; print(neighbour_of_mine.NAME)")
    (tmp_path / "elsewhere").mkdir()
    done = run(tmp_path / "elsewhere", "-m", "ds_minis.run", str(tmp_path / "alone.py"))
    assert done.returncode == 0 and "found" in done.stdout, done.stderr


def test_run_tells_wrong_settings_before_the_script_begins(tmp_path):
    (tmp_path / "alone.py").write_text("print('begun')")
    done = run(tmp_path, "-m", "ds_minis.run", "alone.py", DS_MINIS_CONFIG="maybe")
    assert done.returncode == 1 and "DS_MINIS_CONFIG: true, false or a JSON" in done.stderr and not done.stdout


def test_run_says_what_is_wrong(tmp_path):
    done = run(tmp_path, "-m", "ds_minis.run", "nope.py")
    assert done.returncode == 2 and "no such file: 'nope.py'" in done.stderr
    done = run(tmp_path, "-m", "ds_minis.run", "script.py", DS_MINIS_CONFIG='{"chunk": 3}')
    assert done.returncode == 1 and "environment variable DS_MINIS_CONFIG: unknown key 'chunk'" in done.stderr


def test_run_starts_accelerates_launcher_too_for_a_section_in_its_file(tmp_path):
    path = config_file(tmp_path, SETTINGS)
    launch = "-m", "ds_minis.run", "-m", "accelerate.commands.launch", "--config_file", path, "--cpu"
    done = run(tmp_path, *launch, "-m", "ds_minis.run", "script.py")
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"ds_minis (accelerate config {path})" in done.stdout and "MiniSequence[LlamaMLP]" in done.stdout


@pytest.mark.parametrize("use_orig_params", [False, True])
def test_units_of_fsdp1_inside_of_tiled_modules_are_refused_before_the_first_step(use_orig_params):
    """As PEFT's policy makes of its adapters; with `fsdp_use_orig_params: true` they are left out."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    from ds_minis.integrations.accelerate import fsdp1_units_around_tiled_modules

    policy = lambda module, recurse, nonwrapped_numel: recurse or "lora" in type(module).__name__  # noqa: E731
    plugin = SimpleNamespace(fsdp_version=1, use_orig_params=use_orig_params, auto_wrap_policy=policy)
    plugin.set_auto_wrap_policy = lambda model: None
    model = convert_to_mini_sequence(build("llama"), {"chunk_size": 8})
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        refused = pytest.raises(
            RuntimeError, match="`fsdp_use_orig_params: true` under `fsdp_config` in accelerate's YAML"
        )
        with contextlib.nullcontext() if use_orig_params else refused, fsdp1_units_around_tiled_modules(plugin, model):
            if not use_orig_params:  # else the policy's own
                mlp = model.model.layers[0].mlp
                mlp.gate_proj = FullyShardedDataParallel(mlp.gate_proj, device_id=torch.device("cpu"))
    finally:
        torch.distributed.destroy_process_group()
