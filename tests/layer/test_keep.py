"""`keep`: what a tiled layer keeps from forward to backward changes no gradient; "all" computes nothing twice."""

import copy
import gc

import pytest
import torch
import torch.nn.functional as F
from flops import Flops
from kept import assert_same_gradients_twice
from live_bytes import LiveBytes
from models import (
    CHUNKS,
    add_lora,
    assert_same_tensors,
    assert_same_training,
    batch,
    build,
    checkpointed,
    loss_and_grads,
    quantized,
    twins,
    with_dropout,
)

from ds_minis import convert_to_mini_sequence, mini_sequence_report
from ds_minis.config import MiniSequenceConfig
from ds_minis.layer.kept import kept_layer
from ds_minis.memory import keep_budget

SOME = {"memory_budget": 0.0006}
KEEPS = {
    "input": {"keep": "input"},
    "attention": {"keep": "attention"},
    "matmuls": {"keep": "matmuls"},
    "all": {"keep": "all"},
    "auto": {"memory_budget": 1},
    "auto, some": SOME,
}


def budget_of(model):
    return next(
        m for m in model.modules() if hasattr(m, "mini_sequence_chunking")
    ).mini_sequence_chunking.layer_inputs.budget


def converted(model, settings):
    return convert_to_mini_sequence(model, CHUNKS | settings)


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("family", ["llama", "gemma2", "phi", "qwen3_moe", "gpt_oss"])
def test_same_gradients(family, keep):
    model, reference = (
        checkpointed(m) for m in twins(family, attention="eager" if family in ("gpt_oss", "gemma2") else "sdpa")
    )
    converted(model, KEEPS[keep])
    for length in (23, 5, 41):
        assert_same_training(model, reference, batch(length, padding=3))
    assert budget_of(model).live_bytes == 0
    said = mini_sequence_report(model).last_kept
    if keep in ("all", "auto"):
        assert said == "2 layers kept everything; run once, not twice: 2 layers"
    elif keep == "matmuls":
        assert said == (
            "2 layers kept the results of their matrix products; run once, not twice: the products of 2 layers"
        )
    elif keep == "attention":
        assert said == "2 layers kept the attention's output; run once, not twice: 2 attentions"
    assert ("kept in the last step: " + said in str(mini_sequence_report(model))) or not said


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("lora", [False, True])
def test_autocast(keep, lora):
    model = build("llama", attention="sdpa")
    model = add_lora(model) if lora else model
    reference = copy.deepcopy(model)
    converted(model, KEEPS[keep])
    with torch.autocast("cpu", torch.bfloat16):
        for length in (23, 41):
            assert_same_training(model, reference, batch(length), rtol=3e-2)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("keep", KEEPS)
def test_adapters_two_losses_at_once_and_accumulation(keep, reentrant):
    model = add_lora(build("llama", attention="sdpa"))
    reference = copy.deepcopy(model)
    converted(model, KEEPS[keep])
    runs = []
    for m in (model, reference):
        checkpointed(m, use_reentrant=reentrant).train()
        for _ in range(2):
            losses = [m(**batch(length)).loss for length in (23, 31)]  # the second before the first one's backward
            sum(losses).backward()
        runs.append({name: p.grad for name, p in m.named_parameters() if p.requires_grad})
    assert_same_tensors(*runs)


@pytest.mark.parametrize(("keep", "kept"), [("matmuls", "the results of their matrix products"), ("all", "everything")])
def test_weights_of_four_bits_in_one_process(keep, kept):
    model = add_lora(quantized(build("llama", attention="sdpa")))
    reference = copy.deepcopy(model)
    converted(model, {"keep": keep})
    for length in (23, 41):
        assert_same_training(model, reference, batch(length))
    assert mini_sequence_report(model).last_kept.startswith(f"2 layers kept {kept};")


@pytest.mark.parametrize("keep", ["all", "auto"])
def test_the_same_random_numbers_as_the_unconverted_model(keep):
    model, reference = (with_dropout(m, 0.3) for m in twins("llama", attention="sdpa"))
    converted(model, KEEPS[keep])
    for length in (23, 31):
        runs = []
        for m in (model, reference):
            loss_and_grads(m, batch(length))  # what is found out at a first call draws numbers of its own
            torch.manual_seed(length)
            runs.append(loss_and_grads(m, batch(length)))
        torch.testing.assert_close(runs[0][0], runs[1][0])
        assert_same_tensors(runs[0][1], runs[1][1])


