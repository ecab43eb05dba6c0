"""A loss that weighs all tokens alike, or a pair oppositely, has three products of a trained head: gradients stay exact."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from flops import Flops
from heads import LOSS_ONLY, H, Model, V, data
from models import add_lora, assert_same_tensors, batch, twins
from torch import nn

from ds_minis import convert_to_mini_sequence
from ds_minis.loss.heads.one_factor import Labelled, OneFactor
from ds_minis.loss.heads.row_columns import columns_of, row_columns
from ds_minis.loss.kernels.token_statistics import NAMES, token_statistics
from ds_minis.tiling.core.participation import Memory

INPUTS = data()
LABELS = INPUTS["labels"].flatten()
COUNT = (LABELS != -100).sum()
PRODUCT = 2 * LABELS.numel() * H * V
TWO_PAIRS = data(batch_size=4)


def losses(model, ids=INPUTS["input_ids"], **options) -> torch.Tensor:
    return F.cross_entropy(model(ids)["logits"].view(-1, V), LABELS, reduction="none", **options)


def log_probs(model) -> torch.Tensor:
    return model(INPUTS["input_ids"])["logits"].view(-1, V).log_softmax(-1)


def weighted(model) -> torch.Tensor:
    return (losses(model) * torch.linspace(0.5, 1, LABELS.numel())).sum()


def preference(model, inputs=INPUTS, lengths=(1, 1), reward=lambda margin: -F.logsigmoid(0.1 * margin)) -> torch.Tensor:
    """DPO's loss: of the margin between the sums of the sequences in both halves of the batch, over their lengths."""
    labels = inputs["labels"]
    per_token = F.cross_entropy(model(inputs["input_ids"])["logits"].view(-1, V), labels.flatten(), reduction="none")
    chosen, rejected = (-per_token).view(labels.shape).sum(1).chunk(2)
    return reward(chosen / lengths[0] - rejected / lengths[1] - 0.3).mean()


LOSSES = {
    "mean": lambda model: losses(model).sum() / COUNT,
    "mean over all rows": lambda model: losses(model).mean(),
    "sum, scaled": lambda model: -3.7 * losses(model).sum(),
    "weighted": weighted,
    "one token less": lambda model: losses(model)[:-1].sum(),
    "one token more": lambda model: losses(model).sum() + losses(model)[-1],
    "smoothed": lambda model: losses(model, label_smoothing=0.1).sum() / COUNT,
    "classes weighted": lambda model: losses(model, weight=torch.linspace(0.5, 2, V).to(model.lm_head.weight)).sum(),
    "pair": preference,
    "pair, scaled": lambda model: -3.7 * preference(model),
    "two pairs": lambda model: preference(model, TWO_PAIRS),
    "two pairs, one factor": lambda model: preference(model, TWO_PAIRS, reward=lambda margin: -0.1 * margin),
    "by length": lambda model: preference(model, lengths=(14, 23)),
    "IPO": lambda model: preference(model, lengths=(14, 23), reward=lambda margin: (margin - 5) ** 2),
    "nll": lambda model: F.nll_loss(log_probs(model), LABELS, reduction="none").sum(),
}


def grads_of(model, loss, backward=lambda value: value.backward()) -> dict:
    model.zero_grad()
    value = loss(model)
    backward(value)
    return {"loss": value.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def pair(**settings) -> tuple[nn.Module, nn.Module]:
    model = Model(**settings)
    return convert_to_mini_sequence(model, LOSS_ONLY).train(), Model(**settings).train()


def products(model, reference, *names: str) -> list[float]:
    """The products of each step, whose loss and gradients are those of the plain model."""
    tolerance = 1e-10 if model.lm_head.weight.dtype == torch.float64 else 1e-5
    found = []
    for name in names:
        with Flops() as counter:
            actual = grads_of(model, LOSSES[name])
        assert_same_tensors(actual, grads_of(reference, LOSSES[name]), rtol=tolerance)
        found.append(round(counter.total / PRODUCT, 1))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "name", ["mean", "mean over all rows", "sum, scaled", "smoothed", "classes weighted", "nll", "pair"]
)
def test_three_products(name, dtype):
    """From the first step on, but for a pair, as a mean is expected there."""
    assert products(*pair(dtype=dtype), name, name, name) == [6 if name == "pair" else 3, 3, 3]


