"""The exchanges of a group as differentiable operations.

No gradient is scaled here: the gradient of a tensor that all ranks use is the sum over ranks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from ds_minis.parallel.communication.cut import Cut
from ds_minis.parallel.communication.groups import Group


@contextlib.contextmanager
def naming_ranks(ranks: Iterable[int]) -> Iterator[None]:
    """Inside, an error of the backend says which ranks of the job this one was exchanging with: gloo tells a port alone."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        rank = dist.get_rank()
        others = ", ".join(str(other) for other in sorted({*ranks} - {rank}))
        error.add_note(
            f"sequence_parallel: rank {rank} was exchanging tokens with ranks {others}, of which one has ended or came too "
            "late. The cause is what that rank printed first, or what ended it"
        )
        raise


def gather(x: Tensor, group: Group) -> list[Tensor]:
    """The tensors of all ranks, in their order; equal shapes. No gradient."""
    x = x.contiguous()
    parts = [torch.empty_like(x) for _ in range(group.size)]
    with naming_ranks(group.members):
        dist.all_gather(parts, x, group=group.handle)
    return parts


def gather_sequence(x: Tensor, cut: Cut, group: Group, dim: int = 1) -> Tensor:
    """The whole sequence from each rank's tokens: `(B, T, ...)` -> `(B, S, ...)`. Backward sums over ranks."""
    return _GatherSequence.apply(x, cut, group, dim)


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, cut: Cut, group: Group, dim: int) -> Tensor:
        ctx.cut, ctx.group, ctx.dim = cut, group, dim
        return cut.in_order(gather(x, group), dim)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return scattered_sum(ctx.cut.by_rank(grad, ctx.dim), ctx.group), None, None, None


def gather_ranks(x: Tensor, group: Group) -> list[Tensor]:
    """The tensors of all ranks, in their order; equal shapes. Backward sums over ranks."""
    return list(_GatherRanks.apply(x, group))


class _GatherRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: Group) -> tuple[Tensor, ...]:
        ctx.group = group
        return tuple(gather(x, group))

    @staticmethod
    def backward(ctx, *grads: Tensor):
        return scattered_sum(list(grads), ctx.group), None


def scattered_sum(of_ranks: list[Tensor], group: Group) -> Tensor:
    """This rank's tensor, summed over ranks: each gives one for every rank."""
    of_ranks = [x.contiguous() for x in of_ranks]
    result = torch.empty_like(of_ranks[group.rank])
    with naming_ranks(group.members):
        dist.reduce_scatter(result, of_ranks, group=group.handle)
    return result


def exchange(of_ranks: list[Tensor], group: Group) -> list[Tensor]:
    """Gives each rank the tensor meant for it, and returns those that the others meant for this one. Equal shapes.

    The list is emptied: what was sent is not held beside what is made of the received.
    """
    tensors = tuple(of_ranks)
    of_ranks.clear()
    return list(_Exchange.apply(group, *tensors))


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx, group: Group, *of_ranks: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        return tuple(_all_to_all(of_ranks, group))

    @staticmethod
    def backward(ctx, *grads: Tensor):
        return None, *_all_to_all(grads, ctx.group)


def _all_to_all(of_ranks: tuple[Tensor, ...], group: Group) -> list[Tensor]:
    of_ranks = [x.contiguous() for x in of_ranks]
    received = [torch.empty_like(x) for x in of_ranks]
    with naming_ranks(group.members):
        dist.all_to_all(received, of_ranks, group=group.handle)
    return received


def summed(x: Tensor, group: Group) -> Tensor:
    """The sum over ranks. No gradient."""
    total = x.detach().clone()
    with naming_ranks(group.members):
        dist.all_reduce(total, group=group.handle)
    return total