@pytest.mark.parametrize("keep", KEEPS)
def test_backward_twice(keep):
    model, reference = twins("llama", attention="sdpa")
    converted(model, KEEPS[keep])
    loss = assert_same_gradients_twice(model, reference, batch(23))
    with pytest.raises(RuntimeError):
        loss.backward()
    assert budget_of(model).live_bytes == 0


@pytest.mark.parametrize("length", [7, 53])
@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("lora", [True, False])
def test_nothing_is_computed_twice(lora, checkpointing, length):
    model = add_lora(build("llama", attention="sdpa")) if lora else build("llama", attention="sdpa")
    reference = copy.deepcopy(model)
    converted(model, {"keep": "all", "loss": False})
    if checkpointing:
        checkpointed(model).train()
        reference.enable_input_require_grads()
    counts = []
    for m in (model, reference):
        for _ in range(2):
            with Flops() as counter:
                loss_and_grads(m, batch(length))
        counts.append(counter.total)
    assert counts[0] == counts[1]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("keep", ["matmuls", "all"])
def test_weights_may_be_freed_and_come_back_elsewhere(keep, lora, autocast):
    """As under ZeRO-3: nothing holds the memory that they had in forward."""
    model = add_lora(build("llama", attention="sdpa")) if lora else build("llama", attention="sdpa")
    reference = copy.deepcopy(model)
    converted(model, {"keep": keep})
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = loss_and_grads(reference, batch(23))[1]
        loss_and_grads(model, batch(23))
        model.zero_grad()
        loss = model(**batch(23)).loss
    layers = next(m for m in model.modules() if type(m) is torch.nn.ModuleList)
    for p in layers.parameters():
        before = p.data
        p.data = before.clone()
        # This test's name, and the object made to ask; FSDP and ZeRO-3 free what nobody else holds.
        assert torch._C._storage_Use_Count(before.untyped_storage()._cdata) == 2
        before.fill_(torch.nan)
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert_same_tensors(grads, expected, rtol=3e-2 if autocast else 1e-5)


def test_one_node_gives_all_gradients_of_a_layer():
    """Gradients of a layer arrive together, in the same order whatever the layer keeps."""
    orders = []
    for keep in ("input", "matmuls", "all"):
        model = converted(build("llama", attention="sdpa"), {"keep": keep})
        loss_and_grads(model, batch(23))
        order = []
        handles = [
            p.register_post_accumulate_grad_hook(lambda _, name=name, order=order: order.append(name))
            for name, p in model.named_parameters()
        ]
        loss_and_grads(model, batch(23))
        [handle.remove() for handle in handles]
        orders.append(order)
    assert orders[0] == orders[1] == orders[2] and len(set(orders[0])) == len(orders[0])


def test_a_write_into_what_is_kept_is_an_error():
    model = converted(build("llama", attention="sdpa"), {"keep": "all"})
    loss_and_grads(model, batch(23))
    embedded = model.get_input_embeddings()(batch(23)["input_ids"]).detach().requires_grad_()
    inputs = batch(23) | {"inputs_embeds": embedded * 1}
    del inputs["input_ids"]
    loss = model(**inputs).loss
    with torch.no_grad():
        inputs["inputs_embeds"].mul_(2)
    with pytest.raises(RuntimeError, match="changed in place"):
        loss.backward()


def test_what_is_kept_is_freed_after_backward_and_with_the_loss():
    model = converted(build("llama", attention="sdpa"), {"memory_budget": 1})
    loss_and_grads(model, batch(23))
    loss = model(**batch(23)).loss
    assert budget_of(model).live_bytes > 0
    del loss
    gc.collect()
    assert budget_of(model).live_bytes == 0


def test_an_operation_that_holds_a_weight_by_itself(monkeypatch):
    """An engine could not free it; the layer keeps its input alone, and says so."""

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):
            ctx.weight = weight.t()
            return x @ ctx.weight

        @staticmethod
        def backward(ctx, grad):
            return grad @ ctx.weight.t(), None

    monkeypatch.setattr("ds_minis.layer.kept.layer_graph.has_other_ranks", lambda: True)
    model, reference = twins("llama", attention="sdpa")
    for m in (model, reference):
        for layer in m.model.layers:
            layer.mlp.down_proj.requires_grad_(False)
            layer.mlp.down_proj.forward = lambda x, own=layer.mlp.down_proj: Product.apply(x, own.weight)
    converted(model, {"keep": "all"})
    for _ in range(2):
        assert_same_training(model, reference, batch(23))
    assert "holds a weight until backward by itself" in str(mini_sequence_report(model).unkept)
    assert "everything" not in mini_sequence_report(model).last_kept


