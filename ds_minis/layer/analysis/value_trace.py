"""Follows the outputs of modules through a run, forward and backward, to all that is computed from them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ds_minis.tiling.verify.op_trace import flat, memory_of

_READ_NO_VALUE = {
    getattr(torch.ops.aten, name)
    for name in "empty_like zeros_like ones_like full_like rand_like randn_like new_empty new_empty_strided new_zeros "
    "new_ones new_full".split()
}


class ValueTrace(TorchDispatchMode):
    """Notes inside which values depend on the outputs of which modules.

    A value depends on an output if an operation on the way reads it, whatever it computes: the output may not be NaN. Memory
    is followed as a whole, so a view depends on all that its base depends on.

    Args:
        modules: each is called once, and gives a tensor.
        readers: modules that read the values of their input.
    """

    def __init__(self, modules: Iterable[nn.Module], readers: Iterable[nn.Module] = ()):
        super().__init__()
        self._modules, self._readers = list(modules), list(readers)
        self._sources: dict[int, set[nn.Module]] = {}  # by memory
        self._held: list[Tensor] = []  # so that no address is reused
        self._read: set[nn.Module] = set()

    def read_by(self, values: Sequence[Tensor | None]) -> set[nn.Module]:
        """The modules whose output some of these values depend on, or that decides what runs."""
        return self._read | self._sources_of(values)

    def _sources_of(self, values: Any) -> set[nn.Module]:
        found: set[nn.Module] = set()
        for t in flat(values):
            if isinstance(t, Tensor):
                found |= self._sources.get(memory_of(t), set())
        return found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        sources = self._sources_of((args, kwargs))
        if sources and getattr(func, "overloadpacket", None) not in _READ_NO_VALUE:
            tensors = [t for t in flat(result) if isinstance(t, Tensor)]
            if not tensors:  # such as `item()`
                self._read |= sources
            for t in tensors:
                self._add(t, sources)
        return result

    def _add(self, t: Tensor, sources: set[nn.Module]) -> None:
        memory = memory_of(t)
        if memory not in self._sources:
            self._held.append(t)
        self._sources[memory] = self._sources.get(memory, set()) | sources

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Context for the run and its backward."""

        def watch(module, args, output):
            self._add(output, {module})

        def watch_reader(module, args):
            self._read |= self._sources_of(args)

        handles = [module.register_forward_hook(watch) for module in self._modules]
        handles += [module.register_forward_pre_hook(watch_reader) for module in self._readers]
        try:
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()
            self._held.clear()
