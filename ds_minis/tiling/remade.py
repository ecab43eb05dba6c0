"""What an operation saves for its backward and need not: what can be made again from tensors that are there then.

Either a view of one of them, or a copy of one, as attentions make them: in another dtype (autocast), in another order of
dimensions, with keys and values repeated for each query head, or a mask of booleans as numbers that are added.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ds_minis.tiling.recompute import has_values

Groups = Mapping[str, Sequence[Tensor]]


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

    def made(self, source: Tensor) -> Tensor:
        if source.dtype == torch.bool and self.dtype.is_floating_point:
            return source.new_zeros((), dtype=self.dtype).masked_fill(~source, -torch.inf)
        source = source.transpose(1, 2) if self.transposed else source
        return source.repeat_interleave(self.repeats, 2 if self.transposed else 1) if self.repeats > 1 else source


def copy_of(t: Tensor, sources: Sequence[tuple[Tensor, View]]) -> Copy | None:
    """How a tensor `(B, N, S, D)` can be made from one of some others, to the bit; None if it cannot."""
    small = t[tuple(slice(0, 1) if step == 0 else slice(None) for step in t.stride())]
    for source, view in sources:
        for transposed, repeats in _ways(source, small):
            copy = Copy(view, transposed, repeats, t.shape, t.stride(), t.dtype)
            if has_values(t) and torch.equal(copy.made(source).to(t.dtype), small):
                return copy
    return None


def _ways(source: Tensor, t: Tensor) -> Iterator[tuple[bool, int]]:
    """Whether to transpose and how often to repeat, for the shapes to fit."""
    if source.dim() != 4 or t.dim() != 4:
        return
    for transposed in (False, True):
        shape = source.transpose(1, 2).shape if transposed else source.shape
        heads = 2 if transposed else 1
        repeats = t.shape[heads] // max(shape[heads], 1)
        if all(n * (repeats if i == heads else 1) == m for i, (n, m) in enumerate(zip(shape, t.shape, strict=True))):
            yield transposed, repeats
