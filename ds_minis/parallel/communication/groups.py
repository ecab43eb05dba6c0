"""The groups of ranks that share a batch: consecutive ranks, `size` in each.

Consecutive ranks are on one machine as far as they fit there, which is where the links are fastest.
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist


class GroupError(RuntimeError):
    """The processes of a job cannot be divided into groups as the settings ask."""


@dataclass(frozen=True)
class Group:
    """A group of ranks, seen by one of its members.

    Attributes:
        size: number of ranks.
        rank: this rank's place.
        handle: the group for `torch.distributed`.
        members: the ranks of the group, as numbers in the whole job.
    """

    size: int
    rank: int
    handle: Any
    members: tuple[int, ...]


def replicas(world_size: int, size: int) -> int:
    """How many data-parallel replicas `world_size` processes are, with `size` processes in each.

    Raises:
        GroupError: they cannot be divided.
    """
    if world_size % size:
        divisors = [n for n in range(1, world_size + 1) if world_size % n == 0]
        raise GroupError(
            f"sequence_parallel: {world_size} processes cannot be divided into groups of {size}; allowed with "
            f"{world_size} processes: {', '.join(map(str, divisors))}. Start a multiple of {size} processes, or change "
            "sequence_parallel"
        )
    return world_size // size


def require_divisible(world_size: int, size: int, source: str) -> int:
    """`replicas`, for settings that were given in `source`.

    Raises:
        ValueError: they cannot be divided.
    """
    try:
        return replicas(world_size, size)
    except GroupError as error:
        raise ValueError(f"{source}: {error}") from None


def make_group(size: int, stride: int = 1) -> Group:
    """Makes the groups of all ranks, and returns this rank's. Every rank of the job must call it, in the same order.

    A group has `size` members with `stride` ranks from one to the next: groups of stride a over those of size a make a grid.

    Raises:
        GroupError: no process group is initialized, or its ranks cannot be divided.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise GroupError(
            f"sequence_parallel: groups of {size} processes were asked for, and torch.distributed is not initialized: start "
            'the script with torchrun, `accelerate launch` or `deepspeed`, or leave "sequence_parallel" out'
        )
    world, rank = dist.get_world_size(), dist.get_rank()
    replicas(world, size * stride)
    block = size * stride
    all_members = [
        tuple(range(start + offset, start + block, stride))
        for start in range(0, world, block)
        for offset in range(stride)
    ]
    timeout = _timeout()
    found = None
    for members in all_members:
        handle = dist.new_group(list(members), timeout=timeout)
        if rank in members:
            found = Group(size, members.index(rank), handle, members)
    return found


def _timeout() -> datetime.timedelta | None:
    """The timeout of the job's own process group, which the user has chosen."""
    world = dist.group.WORLD
    for device in world._device_types:
        timeout = getattr(getattr(world._get_backend(device), "options", None), "_timeout", None)
        if timeout is not None:
            return timeout
    return None
