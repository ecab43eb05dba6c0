"""What else a tiled layer can do for memory: head groups, and layer inputs in host memory."""

import copy
import gc
import weakref

import pytest
import torch
from common import SHAPES
from models import (
    CHUNKS,
    add_lora,
    assert_same_training,
    batch,
    build,
    checkpointed,
    count_layers,
    loss_and_grads,
    twins,
)
from transformers import AttentionInterface, AttentionMaskInterface, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transient_memory import decoder_memory
from variants import ALL
from variants import ours as variant

from ds_minis import convert_to_mini_sequence, mini_sequence_report
from ds_minis.config import MiniSequenceConfig
from ds_minis.layer.tiled.tiled_layer import TiledLayer
from ds_minis.memory import layer_inputs
from ds_minis.tiling.core.linear import is_plain_linear
from ds_minis.tiling.modules.state import Chunking
from ds_minis.tiling.modules.swap import tile

SETTINGS = {
    "groups": {"head_groups": "auto"},
    "two groups": {"head_groups": 2},
    "offload": {"offload": "cpu"},
    "all": {"head_groups": "auto", "offload": "cpu"},
}
DEEP = {"num_hidden_layers": 5, "num_attention_heads": 8, "num_key_value_heads": 4}
FAMILIES = ["llama", "qwen2", "qwen3", "gemma2"]


def converted(family="llama", settings=None, **kwargs):
    model, reference = twins(family, **kwargs)
    return convert_to_mini_sequence(model, CHUNKS | (settings or {})), reference