def test_a_weight_that_somebody_lets_go_of_during_the_forward(monkeypatch):
    """As gloo's own thread does after a gather: that call keeps the layer's input alone, and later ones everything."""
    monkeypatch.setattr("ds_minis.layer.kept.layer_graph.has_other_ranks", lambda: True)
    model, reference = twins("llama", attention="sdpa")
    held = []
    for layer in model.model.layers:
        layer.mlp.down_proj.forward = lambda x, own=layer.mlp.down_proj: held.clear() or F.linear(x, own.weight)
    converted(model, {"keep": "all"})
    assert_same_training(model, reference, batch(23))
    held += [layer.mlp.down_proj.weight.detach() for layer in model.model.layers]
    assert_same_training(model, reference, batch(23))
    assert mini_sequence_report(model).last_kept.startswith("1 layer kept everything, 1 layer kept the input alone")
    assert_same_training(model, reference, batch(23))
    assert mini_sequence_report(model).last_kept.startswith("2 layers kept everything")
    assert not mini_sequence_report(model).unkept


@pytest.mark.parametrize("number", range(3))
def test_out_of_memory_while_keeping(number, monkeypatch, caplog):
    """The layer keeps its input alone, the budget shrinks, and the step is completed."""
    model, reference = twins("llama", attention="sdpa")
    converted(model, {"memory_budget": 1})
    assert_same_training(model, reference, batch(23))
    made = []

    class Failing(kept_layer.LayerGraph):
        def __init__(self, *args):
            made.append(self)
            super().__init__(*args)
            if len(made) > number:
                raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(kept_layer, "LayerGraph", Failing)
    for _ in range(2):
        assert_same_training(model, reference, batch(31))
    assert budget_of(model).account(torch.zeros(1, 1, 1)).limit < 2**30 and budget_of(model).live_bytes == 0
    assert len([r for r in caplog.records if "memory ran out while a layer kept" in r.message]) == 1


def peak(model, inputs) -> int:
    model.zero_grad(set_to_none=True)
    with LiveBytes(apart=[*model.parameters(), *model.buffers()]) as live:
        model(**inputs).loss.backward()
    return live.peak


@pytest.mark.parametrize(
    ("kib", "attention", "levels"),
    [
        (50, "sdpa", {"input", "attention"}),
        (300, "sdpa", {"attention", "matmuls"}),
        (1200, "sdpa", {"attention", "matmuls", "all"}),
        (50, "eager", {"input"}),
        (1500, "eager", {"attention", "matmuls", "all"}),
    ],
)
def test_live_bytes_stay_within_the_budget_and_what_inputs_need(kib, attention, levels):
    sizes = {"num_hidden_layers": 6, "hidden_size": 64, "intermediate_size": 160, "head_dim": 16}
    model, plain = twins("llama", attention=attention, **sizes)
    for p in (*model.parameters(), *plain.parameters()):
        p.requires_grad_(p.dim() == 1)  # gradients of weights would hide what is kept
    converted(model, {"memory_budget": kib / 2**20})
    converted(plain, {"keep": "input"})
    for m in (model, plain):
        loss_and_grads(m, batch(12, batch_size=1))
    seen = set()
    for length in (90, 30, 128, 110):
        inputs = batch(length, batch_size=1)
        assert peak(model, inputs) <= peak(plain, inputs) + kib * 1024, length
        seen |= {level for level, number in budget_of(model).last.items() if number}
    assert seen == levels


def test_more_is_kept_with_more_budget_and_the_last_layers_first():
    kept = []
    for kib in (1, 600, 10000):
        model = converted(build("llama", attention="sdpa", num_hidden_layers=6), {"memory_budget": kib / 2**20})
        for _ in range(2):
            loss_and_grads(model, batch(60, batch_size=1))
        kept.append(budget_of(model).last.get("all", 0))
    assert kept == sorted(kept) and kept[0] == 0 and kept[-1] == 6 and 0 < kept[1] < 6, kept


