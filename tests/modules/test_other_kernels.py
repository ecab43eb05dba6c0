"""Kernels of other projects on the same model, as stand-ins: the real ones need a GPU or an engine.

An MLP that runs its chunks again itself, backwards that write in place, forwards bound to an instance (Liger, axolotl).
"""

import copy
import types
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from models import CHUNKS, LLAMA_CALLS, add_lora, assert_same_training, batch, count_layers, loss_and_grads, twins

from ds_minis import convert_to_mini_sequence, mini_sequence_report, revert_mini_sequence

INPUTS = batch(23, prompt=2, padding=3)


class RunAgain(torch.autograd.Function):
    """As DeepSpeed's TiledMLP: backward runs the module again and has the weights' gradients accumulated where they lie."""

    @staticmethod
    def forward(ctx, function, x):
        ctx.function = function
        ctx.save_for_backward(x)
        with torch.no_grad():
            return torch.cat([function(part) for part in x.chunk(3, 1)], 1)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        grads = []
        for part, part_grad in zip(x.chunk(3, 1), grad.chunk(3, 1), strict=True):
            part = part.detach().requires_grad_()
            with torch.enable_grad():
                torch.autograd.backward(ctx.function(part), part_grad)
            grads.append(part.grad)
        return None, torch.cat(grads, 1)


def run_again(mlp):
    own = type(mlp).forward
    mlp.__class__ = type(
        "MLP", (type(mlp),), {"forward": lambda self, x: RunAgain.apply(lambda part: own(self, part), x)}
    )


@pytest.mark.parametrize("scope", ["layer", "tokens", "mlp"])
def test_a_function_that_accumulates_gradients_itself_is_run_as_it_is(scope):
    model, reference = twins("llama")
    for m in (model, reference):
        for layer in m.model.layers:
            run_again(layer.mlp)
    convert_to_mini_sequence(model, {**CHUNKS, "scope": scope})
    for seed in range(2):  # the first step verifies
        assert_same_training(model, reference, batch(23, seed=seed))
    report = mini_sequence_report(model)
    assert "adds to the gradients of weights itself" in report.untiled["model.layers.0.mlp"][1]
    assert not report.layers


class ScaledInPlace(torch.autograd.Function):
    """As Liger's RMSNorm: backward writes its result over the gradient that it is given."""

    @staticmethod
    def forward(ctx, x, weight):
        rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        ctx.save_for_backward(x, weight, rstd)
        return x * rstd * weight

    @staticmethod
    def backward(ctx, grad):
        x, weight, rstd = ctx.saved_tensors
        grad_weight = (grad * x * rstd).flatten(0, -2).sum(0)
        grad.mul_(weight)
        inner = (grad * x).mean(-1, keepdim=True)
        grad.sub_(x * rstd.square() * inner).mul_(rstd)
        return grad, grad_weight


def kernel_norm(self, x):
    return ScaledInPlace.apply(x, self.weight)


def kernel_mlp(self, x):
    return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def kernel_mlp_over_tokens(self, x):
    return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x).cumsum(1))


def bind(model, mlp=kernel_mlp):
    """As Liger does for a model that is there already: `forward` of each instance."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    for layer in base.model.layers:
        layer.mlp.forward = types.MethodType(mlp, layer.mlp)
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.forward = types.MethodType(kernel_norm, norm)
    base.model.norm.forward = types.MethodType(kernel_norm, base.model.norm)
    return model


@pytest.mark.parametrize("lora", [False, True])
def test_forwards_bound_to_instances_are_verified_and_tiled(lora, tiled_calls, scope):
    model, reference = twins("llama")
    if lora:
        model, reference = add_lora(model), add_lora(reference)
    bind(model), bind(reference)
    convert_to_mini_sequence(model, {**CHUNKS, "scope": scope})
    assert_same_training(model, reference, INPUTS)
    assert Counter(name for name, _ in tiled_calls) == LLAMA_CALLS[scope]
    assert scope != "layer" or count_layers(model) == 2
    assert not [reason for _, reason in mini_sequence_report(model).untiled.values() if "replaced" in reason]


def test_a_bound_forward_that_mixes_tokens_is_run_as_a_whole(scope):
    model, reference = (bind(m, kernel_mlp_over_tokens) for m in twins("llama"))
    convert_to_mini_sequence(model, {**CHUNKS, "scope": scope})
    assert_same_training(model, reference, INPUTS)
    assert "model.layers.0.mlp" in mini_sequence_report(model).untiled


def test_bound_forwards_are_back_after_revert_and_run_in_copies(scope):
    model, reference = (bind(m) for m in twins("llama"))
    forwards = {name: m.__dict__["forward"] for name, m in model.named_modules() if "forward" in m.__dict__}
    twin = copy.deepcopy(convert_to_mini_sequence(model, {**CHUNKS, "scope": scope}))
    loss_and_grads(model, INPUTS)
    with torch.no_grad():
        for param in model.parameters():
            param.zero_()
    assert_same_training(twin, reference, INPUTS)
    revert_mini_sequence(model)
    assert forwards == {name: m.__dict__["forward"] for name, m in model.named_modules() if "forward" in m.__dict__}
    assert not any(name.startswith("mini_sequence") for m in model.modules() for name in m.__dict__)


def test_a_forward_that_is_bound_while_tiled_is_left_where_it_is(scope):
    model, reference = twins("llama")
    bind(convert_to_mini_sequence(model, {**CHUNKS, "scope": scope}), kernel_mlp_over_tokens)
    bind(reference, kernel_mlp_over_tokens)
    assert_same_training(model, reference, INPUTS)
    assert_same_training(revert_mini_sequence(model), reference, INPUTS)
