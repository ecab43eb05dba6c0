"""Stores the inputs of tiled layers between forward and backward: in host memory (`offload`), or on the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ds_minis.config import MiniSequenceConfig
from ds_minis.config_values import AUTO
from ds_minis.memory.accounts import Reservation
from ds_minis.memory.host_memory import available_host_bytes, host_bytes_needed
from ds_minis.memory.keep_budget import HOST, INPUT, KeepBudget
from ds_minis.memory.offload import HostStore
from ds_minis.ranks import num_local_ranks
from ds_minis.tiling.core.replay import graph_is_kept, has_values
from ds_minis.tiling.core.warn import Warnings


class LayerInput(Protocol):
    """Stores the input of one call of a layer until backward, and the kept tensors of its attention."""

    def keep(self, *tensors: Tensor) -> None:
        """Stores the layer's input, and the kept tensors of its attention, if any."""

    def fetch(self) -> list[Tensor]:
        """Returns the same tensors in the same order."""

    def release(self) -> None:
        """Called after backward; frees the tensors unless the graph is retained for another backward."""


class LayerInputStore:
    """The layer inputs of one model. A copy starts empty.

    Attributes:
        num_layers: number of layers that are tiled as a whole.
        host: the inputs in host memory; None without `offload`.
        budget: decides what each call of a layer keeps.
    """

    def __init__(self, config: MiniSequenceConfig, warnings: Warnings, num_layers: int = 0):
        self.num_layers = num_layers
        self.host = HostStore() if config.offload else None
        self.budget = KeepBudget(config, warnings)
        self._config, self._warnings = config, warnings
        self._stated = 0

    def __reduce__(self):
        return LayerInputStore, (self._config, self._warnings, self.num_layers)

    def new_input(self, x: Tensor, level: str = INPUT) -> LayerInput | None:
        """Storage for the input of one call of a layer, which keeps that much; None leaves it to autograd."""
        if self.host is None:
            return InMemory() if level != INPUT else None
        account = self.budget.account(x) if self._config.offload == AUTO else None
        if account is not None and level != HOST:
            return InMemory(account.hold)
        self._tell_outside()
        return _InHostMemory(self.host, self._state_need)

    def _state_need(self, tensors: Sequence[Tensor]) -> None:
        """Reports how much host memory a run needs before allocating it, and again for longer sequences.

        Args:
            tensors: the tensors that one layer stores, its input first.

        Raises:
            ValueError: not enough host memory is available.
        """
        x, num_bytes = tensors[0], sum(t.nbytes for t in tensors)
        if num_bytes <= self._stated or not has_values(x):
            return
        layers = self.num_layers
        need = host_bytes_needed(layers, tensors)
        ranks, available = num_local_ranks(), available_host_bytes()
        held = self.host.host_bytes_allocated
        what = f"{layers} layer inputs of {tuple(x.shape)}" + (" and attention outputs" if len(tensors) > 1 else "")
        if available is not None and ranks * (need - held) > available:
            way_out = 'set "keep": "input"' if len(tensors) > 1 else "start fewer processes on it"
            raise ValueError(
                f'"offload": "{self._config.offload}" needs {need / 2**30:.1f} GiB of host memory in each of {ranks} '
                f"processes, for {what}, and {available / 2**30:.1f} GiB are available on this machine: {way_out}, or train "
                "on shorter sequences"
            )
        tell, self._stated = num_bytes > 1.5 * self._stated, num_bytes  # not again for slightly longer sequences
        if tell:
            free = "" if available is None else f", {available / 2**30:.1f} GiB are available"
            self._warnings.once(f"offload: {need / 2**30:.2f} GiB of host memory per process for {what}{free}")

    def _tell_outside(self) -> None:
        if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
            self._warnings.once(
                "something around the decoder layers (activation checkpointing, another offloading) keeps their inputs too, "
                'so "offload" saves nothing: turn that off, a tiled layer needs none'
            )


class InMemory:
    """Holds the tensors on the device, as autograd would; they stay accessible through this object.

    Args:
        hold: counts the bytes of the input until the result is dropped; None counts nothing.
    """

    _kept: list[tuple[Tensor, int]] | None = None

    def __init__(self, hold: Callable[[float], Reservation] | None = None):
        self._hold, self._held = hold, None

    def keep(self, *tensors: Tensor) -> None:
        self._held = self._hold and self._hold(tensors[0].nbytes)
        self._kept = [(t.detach(), t._version) for t in tensors]

    def fetch(self) -> list[Tensor]:
        if self._kept is None:
            raise RuntimeError(
                "backward a second time through a graph whose layer inputs were freed: use retain_graph=True"
            )
        if any(t._version != version for t, version in self._kept):
            raise RuntimeError(
                "the input of a decoder layer, or its attention's output, was changed in place between forward and backward: "
                "change it after backward, or make the operation that changes it give a new tensor"
            )
        return [t for t, _ in self._kept]

    def release(self) -> None:
        if not graph_is_kept():
            self._kept = self._held = None


class _InHostMemory:
    def __init__(self, store: HostStore, state_need: Callable[[Sequence[Tensor]], None]):
        self._store, self._state_need = store, state_need

    def keep(self, *tensors: Tensor) -> None:
        self._state_need(tensors)
        self._kept = [self._store.keep(t, at_once=len(tensors)) for t in tensors]

    def fetch(self) -> list[Tensor]:
        # Last first, the order in which they are prefetched.
        return [kept.fetch(ahead=len(self._kept)) for kept in reversed(self._kept)][::-1]

    def release(self) -> None:
        if not graph_is_kept():
            for kept in self._kept:
                kept.release()