@pytest.mark.parametrize("name", ["weighted", "one token less"])
def test_another_loss_is_exact_and_nothing_is_expected_again(name):
    models = pair(bias=True)
    assert products(*models, "mean", "mean", name, "mean", "mean") == [3, 3, 6, 4, 4]
    assert products(*pair(), name, "mean", "mean") == [6, 4, 4]


def test_one_pair_and_what_is_not_one_factor_but_for_its_sign():
    """Chosen and rejected with opposite gradients; several pairs have several factors, and lengths make two of one."""
    assert products(*pair(), "pair", "pair, scaled", "pair") == [6, 3, 3]
    for name in ("by length", "IPO", "mean"):
        assert products(*pair(bias=True), "pair", "pair", name, "pair") == [6, 3, 6, 4]
    assert products(*pair(), "mean", "mean", "pair", "mean") == [3, 3, 6, 4]
    assert products(*pair(), "two pairs", "two pairs", "pair") == [12, 8, 4]
    # Until the policy leaves the reference.
    assert products(*pair(), *["two pairs, one factor"] * 2, "two pairs", "two pairs") == [12, 6, 12, 8]
    assert products(*pair(), "by length", "pair", "pair") == [6, 4, 4]


def test_two_calls_of_which_one_weighs_a_token():
    assert products(*pair(), "mean", "one token more", "mean") == [3, 3 + 6, 4]


def test_other_logits_of_one_head_tied_weights_and_a_softcap():
    models = pair(process=lambda logits: 5 * torch.tanh(logits / 5), bias=True)
    for m in models:
        m.lm_head.weight = m.embed.weight
    assert products(*models, "mean", "sum, scaled") == [3, 3]


@pytest.mark.parametrize("names", [("mean", "sum, scaled"), ("pair", "pair, scaled")])
def test_accumulation_and_two_forwards_before_a_backward(names):
    model, reference = pair()
    products(model, reference, names[0])
    several = lambda m: sum(LOSSES[name](m) for name in (*names, names[0]))  # noqa: E731
    with Flops() as counter:
        actual = grads_of(model, several)
    assert_same_tensors(actual, grads_of(reference, several))
    assert counter.total == 9 * PRODUCT
    for m in (model, reference):
        m.zero_grad()
        for name in names:
            LOSSES[name](m).backward()
    assert_same_tensors(*({n: p.grad for n, p in m.named_parameters()} for m in (model, reference)))


@pytest.mark.parametrize("name", ["mean", "weighted", "pair"])
def test_backward_again(name):
    def twice(value):
        value.backward(retain_graph=True)
        (value * 0.3).backward()

    model, reference = pair()
    products(model, reference, "mean")
    assert_same_tensors(*(grads_of(m, LOSSES[name], twice) for m in (model, reference)))


def test_zeros_and_what_is_not_finite_show_nothing():
    model, reference = pair()
    seen = model(INPUTS["input_ids"])["logits"].heads()[0].chunking.memory.one_factor
    grads_of(model, lambda m: losses(m).sum() * 0)
    grads_of(model, lambda m: losses(m).sum() * math.nan)
    assert not seen
    assert products(model, reference, "mean") == [3]
    grads_of(model, lambda m: losses(m).sum() * math.inf)
    assert not any(grad.any() for grad in grads_of(model, lambda m: losses(m).sum() * 0).values())
    assert seen == {"losses": ("alike",)}
    assert products(model, reference, "mean") == [3]


def test_a_copy_starts_anew():
    model, reference = pair()
    products(model, reference, "weighted")
    assert products(copy.deepcopy(model), reference, "mean") == [3] and products(model, reference, "mean") == [4]


def test_no_gradients_and_a_frozen_head():
    model, reference = pair()
    products(model, reference, "mean")
    with torch.no_grad(), Flops() as counter:
        LOSSES["mean"](model)
    assert counter.total == PRODUCT
    for m in (model, reference):
        m.lm_head.requires_grad_(False)
    assert products(model, reference, "mean", "weighted", "mean") == [2, 2, 2]
    for m in (model, reference):
        m.lm_head.requires_grad_(True)
        m.embed.requires_grad_(False)
    assert products(model, reference, "mean", "mean") == [2, 2]  # no gradient of the hidden states


