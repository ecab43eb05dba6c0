"""Ring attention: each rank keeps the queries of its part of a sequence; keys and values travel from rank to rank.

The algorithm is Ring Attention's (arXiv 2310.01889): attention is computed block by block, and what the blocks gave is merged
by their log-sum-exp (arXiv 2205.14135). A rank holds the keys and values of at most three ranks: its own, those it computes
with, and those that arrive meanwhile; in backward also gradients of as many tokens four times: its own, those it adds to,
those that leave and those that arrive.

**Zigzag.** If each rank held one run of a causal sequence, the last would compute most. So a sequence is cut in 2 * size
equal parts, and rank r holds part r, then part 2 * size - 1 - r: all ranks compute the same at every step. The layout was
proposed in github.com/zhuzilin/ring-flash-attention (issue 2, February 2024); the Llama 3 report (arXiv 2407.21783) has it
too.

**Bytes** that a rank sends for one layer and one sequence, with X = B * K * T * (D + E) elements of keys and values:
forward (size - 1) * X in the dtype of the keys, and backward as many again, and (size - 1) * X for their gradients in float32
(float64 for float64), which are added in it on their way. In bfloat16: 8 * (size - 1) * X bytes. Windows and documents spare
computation, not bytes.
"""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ds_minis.parallel.attention.block_kernels import ALL, Band, accumulation_dtype, kernel_for, trim
from ds_minis.parallel.communication.collectives import naming_ranks

KEYS, GRADS = 0, 2  # tags of messages: two tensors each


class Block(NamedTuple):
    """Queries of this rank and keys that one rank holds, as indices of the T tokens of each, and which of these see which."""

    rows: slice  # of the batch
    queries: slice
    keys: slice
    band: Band


