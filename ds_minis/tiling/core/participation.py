"""Finds the trainable tensors that a call uses: not those of an inactive adapter, or of an expert that no token chose.

Autograd runs the hooks of every input of a node, even where the gradient is None. The plain model has no unused tensors in
its graph, and engines (ZeRO-2) do not expect them.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from ds_minis.tiling.core.params import Constants, Copies, ParameterSlots
from ds_minis.tiling.core.replay import unseen_graph


class Walk:
    """Replaces trainable tensors by leaves, and finds the leaves that the graphs of given tensors reach."""

    def __init__(self, slots: ParameterSlots):
        self._slots = slots
        self._leaves = [t.detach().requires_grad_() for t in slots.tensors]
        self._waiting = {id(leaf): index for index, leaf in enumerate(self._leaves)}

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        with torch.enable_grad(), unseen_graph(), self._slots.reparametrized(self._leaves):
            yield

    def seen(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Walks the tensors' graphs, and returns the tensors detached."""
        found, todo = set(), [t.grad_fn for t in tensors]
        for t in tensors:
            self._waiting.pop(id(t), None)
        while todo and self._waiting:
            node = todo.pop()
            if node is None or node in found:
                continue
            found.add(node)
            if hasattr(node, "variable"):
                self._waiting.pop(id(node.variable), None)
            todo += [following for following, _ in node.next_functions]
        return tuple(t.detach() for t in tensors)

    def reached(self, indices: Iterable[int]) -> None:
        """Notes tensors that a graph of another kind reaches, by their indices."""
        waiting = {index: key for key, index in self._waiting.items()}
        for index in indices:
            self._waiting.pop(waiting.get(index), None)

    def idle(self) -> tuple[int, ...]:
        """The indices of the leaves that no graph has reached."""
        return tuple(self._waiting.values())


class Memory:
    """What earlier calls of a model's modules have shown. A copied model starts with nothing.

    Attributes:
        copies: copies of small buffers.
        one_factor: kind of loss -> what the gradients of all backward passes were (`ds_minis.loss.heads.one_factor`).
    """

    def __init__(self):
        self.copies = Copies()
        self.one_factor: dict[str, tuple[str, ...]] = {}
        self._whole: weakref.WeakKeyDictionary[nn.Module, tuple[tuple, tuple[int, ...]]] = weakref.WeakKeyDictionary()
        self._idle: weakref.WeakKeyDictionary[nn.Module, tuple[tuple, tuple[int, ...]]] = weakref.WeakKeyDictionary()

    def __reduce__(self):
        return Memory, ()

    def all_take_part(self, module: nn.Module, signature: tuple) -> bool:
        """Whether the last call had this signature and used all trainable tensors."""
        return _of_signature(self._idle.get(module), signature) == ()

    def idle_when_whole(self, module: nn.Module, signature: tuple) -> tuple[int, ...] | None:
        """The indices last given to `note_whole`; None if there are none for this signature."""
        return _of_signature(self._whole.get(module), signature)

    def note_whole(self, module: nn.Module, signature: tuple, idle: tuple[int, ...]) -> None:
        """Stores the unused indices of a call that was not tiled."""
        self._whole[module] = signature, idle

    def note(self, module: nn.Module, signature: tuple, idle: tuple[int, ...]) -> None:
        """Stores the unused indices, except for a module that chooses among its submodules (experts) at each call."""
        if not any(isinstance(part, nn.ModuleList) and len(part) > 1 for part in module.modules()):
            self._idle[module] = signature, idle


def _of_signature(known: tuple[tuple, tuple[int, ...]] | None, signature: tuple) -> tuple[int, ...] | None:
    return known[1] if known is not None and known[0] == signature else None


def call_signature(slots: ParameterSlots, constants: Constants, way: object) -> tuple:
    """Cache key: all that decides which tensors take part and is known before the call."""
    return slots.names, [values for _, values in constants], way
