"""Recomputes tensors that an operation saves for its backward from tensors that backward has anyway.

Such a tensor is a view of one of those, or a copy as attentions make them: in another dtype (autocast), with dimensions
transposed, with keys and values repeated for each query head, or a boolean mask turned into an additive one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ds_minis.tiling.core.replay import has_values

Groups = Mapping[str, Sequence[Tensor]]


def storage_key(t: Tensor) -> tuple:
    """Equal for tensors of one dtype that share memory, while one of them is alive."""
    return t.untyped_storage()._cdata, t.dtype


def whole_storage(t: Tensor) -> Tensor:
    """The tensor's whole storage, flat."""
    return t.detach().as_strided((_storage_size(t),), (1,), 0)


def _storage_size(t: Tensor) -> int:
    return t.untyped_storage().nbytes() // t.element_size()


class Layout:
    """Strides, offsets and shared storages of some tensors, which views of them rely on."""

    def __init__(self, tensors: Sequence[Tensor]):
        self._all = self._places(tensors)

    def of(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """The given tensors in the recorded layout; saved-tensor hooks may have copied them into another."""
        if self._places(tensors) == self._all:
            return tensors
        memory: dict[int, Tensor] = {}
        placed = []
        for t, (shape, stride, offset, size, first) in zip(tensors, self._all, strict=True):
            flat = memory.setdefault(first, t.new_empty(size))
            placed.append(flat.as_strided(shape, stride, offset))
            _unexpanded(placed[-1]).copy_(t[_part(stride)])
        return placed

    @staticmethod
    def _places(tensors: Sequence[Tensor]) -> list[tuple]:
        """For each tensor: shape, strides, offset, size of its storage, index of the first tensor that shares it."""
        keys = list(map(storage_key, tensors))
        pairs = zip(tensors, keys, strict=True)
        return [(t.shape, t.stride(), t.storage_offset(), _storage_size(t), keys.index(key)) for t, key in pairs]


def _part(stride: Sequence[int]) -> tuple[slice, ...]:
    """The index that removes expanded dimensions."""
    return tuple(slice(0, 1) if step == 0 else slice(None) for step in stride)


def _unexpanded(t: Tensor) -> Tensor:
    return t[_part(t.stride())]


@dataclass(frozen=True)
class View:
    """A view of tensor `index` of a group: shape, strides and offset in its storage."""

    group: str
    index: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def like(cls, t: Tensor, group: str, index: int) -> View:
        return cls(group, index, t.shape, t.stride(), t.storage_offset())

    def of(self, groups: Groups) -> Tensor:
        return groups[self.group][self.index].as_strided(self.shape, self.stride, self.offset)


@dataclass(frozen=True)
class Copy:
    """A copy of a view.

    Attributes:
        transposed: whether the second and third dimensions are swapped.
        repeats: how often each head is repeated.
        shape, stride, dtype: of the copy; a dimension of stride 0 is expanded.
    """

    view: View
    transposed: bool
    repeats: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def of(self, groups: Groups) -> Tensor:
        source = self.view.of(groups)
        size = [1 if step == 0 else n for n, step in zip(self.shape, self.stride, strict=True)]
        copy = torch.empty_strided(size, self.stride, dtype=self.dtype, device=source.device)
        return copy.copy_(self.made(source)).as_strided(self.shape, self.stride)

    def is_of(self, source: Tensor, t: Tensor) -> Tensor:
        """Whether `t`, of this layout, is this copy of the source bit for bit: a boolean tensor on their device."""
        return _same_bits(self.made(source).to(t.dtype), _unexpanded(t))

    def made(self, source: Tensor) -> Tensor:
        if source.dtype == torch.bool and self.dtype.is_floating_point:
            return source.new_zeros((), dtype=self.dtype).masked_fill(~source, -torch.inf)
        source = source.transpose(1, 2) if self.transposed else source
        return source.repeat_interleave(self.repeats, 2 if self.transposed else 1) if self.repeats > 1 else source


def copy_of(t: Tensor, sources: Sequence[tuple[Tensor, View]]) -> Copy | None:
    """The copy of one of `sources` that equals `t` `(B, N, S, D)` bit for bit; None if there is none."""
    for source, view in sources:
        for transposed, repeats in ways_to_copy(source, t):
            copy = Copy(view, transposed, repeats, t.shape, t.stride(), t.dtype)
            if has_values(t) and copy.is_of(source, t):
                return copy
    return None


def _same_bits(a: Tensor, b: Tensor) -> Tensor:
    """Compares bits: a NaN equals itself, and 0.0 differs from -0.0."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}.get(a.element_size())
    if integers is None:
        return torch.zeros((), dtype=torch.bool, device=a.device)
    return (a.view(integers) == b.view(integers)).all()


def ways_to_copy(source: Tensor, t: Tensor) -> Iterator[tuple[bool, int]]:
    """Yields each (transposed, repeats) that maps the source's shape to that of `t`."""
    t = _unexpanded(t)
    if source.dim() != 4 or t.dim() != 4:
        return
    for transposed in (False, True):
        shape = source.transpose(1, 2).shape if transposed else source.shape
        heads = 2 if transposed else 1
        repeats = t.shape[heads] // max(shape[heads], 1)
        if all(n * (repeats if i == heads else 1) == m for i, (n, m) in enumerate(zip(shape, t.shape, strict=True))):
            yield transposed, repeats
