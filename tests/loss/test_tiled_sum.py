"""Sums over chunks of rows whose gradients are computed in forward, against the plain sum."""

import copy

import pytest
import torch
from models import assert_same_tensors
from torch import nn
from torch.utils.checkpoint import checkpoint

from ds_minis.loss.heads.tiled_sum import sum_rows

H, CHUNK, EXPECTED = 8, 5, torch.tensor(0.1)


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.scale = nn.Linear(H, 11), nn.Parameter(torch.tensor(0.7))
        self.unused = nn.Parameter(torch.ones(3))
        self.linear.bias.requires_grad_(False)

    def forward(self, x, labels):
        return nn.functional.cross_entropy(self.linear(x) * self.scale, labels, reduction="none")


def data(rows=23):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rows, H, generator=generator), torch.randint(0, 11, (rows,), generator=generator)


def grads(head, x):
    return {"x": x.grad, **{name: p.grad for name, p in head.named_parameters()}}


def assert_same(head, x, reference, y):
    actual, expected = ({n: g for n, g in grads(h, i).items() if g is not None} for h, i in ((head, x), (reference, y)))
    assert "unused" not in expected and "linear.bias" not in expected
    assert_same_tensors(actual, expected)


@pytest.mark.parametrize("rows", [1, 4, 5, 23, 25])
def test_value_and_gradients_of_the_whole_for_any_incoming_gradient(rows):
    head, (x, labels) = Head(), data(rows)
    reference, y = copy.deepcopy(head), x.clone().requires_grad_()
    x.requires_grad_()
    total, expected = sum_rows(head, head, [x, labels], CHUNK, EXPECTED), reference(y, labels).sum()
    torch.testing.assert_close(total, expected)
    (total.square() * -3).backward()
    (expected.square() * -3).backward()
    assert_same(head, x, reference, y)


def test_gradients_that_are_kept_for_a_second_time_are_made_again():
    head, (x, labels) = Head(), data()
    reference, y = copy.deepcopy(head), x.clone().requires_grad_()
    x.requires_grad_()
    total, expected = sum_rows(head, head, [x, labels], CHUNK, EXPECTED), reference(y, labels).sum()
    for factor in (2.0, 0.0, -5.0):
        (total * factor).backward(retain_graph=True)
        (expected * factor).backward(retain_graph=True)
        assert_same(head, x, reference, y)
    total.backward()
    with pytest.raises(RuntimeError, match="second time"):
        total.backward()


def test_random_numbers_are_the_same_where_gradients_are_made_again():
    head, (x, labels) = Head(), data()
    x.requires_grad_()
    function = lambda x, labels: head(nn.functional.dropout(x), labels)  # noqa: E731
    total = sum_rows(function, head, [x, labels], CHUNK, EXPECTED)
    first = torch.autograd.grad(total, [x, head.linear.weight], retain_graph=True)
    state = torch.get_rng_state()
    again = torch.autograd.grad(total, [x, head.linear.weight])
    assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


def test_no_chunk_is_run_again_in_backward():
    head, (x, labels) = Head(), data()
    calls = []
    head.linear.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    total = sum_rows(head, head, [x, labels], CHUNK, EXPECTED)
    assert calls == [True] * 5
    total.backward()
    assert len(calls) == 5
    with torch.no_grad():
        assert not sum_rows(head, head, [x, labels], CHUNK, EXPECTED).requires_grad
    assert calls[5:] == [False] * 5


def test_activation_checkpointing_around_it():
    head, (x, labels) = Head(), data()
    reference, y = copy.deepcopy(head), x.clone().requires_grad_()
    x.requires_grad_()
    checkpoint(lambda x: sum_rows(head, head, [x, labels], CHUNK, EXPECTED), x, use_reentrant=False).backward()
    reference(y, labels).sum().backward()
    assert_same(head, x, reference, y)


def test_weights_that_fsdp1_holds_in_two_places():
    """In forward a view of its flat parameter stands in `_parameters` and in `__dict__`, which is where it is read."""
    head, (x, labels) = Head(), data()
    reference, own = copy.deepcopy(head), head.linear.weight
    view = own * 1
    head.linear._parameters["weight"] = head.linear.__dict__["weight"] = view
    sum_rows(head, head, [x, labels], CHUNK, EXPECTED).backward()
    assert head.linear._parameters["weight"] is view and head.linear.__dict__["weight"] is view
    reference(x, labels).sum().backward()
    torch.testing.assert_close(own.grad, reference.linear.weight.grad)


def test_nothing_trainable_means_no_gradient_work():
    head, (x, labels) = Head().requires_grad_(False), data()
    calls = []
    head.linear.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    assert not sum_rows(head, head, [x, labels], CHUNK, EXPECTED).requires_grad
    assert calls == [False] * 5


def test_a_gradient_of_a_gradient_is_refused():
    head, (x, labels) = Head(), data()
    total = sum_rows(head, head, [x, labels], CHUNK, EXPECTED)
    with pytest.raises(RuntimeError, match="create_graph=True"):
        torch.autograd.grad(total, head.linear.weight, create_graph=True)


def test_parameters_are_back_after_an_error_in_a_chunk():
    head, (x, labels) = Head(), data()
    before = dict(head.linear._parameters)

    def fails(x, labels):
        if len(x) < CHUNK:
            raise RuntimeError("the last chunk")
        return head(x, labels)

    with pytest.raises(RuntimeError, match="the last chunk"):
        sum_rows(fails, head, [x, labels], CHUNK, EXPECTED)
    assert all(head.linear._parameters[name] is p for name, p in before.items())
    assert all(p.grad is None for p in head.parameters())


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_leaves_no_cast_weight_behind(dtype, gradients):
    head, (x, labels) = Head(), data()
    with torch.autocast("cpu", dtype):
        if gradients:
            sum_rows(head, head, [x, labels], CHUNK, EXPECTED).backward()
        else:
            with torch.no_grad():
                sum_rows(head, head, [x, labels], CHUNK, EXPECTED)
        head.zero_grad()
        head(x, labels).sum().backward()  # a cast kept from before would give no gradient
    assert head.linear.weight.grad.abs().max() > 0
