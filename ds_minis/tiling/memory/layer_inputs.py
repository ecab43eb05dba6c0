"""Where the inputs of tiled layers are between forward and backward, if not with autograd.

In host memory (`offload`), or, but for every k-th layer's, nowhere (`checkpoint_every`): they are then computed once more
from the nearest one before, in backward.
"""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from ds_minis.config import MiniSequenceConfig
from ds_minis.ranks import is_main_process, num_local_ranks
from ds_minis.tiling.core.replay import graph_is_kept, has_values
from ds_minis.tiling.memory.host_memory import available_host_bytes, host_bytes_needed
from ds_minis.tiling.memory.offload import HostStore

if TYPE_CHECKING:
    from ds_minis.tiling.passes.node import LayerNode

logger = logging.getLogger("ds_minis")


class Source(Protocol):
    """The input of one call of a layer, from its forward to its backward, with what is kept of its attention."""

    def keep(self, *tensors: Tensor) -> None:
        """The layer's input, and what there is to be kept of its attention."""

    def fetch(self) -> list[Tensor]:
        """The same tensors, in the same order."""

    def release(self) -> None:
        """Called after backward; nothing is let go of where the graph is kept for another one."""


class Checkpoints:
    """The layer inputs of one model. A copy of it has none.

    Attributes:
        num_layers: how many layers are tiled as a whole.
    """

    def __init__(self, config: MiniSequenceConfig, num_layers: int = 0):
        self.num_layers = num_layers
        self._config = config
        self._store = HostStore() if config.offload else None
        self._last: tuple[weakref.ref[Tensor], int, weakref.ref[LayerNode], int] | None = None
        self._stated = 0
        self._told_outside = False

    def __reduce__(self):
        return Checkpoints, (self._config, self.num_layers)

    @property
    def host_bytes_peak(self) -> int:
        """Bytes of host memory that layer inputs took at most."""
        return self._store.host_bytes_peak if self._store is not None else 0

    def source(self, layer: nn.Module, x: Tensor) -> tuple[Source | None, int]:
        """For a call of a layer: where its input `x` is kept, and from how many layers back it would be computed again."""
        every = self._config.checkpoint_every
        if self._store is None and every == 1 and not self._config.keep_attention:
            return None, 0
        self._tell_outside()
        if every > 1:
            _require_own_weights(layer)
            node, depth = self._maker_of(x)
            if node is not None and depth + 1 < every:
                return _Recomputed(node), depth + 1
        if self._store is None:
            return InMemory(), 0
        return _InHostMemory(self._store, self._state_need), 0

    def made(self, node: LayerNode, y: Tensor, depth: int) -> None:
        """Notes that a layer has given `y`, which may be the next one's input."""
        if self._config.checkpoint_every > 1:
            self._last = weakref.ref(y), y._version, weakref.ref(node), depth

    def _maker_of(self, x: Tensor) -> tuple[LayerNode | None, int]:
        if self._last is None:
            return None, 0
        y, version, node, depth = self._last
        return (node(), depth) if y() is x and x._version == version else (None, 0)

    def _state_need(self, tensors: Sequence[Tensor]) -> None:
        """Says how much host memory a run takes, before it takes it, and again when longer sequences come.

        Args:
            tensors: what one layer keeps, its input first.

        Raises:
            ValueError: there is not so much.
        """
        x, num_bytes = tensors[0], sum(t.nbytes for t in tensors)
        if num_bytes <= self._stated or not has_values(x):
            return
        layers = math.ceil(self.num_layers / self._config.checkpoint_every)
        need = host_bytes_needed(layers, tensors)
        ranks, available = num_local_ranks(), available_host_bytes()
        held = self._store.host_bytes_allocated
        what = f"{layers} layer inputs of {tuple(x.shape)}" + (" and attention outputs" if len(tensors) > 1 else "")
        if available is not None and ranks * (need - held) > available:
            every = math.ceil(self.num_layers * ranks * need / layers / max(available, 1))
            way_out = f'set "checkpoint_every" to {every} or more' if len(tensors) == 1 else 'turn "keep_attention" off'
            raise ValueError(
                f'"offload": "cpu" needs {need / 2**30:.1f} GiB of host memory in each of {ranks} processes, for {what}, and '
                f"{available / 2**30:.1f} GiB are available on this machine: {way_out} in the mini-sequence configuration, "
                "or train on shorter sequences"
            )
        tell, self._stated = num_bytes > 1.5 * self._stated, num_bytes  # not for each sequence that is a little longer
        if tell and is_main_process():
            free = "" if available is None else f", {available / 2**30:.1f} GiB are available"
            logger.warning("ds_minis offload: %.2f GiB of host memory per process for %s%s", need / 2**30, what, free)

    def _tell_outside(self) -> None:
        if not self._told_outside and torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
            self._told_outside = True
            if is_main_process():
                logger.warning(
                    "something around the decoder layers (activation checkpointing, another offloading) keeps their inputs "
                    'too, so "offload" and "checkpoint_every" save nothing: turn that off, a tiled layer needs none'
                )


