"""Attention of a block of queries to a block of keys, with its log-sum-exp, and the gradients of one such block.

B: batch. N: query heads. K: key/value heads (N % K == 0). Q, S: tokens of the block's queries and keys. D: width of queries
and keys. E: width of values. All tensors are (B, heads, tokens, width), of any strides.

A kernel has two functions:

    forward(q, k, v, scale, band) -> out (B, N, Q, E), lse (B, N, Q)
    backward(grad_out, q, k, v, out, lse, scale, band, sums)

`sums` are three tensors of the shapes of q, k and v, in the accumulation dtype, to which `backward` adds the gradients.

`lse` is the natural logarithm of the sum of exp(scale * q @ k) over the keys that a query sees, in float32, or float64 for
float64. Blocks of the same queries are merged by it, and `backward` is exact for one of them when it is given the merged
`out` and `lse` (FlashAttention, arXiv 2205.14135, section 3.1 and algorithm 4).

Which keys a query sees is a `Band`. A kernel may only be given a band that `trim` gave: each query then sees a key. For one
that sees none, torch's CPU kernel answers lse = 0, which would count as a key.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten
SCORES = 2**24  # scores that are held at a time where they are held at all: 64 MiB in float32
FLASH_WIDTH = 256  # of a head, the widest that FlashAttention-2 takes


class Band(NamedTuple):
    """Query x of a block sees key y if x - left <= y <= x + right; None is no limit. Negative limits are fine."""

    left: int | None = None
    right: int | None = None


ALL = Band()
Sums = tuple[Tensor, Tensor, Tensor]  # of the gradients of q, k and v


class Kernel(NamedTuple):
    name: str
    forward: Callable
    backward: Callable


def trim(num_queries: int, num_keys: int, band: Band) -> tuple[slice, slice, Band] | None:
    """Queries that see a key, keys that are seen by a query, and the band between these; None if there are none.

    In what is given each query sees a key, and a limit that hides nothing is None.
    """
    left, right = band
    first_key = 0 if left is None else max(0, -left)
    end_key = num_keys if right is None else min(num_keys, num_queries + right)
    first_query = 0 if right is None else max(0, first_key - right)
    end_query = num_queries if left is None else min(num_queries, end_key + left)
    if end_key <= first_key or end_query <= first_query:
        return None
    if left is not None:
        left += first_key - first_query
        left = None if left >= end_query - first_query - 1 else left
    if right is not None:
        right += first_query - first_key
        right = None if right >= end_key - first_key - 1 else right
    return slice(first_query, end_query), slice(first_key, end_key), Band(left, right)


def visible(num_queries: int, num_keys: int, band: Band, device: torch.device | None = None) -> Tensor:
    """A band as a mask: (Q, S), true where a query sees a key."""
    ahead = torch.arange(num_keys, device=device) - torch.arange(num_queries, device=device)[:, None]
    mask = torch.ones_like(ahead, dtype=torch.bool)
    if band.left is not None:
        mask &= ahead >= -band.left
    if band.right is not None:
        mask &= ahead <= band.right
    return mask


def _tiles(num_queries: int, num_keys: int, band: Band, heads: int) -> Iterator[tuple[slice, slice, Band]]:
    """A trimmed block cut along its queries: at most about `SCORES` scores for so many heads, and few of them hidden."""
    rows = max(1, SCORES // (heads * num_keys))
    if band != ALL:
        rows = min(rows, max(64, num_queries // 8 if None in band else band.left + band.right))
    for start in range(0, num_queries, rows):
        left = None if band.left is None else band.left - start
        right = None if band.right is None else band.right + start
        count = min(rows, num_queries - start)
        _, keys, tile = trim(count, num_keys, Band(left, right))
        yield slice(start, start + count), keys, tile


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which outputs and gradients of several blocks are added: float64 for float64, else float32."""
    return torch.promote_types(dtype, torch.float32)


def _by_kv_head(x: Tensor, kv_heads: int, dtype: torch.dtype) -> Tensor:
    """(B, N, Q, W) -> (B, K, N / K * Q, W): the queries of all heads that share a KV head, so that no key is repeated."""
    return x.to(dtype).reshape(x.shape[0], kv_heads, -1, x.shape[-1])


def _scores(q: Tensor, k: Tensor, num_queries: int, scale: float, band: Band) -> Tensor:
    """(B, K, N / K * Q, D), (B, K, S, D) -> (B, K, N / K * Q, S), -inf where a query does not see a key."""
    scores = (q @ k.transpose(-1, -2)).mul_(scale)
    if band != ALL:
        hidden = ~visible(num_queries, k.shape[2], band, k.device)
        scores.view(*k.shape[:2], -1, *hidden.shape).masked_fill_(hidden, float("-inf"))
    return scores


