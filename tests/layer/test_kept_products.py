"""`keep: "matmuls"`: backward repeats no product of a linear layer, and what it takes instead is what forward computed."""

import copy

import pytest
import torch
import torch.nn.functional as F
from flops import Flops
from live_bytes import LiveBytes
from models import CHUNKS, add_lora, assert_same_training, batch, build, loss_and_grads, twins
from torch import nn
from transformers.models.llama.modeling_llama import LlamaMLP

from ds_minis import convert_to_mini_sequence, mini_sequence_report
from ds_minis.tiling.memory.kept_products import KeptProducts
from ds_minis.tiling.passes.layer_passes import LayerPasses

MATMULS = CHUNKS | {"keep": "matmuls", "loss": False}
NEED_KIB = 260  # of budget, with which the layers of a Llama of the tests keep their products at 60 tokens, and not all


def products(model, inputs) -> int:
    loss_and_grads(model, inputs)
    with Flops() as counter:
        loss_and_grads(model, inputs)
    return counter.total


@pytest.mark.parametrize("length", [7, 53])
@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3"])
def test_no_product_is_computed_twice(family, length):
    model, reference = twins(family, attention="sdpa")
    convert_to_mini_sequence(model, MATMULS)
    assert products(model, batch(length)) == products(reference, batch(length))


def test_of_an_adapter_only_its_small_product_is_computed_twice():
    model = add_lora(build("llama", attention="sdpa"))
    reference = copy.deepcopy(model)
    convert_to_mini_sequence(model, MATMULS)
    rows, small = 2 * 53, 2 * sum(p.numel() for n, p in model.named_parameters() if "lora_B" in n)
    assert products(reference, batch(53)) < products(model, batch(53)) <= products(reference, batch(53)) + rows * small


def kept_bytes(model, inputs) -> int:
    """What is held between forward and backward."""
    with LiveBytes(apart=[*model.parameters(), *model.buffers()]) as live:
        loss = model(**inputs).loss
        held = live.now
        loss.backward()
    return held


@pytest.mark.parametrize("lora", [False, True])
def test_bytes_that_are_kept(lora):
    held = {}
    for keep in ("attention", "matmuls"):
        model = build("llama", attention="sdpa")
        model = add_lora(model) if lora else model
        convert_to_mini_sequence(model, CHUNKS | {"keep": keep})
        loss_and_grads(model, batch(53))
        held[keep] = kept_bytes(model, batch(53))
    queries, key_values, output, feed_forward, ranks = 32, 16, 32, 48, 4 * 7 * lora
    features = queries + 2 * key_values + output + 2 * feed_forward + ranks
    assert held["matmuls"] - held["attention"] == 2 * 53 * features * 4 * 2  # rows, float32, layers


class WritesToProducts(LlamaMLP):
    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x).mul_(0.5)) * self.up_proj(x))


def test_a_result_that_is_written_to_is_computed_again():
    model, reference = twins("llama", attention="sdpa")
    for m in (model, reference):
        for layer in m.model.layers:
            layer.mlp.__class__ = WritesToProducts
    convert_to_mini_sequence(model, MATMULS)
    for length in (23, 41):
        assert_same_training(model, reference, batch(length))
    gate = 2 * 2 * 53 * 32 * 48  # operations, rows, inputs, outputs
    assert products(model, batch(53)) == products(reference, batch(53)) + 2 * gate


def test_a_layer_that_calls_its_linear_layers_otherwise_in_backward():
    linear, x = nn.Linear(4, 4), torch.randn(3, 4)
    kept = KeptProducts(linear, 4, take=lambda num_bytes: True, give_back=lambda num_bytes: None)
    with kept.recorded("pass"):
        y = linear(x)
    assert kept.num_bytes == y.nbytes and kept.results("pass")[linear](x) is not y
    with kept.replayed("pass"):
        torch.testing.assert_close(linear(x), y)
        with pytest.raises(RuntimeError, match='set "keep": "attention"'):
            linear(x)
    with kept.replayed("pass"), pytest.raises(RuntimeError, match='set "keep": "attention"'):
        linear(x[:2])
    y.detach().mul_(2)
    with kept.replayed("pass"), pytest.raises(RuntimeError, match="changed in place"):
        linear(x)


def with_budget(kib: float):
    model, reference = twins("llama", attention="sdpa")
    convert_to_mini_sequence(model, CHUNKS | {"memory_budget": kib / 2**20})
    return model, reference


def budget_of(model):
    return model.model.layers[0].mini_sequence_chunking.layer_inputs.budget


def test_products_are_kept_where_not_everything_fits():
    model, reference = with_budget(NEED_KIB)
    for _ in range(3):
        assert_same_training(model, reference, batch(60))
    assert set(budget_of(model).last) == {"matmuls"}
    assert budget_of(model).live_bytes == 0


@pytest.mark.parametrize("kib", range(0, 400, 33))
def test_too_little_for_products(kib):
    """What was begun is dropped, and less is kept."""
    model, reference = with_budget(kib + 1)
    most = 0
    for length in (60, 60, 33, 90):
        assert_same_training(model, reference, batch(length))
        loss = model(**batch(length)).loss
        most = max(most, budget_of(model).live_bytes)
        loss.backward()
        assert budget_of(model).live_bytes == 0 and sum(budget_of(model).last.values()) == 2
    assert most <= (kib + 1) * 1024


@pytest.mark.parametrize("where", ["reach", "post_attention"])
def test_out_of_memory_while_products_are_kept(where, monkeypatch, caplog):
    """That layer keeps less, the budget shrinks, and the step is completed."""
    model, reference = with_budget(NEED_KIB)
    for _ in range(2):
        assert_same_training(model, reference, batch(60))
    own, calls = getattr(LayerPasses, where), []

    def fails_once(self, *args):
        calls.append(where)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return own(self, *args)

    monkeypatch.setattr(LayerPasses, where, fails_once)
    assert_same_training(model, reference, batch(60))
    kept = budget_of(model).last
    assert kept["attention" if where == "post_attention" else "input"] >= 1, kept
    assert budget_of(model).live_bytes == 0
    assert len([r for r in caplog.records if "memory ran out while a layer kept" in r.message]) == 1


def test_the_report_says_so():
    model, _ = with_budget(NEED_KIB)
    for _ in range(2):
        loss_and_grads(model, batch(60))
    said = "2 layers kept the results of their matrix products; run once, not twice: the products of 2 layers"
    assert mini_sequence_report(model).last_kept == said
