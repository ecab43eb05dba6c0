"""How much of a device's memory this process uses, has used at most, and can have. Nothing here waits for the device."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch

from ds_minis.memory.host_memory import available_host_bytes
from ds_minis.ranks import num_local_ranks


class DeviceMemory(Protocol):
    """The memory of one device, in bytes."""

    def in_use(self) -> float:
        """What this process uses now."""

    def peak(self) -> float:
        """The most that it has used, since the process began or since the user set the statistics back."""

    def usable(self) -> float:
        """What it could use in all: what it uses, and what is free."""


def memory_of(device: torch.device) -> DeviceMemory | None:
    """The memory of a device; None where it cannot be read."""
    if device.type == "cuda":
        return CudaMemory(device) if torch.cuda.get_allocator_backend() != "pluggable" else None
    return ProcessMemory() if device.type == "cpu" and ProcessMemory.is_readable() else None


class CudaMemory:
    """A CUDA device's, by the statistics of torch's allocator."""

    def __init__(self, device: torch.device):
        self._device = device

    def in_use(self) -> float:
        return self._statistic("allocated_bytes", "current")

    def peak(self) -> float:
        return self._statistic("allocated_bytes", "peak")

    def usable(self) -> float:
        free, total = torch.cuda.mem_get_info(self._device)
        fraction = getattr(torch.cuda, "get_per_process_memory_fraction", None)  # from torch 2.7 on
        most = total * fraction(self._device) if fraction else total
        return min(free + self._statistic("reserved_bytes", "current"), most)

    def _statistic(self, name: str, which: str) -> float:
        # Not `torch.cuda.memory_allocated`, which flattens and sorts all statistics at each call.
        return torch.cuda.memory_stats_as_nested_dict(self._device)[name]["all"][which]


class ProcessMemory:
    """The CPU's, by Linux's files: the resident memory of this process, and its part of what is available."""

    def __init__(self, root: Path = Path("/")):
        self._root = root

    @classmethod
    def is_readable(cls) -> bool:
        return available_host_bytes() is not None and Path("/proc/self/status").exists()

    def in_use(self) -> float:
        return self._field("VmRSS")

    def peak(self) -> float:
        return self._field("VmHWM")

    def usable(self) -> float:
        return self.in_use() + (available_host_bytes(self._root) or 0) / num_local_ranks()

    def _field(self, name: str) -> float:
        for line in (self._root / "proc/self/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
        return 0.0
