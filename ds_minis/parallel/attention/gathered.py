"""Attention to gathered keys and values by the block kernels of the ring, without a mask in memory."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ds_minis.parallel.attention.block_kernels import accumulation_dtype
from ds_minis.parallel.attention.ring import Block, attend_backward, attend_blocks, no_keys_yet, plan_ring


def gathered_attention(
    q: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    rank: int,
    scale: float,
    window: int | None,
    documents: Tensor | None,
) -> Tensor:
    """`ring_attention` where the keys and values of all ranks are here.

    Args:
        q: `(B, N, T, D)`, the queries of this rank, in the zigzag order.
        keys, values: of each rank, `(B, K, T, D)` and `(B, K, T, E)`.
        rank: this rank's place in the group.
        scale, window, documents: see `ring_attention`.

    Returns:
        `(B, T, N, E)`, in q's dtype.
    """
    plan = plan_ring(rank, len(keys), q.shape[2] // 2, window, documents)
    by_holder = [plan[(rank - holder) % len(keys)] for holder in range(len(keys))]
    return _GatheredAttention.apply(by_holder, scale, q, *keys, *values)


class _GatheredAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, plan: list[list[Block]], scale: float, q: Tensor, *keys_and_values: Tensor) -> Tensor:
        size = len(plan)
        out, lse = no_keys_yet(q, keys_and_values[-1])
        with torch.autocast(q.device.type, enabled=False):
            for blocks, k, v in zip(plan, keys_and_values[:size], keys_and_values[size:], strict=True):
                attend_blocks(blocks, q, k, v, out.transpose(1, 2), lse, scale)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, out, lse, *keys_and_values)
        ctx.plan, ctx.scale = plan, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out: Tensor):
        q, out, lse, *keys_and_values = ctx.saved_tensors
        size, dtype = len(ctx.plan), accumulation_dtype(q.dtype)
        grads = [torch.zeros_like(x, dtype=dtype) for x in (q, *keys_and_values)]
        by_head = q, out.transpose(1, 2), grad_out.transpose(1, 2), lse
        with torch.autocast(q.device.type, enabled=False):
            for i, blocks in enumerate(ctx.plan):
                k, v = keys_and_values[i], keys_and_values[size + i]
                attend_backward(blocks, *by_head, k, v, ctx.scale, grads[0], grads[1 + i], grads[1 + size + i])
        return None, None, *(grad.to(x.dtype) for grad, x in zip(grads, (q, *keys_and_values), strict=True))