def test_rounding_in_bfloat16_and_none_in_float16():
    for dtype, expected in ((torch.bfloat16, 3), (torch.float16, 4)):
        model, _ = pair()
        reference = Model(dtype=torch.float64)
        for _ in range(2):
            with Flops() as counter:
                actual = grads_of(model, lambda m, dtype=dtype: autocast(m, dtype))
        assert counter.total == expected * PRODUCT
        true = grads_of(reference, lambda m: losses(m).sum() / 7)
        for name, grad in true.items():
            assert (actual[name] - grad).norm() < 0.01 * grad.norm()


def autocast(model, dtype) -> torch.Tensor:
    with torch.autocast("cpu", dtype):
        return losses(model).sum() / 7


@pytest.mark.parametrize(("lora", "other"), [(False, (1, 0.1)), (False, (0, 0.1)), (True, (1, 0.1))])
def test_calls_of_trls_trainers(lora, other):
    """An entropy that is logged is no part of the loss; one in the loss is, alone or beside the log-probabilities."""
    utils = pytest.importorskip("trl.trainer.utils")
    model, reference = twins("llama", num_hidden_layers=1)
    inputs, totals = batch(23, prompt=4, padding=3), []
    utils.add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    if lora:
        model, reference = (add_lora(m, target_modules=["q_proj", "lm_head"]) for m in (model, reference))
    convert_to_mini_sequence(model.train(), {**LOSS_ONLY, "loss_chunk_size": 4})
    for weights in ((1, 0), (1, 0), other, (1, 0)):
        with Flops() as counter:
            actual = grads_of(model, lambda m, weights=weights: fused_loss(m(**inputs, fused_lm_head=True), *weights))
        assert_same_tensors(actual, grads_of(reference.train(), lambda m, w=weights: plain_loss(m, inputs, *w)))
        totals.append(counter.total)
    assert totals[1] < totals[3] < totals[2] and totals[1] <= totals[0]  # which analyzes the head too


def test_calls_of_trls_dpo():
    utils = pytest.importorskip("trl.trainer.utils")
    model, reference = twins("llama", num_hidden_layers=1)
    inputs, totals = batch(23, prompt=4, padding=3), []
    utils.add_fused_lm_head(model, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    convert_to_mini_sequence(model.train(), {**LOSS_ONLY, "loss_chunk_size": 4})
    labels = inputs["labels"][:, 1:]

    def loss(m, lengths):
        if m is model:
            log_probs_BT = m(**inputs, fused_lm_head=True).log_probs
        else:
            logits = m(**{key: value for key, value in inputs.items() if key != "labels"}).logits[:, :-1]
            log_probs_BT = -F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        chosen, rejected = log_probs_BT.sum(1).chunk(2)
        return -F.logsigmoid(0.1 * (chosen / lengths[0] - rejected / lengths[1])).mean()

    for lengths in ((1, 1), (1, 1), (2, 3), (1, 1)):
        with Flops() as counter:
            actual = grads_of(model, lambda m, lengths=lengths: loss(m, lengths))
        assert_same_tensors(actual, grads_of(reference.train(), lambda m, lengths=lengths: loss(m, lengths)))
        totals.append(counter.total)
    assert totals[1] < totals[3] < totals[2] <= totals[0]


def fused_loss(output, of_labels: float, of_entropy: float) -> torch.Tensor:
    terms = [-of_labels * output.log_probs.sum() / 7, of_entropy * output.entropy.square().sum()]
    return sum(term if weight else term.detach() for term, weight in zip(terms, (of_labels, of_entropy), strict=True))


def plain_loss(model, inputs: dict, of_labels: float, of_entropy: float) -> torch.Tensor:
    logits = model(**{key: value for key, value in inputs.items() if key != "labels"}).logits[:, :-1]
    labels = inputs["labels"][:, 1:]
    log_p = logits.log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1).masked_fill(labels == -100, 0)
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / 7
    return of_labels * loss + of_entropy * entropy.square().sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_statistics_whose_gradient_is_expected(temperature, dtype):
    torch.manual_seed(0)
    x, weight, target = torch.randn(9, H, dtype=dtype), torch.randn(V, H, dtype=dtype), torch.randint(V, (9,))
    weight[3] = weight[5]  # two largest logits
    target[:4] = torch.tensor([3, 5, 3, 5])
    x[:4] = weight[3]
    expected = torch.tensor([0.3, 0.0] * 4 + [0.2])
    results = []
    for given in (expected, None):
        leaf = x.clone().requires_grad_()
        logits = leaf @ weight.t()
        found = token_statistics(logits, target, temperature, NAMES, given)
        (found[:, 0] * expected).sum().backward()
        results.append((found.detach(), leaf.grad))
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2e-2}[dtype]
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
    wide = (x @ weight.t()).to(torch.promote_types(dtype, torch.float32))
    assert torch.equal(results[0][0][:, -1], (wide.argmax(-1) == target).to(wide.dtype))
    assert results[0][0][:4, -1].sum() == 2  # the first of two largest


