"""What `convert_to_mini_sequence` takes, and what it says of what it does not take: one line, with what is allowed."""

from types import SimpleNamespace

import pytest
import torch
from models import build
from transformers import LlamaForCausalLM

from ds_minis import MiniSequenceConfig, convert_to_mini_sequence, mini_sequence_report, revert_mini_sequence


def refusal(*args, **kwargs) -> str:
    with pytest.raises(ValueError) as error:
        convert_to_mini_sequence(*args, **kwargs)
    message = str(error.value)
    assert message.startswith("convert_to_mini_sequence: ") and "\n" not in message
    return message


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("llama", "got 'llama' (str); did you mean AutoModelForCausalLM.from_pretrained('llama')?"),
        (LlamaForCausalLM, "did you mean an instance, such as LlamaForCausalLM.from_pretrained(...)?"),
        (SimpleNamespace(model=torch.nn.Linear(1, 1)), "did you mean the SimpleNamespace's .model?"),
        (None, "got None (NoneType)"),
        (torch.optim.SGD([torch.ones(1)]), "weight_decay: 0 ) (SGD)"),
    ],
    ids=["name", "class", "trainer", "nothing", "several lines"],
)
def test_what_is_no_model(model, words):
    message = refusal(model)
    assert "model: a torch.nn.Module is allowed" in message and message.endswith(words)
    with pytest.raises(ValueError, match="^revert_mini_sequence: model: a torch.nn.Module is allowed"):
        revert_mini_sequence(model)
    with pytest.raises(ValueError, match="^mini_sequence_report: model: a torch.nn.Module is allowed"):
        mini_sequence_report(model)


def test_a_filter_that_is_no_function():
    assert refusal(build("llama"), module_filter="mlp").endswith(
        "a function of a module and its name is allowed, got 'mlp'"
    )


def test_settings_as_keywords_are_those_of_a_mapping():
    model = convert_to_mini_sequence(build("llama"), chunk_size=5, loss_chunk_size=4)
    assert mini_sequence_report(model).config == MiniSequenceConfig(chunk_size=5, loss_chunk_size=4)
    convert_to_mini_sequence(model, {"chunk_size": 5, "loss_chunk_size": 4})  # the same settings


@pytest.mark.parametrize("config", [True, {"chunk_size": 5}, MiniSequenceConfig()])
def test_a_config_and_keywords_together(config):
    assert "give a config or settings, not both" in refusal(build("llama"), config, chunk_size=5)


def test_a_misspelt_or_wrong_keyword():
    assert "unknown key 'chunksize' (value 5); did you mean \"chunk_size\"?" in refusal(build("llama"), chunksize=5)
    assert 'did you mean "layer"?' in refusal(build("llama"), scope="layers")


def test_groups_of_heads_are_checked_before_anything_is_changed():
    model = build("llama", num_attention_heads=8, num_key_value_heads=4)
    before = [type(module) for module in model.modules()]
    message = refusal(model, head_groups=3)
    assert '3 groups cannot be made of 4 KV heads; allowed: 1, 2, 4 or "auto"; did you mean 2?' in message
    assert [type(module) for module in model.modules()] == before and mini_sequence_report(model) is None
    convert_to_mini_sequence(model, head_groups=4)
    # Layers that are not tiled as a whole have no groups, and nothing is to be refused.
    convert_to_mini_sequence(build("llama", num_key_value_heads=4), head_groups=3, exclude=["layers.0", "layers.1"])
