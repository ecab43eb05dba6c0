"""`keep: "matmuls"`: backward repeats no product of a linear layer, and what it takes instead is what forward computed."""

import copy

import pytest
import torch
import torch.nn.functional as F
from flops import Flops
from live_bytes import LiveBytes
from models import CHUNKS, add_lora, assert_same_training, batch, build, checkpointed, loss_and_grads, twins
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.models.llama.modeling_llama import LlamaMLP

from ds_minis import convert_to_mini_sequence, mini_sequence_report
from ds_minis.layer.passes.layer_passes import LayerPasses
from ds_minis.memory.kept_products import KeptProducts

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
    """With fewer tokens than a chunk neither, where the layer is checkpointed by itself."""
    model, reference = twins(family, attention="sdpa")
    convert_to_mini_sequence(checkpointed(model), MATMULS)
    assert products(model, batch(length)) == products(reference, batch(length))


def test_of_an_adapter_only_its_small_product_is_computed_twice():
    model = add_lora(build("llama", attention="sdpa"))
    reference = copy.deepcopy(model)
    convert_to_mini_sequence(model, MATMULS)
    rows, small = 2 * 53, 2 * sum(p.numel() for n, p in model.named_parameters() if "lora_B" in n)
    assert products(reference, batch(53)) < products(model, batch(53)) <= products(reference, batch(53)) + rows * small


