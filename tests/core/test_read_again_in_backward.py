"""What backward reads again must be what forward read: buffers, masks, frozen weights, and nobody else's thread."""

import threading

import pytest
import torch
from models import (
    CHUNKS,
    add_lora,
    assert_same_tensors,
    assert_same_training,
    batch,
    build,
    count_layers,
    loss_and_grads,
)
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ds_minis import convert_to_mini_sequence, mini_sequence_report


class Scaled(nn.Module):
    """A feed-forward part with a buffer whose value autograd does not save."""

    def __init__(self, mlp: nn.Module, size: int):
        super().__init__()
        self.mlp = mlp
        self.register_buffer("scale", torch.zeros(size))

    def forward(self, x):
        return self.mlp(x) * self.scale[:1].sigmoid()


def with_buffers(size: int = 4):
    model = build("llama")
    for layer in model.model.layers:
        layer.mlp = Scaled(layer.mlp, size)
    return model


def converted_and_plain(make, **settings):
    model, plain = make(), make()
    return convert_to_mini_sequence(model, CHUNKS | settings), plain


@pytest.mark.parametrize("settings", [{}, {"scope": "tokens"}], ids=str)
@pytest.mark.parametrize("how", ["set anew", "in place"])
def test_a_buffer_that_changes_between_two_forwards_and_one_backward(how, settings):
    grads = []
    for model in converted_and_plain(with_buffers, **settings):
        loss = 0
        for i in range(2):
            for layer in model.model.layers:
                if how == "in place":
                    layer.mlp.scale.fill_(3.0 * i)
                else:
                    layer.mlp.scale = torch.full((4,), 3.0 * i)
            loss = loss + model(**batch(23, seed=i)).loss
        loss.backward()
        assert all(layer.mlp.scale[0] == 3 for layer in model.model.layers)  # put back
        grads.append({n: p.grad for n, p in model.named_parameters()})
    assert_same_tensors(*grads)


def test_a_large_buffer_that_is_changed_in_place_is_named():
    model = convert_to_mini_sequence(with_buffers(2**15), CHUNKS)
    loss = model(**batch(23)).loss
    model.model.layers[1].mlp.scale.fill_(1.0)
    with pytest.raises(RuntimeError, match=r"mlp\.scale of a LlamaDecoderLayer was changed in place"):
        loss.backward()


@pytest.mark.parametrize("scope", ["layer", "tokens"])
def test_a_frozen_weight_that_is_changed_in_place_is_named(scope):
    model = convert_to_mini_sequence(add_lora(build("llama"), target_modules=["up_proj"]), CHUNKS | {"scope": scope})
    model.enable_input_require_grads()
    loss = model(**batch(23)).loss
    with torch.no_grad():
        model.base_model.model.model.layers[1].mlp.down_proj.weight.mul_(2)
    with pytest.raises(
        RuntimeError, match=r"down_proj\.weight of a .* was changed in place between forward and backward"
    ):
        loss.backward()


def test_a_mask_that_is_written_to_after_forward():
    mask = torch.ones(23, 23).tril().bool()[None, None].expand(2, 1, 23, 23).contiguous()
    grads = []
    for model in converted_and_plain(lambda: build("llama", attention="sdpa")):
        given = mask.clone()
        loss = model(**batch(23) | {"attention_mask": given}).loss
        given[..., 5:] = False
        given[..., 0] = True
        loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters()})
    assert_same_tensors(*grads)


@pytest.mark.parametrize("scope", ["layer", "tokens"])
def test_a_module_that_writes_to_its_input(scope):
    def make():
        model = build("llama")
        for layer in model.model.layers:
            base = type(layer.mlp)

            class Writing(base):
                def forward(self, x):
                    return super().forward(x.mul_(2))

            layer.mlp.__class__ = Writing
        return model

    model, plain = converted_and_plain(make, scope=scope)
    assert_same_training(model, plain, batch(23))


@pytest.mark.parametrize("settings", [{}, {"loss": False}], ids=str)
def test_a_step_that_is_measured(settings):
    model, plain = converted_and_plain(lambda: build("llama"), **settings)
    with FlopCounterMode(display=False) as counter:
        assert_same_training(model, plain, batch(23))
    assert counter.get_total_flops() > 0
    assert_same_training(model, plain, batch(23))
    assert count_layers(model) == 2 and not mini_sequence_report(model).untiled


@pytest.mark.parametrize("settings", [{}, {"loss": False}], ids=str)
def test_two_threads_in_one_model_are_refused(settings):
    model, plain = converted_and_plain(lambda: build("llama"), **settings)
    inside = threading.Barrier(2, timeout=60)

    def wait(*_):
        if threading.current_thread() is not threading.main_thread():
            inside.wait()  # the other thread begins
            inside.wait()  # and has been told

    handle = model.model.layers[1].mlp.register_forward_hook(wait)
    thread = threading.Thread(target=lambda: model(**batch(23)))
    thread.start()
    inside.wait()
    with pytest.raises(RuntimeError, match="two threads run one LlamaForCausalLM at once"):
        model(**batch(23))
    inside.wait()
    thread.join()
    handle.remove()
    assert_same_training(model, plain, batch(23))


def test_two_threads_may_compute_logits():
    model, plain = converted_and_plain(lambda: build("llama"))
    inputs, inside = {"input_ids": batch(23)["input_ids"]}, threading.Barrier(2, timeout=60)
    model.model.layers[0].register_forward_hook(lambda *_: [inside.wait()].clear())
    results = []

    def run():
        with torch.no_grad():
            results.append(model(**inputs).logits)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 2
    for logits in results:
        torch.testing.assert_close(logits, plain(**inputs).logits)
    assert not model.model.layers[0].mini_sequence_chunking.suspended


def test_a_thread_in_the_backward_of_a_layer():
    model = convert_to_mini_sequence(build("llama"), CHUNKS)
    loss_and_grads(model, batch(23))
    layer = model.model.layers[0]
    layer.__dict__["ds_minis_running_in"] = -1
    with pytest.raises(RuntimeError, match="two threads run one LlamaDecoderLayer at once"):
        model(**batch(23))
    del layer.__dict__["ds_minis_running_in"]
    loss_and_grads(model, batch(23))


def test_an_attention_that_is_made_for_all_heads():
    """As Ulysses': groups of heads were asked for, and it is one call from then on."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def attention(module, query, key, value, mask, **kwargs):  # a list of its calls would be state, which is not tiled
        assert query.shape[1] == 4, "not all heads"
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, **kwargs)

    ALL_ATTENTION_FUNCTIONS.register("of_four_heads", attention)
    try:
        models = converted_and_plain(lambda: build("llama", attention="sdpa"), head_groups=2)
        for model in models:
            model.config._attn_implementation = "of_four_heads"
        for _ in range(2):
            assert_same_training(*models, batch(23))
        assert count_layers(models[0]) == 2 and not mini_sequence_report(models[0]).untiled
        reasons = mini_sequence_report(models[0]).one_call.values()
        assert len(reasons) == 2 and all("something else for a part of the heads" in reason for reason in reasons)
    finally:
        del ALL_ATTENTION_FUNCTIONS._global_mapping["of_four_heads"]
