"""A few numbers for each row, the first with its gradient computed in forward: gradients are those of one untiled call."""

import pytest
import torch
from torch import nn

from ds_minis.loss.heads.row_columns import columns_of, row_columns

NUM_ROWS, CHUNK = 23, 5


class Numbers:
    """`(C, 3)` numbers of rows of a linear layer, and of factors; counts its calls."""

    def __init__(self, dtype=torch.float64, trained=False):
        torch.manual_seed(0)
        self.module = nn.Linear(6, 11, dtype=dtype).requires_grad_(trained)
        self.x = torch.randn(NUM_ROWS, 6, dtype=dtype, requires_grad=True)
        self.factors = torch.rand(NUM_ROWS, 1, dtype=dtype, requires_grad=True)
        self.calls = 0

    def __call__(self, x, factor):
        self.calls += 1
        y = self.module(x) * factor
        return torch.stack([y.logsumexp(-1), y.square().mean(-1), y[:, 3].sin()], -1)

    def tensors(self):
        return self.x, self.factors, *self.module.parameters()

    def grads(self):
        grads = [t.grad for t in self.tensors()]
        for tensor in self.tensors():
            tensor.grad = None
        return grads


LOSSES = {
    "the first": lambda a, b, c: (a * torch.linspace(-1, 2, NUM_ROWS).to(a)).sum(),
    "the first, masked": lambda a, b, c: a.masked_fill(torch.arange(NUM_ROWS) % 3 == 0, 0).square().sum(),
    "another": lambda a, b, c: (b * torch.linspace(-1, 2, NUM_ROWS).to(a)).sum(),
    "all": lambda a, b, c: (a * b + c).sum(),
    "the first, others without gradients": lambda a, b, c: (a * b.detach()).sum(),
}


def of(numbers: Numbers, chunk: int = CHUNK, function=None) -> tuple[torch.Tensor, ...]:
    result = row_columns(function or numbers, numbers.module, [numbers.x, numbers.factors], chunk)
    assert type(result) is tuple or not result._is_view()
    return result if type(result) is tuple else columns_of(result)


def compared(numbers: Numbers, loss, passes: int = 1) -> None:
    results = []
    for chunk in (CHUNK, NUM_ROWS):
        columns = of(numbers, chunk)
        value = loss(*columns)
        for again in reversed(range(passes)):
            value.backward(retain_graph=again > 0)
        results.append((*columns, *numbers.grads()))
    for found, expected in zip(*results, strict=True):
        assert (found is None) == (expected is None)
        if expected is not None:
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_those_of_one_call(name, trained):
    compared(Numbers(trained=trained), LOSSES[name])


@pytest.mark.parametrize("passes", [2, 3])
@pytest.mark.parametrize("name", LOSSES)
def test_backward_again(name, passes):
    compared(Numbers(), LOSSES[name], passes)


def test_no_chunk_is_run_again_for_the_first_number():
    numbers, chunks = Numbers(), -(-NUM_ROWS // CHUNK)
    columns = of(numbers)
    LOSSES["the first, others without gradients"](*columns).backward()
    assert numbers.calls == chunks
    columns = of(numbers)
    LOSSES["all"](*columns).backward()
    assert numbers.calls == 3 * chunks


def test_hidden_states_in_bfloat16_have_gradients_of_their_dtype():
    numbers, wide = Numbers(torch.bfloat16), Numbers()
    with torch.no_grad():
        for own, other in zip(wide.tensors(), numbers.tensors(), strict=True):
            own.copy_(other)
    for each in (numbers, wide):
        columns = of(each)
        LOSSES["the first"](*columns).backward()
    assert numbers.x.grad.dtype == torch.bfloat16
    error = (numbers.x.grad - wide.x.grad).norm() / wide.x.grad.norm()
    assert error < 0.02


@pytest.mark.parametrize("trained", [False, True])
def test_a_caller_may_write_to_the_numbers(trained):
    compared(Numbers(trained=trained), lambda a, b, c: (a.mul_(2) * b.masked_fill_(b > 0.5, 0)).sum())


def test_random_numbers_are_those_of_forward_where_a_chunk_is_run_again():
    numbers = Numbers()
    numbers.module = nn.Sequential(numbers.module, nn.Dropout(0.5))
    results = []
    for tiled in (True, False):
        torch.manual_seed(1)
        if tiled:
            columns = of(numbers)
        else:
            chunks = zip(numbers.x.split(CHUNK), numbers.factors.split(CHUNK), strict=True)
            columns = torch.cat([numbers(*chunk) for chunk in chunks]).unbind(-1)
        torch.manual_seed(2)
        LOSSES["all"](*columns).backward()
        results.append((*columns, *(grad for grad in numbers.grads() if grad is not None)))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_gradients_of_gradients_are_refused():
    numbers = Numbers()
    first, *_ = of(numbers)
    with pytest.raises(RuntimeError, match="loss"):
        torch.autograd.grad(first.sum(), numbers.x, create_graph=True)


@pytest.mark.parametrize("trained", [False, True])
def test_one_number_of_each_row(trained):
    numbers = Numbers(trained=trained)
    results = []
    for chunk in (CHUNK, NUM_ROWS):
        (column,) = of(numbers, chunk, lambda *rows: numbers(*rows)[:, 0].clone())
        (column * torch.linspace(-1, 2, NUM_ROWS).to(column)).sum().backward()
        results.append((column, *(g for g in numbers.grads() if g is not None)))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
