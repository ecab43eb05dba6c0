"""`ds-minis check`: what it prints, and its exit status."""

import configparser
import importlib
import json
import math
import re
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, MixtralConfig, OPTConfig, PreTrainedConfig, Qwen3Config, ViTConfig, XLNetConfig
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from ds_minis.check import exactness
from ds_minis.check.exactness import PlainModelFails, compare_with_plain
from ds_minis.check.tiny import tiny_config
from ds_minis.cli import check as check_module
from ds_minis.cli import main

BUILD = AutoModelForCausalLM.from_config


def saved(folder, config):
    """The configuration's JSON file in a folder."""
    config.save_pretrained(folder)
    return folder / "config.json"


class TwoModels:
    """Builds another model at every second call: what is compared is not the same."""

    calls = 0

    def __call__(self, config):
        self.calls += 1
        model = BUILD(config)
        if self.calls > 3:  # each model is built on the meta device first
            model.lm_head.weight.data *= 1.001
        return model


@pytest.mark.parametrize("as_file", [True, False], ids=["file", "folder"])
def test_dense_model(tmp_path, capsys, as_file):
    file = saved(tmp_path, LlamaConfig(num_hidden_layers=5))
    assert main(["check", str(file if as_file else tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "tiled: 5 x LlamaMLP" in out and "tiled: 11 x LlamaRMSNorm" in out  # at the full size
    assert "tiled as a whole: 5 x LlamaDecoderLayer" in out and "is exact" in out and "never held" in out


def test_json(tmp_path, capsys):
    assert main(["check", "--json", str(saved(tmp_path, Qwen3Config(num_hidden_layers=3)))]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["class"] == "Qwen3ForCausalLM" and result["exact"] is True and result["tiled"]["Qwen3MLP"] == 3
    assert result["layers"] == {"Qwen3DecoderLayer": 3}
    assert 0 < result["grad_error"] < 1e-5 and result["checkpointing_error"] < 1e-5 and result["logits_held"] is False


def test_inexact_model(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(check_module, "model_class_for", lambda config, trust: (TwoModels(), config))
    assert main(["check", str(saved(tmp_path, LlamaConfig(num_hidden_layers=2)))]) == 1
    assert "is NOT exact" in capsys.readouterr().out


def test_model_that_cannot_be_laid_out_without_memory(tmp_path, capsys, monkeypatch):
    def build(config):
        model = BUILD(config)
        float(model.lm_head.weight.sum())  # not possible on the meta device
        return model

    monkeypatch.setattr(check_module, "model_class_for", lambda config, trust: (build, config))
    assert main(["check", str(saved(tmp_path, LlamaConfig(num_hidden_layers=5)))]) == 0
    out = capsys.readouterr().out
    assert "the full size cannot be laid out without weights" in out and "tiled: 2 x LlamaMLP" in out


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "no such file"),
        ("{", "is no JSON file"),
        ("[]", "model_type None"),
        ('{"model_type": "lama"}', "'lama', which transformers does not know.*such as .*llama"),
        (json.dumps(ViTConfig().to_dict()), "ViTConfig is the configuration of no causal or image-text"),
    ],
    ids=["missing", "broken", "list", "unknown", "no-language-model"],
)
def test_wrong_argument(tmp_path, capsys, content, message):
    file = tmp_path / "config.json"
    if content is not None:
        file.write_text(content)
    assert main(["check", str(file)]) == 2
    captured = capsys.readouterr()
    assert re.search(message, captured.err)
    assert "allowed" in captured.err and not captured.out


def test_hub_id_that_is_not_there(capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["check", "nobody/no-such-model"]) == 2
    assert "nobody/no-such-model" in capsys.readouterr().err


def test_comparison_sees_another_model():
    result = compare_with_plain(TwoModels(), tiny_config(LlamaConfig(), dropout=0.0))
    assert not result.exact and result.grad_error > 1e-4


def test_comparison_sees_full_logits():
    result = compare_with_plain(BUILD, tiny_config(LlamaConfig(), dropout=0.0), settings={"loss": False})
    assert result.exact and result.logits_held


def test_comparison_takes_router_outputs():
    result = compare_with_plain(BUILD, tiny_config(MixtralConfig(), dropout=0.0))
    assert result.exact and 0 < result.router_error < 1e-5


def test_comparison_without_checkpointing():
    result = compare_with_plain(BUILD, tiny_config(XLNetConfig(), dropout=0.0))
    assert result.exact and result.checkpointing_error is None


def test_plain_model_that_fails_is_told_apart():
    config = tiny_config(OPTConfig(), dropout=0.0)
    config.max_position_embeddings = 4
    with pytest.raises(PlainModelFails):
        compare_with_plain(BUILD, config)


REMOTE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OddConfig(LlamaConfig):
    model_type = "odd"

class OddForCausalLM(LlamaForCausalLM):
    config_class = OddConfig
"""


def test_code_of_a_repository_runs_only_when_trusted(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(tmp_path / "cache")
    fields = LlamaConfig(num_hidden_layers=3).to_dict() | {"model_type": "odd", "architectures": ["OddForCausalLM"]}
    fields["auto_map"] = {"AutoConfig": "odd.OddConfig", "AutoModelForCausalLM": "odd.OddForCausalLM"}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    (tmp_path / "odd.py").write_text(REMOTE)
    assert main(["check", str(tmp_path)]) == 2
    assert "--trust-remote-code" in capsys.readouterr().err
    assert main(["check", "--trust-remote-code", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "OddForCausalLM" in out and "tiled: 3 x LlamaMLP" in out


def test_made_up_configuration_is_refused(tmp_path, capsys):
    class Own(PreTrainedConfig):
        model_type = "made_up_for_this_test"

    assert main(["check", str(saved(tmp_path, Own()))]) == 2
    assert "made_up_for_this_test" in capsys.readouterr().err


def test_console_script_is_the_command_line():
    setup = configparser.ConfigParser()
    setup.read(Path(__file__).parents[2] / "setup.cfg")
    name, target = setup["options.entry_points"]["console_scripts"].strip().split(" = ")
    module, function = target.split(":")
    assert name == "ds-minis" and getattr(importlib.import_module(module), function) is main


def _step(**grads):
    return exactness.Step(1.0, {name: torch.tensor(value) for name, value in grads.items()}, {})


def test_what_counts_as_exact():
    for error, exact in [(0.9e-5, True), (1.1e-5, False), (math.nan, False)]:
        for field in ("loss_error", "grad_error", "checkpointing_error", "router_error"):
            figures = dict.fromkeys(("loss_error", "grad_error", "checkpointing_error", "router_error"), 0.0)
            result = exactness.Exactness(report=None, grad_name="", logits_held=False, **figures | {field: error})
            assert result.exact is exact


def test_errors_of_gradients_are_relative_to_their_own_with_a_floor():
    expected = _step(large=[100.0], small=[2.0], tiny=[1e-6])
    assert exactness.step_errors(_step(large=[100.0], small=[2.02], tiny=[1e-6]), expected)[1:] == (
        pytest.approx(0.01, rel=1e-3),
        "small",
    )
    assert exactness.step_errors(_step(large=[100.0], small=[2.0], tiny=[0.0]), expected)[1] == pytest.approx(1e-6)
    assert exactness.step_errors(_step(large=[100.0], tiny=[1e-6]), expected)[1:] == (
        1.0,
        "small",
    )  # a gradient is missing
    assert exactness.step_errors(_step(large=[100.0], small=[2.0], tiny=[1e-6], more=[1.0]), expected)[2] == "more"