@pytest.mark.parametrize(("attention", "grows"), [("sdpa", False), ("eager", True)])
def test_bytes_for_pairs_of_tokens_are_not_those_of_a_width(attention, grows):
    """With as many tokens as a width, a tensor of hidden states looks like one with a value for each pair."""
    model = converted(build("llama", attention=attention), {"memory_budget": 1})
    learned = []
    for length in (32, 41):
        loss_and_grads(model, batch(length, padding=3) if grows else batch(length, batch_size=1))
        learned += [need.per_pair > 0 for (level, _), need in budget_of(model).needs.items() if level == "all"]
    assert learned == [False, grows]


@pytest.mark.parametrize("num_tokens", [10, 10000])
def test_levels(num_tokens):
    def levels(budget, layers=8, **needs):
        needs = {"input": 0.0, "attention": 10.0, "matmuls": 40.0, "all": 100.0} | needs
        chosen, live = [], 0.0
        for left in range(layers, 0, -1):
            level = keep_budget.choose_level(budget - live, left, num_tokens, 1000, needs)
            chosen.append(level)
            live += needs[level]
        assert live <= budget
        return chosen

    assert levels(1000) == ["all"] * 8 and levels(0) == ["input"] * 8
    assert levels(340) == ["matmuls"] * 8
    assert levels(600) == ["matmuls"] * 5 + ["all"] * 3  # products first
    # At few tokens a product saves more per byte than an attention, at many less.
    assert levels(170) == (["input"] * 4 + ["matmuls"] * 4 if num_tokens == 10 else ["attention"] * 6 + ["matmuls"] * 2)
    assert levels(270, matmuls=10.0) == ["matmuls"] * 7 + ["all"]  # a layer without linear layers of its own
    order = {"input": 0, "attention": 1, "matmuls": 2, "all": 3}
    for budget in range(0, 1000, 7):
        ranks = [order[level] for level in levels(budget)]
        assert ranks == sorted(ranks), (budget, ranks)
    assert levels(95) == (["input"] * 6 + ["matmuls"] * 2 if num_tokens == 10 else ["attention"] * 8)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep": "all", "head_groups": 2}, "keep='all' takes memory to save time, and head_groups=2"),
        ({"keep": "all", "offload": "cpu"}, "keep='all' holds most of a layer on the device"),
        ({"keep": "matmuls", "offload": "cpu"}, "keep='matmuls' holds most of a layer on the device"),
        ({"keep": "matmuls", "head_groups": 2}, "keep='matmuls' takes memory to save time, and head_groups=2"),
        ({"keep": "all", "memory_budget": 2}, 'memory_budget=2 is for keep "auto"'),
        ({"keep": "all", "sequence_parallel": 2}, "does not go with sequence_parallel=2"),
        ({"memory_budget": 1, "sequence_parallel": 2}, "does not go with sequence_parallel=2"),
        ({"memory_budget": 0}, 'memory_budget: a number of GiB above 0, "auto" or null is allowed'),
        ({"memory_budget": "Auto"}, 'did you mean "auto"'),
        ({"memory_budget": "auto", "keep": "input"}, "memory_budget='auto' is for keep \"auto\", not 'input'"),
        (
            {"memory_budget": "auto", "sequence_parallel": 2},
            "memory_budget='auto' does not go with sequence_parallel=2",
        ),
        ({"memory_budget": "auto", "scope": "tokens"}, "memory_budget='auto' is for whole layers"),
        ({"offload": "auto", "keep": "all"}, "keep='all' holds most of a layer on the device"),
        ({"offload": "auto", "keep": "attention"}, "offload='auto' finds room for the layers' inputs first"),
        ({"offload": "auto", "sequence_parallel": 2}, "offload='auto' does not go with sequence_parallel=2"),
        ({"offload": "disk"}, 'offload: "cpu", "auto" or null is allowed'),
        ({"keep": "all", "scope": "mlp"}, "keep='all' is for whole layers"),
        ({"keep_attention": True}, 'it became a value of "keep"'),
        ({"keep": "everything"}, '"input" or "attention" or "matmuls" or "all" or "auto" is allowed'),
    ],
)
def test_settings_that_do_not_go_together(settings, message):
    with pytest.raises(ValueError, match=message):
        MiniSequenceConfig(**settings)
