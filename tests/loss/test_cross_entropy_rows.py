"""The loss of one chunk against float64: torch's implementation, or the kernel under Triton's interpreter.

TRITON_INTERPRET=1 pytest tests/loss/test_cross_entropy_rows.py      # the kernel; test_cross_entropy.py runs it so
"""

import os

import pytest
import torch
import torch.nn.functional as F

from ds_minis.loss.kernels import cross_entropy as plain

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # when Triton is imported, or its own functions are compiled


@pytest.fixture
def implementation(monkeypatch):
    """torch's; or the kernel, where Triton's interpreter is on."""
    if not INTERPRETED:
        monkeypatch.setitem(plain.BLOCK_ELEMENTS, "cpu", 100)  # some rows to a block, and one
        return plain.PlainTorch
    from ds_minis.loss.kernels import cross_entropy_kernel

    monkeypatch.setattr(cross_entropy_kernel, "MAX_BLOCK", 64)  # several blocks to a row
    return cross_entropy_kernel


def chunk(vocab_size, dtype=torch.float32, rows=7, ignore_index=-100):
    generator = torch.Generator().manual_seed(vocab_size)
    logits = (torch.randn(rows, vocab_size, generator=generator) * 4).to(dtype)
    target = torch.randint(0, vocab_size, (rows,), generator=generator)
    target[[0, rows // 2]] = ignore_index
    return logits, target


def expected(logits, target, ignore_index, grad):
    exact = logits.double().requires_grad_()
    losses = F.cross_entropy(exact, target, ignore_index=ignore_index, reduction="none")
    (gradient,) = torch.autograd.grad(losses, exact, grad.double().expand_as(losses))
    return losses.detach(), gradient


# One rounding of the gradient to the dtype of the logits; the interpreter cuts bfloat16 off instead.
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2**-7 if INTERPRETED else 2**-8, torch.float16: 2**-11}


def assert_close(actual, exact, dtype):
    torch.testing.assert_close(actual.double(), exact, rtol=ROUNDING[dtype], atol=1e-7)


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize(
    ("vocab_size", "ignore_index"), [(1, -100), (37, -100), (64, 5), (127, -1), (129, 2**31 + 5), (301, -100)]
)
def test_losses_and_gradients(implementation, dtype, vocab_size, ignore_index):
    logits, target = chunk(vocab_size, dtype, ignore_index=ignore_index)
    weights = torch.linspace(-1, 2, 7)
    losses, gradient = expected(logits, target, ignore_index, weights)
    before = logits.clone()
    actual, normalizers = implementation.losses(logits, target, ignore_index, None)
    assert torch.equal(logits, before) and actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), losses, rtol=1e-6, atol=2e-6)
    made = implementation.gradients(logits, target, ignore_index, normalizers, weights)
    assert torch.equal(logits, before) and made.dtype == dtype
    assert_close(made, gradient, dtype)
    assert made[target == ignore_index].eq(0).all()


@pytest.mark.parametrize("level", [0.0, 1e2, 1e4])
def test_small_losses_of_large_logits(implementation, level):
    """A row that is nearly right: its loss must not be lost in the rounding of its logits. As close as torch's."""
    logits, target = chunk(301)
    rows = (target != -100).nonzero().squeeze()
    logits[rows, target[rows]] = logits[rows].amax(1) + 7
    logits += level
    weights = torch.ones(7)
    losses, gradient = expected(logits, target, -100, weights)
    actual, normalizers = implementation.losses(logits, target, -100, None)
    torch.testing.assert_close(actual.double(), losses, rtol=3e-4, atol=0)
    made = implementation.gradients(logits, target, -100, normalizers, weights)
    torchs = logits.clone().requires_grad_()
    F.cross_entropy(torchs, target, reduction="sum").backward()
    assert (made - gradient).abs().max() <= 3 * (torchs.grad - gradient).abs().max()


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("vocab_size", [37, 301])
def test_gradients_in_the_place_of_the_logits(implementation, dtype, vocab_size):
    for factor in (torch.tensor(0.37), torch.linspace(-1, 2, 7)):
        logits, target = chunk(vocab_size, dtype)
        losses, gradient = expected(logits, target, -100, factor)
        actual, _ = implementation.losses(logits, target, -100, factor)
        torch.testing.assert_close(actual.double(), losses, rtol=1e-6, atol=2e-6)
        assert_close(logits, gradient, dtype)


def test_rows_without_a_label(implementation):
    logits, target = chunk(37)
    target[:] = -100
    losses, normalizers = implementation.losses(logits, target, -100, None)
    gradient = implementation.gradients(logits, target, -100, normalizers, torch.ones(7))
    assert losses.eq(0).all() and gradient.eq(0).all()
    implementation.losses(logits, target, -100, torch.tensor(1.0))
    assert logits.eq(0).all()


@pytest.mark.parametrize("make", [lambda x: x[:, 3:141], lambda x: x[::2], lambda x: x[:, :6].t()])
def test_rows_that_are_not_contiguous(implementation, make):
    base, _ = chunk(301)
    logits = make(base)
    target = torch.arange(logits.shape[0]).clamp(max=logits.shape[1] - 1)
    losses, gradient = expected(logits, target, -100, torch.tensor(1.0))
    actual, normalizers = implementation.losses(logits, target, -100, None)
    torch.testing.assert_close(actual.double(), losses, rtol=1e-6, atol=2e-6)
    made = implementation.gradients(logits, target, -100, normalizers, torch.ones_like(losses).float())
    assert_close(made, gradient, torch.float32)
    written = base.clone()
    implementation.losses(make(written), target, -100, torch.tensor(1.0))
    assert_close(make(written), gradient, torch.float32)
    make(written).copy_(logits)
    assert torch.equal(written, base)  # nothing beside them was written to


def test_tokens_that_may_not_be_predicted(implementation):
    logits, target = chunk(129)
    logits[:, :70] = -torch.inf  # the first block of the kernel as a whole
    target = target.clamp(min=70)
    losses, gradient = expected(logits, target, -100, torch.tensor(1.0))
    actual, normalizers = implementation.losses(logits, target, -100, None)
    torch.testing.assert_close(actual.double(), losses, rtol=1e-6, atol=2e-6)
    assert_close(implementation.gradients(logits, target, -100, normalizers, torch.ones(7)), gradient, torch.float32)


def test_large_logits_do_not_overflow(implementation):
    logits, target = chunk(129)
    logits *= 1e4
    losses, gradient = expected(logits, target, -100, torch.tensor(1.0))
    actual, _ = implementation.losses(logits, target, -100, torch.tensor(1.0))
    torch.testing.assert_close(actual.double(), losses, rtol=1e-6, atol=1e-2)
    assert_close(logits, gradient, torch.float32)


def test_no_rows(implementation):
    logits = torch.empty(0, 37)
    losses, normalizers = implementation.losses(logits, torch.empty(0, dtype=torch.long), -100, torch.tensor(1.0))
    assert losses.shape == (0,) and normalizers.shape == (2, 0)


def test_a_label_out_of_range_is_an_error(implementation):
    logits, target = chunk(37)
    target[3] = 37
    with pytest.raises((IndexError, RuntimeError)):
        implementation.losses(logits, target, -100, None)
