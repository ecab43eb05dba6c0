"""Models that accelerate has dispatched (`device_map`): its hooks stand on each instance, in front of the class's forward."""

import copy
from collections import Counter

import pytest
import torch
from accelerate import Accelerator, dispatch_model
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from models import (
    CHUNKS,
    LLAMA_CALLS,
    add_lora,
    assert_same_tensors,
    assert_same_training,
    batch,
    build,
    checkpointed,
    loss_and_grads,
    twins,
)
from transformers import AutoModelForCausalLM

from ds_minis import convert_to_mini_sequence, mini_sequence_report, revert_mini_sequence

INPUTS = batch(23, prompt=2, padding=3)
LAYERS = ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head"]


def count(calls) -> dict[str, int]:
    return Counter(name for name, _ in calls)


def hook_every_module(model):
    for module in list(model.modules()):
        add_hook_to_module(module, AlignDevicesHook(execution_device="cpu", io_same_device=True))
    return model


DISPATCH = {
    "one device": lambda model: dispatch_model(model, {"": "cpu"}, force_hooks=True),
    "layer by layer": lambda model: dispatch_model(
        model, dict.fromkeys(LAYERS, "cpu"), main_device="cpu", force_hooks=True
    ),
    "every module": hook_every_module,
}


def hooked(model) -> int:
    return sum("_hf_hook" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("order", ["dispatched first", "converted first"])
@pytest.mark.parametrize("kind", DISPATCH)
def test_a_dispatched_model_is_tiled_and_exact(kind, order, tiled_calls, scope):
    model, reference = twins("llama")
    if order == "dispatched first":
        convert_to_mini_sequence(DISPATCH[kind](model), {**CHUNKS, "scope": scope})
    else:
        DISPATCH[kind](convert_to_mini_sequence(model, {**CHUNKS, "scope": scope}))
    assert hooked(model) > 10
    assert_same_training(model, reference, INPUTS)
    assert count(tiled_calls) == LLAMA_CALLS[scope]
    assert_same_training(checkpointed(model), checkpointed(reference), INPUTS)
    with torch.no_grad():
        assert torch.equal(*(m(INPUTS["input_ids"]).logits for m in (model, reference)))


@pytest.mark.parametrize("adapters", ["first", "last"])
def test_loaded_with_a_device_map_and_adapted(tmp_path, tiled_calls, scope, adapters):
    plain = build("llama")
    plain.save_pretrained(tmp_path)
    device_map = dict.fromkeys(LAYERS, "cpu")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=device_map, attn_implementation="eager")
    dispatch_model(model, device_map, main_device="cpu", force_hooks=True)  # one device alone would need no hooks
    if adapters == "first":
        model = convert_to_mini_sequence(add_lora(model), {**CHUNKS, "scope": scope})
    else:
        model = add_lora(convert_to_mini_sequence(model, {**CHUNKS, "scope": scope}))
    assert hooked(model) > 10
    assert_same_training(model.train(), add_lora(plain), INPUTS)
    assert count(tiled_calls) == LLAMA_CALLS[scope]


@pytest.mark.parametrize("order", ["dispatched first", "converted first"])
@pytest.mark.parametrize("undone", [("revert", "hooks"), ("hooks", "revert"), ("revert",), ("hooks",)])
def test_undone_in_either_order(order, undone, tiled_calls, scope):
    model, reference = twins("llama")
    steps = [hook_every_module, lambda m: convert_to_mini_sequence(m, {**CHUNKS, "scope": scope})]
    for step in steps if order == "dispatched first" else reversed(steps):
        step(model)
    for step in undone:
        if step == "revert":
            assert revert_mini_sequence(model) is model
        else:
            remove_hook_from_module(model, recurse=True)
        tiled_calls.clear()
        assert_same_training(model, reference, INPUTS)
    assert count(tiled_calls) == ({} if "revert" in undone else LLAMA_CALLS[scope])
    assert hooked(model) == (0 if "hooks" in undone else len(list(model.modules())))
    assert "logits" in model(**INPUTS) or "revert" not in undone
    tiled_calls.clear()
    convert_to_mini_sequence(model, {**CHUNKS, "scope": scope})
    assert_same_training(model, reference, INPUTS)
    assert count(tiled_calls) == LLAMA_CALLS[scope]