class InMemory:
    """On the device, as autograd would, but within reach of the layers behind."""

    _kept: list[tuple[Tensor, int]] | None = None

    @property
    def is_empty(self) -> bool:
        return self._kept is None

    def keep(self, *tensors: Tensor) -> None:
        self._kept = [(t.detach(), t._version) for t in tensors]

    def fetch(self) -> list[Tensor]:
        if self._kept is None:
            raise RuntimeError(
                "backward a second time through a graph whose layer inputs were freed: use retain_graph=True"
            )
        if any(t._version != version for t, version in self._kept):
            raise RuntimeError(
                "the input of a decoder layer, or its attention's output, was changed in place between forward and backward"
            )
        return [t for t, _ in self._kept]

    def release(self) -> None:
        if not graph_is_kept():
            self._kept = None


class _InHostMemory:
    def __init__(self, store: HostStore, state_need: Callable[[Sequence[Tensor]], None]):
        self._store, self._state_need = store, state_need

    def keep(self, *tensors: Tensor) -> None:
        self._state_need(tensors)
        self._kept = [self._store.keep(t, at_once=len(tensors)) for t in tensors]

    def fetch(self) -> list[Tensor]:
        # In the order in which they are brought ahead, the last first.
        return [kept.fetch(ahead=len(self._kept)) for kept in reversed(self._kept)][::-1]

    def release(self) -> None:
        if not graph_is_kept():
            for kept in self._kept:
                kept.release()


class _Recomputed:
    """Nowhere: the output of the layer before, computed again."""

    def __init__(self, maker: LayerNode):
        self._maker, self._x = maker, None

    def keep(self, *tensors: Tensor) -> None:
        pass

    def fetch(self) -> list[Tensor]:
        if self._x is None:
            self._x = self._maker.forward_again(*self._maker.source.fetch())
        return [self._x]

    def release(self) -> None:
        self._x = None


def _require_own_weights(layer: nn.Module) -> None:
    """Refuses engines that hold a layer's weights only while this layer is run: its neighbours are run again beside it."""
    tensors = [t for m in layer.modules() for holder in (m._parameters, m.__dict__) for t in holder.values()]
    tensors = [t for t in tensors if isinstance(t, Tensor)]
    sharded = any(hasattr(t, "ds_id") and getattr(t, "ds_shape", t.shape) != t.shape for t in tensors)
    zero3 = any(hasattr(t, "ds_status") for t in tensors)
    fsdp2 = any(cls.__name__ == "FSDPModule" for cls in type(layer).__mro__)
    fsdp1 = any(not isinstance(t, nn.Parameter) and t.requires_grad for t in tensors)
    if sharded or zero3 or fsdp2 or fsdp1:
        raise ValueError(
            f'"checkpoint_every": backward computes several layers at once, and {type(layer).__name__} has its weights '
            "partitioned by FSDP or ZeRO-3, which gather one layer's at a time. Allowed with one process, DDP and ZeRO-0 to "
            '2; here set "checkpoint_every": 1, with "offload": "cpu" where memory is the limit'
        )
