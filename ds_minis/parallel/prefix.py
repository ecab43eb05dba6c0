"""Attention of a part of the queries to all keys up to them, without a mask in memory.

Shapes: B batch, Q queries, S keys, N heads, K KV heads, D and E their widths.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ds_minis.parallel.block_kernels import Band, kernel_for, trim


def prefix_attention(q: Tensor, k: Tensor, v: Tensor, start: int, scale: float, window: int | None) -> Tensor:
    """Causal attention of the queries from position `start` on to the keys from position 0 to that of the last query.

    Args:
        q: `(B, N, Q, D)`.
        k: `(B, K, start + Q, D)`; N is a multiple of K.
        v: `(B, K, start + Q, E)`.
        scale: factor of the scores.
        window: a token sees itself and the `window - 1` before it; None: all before it.

    Returns:
        `(B, Q, N, E)`, in q's dtype.
    """
    return _PrefixAttention.apply(q, k, v, scale, Band(None if window is None else window - 1 - start, start))


class _PrefixAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, scale: float, band: Band) -> Tensor:
        _, keys, trimmed = trim(q.shape[2], k.shape[2], band)  # every query sees at least its own key
        with torch.autocast(q.device.type, enabled=False):
            out, lse = kernel_for(q, v).forward(q, k[:, :, keys], v[:, :, keys], scale, trimmed)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.scale, ctx.keys, ctx.band = scale, keys, trimmed
        return out.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out: Tensor):
        q, k, v, out, lse = ctx.saved_tensors
        keys = ctx.keys
        with torch.autocast(q.device.type, enabled=False):
            grads = kernel_for(q, v).backward(
                grad_out.transpose(1, 2), q, k[:, :, keys], v[:, :, keys], out, lse, ctx.scale, ctx.band
            )
        grad_k, grad_v = torch.zeros_like(k), torch.zeros_like(v)
        grad_k[:, :, keys].copy_(grads[1])
        grad_v[:, :, keys].copy_(grads[2])
        return grads[0].to(q.dtype), grad_k, grad_v, None, None
