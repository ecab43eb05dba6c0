"""Host memory for layer inputs: a pool of blocks, how much a run needs, and how much is available.

Memory is allocated in blocks of one size, since torch's pinned allocator rounds every request up to a power of two: one
request of 3.2 GB would take 4 GB. Any layer reuses free blocks, at any length, so from the second step on none is allocated.
The pool keeps its blocks until it is deleted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

BLOCK_BYTES = 2**24  # a power of two; copies of 16 MiB reach the bus's full speed, and at most 16 MiB stay unused


def block_layout(num_bytes: int) -> tuple[int, int]:
    """The size and the number of the blocks that hold `num_bytes`."""
    size = min(BLOCK_BYTES, 1 << max(num_bytes - 1, 0).bit_length())
    return size, -(-num_bytes // size)


def host_bytes_needed(num_layers: int, tensors: Sequence[Tensor]) -> int:
    """Host memory for the layer inputs of one process: tensors like these for each layer, each in whole blocks."""
    return num_layers * sum(math.prod(block_layout(t.nbytes)) for t in tensors)


class BlockPool:
    """Blocks of host memory. `give_back` may be called at any time, from any thread (by the garbage collector)."""

    def __init__(self, *, pinned: bool):
        self._pinned = pinned
        self._free: dict[int, list[Tensor]] = {}
        self.bytes_allocated = 0

    @property
    def bytes_in_use(self) -> int:
        # Computed, not counted: a `give_back` may interrupt an update of a counter.
        return self.bytes_allocated - sum(size * len(blocks) for size, blocks in list(self._free.items()))

    def take(self, num_bytes: int) -> list[Tensor]:
        """Blocks that hold `num_bytes`, all of one size; the last one may be partly filled."""
        size, count = block_layout(num_bytes)
        free = self._free.setdefault(size, [])
        blocks = [free.pop() for _ in range(min(count, len(free)))]
        try:
            while len(blocks) < count:
                blocks.append(torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=self._pinned))
                self.bytes_allocated += size
        except (RuntimeError, MemoryError) as error:
            free.extend(blocks)
            raise RuntimeError(
                f"no {'pinned ' if self._pinned else ''}host memory left for layer inputs: {self.bytes_in_use:,} bytes hold "
                f"layer inputs, {self.bytes_allocated - self.bytes_in_use:,} are in free blocks, and the next "
                f"needs {count * size:,}. Train on shorter sequences, or let the process have more host memory"
            ) from error
        return blocks

    def give_back(self, blocks: list[Tensor]) -> None:
        if blocks:
            self._free[len(blocks[0])].extend(blocks)  # one atomic operation


def available_host_bytes(root: Path = Path("/")) -> int | None:
    """Available host memory: the least of the machine's and that of each cgroup of this process.

    It is shared by all processes of the machine (or of the cgroup). None if Linux's files are missing.
    """
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        available = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return None
    return max(0, min([available, *_left_by_cgroups(root)]))


# Folder of the cgroups; names of the limit, of the usage, and of the part of it that is reclaimable file cache.
_CGROUPS_1 = "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
_CGROUPS_2 = "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"


def _left_by_cgroups(root: Path) -> Iterator[int]:
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for _, controllers, path in (line.split(":", 2) for line in groups):
        if controllers and "memory" not in controllers.split(","):
            continue
        mount, limit, usage, cache = _CGROUPS_1 if controllers else _CGROUPS_2
        group = Path(path.lstrip("/"))
        # Limits of parent groups apply, too. In a container the path may be the host's, and only the root may exist.
        for folder in (root / mount / group, *(root / mount / parent for parent in group.parents)):
            try:
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                left = int((folder / limit).read_text()) - int((folder / usage).read_text())
                yield left + int(stat.get(cache, 0))
            except (OSError, ValueError):  # no such group, or "max" for no limit
                continue
