"""With other ranks: parameters of a call that runs whole get their gradients in the order in which a tiled call gives them.

ZeRO-2 adds gradients up in the order in which they come; one rank's hook must not change it.
"""

import pytest
import torch
from models import CHUNKS, add_lora, assert_same_tensors, batch, build, checkpointed, loss_and_grads
from torch import nn

from ds_minis import convert_to_mini_sequence, mini_sequence_report
from ds_minis.layer.tiled import tiled_layer
from ds_minis.tiling.core import tiled_op
from ds_minis.tiling.modules import gate


@pytest.fixture
def other_ranks(monkeypatch):
    for module in (gate, tiled_layer, tiled_op):
        monkeypatch.setattr(module, "has_other_ranks", lambda: True)


def with_second_adapter(model):
    """Trained, and not active."""
    model.add_adapter("second", model.peft_config["default"])
    for name, param in model.named_parameters():
        param.requires_grad_("lora_" in name)
    return model


MODELS = {
    "full": lambda: build("llama"),
    "reentrant": lambda: checkpointed(build("llama"), use_reentrant=True),
    "a second adapter": lambda: with_second_adapter(add_lora(build("llama"), target_modules=["up_proj", "v_proj"])),
    "experts": lambda: build("mixtral without router outputs"),
}


def arrivals(model, inputs, **kwargs) -> tuple[list[str], torch.Tensor, dict]:
    """The names of the parameters in the order in which their gradients are there; loss and gradients."""
    if hasattr(model, "peft_config"):
        model.enable_input_require_grads()
    order, handles = [], []
    for name, param in model.named_parameters():
        if param.requires_grad:
            hook = param.register_hook(lambda grad, name=name: order.append(name if grad is not None else f"no {name}"))
            handles += [hook]
    loss, grads = loss_and_grads(model, inputs, **kwargs)
    for handle in handles:
        handle.remove()
    return order, loss, grads


@pytest.mark.parametrize(("kind", "scope"), [*((kind, "layer") for kind in MODELS), ("full", "tokens")])
def test_a_hook_on_one_rank_alone(other_ranks, kind, scope):
    tiled, whole, plain = (MODELS[kind]() for _ in range(3))
    for model in (tiled, whole):
        convert_to_mini_sequence(model, CHUNKS | {"scope": scope})
    for name, part in whole.named_modules():
        if name.endswith(("up_proj", "mlp.gate")):
            part.register_forward_hook(lambda *_: None)
    order, _, _ = arrivals(tiled, batch(23))
    for _ in range(2):
        order_whole, loss, grads = arrivals(whole, batch(23))
        _, expected_loss, expected = arrivals(plain, batch(23))
        torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=0)
        assert_same_tensors(grads, expected)
        assert order_whole == order
    assert not any(name.startswith("no ") for name in order)
    assert any("hook" in reason for _, reason in mini_sequence_report(whole).untiled.values())


def test_an_output_that_is_asked_for_on_one_rank_alone(other_ranks):
    """And that has a gradient of its own."""
    tiled, whole, plain = (build("llama") for _ in range(3))
    for model in (tiled, whole):
        convert_to_mini_sequence(model, CHUNKS)
    order, _, _ = arrivals(tiled, batch(23))
    order_whole, _, _ = arrivals(whole, batch(23), output_attentions=True)
    assert order_whole == order
    grads = []
    for model in (whole, plain):
        model.zero_grad(set_to_none=True)
        output = model(**batch(23), output_attentions=True)
        (output.loss + sum(a.square().mean() for a in output.attentions)).backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters()})
    assert_same_tensors(*grads)


def test_a_loss_on_what_a_hook_has_caught(other_ranks):
    """It is part of the plain model's graph, beside the layer's own result."""
    grads = []
    for converted in (False, True):
        model, caught = build("llama"), []
        if converted:
            convert_to_mini_sequence(model, CHUNKS)
        model.model.layers[0].mlp.up_proj.register_forward_hook(lambda m, args, out, to=caught: to.append(out))
        loss = model(**batch(23)).loss
        (loss + caught[0].square().mean()).backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters()})
    assert_same_tensors(grads[1], grads[0])


class _Again(torch.autograd.Function):
    """Runs a module in backward, which adds to its weights' gradients itself (as DeepSpeed's TiledMLP)."""

    @staticmethod
    def forward(ctx, module, x):
        ctx.module = module
        ctx.save_for_backward(x)
        with torch.no_grad():
            return module.own(x)

    @staticmethod
    def backward(ctx, grad):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            torch.autograd.backward(ctx.module.own(x), grad)
        return None, x.grad


def test_weights_that_are_in_no_graph(other_ranks):
    models = []
    for converted in (False, True):
        model = build("llama")
        for layer_ in model.model.layers:
            base = type(layer_.mlp)

            class RunAgain(base):
                own = base.forward

                def forward(self, x):
                    return _Again.apply(self, x)

            layer_.mlp.__class__ = RunAgain
        if converted:
            convert_to_mini_sequence(model, CHUNKS)
        models.append(arrivals(model, batch(23)))
    (_, loss, expected), (order, converted_loss, grads) = models
    torch.testing.assert_close(converted_loss, loss, rtol=1e-5, atol=0)
    assert_same_tensors(grads, expected)
    assert not any(name.startswith("no ") for name in order) and len(order) == len(set(order))


def test_a_single_process_has_no_gate():
    model = build("llama")
    convert_to_mini_sequence(model, CHUNKS)
    seen = []
    linear = model.model.layers[0].mlp.up_proj
    linear.register_forward_hook(lambda module, *_: seen.append(module.weight))
    model(**batch(23))
    assert all(isinstance(weight, nn.Parameter) for weight in seen) and seen
