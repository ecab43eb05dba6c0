"""Blocks of attention with their log-sum-exp: every kernel against autograd through plain attention, for every band."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from ds_minis.parallel.attention import block_kernels
from ds_minis.parallel.attention.block_kernels import (
    CPU_FLASH,
    CUDA_FLASH,
    MATH,
    Band,
    accumulation_dtype,
    kernel_for,
    trim,
    visible,
)

SCALE = 0.4
BANDS = {
    "all": (9, 14, Band()),
    "causal": (12, 12, Band(None, 0)),
    "causal with a window": (12, 12, Band(3, 0)),
    "keys long ago": (12, 12, Band(-4, None)),
    "window that ends in the block": (12, 12, Band(2, None)),
    "fewer queries than keys": (5, 13, Band(3, 6)),
    "more queries than keys": (13, 5, Band(9, 4)),
    "causal, more queries than keys": (13, 5, Band(None, 0)),
    "a narrow window over many": (150, 150, Band(20, 0)),
    "one query": (1, 7, Band(None, None)),
}
HEADS = [(4, 4), (4, 2), (4, 1)]


def trimmed(name):
    queries, keys, band = BANDS[name]
    queries, keys, band = trim(queries, keys, band)
    return queries.stop - queries.start, keys.stop - keys.start, band


def block(heads, kv_heads, queries, keys, *, width=8, value_width=8, dtype=torch.float64, device="cpu"):
    """q, k, v and the gradient of the output, none of them contiguous."""
    torch.manual_seed(0)
    shapes = [
        (heads, queries, width),
        (kv_heads, keys, width),
        (kv_heads, keys, value_width),
        (heads, queries, value_width),
    ]
    return [torch.randn(2, t + 1, h, w, device=device).to(dtype).transpose(1, 2)[:, :, 1:] for h, t, w in shapes]


def expected(q, k, v, grad_out, band):
    """Output, lse and gradients in float64, where these keys are all that the queries see."""
    q, k, v = (x.detach().double().requires_grad_() for x in (q, k, v))
    groups = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(groups, 1).transpose(-1, -2) * SCALE
    scores = scores.masked_fill(~visible(q.shape[2], k.shape[2], band, q.device), float("-inf"))
    out = scores.softmax(-1) @ v.repeat_interleave(groups, 1)
    return [out.detach(), scores.logsumexp(-1).detach(), *torch.autograd.grad(out, (q, k, v), grad_out.double())]


def found(kernel, q, k, v, grad_out, band):
    out, lse = kernel.forward(q, k, v, SCALE, band)
    return [out, lse, *gradients(kernel, grad_out, q, k, v, out, lse, band)]


def gradients(kernel, grad_out, q, k, v, out, lse, band):
    """What is added to sums that are not zero."""
    sums = tuple(torch.ones_like(x, dtype=accumulation_dtype(x.dtype)) for x in (q, k, v))
    kernel.backward(grad_out, q, k, v, out, lse, SCALE, band, sums)
    return [x - 1 for x in sums]


def assert_equal(actual, exact, tolerance):
    for name, a, e in zip(("out", "lse", "dq", "dk", "dv"), actual, exact, strict=True):
        assert a.shape == e.shape, name
        assert (a.double() - e).abs().max() <= tolerance * max(1, e.abs().max()), name


@pytest.fixture(params=[2**24, 40], ids=["one tile", "tiles"])
def scores(request, monkeypatch):
    monkeypatch.setattr(block_kernels, "SCORES", request.param)


@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize("name", BANDS)
@pytest.mark.parametrize(
    ("kernel", "dtype", "tolerance"),
    [
        (MATH, torch.float64, 1e-12),
        (MATH, torch.float32, 1e-5),
        (MATH, torch.bfloat16, 2e-2),
        (CPU_FLASH, torch.float32, 1e-5),
        (CPU_FLASH, torch.bfloat16, 2e-2),
    ],
    ids=lambda x: getattr(x, "name", None) or str(x),
)
def test_a_kernel_equals_plain_attention(kernel, dtype, tolerance, name, heads, kv_heads, scores):
    queries, keys, band = trimmed(name)
    inputs = block(heads, kv_heads, queries, keys, dtype=dtype)
    assert_equal(found(kernel, *inputs, band), expected(*inputs, band), tolerance)


@pytest.mark.parametrize("value_width", [3, 13])
@pytest.mark.parametrize("kernel", [MATH, CPU_FLASH], ids=lambda kernel: kernel.name)
def test_values_of_another_width(kernel, value_width):
    queries, keys, band = trimmed("causal with a window")
    inputs = block(4, 2, queries, keys, value_width=value_width, dtype=torch.float32)
    assert_equal(found(kernel, *inputs, band), expected(*inputs, band), 1e-5)


@pytest.mark.parametrize("kernel", [MATH, CPU_FLASH], ids=lambda kernel: kernel.name)
def test_backward_of_a_part_takes_the_output_of_all_keys(kernel):
    """Gradients of two halves of the keys, each found by itself from the merged output and lse."""
    q, k, v, grad_out = block(4, 2, 6, 10, dtype=torch.float32)
    out, lse, *exact = expected(q, k, v, grad_out, Band())
    out, lse = out.float(), lse.float()
    halves = [
        gradients(kernel, grad_out, q, k[:, :, half], v[:, :, half], out, lse, Band())
        for half in (slice(0, 5), slice(5, 10))
    ]
    dq = halves[0][0] + halves[1][0]
    dk, dv = (torch.cat([half[i] for half in halves], 2) for i in (1, 2))
    assert_equal([out, lse, dq, dk, dv], [out.double(), lse.double(), *exact], 1e-5)


def test_trimmed_blocks_have_all_that_is_visible_and_nothing_in_vain():
    limits = [None, *range(-6, 7)]
    for queries, keys, left, right in itertools.product((1, 3, 5), (1, 4, 5), limits, limits):
        if left is not None and right is not None and left + right < 0:
            continue  # sees nothing anywhere
        mask = visible(queries, keys, Band(left, right))
        part = trim(queries, keys, Band(left, right))
        if part is None:
            assert not mask.any()
            continue
        rows, columns, band = part
        inner = mask[rows, columns]
        assert inner.sum() == mask.sum() and inner.any(0).all() and inner.any(1).all()
        assert (visible(*inner.shape, band) == inner).all()
        if inner.all():
            assert band == Band()


def test_no_band_is_given_up_as_none():
    assert trim(3, 3, Band(-2, 1)) is None  # from 2 on, and up to 1


def test_which_kernel():
    q = torch.zeros(1, 1, 2, 8)
    assert kernel_for(q, q) is kernel_for(q.bfloat16(), q.bfloat16()) is CPU_FLASH
    assert kernel_for(q.double(), q.double()) is kernel_for(q.to("meta"), q.to("meta")) is MATH


class Flash:
    """FlashAttention-2's two functions by its documentation, with what torch's `flash_api.cpp` checks.

    Query i sees key j if i + S - Q - left <= j <= i + S - Q + right, where negative is no limit.
    """

    @staticmethod
    def scores(q, k, scale, is_causal, left, right):
        queries, keys, groups = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
        left, right = (-1 if x is None else x for x in (left, right))
        right = 0 if is_causal else right
        i, j = torch.arange(queries)[:, None] + keys - queries, torch.arange(keys)
        hidden = torch.zeros(queries, keys, dtype=torch.bool)
        if left >= 0:
            hidden |= j < i - left
        if right >= 0:
            hidden |= j > i + right
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(groups, 2)) * scale
        return scores.masked_fill(hidden, float("-inf"))

    @staticmethod
    def check(queries, keys, max_q, max_k, dropout, *tensors):
        assert (queries.shape[1], keys.shape[1], dropout) == (max_q, max_k, 0.0)
        assert len({x.shape[-1] for x in tensors}) == 1 and queries.shape[-1] % 8 == 0
        assert all(x.stride(-1) == 1 for x in tensors)

    @classmethod
    def forward(cls, q, k, v, cum_q, cum_k, max_q, max_k, dropout, is_causal, debug, *, scale,
                window_size_left=None, window_size_right=None):  # fmt: skip
        assert cum_q is cum_k is None and not debug
        cls.check(q, k, max_q, max_k, dropout, q, k, v)
        scores = cls.scores(q, k, scale, is_causal, window_size_left, window_size_right)
        values = v.repeat_interleave(q.shape[2] // k.shape[2], 2)
        return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), values), scores.logsumexp(-1), None, None, None

    @classmethod
    def backward(cls, grad, q, k, v, out, lse, cum_q, cum_k, max_q, max_k, dropout, is_causal, rng, unused, *, scale,
                 window_size_left=None, window_size_right=None):  # fmt: skip
        assert cum_q is cum_k is None and lse.is_contiguous()
        cls.check(q, k, max_q, max_k, dropout, q, k, v, out, grad)
        groups = q.shape[2] // k.shape[2]
        p = (cls.scores(q, k, scale, is_causal, window_size_left, window_size_right) - lse[..., None]).exp()
        dp = torch.einsum("bqhd,bkhd->bhqk", grad, v.repeat_interleave(groups, 2))
        ds = p * (dp - (grad * out).sum(-1).transpose(1, 2)[..., None]) * scale
        dk, dv = torch.einsum("bhqk,bqhd->bkhd", ds, q), torch.einsum("bhqk,bqhd->bkhd", p, grad)
        dq = torch.einsum("bhqk,bkhd->bqhd", ds, k.repeat_interleave(groups, 2))
        return dq, *(x.unflatten(2, (-1, groups)).sum(3) for x in (dk, dv))


@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize(("width", "value_width"), [(8, 8), (6, 11)])
@pytest.mark.parametrize("name", BANDS)
def test_cuda_is_asked_for_the_band_that_is_meant(name, width, value_width, heads, kv_heads, monkeypatch):
    ops = SimpleNamespace(_flash_attention_forward=Flash.forward, _flash_attention_backward=Flash.backward)
    monkeypatch.setattr(block_kernels, "aten", ops)
    queries, keys, band = trimmed(name)
    inputs = block(heads, kv_heads, queries, keys, width=width, value_width=value_width)
    assert_equal(found(CUDA_FLASH, *inputs, band), expected(*inputs, band), 1e-12)


@pytest.mark.parametrize("name", BANDS)
def test_torch_takes_what_cuda_is_asked(name):
    """Its functions without data: names, types and number of the arguments, and shapes of what comes back."""
    queries, keys, band = trimmed(name)
    inputs = block(4, 2, queries, keys, value_width=12, dtype=torch.bfloat16, device="meta")
    out, lse, *grads = found(CUDA_FLASH, *inputs, band)
    assert out.shape == (2, 4, queries, 12) and lse.shape == (2, 4, queries)
    assert [x.shape for x in grads] == [x.shape for x in inputs[:3]]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", BANDS)
def test_flash_attention_on_cuda(name, dtype):
    queries, keys, (left, right) = BANDS[name]
    for times in (1, 40):  # less and more than the tiles of the kernel
        longer = Band(*(None if limit is None else limit * times for limit in (left, right)))
        rows, columns, band = trim(queries * times, keys * times, longer)
        for (heads, kv_heads), widths in itertools.product(HEADS, ((64, 64), (40, 24))):
            sizes = {"queries": rows.stop - rows.start, "keys": columns.stop - columns.start}
            sizes |= dict(zip(("width", "value_width"), widths, strict=True))
            inputs = block(heads, kv_heads, **sizes, dtype=dtype, device="cuda")
            assert kernel_for(inputs[0], inputs[2]) is CUDA_FLASH
            exact = expected(*inputs, band)
            assert_equal(found(CUDA_FLASH, *inputs, band), exact, 3e-2)
            assert_equal(found(MATH, *inputs, band), exact, 3e-2)