class Scaled(nn.Module):
    """A linear layer with a buffer, and a parameter that no call uses."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.unused = nn.Linear(H, V), nn.Parameter(torch.ones(3))
        self.register_buffer("scale", torch.tensor(0.7))

    def forward(self, x_RH, labels_R, expected=None):
        return F.cross_entropy(self.linear(x_RH) * self.scale, labels_R, reduction="none")


def test_what_no_call_uses_and_a_buffer_that_is_written_to():
    module, plain = Scaled(), Scaled()
    x, labels, memory, hooks = torch.randn(9, H), torch.randint(V, (9,)), Memory(), []
    module.unused.register_hook(hooks.append)
    for weights in (torch.ones(9), torch.ones(9), torch.arange(9.0)):
        module.zero_grad()
        plain.zero_grad()
        labelled = OneFactor(memory, Labelled("losses", labels >= 0))
        (column,) = columns_of_(row_columns(module, module, [x, labels], 4, labels=labelled))
        module.scale.mul_(2)
        (column * weights).sum().backward()
        module.scale.div_(2)
        (plain(x, labels) * weights).sum().backward()
        assert_same_tensors(
            *({n: p.grad for n, p in m.named_parameters() if p.grad is not None} for m in (module, plain))
        )
    assert memory.one_factor == {"losses": ()} and not hooks


def weighted_sum(module, memory, labels, weights) -> torch.Tensor:
    torch.manual_seed(1)
    x = torch.randn(len(labels), H, dtype=module.linear.weight.dtype)
    labelled = OneFactor(memory, Labelled("losses", labels >= 0))
    (column,) = columns_of_(row_columns(module, module, [x, labels], 4, labels=labelled))
    return (column.masked_fill(labels < 0, 0) * weights).sum()


def test_labels_in_one_half_show_neither_sign():
    """They are expected alike, until a half with another sign comes; a call keeps what its own forward has expected."""
    memory, module, plain = Memory(), Scaled(), Scaled()
    labels = torch.randint(V, (10,))
    first, second = labels.index_fill(0, torch.arange(5, 10), -100), labels.index_fill(0, torch.arange(5), -100)
    alike = torch.ones(10)
    opposed = alike.index_fill(0, torch.arange(5, 10), -1)
    both = ("alike", "opposed")
    steps = [(first, alike, both), (second, alike, both), (labels, 3 * opposed, both[1:]), (second, alike, both[1:])]
    for given, weights, seen in [*steps, (labels, opposed, both[1:])]:
        grads = []
        for m, shown in ((module, memory), (plain, Memory())):
            m.zero_grad()
            weighted_sum(m, shown, given, weights).backward()
            grads.append({n: p.grad for n, p in m.named_parameters() if p.grad is not None})
        assert_same_tensors(*grads)
        assert memory.one_factor["losses"] == seen
    memory.one_factor["losses"] = both
    for m, shown in ((module, memory), (plain, Memory())):
        m.zero_grad()
        earlier = weighted_sum(m, shown, labels, alike)
        weighted_sum(m, shown, labels, opposed).backward()
        earlier.backward()
    assert_same_tensors(*({n: p.grad for n, p in m.named_parameters() if p.grad is not None} for m in (module, plain)))


def test_numbers_in_bfloat16_have_no_bias():
    """The ratio of this factor to 1 / 9 rounds to bfloat16 with an error of 0.4%."""
    labels, factor = torch.randint(V, (9,)), torch.full((9,), 0.23, dtype=torch.bfloat16)
    grads = []
    for seen in (("alike",), ()):
        module, memory = Scaled().bfloat16(), Memory()
        memory.one_factor["losses"] = seen
        weighted_sum(module, memory, labels, factor).backward()
        grads.append(module.linear.weight.grad.double().flatten())
    assert abs(grads[0] @ grads[1] / grads[1].square().sum() - 1) < 5e-4


def columns_of_(result):
    return result if type(result) is tuple else columns_of(result)
