"""Converted models train as unconverted ones do: the loss and every gradient, in float32."""

import copy

import pytest
import torch
from flops import Flops
from models import CHUNKS, CONFIGS, add_lora, assert_same_training, batch, build, checkpointed, loss_and_grads, twins

from ds_minis import convert_to_mini_sequence

# In rows (batch size 2): below one chunk, exactly one, not divisible, divisible.
LENGTHS = (4, 5, 23, 20)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", CONFIGS)
def test_loss_and_gradients_are_those_of_the_unconverted_model(family, lora, checkpointing, scope):
    model, reference = twins(family)
    if lora:
        model, reference = add_lora(model), add_lora(reference)
    if checkpointing:
        checkpointed(model), checkpointed(reference)
    convert_to_mini_sequence(model, {**CHUNKS, "scope": scope})
    for length in LENGTHS:
        assert_same_training(model, reference, batch(length))
        assert_same_training(model, reference, batch(length, prompt=length // 2, padding=length // 3))


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_sdpa_attention_and_position_ids(family, scope):
    model, reference = twins(family, attention="sdpa")
    convert_to_mini_sequence(model, {**CHUNKS, "scope": scope})
    inputs = batch(24) | {"position_ids": torch.arange(24).remainder(9).expand(2, -1)}
    del inputs["attention_mask"]
    assert_same_training(model, reference, inputs)


@pytest.mark.parametrize("settings", [{"num_mini_sequences": 4}, {"chunk_size": 1, "loss_chunk_size": 1}, {}])
@pytest.mark.parametrize("scope", ["mlp", "tokens", "layer"])
def test_every_way_to_choose_chunks(settings, scope):
    model, reference = twins("llama")
    convert_to_mini_sequence(model, {"loss_chunk_size": 5, "scope": scope, **settings})
    assert_same_training(model, reference, batch(23))


def test_reentrant_checkpointing(scope):
    model, reference = twins("llama")
    for m in (model, reference):
        checkpointed(m, use_reentrant=True)
        m.enable_input_require_grads()
    convert_to_mini_sequence(model, {**CHUNKS, "scope": scope})
    assert_same_training(model, reference, batch(23))


def flops_of_a_step(model, inputs=None) -> int:
    inputs = inputs or batch(23)
    loss_and_grads(model, inputs)  # the first call of each module verifies it on some rows
    with Flops() as counter:
        loss_and_grads(model, inputs)
    return counter.total


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_turned_on_before_or_after_conversion_and_off_again(reentrant, lora, scope):
    first, reference = twins("llama")
    last = copy.deepcopy(first)
    if lora:
        first, last, reference = map(add_lora, (first, last, reference))
    models = first, last, reference
    convert_to_mini_sequence(last, {**CHUNKS, "scope": scope})
    for model in models:
        checkpointed(model, use_reentrant=reentrant).enable_input_require_grads()
    convert_to_mini_sequence(first, {**CHUNKS, "scope": scope})
    actions = [
        lambda m: None,
        lambda m: m.gradient_checkpointing_disable(),
        lambda m: checkpointed(m, use_reentrant=not reentrant),
    ]
    for action in actions:
        for model in models:
            action(model)
        for model in (first, last):
            assert_same_training(model, reference, batch(23))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_costs_the_same_whichever_came_first(reentrant, scope):
    """And costs nothing where layers are tiled as a whole, which takes its place."""
    first, last = twins("llama")
    settings = {"chunk_size": 10, "loss": False, "scope": scope}
    convert_to_mini_sequence(last, settings)
    without = flops_of_a_step(last)
    for model in (first, last):
        checkpointed(model, use_reentrant=reentrant).enable_input_require_grads()
    convert_to_mini_sequence(first, settings)
    checkpointing = flops_of_a_step(first)
    assert checkpointing == flops_of_a_step(last)
    assert checkpointing == without if scope == "layer" else checkpointing > without
    for model in (first, last):
        model.gradient_checkpointing_disable()
    assert flops_of_a_step(first) == flops_of_a_step(last) == without


def test_accumulated_gradients_with_num_items_in_batch():
    model, reference = twins("llama")
    convert_to_mini_sequence(model, CHUNKS)
    batches = [batch(11, prompt=3), batch(23, seed=1, prompt=7)]
    num_items = sum((b["labels"][:, 1:] != -100).sum() for b in batches)
    for m in (model, reference):
        m.zero_grad()
        for b in batches:
            m(**b, num_items_in_batch=num_items).loss.backward()
    for (name, param), other in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(param.grad, other.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_loss_scaling():
    model, reference = twins("llama-tied-bias")
    convert_to_mini_sequence(model, CHUNKS)
    grads = []
    for m in (model, reference):
        (m(**batch(23)).loss * 1024).backward()
        grads.append({n: p.grad for n, p in m.named_parameters()})
    for name in grads[1]:
        torch.testing.assert_close(grads[0][name], grads[1][name], rtol=1e-4, atol=1e-3, msg=name)


def test_bfloat16_is_as_close_to_float32_as_the_unconverted_model():
    reference = twins("llama")[0]
    _, exact = loss_and_grads(reference, batch(60))
    errors = []
    for tile in (True, False):
        model = twins("llama")[0].to(torch.bfloat16)
        if tile:
            convert_to_mini_sequence(model, {"chunk_size": 4, "loss_chunk_size": 4})
        loss, grads = loss_and_grads(model, batch(60))
        assert loss.dtype == torch.float32
        errors.append(sum((grads[n].float() - g).norm() / g.norm() for n, g in exact.items()) / len(exact))
    assert errors[0] < 1.1 * errors[1], errors


def test_eval_with_labels_gives_the_same_loss_without_gradients():
    model, reference = twins("gemma2")
    convert_to_mini_sequence(model, CHUNKS)
    model.eval(), reference.eval()
    with torch.no_grad():
        loss, expected = model(**batch(23)).loss, reference(**batch(23)).loss
    assert not loss.requires_grad
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)


# Of one token in both layers of the tiny models.
TWO_OF_THE_MLP = 2 * 2 * (2 * 32 * 48)
QUERIES_AND_KEYS = 2 * (2 * 32 * (32 + 16))
MORE_FLOPS = {
    # Gemma-2 has a norm behind the MLP, so that checkpointing itself must run the whole MLP again before ours does.
    ("tokens", "gemma2"): TWO_OF_THE_MLP,
    # The norms behind these projections need their values a third time, when the attention's gradients are there.
    ("layer", "qwen3"): QUERIES_AND_KEYS,
}


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "phi3", "gemma2"])
def test_no_matmul_more_than_checkpointing_alone(family, scope):
    model, reference = twins(family)
    checkpointed(model), checkpointed(reference)
    convert_to_mini_sequence(model, {**CHUNKS, "scope": scope})
    flops = [flops_of_a_step(m) for m in (model, reference)]
    assert flops[0] == flops[1] + 46 * MORE_FLOPS.get((scope, family), 0)


def test_matmuls_at_the_proportions_of_qwen3_8b_at_8192_tokens():
    """All sizes but the vocabulary's divided by 64: hidden 4096, MLP 12288, 32 heads, 8 for keys and values, 8192 tokens."""
    sizes = {"hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 8, "num_key_value_heads": 2}
    flops = []
    for settings in ({"scope": "layer", "chunk_size": 32}, False):
        model = checkpointed(build("qwen3", **sizes))
        convert_to_mini_sequence(model, settings)
        flops.append(flops_of_a_step(model, batch(128, batch_size=1)))
    assert 1 < flops[0] / flops[1] <= 1.025


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_adapters_cost_hardly_a_matmul_more(family):
    """Frozen weights have no gradients, so that a projection run again weighs more; rank 4 of 32 stands for 16 of 128."""
    model, reference = (checkpointed(add_lora(m)) for m in twins(family))
    convert_to_mini_sequence(model, CHUNKS)
    flops = [flops_of_a_step(m) for m in (model, reference)]
    assert flops[0] / flops[1] <= {"llama": 1, "qwen3": 1.02, "gemma2": 1.01}[family]