def test_a_copy_of_a_dispatched_model_is_tiled_and_independent(tiled_calls, scope):
    model, reference = twins("llama")
    twin = copy.deepcopy(convert_to_mini_sequence(hook_every_module(model), {**CHUNKS, "scope": scope}))
    with torch.no_grad():
        for param in model.parameters():
            param.zero_()
    assert_same_training(twin, reference, INPUTS)
    assert count(tiled_calls) == LLAMA_CALLS[scope]
    revert_mini_sequence(twin)
    assert_same_training(twin, reference, INPUTS)
    assert count(tiled_calls) == LLAMA_CALLS[scope]


def test_a_forward_on_the_instance_that_is_not_known_is_left_alone_and_reported(tiled_calls):
    model, reference = twins("llama")
    for m in (model, reference):
        mlp = m.model.layers[0].mlp

        def doubled(x, mlp=mlp):
            return 2 * type(mlp).forward(mlp, x)

        mlp.forward = doubled
        norm = m.model.layers[1].input_layernorm
        norm.forward = lambda x, norm=norm: x * norm.weight
        m.model.norm.forward = m.model.norm.forward  # the class's own, bound
    report = mini_sequence_report(convert_to_mini_sequence(model, {**CHUNKS, "scope": "tokens"}))
    reasons = {name: reason for name, (_, reason) in report.untiled.items() if "self_attn" not in name}
    assert reasons.keys() == {"model.layers.0.mlp", "model.layers.1.input_layernorm"}
    assert all("replaced on the instance" in reason for reason in reasons.values())
    assert "doubled" in reasons["model.layers.0.mlp"]
    assert_same_training(model, reference, INPUTS)
    assert count(tiled_calls) == {"LlamaMLP": 1, "LlamaRMSNorm": 4, "Linear": 1}
    revert_mini_sequence(model)
    tiled_calls.clear()
    layer = model.model.layers[0]
    layer.forward = lambda *args, forward=layer.forward, **kwargs: forward(*args, **kwargs)
    report = mini_sequence_report(convert_to_mini_sequence(model, CHUNKS))
    assert not report.layers  # one is replaced itself, a norm of the other is
    assert "replaced on the instance" in report.untiled["model.layers.0"][1]
    assert "a part of it is left out" in report.untiled["model.layers.1"][1]
    assert_same_training(model, reference, INPUTS)


def test_a_hook_that_somebody_put_in_front_of_accelerates_is_not_skipped(tiled_calls, scope):
    model, reference = twins("llama")
    for m in (model, reference):
        hook_every_module(m)
        mlp = m.model.layers[0].mlp
        mlp.forward = lambda x, forward=mlp.forward: 2 * forward(x)
    report = mini_sequence_report(convert_to_mini_sequence(model, {**CHUNKS, "scope": scope}))
    assert "replaced on the instance" in report.untiled["model.layers.0.mlp"][1]
    assert_same_training(model, reference, INPUTS)
    assert count(tiled_calls)[{"layer": "LlamaDecoderLayer", "tokens": "LlamaMLP"}[scope]] == 1  # the other layer's


@pytest.mark.parametrize("order", ["prepared first", "converted first"])
def test_accelerators_autocast_in_front_of_the_models_forward(order, tiled_calls, scope):
    results = []
    for model in twins("llama"):
        accelerator = Accelerator(mixed_precision="bf16", cpu=True)
        ours = not results
        if ours and order == "converted first":
            convert_to_mini_sequence(model, {**CHUNKS, "scope": scope})
        model = accelerator.prepare(model)
        assert "forward" in model.__dict__
        if ours and order == "prepared first":
            convert_to_mini_sequence(model, {**CHUNKS, "scope": scope})
        results.append((*loss_and_grads(model, INPUTS), set(model(**INPUTS))))
        plain = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        assert not hasattr(plain.forward, "__wrapped__")
        results[-1] += (loss_and_grads(plain, INPUTS)[0],)
    (loss, grads, fields, loss32), (expected_loss, expected, _, expected32) = results
    torch.testing.assert_close(loss, expected_loss, rtol=1e-3, atol=0)
    torch.testing.assert_close(loss32, expected32, rtol=1e-5, atol=0)
    assert loss != loss32  # autocast was on
    assert_same_tensors(grads, expected, rtol=0.03)
    assert fields == {"loss"} and count(tiled_calls).keys() == LLAMA_CALLS[scope].keys()