class _Run(NamedTuple):
    """Tokens of one document, all in one part: where they are in the sequence, who holds them, and where the holder does."""

    start: int
    length: int
    holder: int
    local: int


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: dist.ProcessGroup | None,
    scale: float,
    window: int | None = None,
    documents: Tensor | None = None,
) -> Tensor:
    """Causal attention over a sequence whose tokens lie on the ranks of a group, in the zigzag order.

    Collective: all ranks of the group call it with the same shapes, `scale`, `window` and `documents`, and all of them run
    its backward. Under autocast it computes in autocast's dtype, as torch's own attention does. No dropout.

    Args:
        q: (B, N, T, D), the queries of this rank's T tokens: the first T / 2 of part `rank`, then those of part
            2 * size - 1 - rank, of S = size * T tokens cut in 2 * size parts.
        k: (B, K, T, D), N % K == 0.
        v: (B, K, T, E).
        group: The ranks that share the sequence, in the order of their ranks in it; None is the group of all.
        scale: Factor of the scores.
        window: Token i sees token j <= i if i - j < window (transformers' `sliding_window`); None: all of them.
        documents: (B, S) integers, for all tokens of the sequence in its order: a token sees those of its own number alone.
            Padding is a document. Better on the CPU: it is read there, and a copy from a device waits for it. It costs one
            call of a kernel for each pair of runs of equal numbers that see each other, so runs should be long.

    Returns:
        (B, T, N, E) contiguous, in q's dtype. In backward the gradients of k and v are sums over the queries of all ranks.

    Raises:
        ValueError: for shapes, dtypes, a window or documents other than these.
    """
    q, k, v = in_autocast_dtype(q, k, v)
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    if rank < 0:
        raise ValueError("ring_attention: this rank is not in the group that was given; give the one that it shares")
    check_inputs(q, k, v, size, window, documents)
    plan = plan_ring(rank, size, q.shape[2] // 2, window, documents)
    return _RingAttention.apply(q, k, v, group, scale, plan)


def in_autocast_dtype(*tensors: Tensor) -> list[Tensor]:
    """Tensors as autocast gives them to torch's own attention: models leave queries in another dtype than values."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [x if x.dtype == torch.float64 else x.to(dtype) for x in tensors]


def check_inputs(q: Tensor, k: Tensor, v: Tensor, size: int, window: int | None, documents: Tensor | None) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    four = q.dim() == k.dim() == v.dim() == 4
    if not four or (k.shape[0], *k.shape[2:]) != (q.shape[0], *q.shape[2:]) or v.shape[:3] != k.shape[:3]:
        raise ValueError(f"ring_attention needs q (B, N, T, D), k (B, K, T, D) and v (B, K, T, E), not {shapes}")
    if q.shape[1] % k.shape[1]:
        raise ValueError(
            f"ring_attention: {k.shape[1]} key/value heads do not divide {q.shape[1]} query heads ({shapes})"
        )
    if q.shape[2] == 0 or q.shape[2] % 2:
        raise ValueError(
            f"ring_attention: a rank holds two equal parts of the sequence, which {q.shape[2]} tokens are not; pad the "
            f"sequence to a multiple of 2 * size = {2 * size}"
        )
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise ValueError(
            f"ring_attention needs q, k and v of one floating dtype, not {q.dtype}, {k.dtype} and {v.dtype}"
        )
    if window is not None and window < 1:
        raise ValueError(f"ring_attention: window is {window}; a token sees at least itself, so 1 or more, or None")
    if documents is not None and documents.shape != (q.shape[0], size * q.shape[2]):
        raise ValueError(
            f"ring_attention: documents is {tuple(documents.shape)}; it numbers all tokens of the sequence, (B, size * T) = "
            f"{(q.shape[0], size * q.shape[2])}"
        )


def plan_ring(
    rank: int, size: int, part: int, window: int | None = None, documents: Tensor | None = None
) -> list[list[Block]]:
    """What a rank computes with the keys of rank - 0, rank - 1, ... (modulo size): blocks in which some query sees some key.

    Each pair of a query of this rank and a key that it sees is in one block. `part` is T / 2; `window` and `documents` are
    those of `ring_attention`.
    """
    steps: list[list[Block]] = [[] for _ in range(size)]
    for rows, runs in _runs_of_rows(size, part, documents):
        for same_document in runs:
            for own in same_document:
                if own.holder == rank:
                    for other in same_document:
                        block = _block(rows, own, other, window)
                        if block is not None:
                            _append(steps[(rank - other.holder) % size], block)
    return steps


def _runs_of_rows(size: int, part: int, documents: Tensor | None) -> list[tuple[slice, list[list[_Run]]]]:
    """For each row of the batch, or for all of them where they are equal: the runs of each document, in their order."""
    borders = torch.arange(0, 2 * size * part, part)
    if documents is None:
        documents = torch.zeros(1, 2 * size * part, dtype=torch.int64)
    documents = documents.cpu()
    if (documents == documents[:1]).all():
        rows = [(slice(None), documents[0])]
    else:
        rows = [(slice(row, row + 1), ids) for row, ids in enumerate(documents)]
    result = []
    for row, ids in rows:
        changes = (ids[1:] != ids[:-1]).nonzero().flatten() + 1
        starts = torch.cat([borders, changes]).unique()
        ends = [*starts[1:].tolist(), len(ids)]
        by_document = defaultdict(list)
        for start, end, document in zip(starts.tolist(), ends, ids[starts].tolist(), strict=True):
            by_document[document].append(_run(start, end - start, size, part))
        result.append((row, list(by_document.values())))
    return result


def _run(start: int, length: int, size: int, part: int) -> _Run:
    number, offset = divmod(start, part)
    if number < size:
        return _Run(start, length, number, offset)
    return _Run(start, length, 2 * size - 1 - number, part + offset)


def _block(rows: slice, own: _Run, other: _Run, window: int | None) -> Block | None:
    """Queries of one run with keys of another: trimmed to those that see one another, None if there are none."""
    distance = own.start - other.start  # of query 0 from key 0: query x and key y are distance + x - y tokens apart
    left = None if window is None else window - 1 - distance
    trimmed = trim(own.length, other.length, Band(left, distance))
    if trimmed is None:
        return None
    queries, keys, band = trimmed
    return Block(rows, _moved(queries, own.local), _moved(keys, other.local), band)


def _moved(tokens: slice, offset: int) -> slice:
    return slice(tokens.start + offset, tokens.stop + offset)


def _append(blocks: list[Block], block: Block) -> None:
    """Two blocks side by side in which every query sees every key are one: half the calls, and half the merges."""
    last = blocks[-1] if blocks else None
    if last is not None and last.rows == block.rows and last.band == block.band == ALL:
        if last.keys == block.keys and last.queries.stop == block.queries.start:
            block = block._replace(queries=slice(last.queries.start, block.queries.stop))
            blocks.pop()
        elif last.queries == block.queries and last.keys.stop == block.keys.start:
            block = block._replace(keys=slice(last.keys.start, block.keys.stop))
            blocks.pop()
    blocks.append(block)


def _in_memory_order(x: Tensor) -> Tensor:
    """(B, K, T, D) as it is where its memory, or that of (B, T, K, D), has no gaps; else a copy."""
    return x if _flat(x).is_contiguous() else x.contiguous()


def _flat(x: Tensor) -> Tensor:
    """The same memory, in its own order: what can be sent."""
    return x if x.is_contiguous() else x.transpose(1, 2)


class Hop:
    """Tensors on their way to the next rank of the ring, and those of the previous rank to this one.

    Layers give keys whose memory is ordered by heads or by tokens; it is the same on all ranks, and what arrives has it too.
    """

    def __init__(self, tensors: list[Tensor], group: dist.ProcessGroup | None, tag: int):
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        peers = group if group is not None else dist.group.WORLD
        following, previous = self.peers = [dist.get_global_rank(peers, (rank + step) % size) for step in (1, -1)]
        self.sent, self.received = tensors, [torch.empty_like(x) for x in tensors]  # both are in use until `wait`
        operations = []
        for number, (sent, received) in enumerate(zip(self.sent, self.received, strict=True), tag):
            operations.append(dist.P2POp(dist.isend, _flat(sent), following, group, number))
            operations.append(dist.P2POp(dist.irecv, _flat(received), previous, group, number))
        with naming_ranks(self.peers):
            self.works = dist.batch_isend_irecv(operations)

    def wait(self) -> list[Tensor]:
        """What has arrived, once; afterwards nothing is held here."""
        with naming_ranks(self.peers):
            for work in self.works:
                work.wait()
        received, self.sent, self.received, self.works = self.received, [], [], []
        return received


class _RingAttention(torch.autograd.Function):
    """Keeps q, k, v, the output and its log-sum-exp for backward, in which keys and values travel once more.

    Blocks are merged, and their gradients added, in the order of the plan: the same bits each time, where kernels give them.
    """

    @staticmethod
    def forward(ctx, q, k, v, group, scale, plan):
        out, lse = no_keys_yet(q, v)
        keys = [_in_memory_order(x) for x in (k, v)]
        with torch.autocast(q.device.type, enabled=False):
            for step, blocks in enumerate(plan, 1):
                arriving = Hop(keys, group, KEYS) if step < len(plan) else None
                attend_blocks(blocks, q, *keys, out.transpose(1, 2), lse, scale)
                if arriving is not None:
                    keys = arriving.wait()
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.group, ctx.scale, ctx.plan = group, scale, plan
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        q, k, v, out, lse = ctx.saved_tensors
        dtype = accumulation_dtype(q.dtype)
        grad_q, grad_k, grad_v = (torch.zeros_like(x, dtype=dtype) for x in (q, k, v))
        keys, grads, travelling = [_in_memory_order(x) for x in (k, v)], [grad_k, grad_v], None
        by_head = q, out.transpose(1, 2), grad_out.transpose(1, 2), lse
        with torch.autocast(q.device.type, enabled=False):
            for step, blocks in enumerate(ctx.plan, 1):
                arriving = Hop(keys, ctx.group, KEYS) if step < len(ctx.plan) else None
                attend_backward(blocks, *by_head, *keys, ctx.scale, grad_q, *grads)
                if step > 1:  # on to the next rank, with what earlier ones found for these keys; the last is at home
                    _add_arrived(grads, travelling)
                    travelling = Hop(grads, ctx.group, GRADS)
                if arriving is not None:
                    keys = arriving.wait()
                    grads = [torch.zeros_like(x, dtype=dtype) for x in keys]
            _add_arrived([grad_k, grad_v], travelling)
        return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype), None, None, None


def no_keys_yet(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Output (B, T, N, E) and log-sum-exp (B, N, T) of queries that have seen no keys, for `attend_blocks` to add to."""
    dtype, (batch, heads, tokens, _) = accumulation_dtype(q.dtype), q.shape
    out = q.new_zeros(batch, tokens, heads, v.shape[-1], dtype=dtype)
    return out, q.new_full((batch, heads, tokens), float("-inf"), dtype=dtype)


def attend_blocks(blocks: list[Block], q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float) -> None:
    """Merges into out (B, N, T, E) and lse (B, N, T) what the blocks give, for keys and values that are here."""
    kernel = kernel_for(q, v)
    for rows, own, other, band in blocks:
        part, part_lse = kernel.forward(q[rows, :, own], k[rows, :, other], v[rows, :, other], scale, band)
        _merge(out[rows, :, own], lse[rows, :, own], part, part_lse)


def _merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Adds attention over further keys in place: (B, N, Q, E), (B, N, Q). Before the first keys, lse is -inf."""
    total = torch.logaddexp(lse, part_lse)
    out.mul_(torch.exp(lse - total).unsqueeze(-1)).add_(part * torch.exp(part_lse - total).unsqueeze(-1))
    lse.copy_(total)


def attend_backward(
    blocks: list[Block],
    q: Tensor,
    out: Tensor,
    grad_out: Tensor,
    lse: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
) -> None:
    """Adds to three gradients those of the blocks, for keys and values that are here; out and lse are of all keys."""
    kernel = kernel_for(q, v)
    for rows, own, other, band in blocks:
        q_block, out_block, grad_block, lse_block = (x[rows, :, own] for x in (q, out, grad_out, lse))
        k_block, v_block = k[rows, :, other], v[rows, :, other]
        sums = grad_q[rows, :, own], grad_k[rows, :, other], grad_v[rows, :, other]
        kernel.backward(grad_block, q_block, k_block, v_block, out_block, lse_block, scale, band, sums)


def _add_arrived(grads: list[Tensor], travelling: Hop | None) -> None:
    if travelling is not None:
        for grad, arrived in zip(grads, travelling.wait(), strict=True):
            grad += arrived
