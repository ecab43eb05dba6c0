"""A model that DeepSpeed's JSON asks to convert is checked before its weights are loaded."""

import json

import pytest
import torch
from models import build
from transformers import AutoModelForCausalLM, LlamaConfig, TrainingArguments

from ds_minis import mini_sequence_report

pytestmark = pytest.mark.usefixtures("clean_accelerate_state")


@pytest.fixture
def arguments(tmp_path):
    def make(section) -> TrainingArguments:
        path = tmp_path / "ds.json"
        config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 2}, "mini_sequence": section}
        path.write_text(json.dumps(config))
        return TrainingArguments(output_dir=str(tmp_path / "out"), deepspeed=str(path), use_cpu=True)

    return make


@pytest.fixture
def no_weights(tmp_path):
    """A folder with a configuration alone: whoever goes on to load from it fails in another way."""
    LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4,
                vocab_size=131).save_pretrained(tmp_path / "model")  # fmt: skip
    return tmp_path / "model"


def test_groups_of_heads_that_the_model_cannot_have(arguments, no_weights):
    args = arguments({"head_groups": 3})
    with pytest.raises(ValueError, match=r"ds\.json: .*3 groups cannot be made of 4 KV heads"):
        AutoModelForCausalLM.from_pretrained(no_weights)
    del args


def test_the_file_is_named_under_accelerates_launcher_too(tmp_path, no_weights, monkeypatch):
    """Which hands on the file in a variable; accelerate then makes copies of its content."""
    path = tmp_path / "launched.json"
    path.write_text(
        json.dumps(
            {
                "train_micro_batch_size_per_gpu": 1,
                "zero_optimization": {"stage": 2},
                "mini_sequence": {"head_groups": 3},
            }
        )
    )
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(path))
    args = TrainingArguments(output_dir=str(tmp_path / "out"), use_cpu=True)
    with pytest.raises(ValueError, match=r"launched\.json: .*3 groups cannot be made of 4 KV heads"):
        AutoModelForCausalLM.from_pretrained(no_weights)
    del args


def test_nothing_to_tile(arguments, no_weights, monkeypatch):
    args = arguments({"scope": "mlp", "loss": False})
    monkeypatch.setattr("ds_minis.convert.find_candidates", lambda model: [])
    with pytest.raises(ValueError, match=r"ds\.json: nothing in LlamaForCausalLM can be tiled"):
        AutoModelForCausalLM.from_pretrained(no_weights)
    del args


@pytest.mark.parametrize("section", [False, {"include": ["base_model.*.mlp"]}, {"head_groups": 2}])
def test_what_can_be_done_is_loaded_as_ever(arguments, tmp_path, section, capsys):
    model = build("llama")
    model.save_pretrained(tmp_path / "model")
    args = arguments(section)
    torch.manual_seed(7)
    state = torch.get_rng_state()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert mini_sequence_report(loaded) is None and "ds_minis" not in capsys.readouterr().out
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    del args


def test_without_a_configuration_nobody_looks(no_weights, arguments):
    args = arguments({"head_groups": 3})
    del args  # and transformers forgets its configuration
    with pytest.raises(OSError, match="safetensors"):
        AutoModelForCausalLM.from_pretrained(no_weights)