class Experts(nn.Module):
    """Linear layers that get the rows that a router gives them: another number in each chunk, none in some."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.router = nn.Linear(width, 4, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, inner), nn.SiLU(), nn.Linear(inner, width)) for _ in range(4)
        )

    def forward(self, x):
        rows = x.flatten(0, -2)
        weights, choices = self.router(rows).softmax(-1).topk(2, -1)
        result = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            row, place = (choices == number).nonzero(as_tuple=True)
            if len(row):
                result = result.index_add(0, row, expert(rows[row]) * weights[row, place, None])
        return result.view(x.shape)


def with_experts(model):
    torch.manual_seed(3)
    for layer in model.model.layers:
        layer.mlp = Experts(32, 48)


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


class ChecksOut(LlamaMLP):
    """Checkpointed by itself, as a whole."""

    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False)


class ChecksOutInside(LlamaMLP):
    def forward(self, x):
        gate = checkpoint(lambda x: F.silu(self.gate_proj(x)), x, use_reentrant=False)
        return self.down_proj(gate * self.up_proj(x))


class CallsTwice(LlamaMLP):
    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.gate_proj(x * 0.5))


def with_mlp(cls):
    def change(model):
        for layer in model.model.layers:
            layer.mlp.__class__ = cls

    return change


def queries_are_outputs(model):
    """One module in two places of an attention, of which a later chunk runs one alone behind its attention."""
    for layer in model.model.layers:
        layer.self_attn.o_proj = layer.self_attn.q_proj


def one_weight_of_two(model):
    for layer in model.model.layers:
        layer.mlp.up_proj.weight = layer.mlp.gate_proj.weight


@pytest.mark.parametrize(
    "change",
    [
        with_mlp(ChecksOut),
        with_mlp(ChecksOutInside),
        with_mlp(CallsTwice),
        queries_are_outputs,
        one_weight_of_two,
        with_experts,
    ],
)
def test_layers_that_call_a_linear_layer_in_other_ways(change):
    model = build("llama", attention="sdpa")
    change(model)
    reference = copy.deepcopy(model)
    convert_to_mini_sequence(model, MATMULS)
    for length in (7, 23, 41):
        assert_same_training(model, reference, batch(length))
    assert mini_sequence_report(model).last_kept.startswith("2 layers kept the results of their matrix products")


class CheckpointedAround(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, **kwargs):
        return checkpoint(lambda x: self.layer(x, **kwargs), x, use_reentrant=False)


def test_what_checkpoints_around_a_layer_decides_what_it_keeps():
    """Run again in backward, the layer must save the same, whatever of the budget is left then."""
    model = add_lora(build("llama", attention="sdpa"))
    reference = copy.deepcopy(model)
    convert_to_mini_sequence(model, CHUNKS | {"memory_budget": NEED_KIB / 2**20})
    for m in (model, reference):
        around = m.base_model.model.model
        around.layers = nn.ModuleList(map(CheckpointedAround, around.layers))
    for _ in range(2):
        assert_same_training(model, reference, batch(60))
    assert set(budget_of(model).last) == {"input"}


def kept_of(linear, take=lambda num_bytes: True, running=None):
    """KeptProducts of a layer of its own, and all that it gave back."""
    given_back = []
    chunk = (lambda: 0) if running is None else (lambda: running[0])
    return KeptProducts(linear, 4, chunk, take, given_back.append), given_back


def test_a_layer_that_calls_its_linear_layers_otherwise_in_backward():
    linear, x = nn.Linear(4, 4), torch.randn(3, 4)
    kept, _ = kept_of(linear)
    with kept.recorded("pass"):
        y = linear(x)
    assert kept.num_bytes == y.nbytes and kept.results("pass")[linear](x) is not y
    with kept.replayed("pass"):
        assert linear(x).data_ptr() == y.data_ptr()
        again = linear(x)  # once more than in forward
        assert again.data_ptr() != y.data_ptr()
        torch.testing.assert_close(again, y)
    with kept.replayed("pass"), pytest.raises(RuntimeError, match='set "keep": "attention"'):
        linear(x[:2])
    y.detach().mul_(2)
    with kept.replayed("pass"), pytest.raises(RuntimeError, match="changed in place"):
        linear(x)


@pytest.mark.parametrize(("width", "kept_bytes"), [(4, 48), (8, 0)])
def test_layers_with_few_inputs_are_left_out(width, kept_bytes):
    """A quarter of the hidden size is enough; a vector is no row."""
    linear = nn.Linear(1, 4)
    kept = KeptProducts(linear, width, lambda: 0, lambda num_bytes: True, lambda num_bytes: None)
    with kept.recorded("pass"):
        linear(torch.randn(3, 1)), linear(torch.randn(1))
    assert kept.num_bytes == kept_bytes


def test_no_call_takes_more_than_is_left():
    """Not in the first step either, before it is known how much products take."""
    model, _ = with_budget(70)
    loss = model(**batch(60)).loss
    assert budget_of(model).live_bytes <= 70 * 1024
    loss.backward()


def test_each_chunk_gets_its_own_results():
    linear, x, running = nn.Linear(4, 4), torch.randn(2, 3, 4), [0]
    kept, _ = kept_of(linear, running=running)
    with kept.recorded("pass"):
        expected = []
        for running[0] in range(2):
            expected.append([linear(x[running[0]]), linear(x[running[0]] + 1)])
    with kept.replayed("pass"):
        for running[0], number in ((1, 1), (0, 2)):  # one of them is left
            for i in range(number):
                assert linear(x[running[0]]).data_ptr() == expected[running[0]][i].data_ptr()


def test_what_is_dropped_is_given_back_once():
    linear, x = nn.Linear(4, 4), torch.randn(3, 4)
    size, taken = 48, []
    kept, given_back = kept_of(linear, take=lambda num_bytes: taken.append(num_bytes) or len(taken) < 3)
    with kept.recorded("pass"):
        for _ in range(4):
            linear(x)
    assert taken == 3 * [size] and kept.is_too_large and kept.num_bytes == 3 * size
    kept.drop()  # memory runs out as well
    assert sum(given_back) == 2 * size and not kept.results("pass")
    kept, given_back = kept_of(nn.Sequential(linear, other := nn.Linear(4, 4)))
    with kept.recorded("pass"):
        linear(x), other(x).add_(1)
    assert kept.num_bytes == size and list(kept.results("pass")) == [linear] and given_back == [size]
    kept.leave_out("pass", [other, linear])
    assert kept.num_bytes == 0 and given_back == [size, size]
    kept.drop()
    assert sum(given_back) == 2 * size


def with_budget(kib: float):
    model, reference = twins("llama", attention="sdpa")
    convert_to_mini_sequence(model, CHUNKS | {"memory_budget": kib / 2**20})
    return model, reference


def budget_of(model):
    chunking = next(m.mini_sequence_chunking for m in model.modules() if hasattr(m, "mini_sequence_chunking"))
    return chunking.layer_inputs.budget


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