def _math_forward(q: Tensor, k: Tensor, v: Tensor, scale: float, band: Band) -> tuple[Tensor, Tensor]:
    dtype, (batch, heads, queries), kv_heads = accumulation_dtype(q.dtype), q.shape[:3], k.shape[1]
    k, v = k.to(dtype), v.to(dtype)
    out = q.new_empty(batch, heads, queries, v.shape[-1], dtype=dtype)
    lse = q.new_empty(batch, heads, queries, dtype=dtype)
    for rows, keys, tile in _tiles(queries, k.shape[2], band, batch * heads):
        q_tile = _by_kv_head(q[:, :, rows], kv_heads, dtype)
        scores = _scores(q_tile, k[:, :, keys], rows.stop - rows.start, scale, tile)
        sums = scores.logsumexp(-1)
        probabilities = scores.sub_(sums.unsqueeze(-1)).exp_()
        out[:, :, rows] = (probabilities @ v[:, :, keys]).view_as(out[:, :, rows])
        lse[:, :, rows] = sums.view_as(lse[:, :, rows])
    return out, lse


def _math_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, band: Band, sums: Sums
) -> None:
    dtype, (batch, heads, queries), kv_heads = accumulation_dtype(q.dtype), q.shape[:3], k.shape[1]
    k, v = k.to(dtype), v.to(dtype)
    grad_q, grad_k, grad_v = sums
    for rows, keys, tile in _tiles(queries, k.shape[2], band, batch * heads):
        parts = (x[:, :, rows] for x in (q, out, grad_out, lse.unsqueeze(-1)))
        q_tile, out_tile, grad_tile, lse_tile = (_by_kv_head(x, kv_heads, dtype) for x in parts)
        k_tile, v_tile = k[:, :, keys], v[:, :, keys]
        probabilities = _scores(q_tile, k_tile, rows.stop - rows.start, scale, tile).sub_(lse_tile).exp_()
        grad_v[:, :, keys] += probabilities.transpose(-1, -2) @ grad_tile
        delta = (grad_tile * out_tile).sum(-1, keepdim=True)
        grad_scores = (grad_tile @ v_tile.transpose(-1, -2)).sub_(delta).mul_(probabilities).mul_(scale)
        grad_q[:, :, rows] += (grad_scores @ k_tile).view_as(grad_q[:, :, rows])
        grad_k[:, :, keys] += grad_scores.transpose(-1, -2) @ q_tile


def _widened(width: int, *tensors: Tensor) -> list[Tensor]:
    """Each with zeros behind its last dimension up to `width`: they add nothing to a product."""
    return [x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1])) for x in tensors]


def _cpu_calls(q: Tensor, k: Tensor, band: Band) -> Iterator[tuple[slice, slice, bool, Tensor | None]]:
    """Queries, keys, `is_causal` and mask (Q, S) of the calls that torch's CPU kernel needs for one head of each KV head.

    It knows causal blocks by itself; of other bands it is given the masks of a few queries at a time.
    """
    queries, keys = q.shape[2], k.shape[2]
    causal = band == Band(None, 0) and queries == keys
    if causal or band == ALL:
        yield slice(0, queries), slice(0, keys), causal, None
        return
    for rows, columns, tile in _tiles(queries, keys, band, 1):
        seen = visible(rows.stop - rows.start, columns.stop - columns.start, tile)
        yield rows, columns, False, torch.zeros_like(seen, dtype=q.dtype).masked_fill_(~seen, float("-inf"))


def _cpu_forward(q: Tensor, k: Tensor, v: Tensor, scale: float, band: Band) -> tuple[Tensor, Tensor]:
    """One call for each query head of a KV head: the kernel knows groups of heads only since pytorch#157893 (July 2025)."""
    width = max(q.shape[-1], v.shape[-1])
    out = q.new_empty(*q.shape[:3], v.shape[-1])
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    group = q.shape[1] // k.shape[1]
    q, k, v = _widened(width, q, k, v)
    for rows, keys, causal, mask in _cpu_calls(q, k, band):
        for head in range(group):
            part, sums = aten._scaled_dot_product_flash_attention_for_cpu(
                q[:, head::group, rows], k[:, :, keys], v[:, :, keys], 0.0, causal, attn_mask=mask, scale=scale
            )
            out[:, head::group, rows] = part[..., : out.shape[-1]]
            lse[:, head::group, rows] = sums
    return out, lse


