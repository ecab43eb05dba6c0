"""`keep: "attention"`: an attention is run once in a step, nothing but its output is kept, and gradients stay the same."""

import copy
import gc

import pytest
import torch
from kept import SETTINGS, WIDE, Attention, assert_same_gradients_twice, converted, unmasked
from models import (
    CHUNKS,
    add_lora,
    assert_same_tensors,
    assert_same_training,
    batch,
    build,
    checkpointed,
    count_layers,
    loss_and_grads,
    twins,
)

from ds_minis import convert_to_mini_sequence, mini_sequence_report
from ds_minis.config import MiniSequenceConfig
from ds_minis.layer.attention.kept_attention import KeptAttention
from ds_minis.memory import layer_inputs


@pytest.fixture
def attention():
    return Attention()


def layer_class(model) -> str:
    (name,) = {type(m).__name__ for m in model.modules() if type(m).__name__.endswith(("DecoderLayer", "Block"))}
    return name


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "phi", "cohere", "phi3", "qwen3_moe"])
def test_same_gradients_with_one_attention_less(family, settings, attention):
    model, reference = converted(SETTINGS[settings], family, attention.name)
    loss_and_grads(model, unmasked(23))  # what is found out at the first call is over
    for length in (23, 20, 31):
        inputs = unmasked(length, prompt=length // 3)
        assert_same_training(model, reference, inputs)
        attention.calls = 0
        loss_and_grads(model, inputs)
        assert attention.calls == 2, "not once for each layer"
    attention.calls = 0
    loss_and_grads(reference, inputs)
    assert attention.calls == 4
    assert count_layers(model) == 2


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("which", [0, 1, 2])
def test_an_attention_that_gives_what_it_was_given(which, settings):
    """Its output can be made again from queries, keys or values; nothing is kept."""

    class Passing(Attention):
        name = "passing_for_keep_attention"

        def __call__(self, module, *heads, **kwargs):
            self.calls += 1
            out = heads[which].repeat_interleave(heads[0].shape[1] // heads[which].shape[1], 1)
            return out.transpose(1, 2).contiguous() + 0 * sum(t.sum() for t in heads[:3]), None

    passing = Passing()
    model, reference = converted(SETTINGS[settings], attention=passing.name)
    for _ in range(2):
        assert_same_training(model, reference, unmasked(23))
    passing.calls = 0
    loss_and_grads(model, unmasked(23))
    assert passing.calls == 2


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_output_is_kept_and_queries_keys_and_values_are_not(settings, attention):
    model, _ = converted(SETTINGS[settings], attention=attention.name)
    loss_and_grads(model, unmasked(23))
    attention.heads.clear(), attention.outputs.clear()
    loss = model(**unmasked(23)).loss
    gc.collect()
    assert [[ref() is None for ref in refs] for refs in attention.heads] == [[True] * 3] * 2
    # The copy of the last output to host memory is looked after at the next one.
    assert [ref() is not None for ref in attention.outputs] == [settings != "layer, offload", True]
    loss.backward()
    assert all(ref() is None for ref in attention.outputs), "kept after backward, with the loss still there"


@pytest.mark.parametrize("settings", SETTINGS)
def test_backward_twice(settings):
    loss = assert_same_gradients_twice(*converted(SETTINGS[settings]), unmasked(23))
    with pytest.raises(RuntimeError):
        loss.backward()


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_adapters_and_two_losses_at_once(settings, reentrant):
    model = add_lora(build("llama", attention="sdpa", **WIDE))
    reference = copy.deepcopy(model)
    convert_to_mini_sequence(model, CHUNKS | {"keep": "attention"} | SETTINGS[settings])
    runs = []
    for m in (model, reference):
        checkpointed(m, use_reentrant=reentrant).train()
        losses = [m(**unmasked(length)).loss for length in (23, 31)]  # the second before the first one's backward
        sum(losses).backward()
        runs.append({name: p.grad for name, p in m.named_parameters() if p.requires_grad})
    assert_same_tensors(*runs)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("family", ["llama", "mistral", "phi3"])
def test_copies_that_an_attention_makes_of_what_it_is_given_are_not_kept(family, settings, sdpa_masks):
    """A mask as numbers to be added, and keys and values once for each query head."""
    model, reference = converted(SETTINGS[settings], family)
    for _ in range(2):
        assert_same_training(model, reference, batch(53, padding=9))
    sdpa_masks.clear()
    loss_and_grads(model, batch(53, padding=9))
    assert len(sdpa_masks) == 2 and all(mask.dtype == torch.bool for mask in sdpa_masks)


@pytest.mark.parametrize("settings", SETTINGS)
def test_autocast(settings, attention):
    model, reference = converted(SETTINGS[settings], attention=attention.name)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_training(model, reference, unmasked(23), rtol=3e-2)
        attention.calls = 0
        loss_and_grads(model, unmasked(23))
    assert attention.calls == 2


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize(
    ("family", "attention", "padding", "reason"),
    [
        ("llama", "eager", 5, "times its output's bytes"),  # its weights, one for each pair of tokens
        ("gpt_oss", "eager", 0, "times its output's bytes"),
    ],
)
def test_what_cannot_be_kept_is_run_again_and_reported(family, attention, padding, reason, settings, told):
    model, reference = converted(SETTINGS[settings], family, attention)
    for _ in range(2):
        assert_same_training(model, reference, batch(37, padding=padding))
    ((name, said),) = mini_sequence_report(model).unkept
    assert name == layer_class(reference) and reason in said and told() == [said]
    assert f"  attention not kept: {name} ({said})" in str(mini_sequence_report(model)).splitlines()


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_write_into_what_is_kept_is_an_error(settings, attention):
    written = []
    attention.change = lambda out: written.append(out.detach()) or out
    model, _ = converted(SETTINGS[settings], attention=attention.name)
    loss_and_grads(model, unmasked(23))
    loss = model(**unmasked(23)).loss
    written[-1].mul_(2)
    with pytest.raises(RuntimeError, match="changed in place"):
        loss.backward()


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_layer_with_two_attentions(settings, attention):
    model, reference = converted(SETTINGS[settings], "bart", attention.name, d_model=64)
    inputs = unmasked(23) | {"encoder_hidden_states": torch.randn(2, 9, 64)}
    for _ in range(2):
        attention.calls = 0
        assert_same_training(model, reference, inputs)
        assert attention.calls == 8 + 8 and not mini_sequence_report(model).unkept
    assert count_layers(model) == 0


@pytest.mark.parametrize("settings", SETTINGS)
def test_each_class_of_layers_is_asked_once_and_named(settings, monkeypatch):
    """Also where something was left out before the first step."""
    model, reference = (checkpointed(m) for m in twins("llama", num_hidden_layers=4))
    for m in (model, reference):
        m.model.layers[3].__class__ = type("Other", (type(m.model.layers[3]),), {})
    convert_to_mini_sequence(model, CHUNKS | SETTINGS[settings] | {"keep": "attention", "exclude": ["layers.0.*"]})
    made, init = [], KeptAttention.__init__
    monkeypatch.setattr(KeptAttention, "__init__", lambda self, *args: made.append(self) or init(self, *args))
    for _ in range(2):
        assert_same_training(model, reference, batch(37))
    assert len(made) == 2
    names = [name for name, _ in mini_sequence_report(model).unkept]
    assert names == ["LlamaDecoderLayer", "Other"]


@pytest.mark.parametrize("settings", SETTINGS)
def test_compiled_attention_is_left_alone(settings, told):
    model, reference = converted(SETTINGS[settings])
    for layer in model.model.layers:
        layer.self_attn.compile(backend="eager")
    assert_same_training(model, reference, unmasked(23))
    reason = "its part self_attn is compiled by itself"
    assert not told() and not mini_sequence_report(model).unkept
    assert ("LlamaDecoderLayer", reason) in mini_sequence_report(model).untiled.values()


@pytest.mark.parametrize("settings", SETTINGS)
def test_copies_and_evaluation(settings):
    model, reference = converted(SETTINGS[settings])
    loss_and_grads(model, unmasked(23))
    other = copy.deepcopy(model)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(**unmasked(23)).loss, reference.eval()(**unmasked(23)).loss)
    for m in (model, other):
        assert_same_training(m.train(), reference.train(), unmasked(23))


def test_host_memory_holds_outputs_too(caplog, monkeypatch):
    model, _ = converted({"offload": "cpu"})
    store = model.model.layers[0].mini_sequence_chunking.layer_inputs
    for _ in range(2):
        loss = model(**unmasked(32)).loss
        # Inputs and outputs of 64 numbers for each token, and a log-sum-exp for each of 4 heads.
        assert store.host.host_bytes_in_use == 2 * 2 * 32 * (64 + 64 + 4) * 4
        loss.backward()
        assert store.host.host_bytes_in_use == 0
    lines = [r.message for r in caplog.records if "host memory" in r.message]
    assert len(lines) == 1 and "2 layer inputs of (2, 32, 64) and attention outputs" in lines[0]
    monkeypatch.setattr(layer_inputs, "available_host_bytes", lambda: 1000)
    model, _ = converted({"offload": "cpu"})
    with pytest.raises(ValueError, match='for 2 layer inputs .* and attention outputs, .*set "keep": "input"'):
        model(**unmasked(32))


@pytest.mark.parametrize("other", [{"head_groups": 2}, {"head_groups": "auto"}])
def test_settings_that_save_memory_for_time_are_refused_beside_it(other):
    with pytest.raises(ValueError, match=f"keep='attention' takes memory to save time, and {next(iter(other))}="):
        MiniSequenceConfig(keep="attention", **other)
