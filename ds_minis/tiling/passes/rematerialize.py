"""What an operation saves for its backward and need not: what can be made again from tensors that are there then.

Either a view of one of them, or a copy of one, as attentions make them: in another dtype (autocast), in another order of
dimensions, with keys and values repeated for each query head, or a mask of booleans as numbers that are added.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ds_minis.tiling.core.replay import has_values

Groups = Mapping[str, Sequence[Tensor]]


def storage_key(t: Tensor) -> tuple:
    """The same for tensors that share memory, as long as one of them lives."""
    return t.untyped_storage()._cdata, t.dtype


def whole_storage(t: Tensor) -> Tensor:
    """All memory that a tensor is a view of, flat."""
    return t.detach().as_strided((_storage_size(t),), (1,), 0)


def _storage_size(t: Tensor) -> int:
    return t.untyped_storage().nbytes() // t.element_size()


class Layout:
    """How some tensors lie in memory, which views of them count on."""

    def __init__(self, tensors: Sequence[Tensor]):
        self._all = self._places(tensors)

    def of(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Tensors of the same values that lie as those did. Saved tensor hooks may have copied them in between."""
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
        """Of each: shape, strides, offset and size of its memory, and the first that shares it."""
        keys = list(map(storage_key, tensors))
        pairs = zip(tensors, keys, strict=True)
        return [(t.shape, t.stride(), t.storage_offset(), _storage_size(t), keys.index(key)) for t, key in pairs]


def _part(stride: Sequence[int]) -> tuple[slice, ...]:
    """Without what is there again by expansion."""
    return tuple(slice(0, 1) if step == 0 else slice(None) for step in stride)


def _unexpanded(t: Tensor) -> Tensor:
    return t[_part(t.stride())]


@dataclass(frozen=True)
class View:
    """A view of a tensor: which one of a group of them, and where it lies in that one's memory."""

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
        transposed: whether its second and third dimension are changed round.
        repeats: how often each head is repeated.
        shape, stride, dtype: of the copy; a dimension of stride 0 is an expanded one.
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
        """Whether a tensor of this layout is this copy of the source, to the bit: a boolean on their device."""
        return _same_bits(self.made(source).to(t.dtype), _unexpanded(t))

    def made(self, source: Tensor) -> Tensor:
        if source.dtype == torch.bool and self.dtype.is_floating_point:
            return source.new_zeros((), dtype=self.dtype).masked_fill(~source, -torch.inf)
        source = source.transpose(1, 2) if self.transposed else source
        return source.repeat_interleave(self.repeats, 2 if self.transposed else 1) if self.repeats > 1 else source


def copy_of(t: Tensor, sources: Sequence[tuple[Tensor, View]]) -> Copy | None:
    """How a tensor `(B, N, S, D)` can be made from one of some others, to the bit; None if it cannot."""
    for source, view in sources:
        for transposed, repeats in ways_to_copy(source, t):
            copy = Copy(view, transposed, repeats, t.shape, t.stride(), t.dtype)
            if has_values(t) and copy.is_of(source, t):
                return copy
    return None


def _same_bits(a: Tensor, b: Tensor) -> Tensor:
    """A NaN equals itself here, and zeros of different signs are different."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}.get(a.element_size())
    if integers is None:
        return torch.zeros((), dtype=torch.bool, device=a.device)
    return (a.view(integers) == b.view(integers)).all()


def ways_to_copy(source: Tensor, t: Tensor) -> Iterator[tuple[bool, int]]:
    """Whether to transpose and how often to repeat, for the shapes to fit."""
    t = _unexpanded(t)
    if source.dim() != 4 or t.dim() != 4:
        return
    for transposed in (False, True):
        shape = source.transpose(1, 2).shape if transposed else source.shape
        heads = 2 if transposed else 1
        repeats = t.shape[heads] // max(shape[heads], 1)
        if all(n * (repeats if i == heads else 1) == m for i, (n, m) in enumerate(zip(shape, t.shape, strict=True))):
            yield transposed, repeats