def _cpu_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, band: Band, sums: Sums
) -> None:
    grad_q, grad_k, grad_v = sums
    group = q.shape[1] // k.shape[1]
    q, k, v, out, grad_out = _widened(max(q.shape[-1], v.shape[-1]), q, k, v, out, grad_out)
    for rows, keys, causal, mask in _cpu_calls(q, k, band):
        for head in range(group):
            # In memory (B, Q, heads), as forward gives it: older kernels read it so, whatever its strides say.
            lse_of_heads = lse[:, head::group, rows].transpose(1, 2).contiguous().transpose(1, 2)
            part_q, part_k, part_v = aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad_out[:, head::group, rows], q[:, head::group, rows], k[:, :, keys], v[:, :, keys],
                out[:, head::group, rows], lse_of_heads, 0.0, causal, attn_mask=mask, scale=scale,
            )  # fmt: skip
            grad_q[:, head::group, rows] += part_q[..., : grad_q.shape[-1]]
            grad_k[:, :, keys] += part_k[..., : grad_k.shape[-1]]
            grad_v[:, :, keys] += part_v[..., : grad_v.shape[-1]]
            del part_q, part_k, part_v  # not beside those of the next heads


def _cuda_band(num_queries: int, num_keys: int, band: Band) -> dict:
    """A band in the words of FlashAttention-2, which counts keys from the last of a block, not from its first.

    Query x sees key y there if x + S - Q - window_size_left <= y <= x + S - Q + window_size_right; below zero is no limit.
    In a trimmed block neither limit can be below zero here: the last query sees the last key, the first sees the first.
    """
    if band == Band(None, 0) and num_queries == num_keys:
        return {"is_causal": True}
    shift = num_keys - num_queries
    left = -1 if band.left is None else band.left + shift
    right = -1 if band.right is None else band.right - shift
    return {"is_causal": False, "window_size_left": left, "window_size_right": right}


def _cuda_layout(*tensors: Tensor) -> list[Tensor]:
    """(B, heads, tokens, width) -> (B, tokens, heads, width rounded up to 8), the last dimension contiguous."""
    width = -(-max(x.shape[-1] for x in tensors) // 8) * 8
    wide = (x.transpose(1, 2) for x in _widened(width, *tensors))
    return [x if x.stride(-1) == 1 else x.contiguous() for x in wide]


def _cuda_forward(q: Tensor, k: Tensor, v: Tensor, scale: float, band: Band) -> tuple[Tensor, Tensor]:
    queries, keys, width = q.shape[2], k.shape[2], v.shape[-1]
    band_args = _cuda_band(queries, keys, band)
    is_causal = band_args.pop("is_causal")
    out, lse, *_ = aten._flash_attention_forward(
        *_cuda_layout(q, k, v), None, None, queries, keys, 0.0, is_causal, False, scale=scale, **band_args
    )
    return out[..., :width].transpose(1, 2), lse


def _cuda_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, band: Band, sums: Sums
) -> None:
    queries, keys = q.shape[2], k.shape[2]
    band_args = _cuda_band(queries, keys, band)
    is_causal = band_args.pop("is_causal")
    q, k, v, out, grad_out = _cuda_layout(q, k, v, out, grad_out)
    unused = torch.zeros(2, dtype=torch.uint64, device=q.device)  # the state of dropout's random numbers
    # The kernel reads lse as (B, N, Q) without looking at its strides.
    grads = aten._flash_attention_backward(
        grad_out, q, k, v, out, lse.contiguous(), None, None, queries, keys, 0.0, is_causal, unused, unused,
        scale=scale, **band_args,
    )  # fmt: skip
    for total, grad in zip(sums, grads, strict=True):
        total += grad[..., : total.shape[-1]].transpose(1, 2)


MATH = Kernel("math", _math_forward, _math_backward)
CPU_FLASH = Kernel("cpu flash", _cpu_forward, _cpu_backward)
CUDA_FLASH = Kernel("cuda flash", _cuda_forward, _cuda_backward)


def kernel_for(q: Tensor, v: Tensor) -> Kernel:
    """The fastest kernel for these queries and values; `MATH` for float64 and for devices without a kernel that we know."""
    if q.dtype == torch.float64:
        return MATH
    if q.device.type == "cpu":
        return CPU_FLASH
    narrow = max(q.shape[-1], v.shape[-1]) <= FLASH_WIDTH
    if q.device.type == "cuda" and q.dtype in (torch.float16, torch.bfloat16) and narrow and _cuda_has_flash(q.device):
        return CUDA_FLASH
    return MATH


def _cuda_has_flash(device: torch.device) -> bool:
    """FlashAttention-2 needs Ampere, and a torch that was built with it. ROCm's gives another layout of lse: not tried."""
    built = torch.version.hip is None and torch.backends.cuda.is_flash_attention_available()
    return built and torch.cuda.get_device_capability(device) >= (8, 0)