def analyses(model) -> list:
    """What was found out about each layer."""
    layers = [m for m in model.modules() if isinstance(m, TiledLayer)]
    return [analysis for layer in layers for analysis in layer.mini_sequence_analyses.values()]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_same_loss_and_gradients(family, settings):
    sizes = (
        DEEP if family == "llama" else {**DEEP, "num_hidden_layers": 2}
    )  # the others list a type for each of two layers
    model, reference = converted(family, SETTINGS[settings], **sizes)
    for batch_size, length in ((1, 23), (2, 23), (2, 4)):
        assert_same_training(model, reference, batch(length, batch_size=batch_size, prompt=length // 3))
    assert count_layers(model) == sizes["num_hidden_layers"], mini_sequence_report(model)
    if "head_groups" in SETTINGS[settings]:
        wanted = SETTINGS[settings]["head_groups"]
        assert {analysis.groups.count for analysis in analyses(model)} == {4 if wanted == "auto" else wanted}


@pytest.mark.parametrize("settings", ["groups", "offload", "all"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_adapters(settings, dropout):
    """With dropout, gradients are compared with those by finite differences along one direction."""
    model = add_lora(
        build("llama", **DEEP), target_modules=["q_proj", "v_proj", "o_proj", "up_proj"], lora_dropout=dropout
    )
    reference = copy.deepcopy(model)
    convert_to_mini_sequence(model, CHUNKS | SETTINGS[settings])
    if not dropout:
        assert_same_training(model, reference, batch(23))
        return
    model.double()  # though its loss is float32

    def loss() -> torch.Tensor:
        torch.manual_seed(1)
        return model(**batch(23)).loss

    model.train()
    loss().backward()
    params = [p for p in model.parameters() if p.grad is not None]
    generator = torch.Generator().manual_seed(0)
    steps = [torch.randn(p.shape, generator=generator, dtype=p.dtype) * 1e-3 for p in params]
    slope = sum((p.grad * step).sum() for p, step in zip(params, steps, strict=True))
    with torch.no_grad():
        values = []
        for sign in (1, -2):
            for p, step in zip(params, steps, strict=True):
                p.add_(step, alpha=sign)
            with torch.enable_grad():
                values.append(loss().detach())
    assert slope.abs() > 1e-3
    torch.testing.assert_close((values[0] - values[1]).double(), 2 * slope, rtol=1e-2, atol=0)


@pytest.mark.parametrize("settings", SETTINGS)
def test_autocast_and_masks(settings):
    model, reference = converted("llama", SETTINGS[settings], **DEEP)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_training(model, reference, batch(23, padding=5), rtol=3e-2)


@pytest.mark.parametrize("settings", SETTINGS)
def test_backward_twice_and_checkpointing_around(settings):
    model, reference = converted("llama", SETTINGS[settings], **DEEP)
    _, grads = loss_and_grads(checkpointed(reference), batch(23))
    loss = checkpointed(model).train()(**batch(23)).loss
    for keep in (True, False):
        model.zero_grad()
        loss.backward(retain_graph=keep)
        for name, param in model.named_parameters():
            scale = grads[name].abs().max()
            torch.testing.assert_close(param.grad, grads[name], rtol=0, atol=float(1e-5 * scale))
    with pytest.raises(RuntimeError):
        loss.backward()


def test_host_memory_holds_each_input_and_is_used_again():
    model, _ = converted("llama", {"offload": "cpu"}, **DEEP)
    store = model.model.layers[0].mini_sequence_chunking.layer_inputs
    for _ in range(3):
        loss = model(**batch(32)).loss
        assert store.host.host_bytes_in_use == 5 * 2 * 32 * 32 * 4
        loss.backward()
        assert store.host.host_bytes_in_use == 0  # with the loss still there
    assert store.host.host_bytes_peak == store.host.host_bytes_allocated == 5 * 2 * 32 * 32 * 4


def test_inputs_are_not_held_on_the_device():
    model, _ = converted("llama", {"offload": "cpu"}, **DEEP)
    loss_and_grads(model, batch(23))  # what is found out at the first call is over
    inputs = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda module, args: inputs.append(weakref.ref(args[0])))
    loss = model(**batch(23)).loss
    gc.collect()
    alive = [ref() is not None for ref in inputs]
    # The end of a copy is looked for at the next one: the last two may still be there.
    assert alive[:3] == [False] * 3
    loss.backward()


def test_need_of_host_memory_is_said_before_the_first_step(caplog, monkeypatch):
    monkeypatch.setattr(layer_inputs, "available_host_bytes", lambda: 3 * 2**30)
    model, _ = converted("llama", {"offload": "cpu"}, **DEEP)
    for length in (32, 32, 33, 64):
        model(**batch(length)).loss.backward()
    lines = [r.message for r in caplog.records if "host memory" in r.message]
    assert len(lines) == 2 and "5 layer inputs of (2, 32, 32), 3.0 GiB are available" in lines[0]


def test_too_little_host_memory_is_an_error_that_says_what_to_do(monkeypatch):
    monkeypatch.setattr(layer_inputs, "available_host_bytes", lambda: 100_000)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    model, _ = converted("llama", {"offload": "cpu"}, **DEEP)
    with pytest.raises(ValueError, match="start fewer processes on it, or train on shorter sequences") as error:
        model(**batch(32))
    assert "in each of 4 processes, for 5 layer inputs of (2, 32, 32)" in str(error.value)


def test_checkpointing_by_somebody_else_is_told(caplog):
    model, _ = converted("llama", {"offload": "cpu"}, **DEEP)
    inputs = batch(23)
    loss = torch.utils.checkpoint.checkpoint(
        lambda ids: model(ids, labels=ids).loss, inputs["input_ids"], use_reentrant=False
    )
    loss.backward()
    assert sum("turn that off, a tiled layer needs none" in r.message for r in caplog.records) == 1


def test_each_model_is_told_once_what_offload_takes(caplog):
    """A copy too: it may train elsewhere."""
    model, _ = converted("llama", {"offload": "cpu"}, **DEEP)
    for m in (model, converted("llama", {"offload": "cpu"}, **DEEP)[0], copy.deepcopy(model)):
        caplog.clear()
        for _ in range(2):
            m(**batch(23)).loss.backward()
        assert sum(r.message.startswith("ds_minis: offload: 0.00 GiB of host memory") for r in caplog.records) == 1


@pytest.mark.parametrize("settings", ["offload", "all"])
def test_copies_of_a_model_share_no_host_memory(settings):
    model, reference = converted("llama", SETTINGS[settings], **DEEP)
    loss = model(**batch(23)).loss
    other = copy.deepcopy(model)
    assert_same_training(other, reference, batch(23))
    loss.backward()
    ours, theirs = (m.model.layers[0].mini_sequence_chunking.layer_inputs for m in (model, other))
    assert ours is not theirs and theirs.num_layers == 5 and ours.host is not theirs.host


def test_heads_that_cannot_be_cut_are_attended_to_at_once():
    """Queries, keys and values are made in one projection."""
    model, reference = converted("phi3", {"head_groups": "auto"})
    assert_same_training(model, reference, batch(23))
    assert all(analysis.groups is None and analysis.one_call for analysis in analyses(model))
    text = (
        "attention in one call: 2 x Phi3DecoderLayer (the projections in front of its attention cannot be cut by heads)"
    )
    assert text in str(mini_sequence_report(model))


def test_sinks_one_for_each_head_are_attended_to_at_once(caplog):
    model, reference = converted("gpt_oss", {"head_groups": "auto"})
    assert_same_training(model, reference, batch(23))
    assert "'s_aux' has a part for each head" in caplog.text


def test_groups_that_do_not_fit_are_an_error_that_says_what_would(monkeypatch):
    words = r'3 groups cannot be made of 4 KV heads; allowed: 1, 2, 4 or "auto"; did you mean 2\?'
    with pytest.raises(ValueError, match=f'^convert_to_mini_sequence: "head_groups": {words}'):
        converted("llama", {"head_groups": 3}, **DEEP)
    monkeypatch.setattr("ds_minis.convert.num_kv_heads", lambda layer: None)  # an attention that does not state them
    model, _ = converted("llama", {"head_groups": 3}, **DEEP)
    with pytest.raises(ValueError, match=words):
        model(**batch(23))


def test_masks_with_one_part_per_head_are_attended_to_at_once():
    """A group of heads would be given the whole mask."""
    for count in ("auto", 2, 4):
        _with_a_mask_for_each_head(count)


def _with_a_mask_for_each_head(count):
    model, reference = converted("llama", {"head_groups": count}, **DEEP)
    inputs = batch(23)
    causal = torch.full((23, 23), torch.finfo(torch.float32).min).triu(1)
    slopes = torch.arange(1.0, 9.0).view(1, 8, 1, 1)
    distance = (torch.arange(23)[None] - torch.arange(23)[:, None]).float()
    inputs["attention_mask"] = (causal + 0.1 * slopes * distance.tril()).expand(2, 8, 23, 23)
    assert_same_training(model, reference, inputs)
    plain = dict(inputs, attention_mask=None)
    assert (reference(**inputs).loss - reference(**plain).loss).abs() > 1e-4


@pytest.mark.parametrize("settings", [{"head_groups": 2}, {"offload": "cpu"}, {"keep": "attention"}])
def test_other_scopes_refuse_them(settings):
    with pytest.raises(ValueError, match='is for whole layers: it needs scope "layer", not'):
        convert_to_mini_sequence(build("llama"), {"scope": "tokens", **settings})


def test_no_projection_is_cut_outside_of_a_run():
    model, _ = converted("llama", {"head_groups": "auto"}, **DEEP)
    shapes = {n: p.shape for n, p in model.named_parameters()}
    loss_and_grads(model, batch(23))
    assert {n: p.shape for n, p in model.named_parameters()} == shapes
    assert all(is_plain_linear(m) for m in model.model.layers[0].modules() if isinstance(m, torch.nn.Linear))


@pytest.mark.huge
def test_a_layer_of_more_than_2_to_the_31_elements():
    """On the CPU, in bfloat16, with few heads and an attention that gives each token its own value."""
    AttentionInterface.register("own value", lambda module, q, k, v, mask, **kwargs: (v.transpose(1, 2), None))
    AttentionMaskInterface.register("own value", lambda *args, **kwargs: None)
    sizes = {"hidden_size": 4096, "intermediate_size": 4, "num_hidden_layers": 1, "head_dim": 4}
    config = LlamaConfig(**sizes, num_attention_heads=1, num_key_value_heads=1, attn_implementation="own value")
    layer = LlamaDecoderLayer(config, 0).bfloat16()
    with torch.no_grad():
        for param in layer.parameters():
            param.fill_(2**-6)
    tile(layer, TiledLayer, Chunking(MiniSequenceConfig(chunk_size=16384), hidden_size=4096))
    num_tokens = 2**31 // 4096 + 8
    x = torch.zeros(1, num_tokens, 4096, dtype=torch.bfloat16)
    x[0, -1], x[0, 0] = 3, 1
    few = x[:, [0, 1, -1]].clone().requires_grad_()
    rope = torch.ones(1, num_tokens, 4, dtype=torch.bfloat16), torch.zeros(1, num_tokens, 4, dtype=torch.bfloat16)
    x.requires_grad_()
    y = layer(x, position_embeddings=rope)
    assert count_layers(layer) == 1
    grad = torch.zeros_like(x)
    grad[0, -1] = 2.0
    # Tokens are independent here, so that three of them tell.
    expected = layer(few, position_embeddings=tuple(t[:, :3] for t in rope))
    assert torch.equal(y[:, [0, 1, -1]], expected)
    params = list(layer.parameters())
    grads = torch.autograd.grad(expected, [few, *params], grad[:, [0, 1, -1]], allow_unused=True)
    y.backward(grad)
    torch.testing.assert_close(x.grad[:, [0, 1, -1]], grads[0])
    for param, wanted in zip(params, grads[1:], strict=True):
        assert (param.grad is None) == (wanted is None)  # of queries and keys
        if wanted is not None:
            torch.testing.assert_close(param.grad, wanted)


def test_a_step_of_more_than_2_to_the_31_elements_at_full_width():
    """Shapes alone: 540,672 tokens x 4,096, more than 2**31 elements. In large chunks, to save time."""
    tiled = variant("", scope="layer", head_groups="auto", chunk_size=16384)
    plain, ours = (decoder_memory(SHAPES["llama-3-8b"], v, 540_672, 1) for v in (ALL["plain"], tiled))
    assert ours["W_KiB_per_token"] < 36 < 52 < plain["W_KiB_per_token"]


def changed_in_place(module, args, output):
    with torch.no_grad():
        (output[0] if isinstance(output, tuple) else output).mul_(1.3)


def changed_anew(module, args, output):
    y = output[0] if isinstance(output, tuple) else output
    module.held = y  # as somebody who collects hidden states does
    changed = y * 1.3
    return (changed, *output[1:]) if isinstance(output, tuple) else changed


@pytest.mark.parametrize("change", [changed_in_place, changed_anew])
@pytest.mark.parametrize("settings", ["offload", "all"])
def test_hidden_states_that_are_changed_between_layers(settings, change):
    """What is computed once more is the layer's output, not what somebody made of it."""
    model, reference = converted("llama", SETTINGS[settings], **DEEP)
    for m in (model, reference):
        for i in (0, 2, 3):
            m.model.layers[i].register_forward_hook(change)
    assert_same_training(model, reference, batch(23))
