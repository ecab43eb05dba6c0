"""Weights among the tensors that a graph saves: held as references, and looked up again in backward.

An engine (ZeRO-3, FSDP) frees the weights of a layer after its forward, and gathers them again before its backward, perhaps
elsewhere in memory. A graph must not hold them in between.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ds_minis.tiling.core.params import ParameterSlots


class WeightView(NamedTuple):
    """A view of a weight.

    Attributes:
        number: of the weight, in `SavedWeights`.
        offset: from the weight's beginning, in elements.
        dtype: of the saved tensor: the weight's own, or what autocast has cast it to.
    """

    number: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype


class SavedWeights:
    """The tensors of a module in one call. Holds none of them after `end`.

    Attributes:
        trainable: number of the trainable ones, which come first.
    """

    def __init__(self, slots: ParameterSlots):
        self.trainable = len(slots.tensors)
        own = sorted(slots.places.items())
        self._places = [(part, "_parameters", name) for _, (part, name) in own]
        self._places += [(part, kind, name) for part, kind, name, _ in slots.others]
        self._layouts: list[tuple[torch.Size, tuple[int, ...]]] = []
        self._of: dict[int, list[tuple[int, Tensor]]] = {}
        for number, t in enumerate((*slots.tensors, *(t for *_, t in slots.others))):
            self._layouts.append((t.shape, t.stride()))
            if not is_traceable_wrapper_subclass(t) and t.numel():
                self._of.setdefault(t.untyped_storage()._cdata, []).append((number, t))

    def view_of(self, t: Tensor) -> WeightView | None:
        """What to save instead of a tensor; None if it shares no memory with a weight.

        Raises:
            NotAView: it shares memory with a weight in a way that cannot be found again.
        """
        weights = self._of.get(t.untyped_storage()._cdata)
        if weights is None:
            return None
        last = t.storage_offset() + sum((n - 1) * step for n, step in zip(t.shape, t.stride(), strict=True))
        for number, weight in weights:  # several where FSDP1 has one memory for many
            first = weight.storage_offset()
            if t.dtype == weight.dtype and first <= t.storage_offset() and last < first + weight.numel():
                return WeightView(number, t.shape, t.stride(), t.storage_offset() - first, t.dtype)
        raise NotAView("it saves a weight for its backward in another form")

    def uses(self) -> list[int]:
        """How many hold the memory of each weight."""
        return [
            torch._C._storage_Use_Count(t.untyped_storage()._cdata) for found in self._of.values() for _, t in found[:1]
        ]

    def cast(self, number: int, t: Tensor) -> WeightView:
        """What to save instead of a copy that autocast made of a weight."""
        return WeightView(number, t.shape, t.stride(), 0, t.dtype)

    def is_whole(self, number: int, t: Tensor) -> bool:
        """Whether a copy has the shape and the memory format of the weight, perhaps transposed."""
        shape, stride = self._layouts[number]
        mine = {(t.shape, t.stride()), *({(t.mT.shape, t.mT.stride())} if t.dim() == 2 else ())}
        return (shape, stride) in mine and t.storage_offset() == 0

    def has_casts(self, dtype: torch.dtype | None) -> bool:
        """Whether autocast to `dtype` copies a weight that is not trained."""
        if dtype is None:
            return False
        found = (pair for pairs in self._of.values() for pair in pairs)
        return any(n >= self.trainable and t.dim() > 1 and _is_cast(t.dtype, dtype) for n, t in found)

    def end(self) -> None:
        """Call this after forward."""
        self._of.clear()

    def now(self, view: WeightView, trainable: Sequence[Tensor | None]) -> Tensor:
        """The saved tensor, from the module's tensors as they are now.

        Args:
            trainable: the trainable ones; None for one that is looked up in the module.

        Raises:
            RuntimeError: the weight has another shape or memory format than in forward.
        """
        shape, stride = self._layouts[view.number]
        weight = trainable[view.number] if view.number < self.trainable else None
        weight = self._found(view.number) if weight is None else weight
        with torch._C.DisableTorchFunctionSubclass():
            weight = weight.detach()
            if (weight.shape, weight.stride()) != (shape, stride):
                raise RuntimeError(
                    f"a weight of a decoder layer has shape {tuple(weight.shape)} and strides {weight.stride()} in backward, "
                    f"and had {tuple(shape)} and {stride} in forward: change it after backward, or set "
                    '"keep": "input" in the mini-sequence configuration'
                )
            if weight.dtype != view.dtype:
                weight = weight.to(view.dtype)
            return weight.as_strided(view.shape, view.stride, weight.storage_offset() + view.offset)

    def _found(self, number: int) -> Tensor:
        part, kind, name = self._places[number]
        holder = part.__dict__ if kind == "__dict__" else part.__dict__[kind]
        return holder[name] if name in holder else getattr(part, name)


class NotAView(RuntimeError):
    """A saved tensor cannot be found again from the weights."""


def _is_cast(dtype: torch.dtype, autocast: torch.dtype) -> bool:
    return dtype != autocast and dtype in (torch.float32, torch.float16, torch.bfloat16)
