"""Detects losses that give every token with a label the same gradient, so that forward can compute weight gradients.

A mean and a sum over tokens do (supervised fine-tuning). A difference of two sequences' sums does, up to the sign (DPO with
one pair). A loss that weighs tokens or sequences (DPO with several pairs), or that reads another number too (an entropy
bonus), does not. Backward shows which one it is. The first forward pass expects a mean, each later one what all backward
passes of the model so far have shown, and its own backward checks that.

Shapes: R rows (tokens).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ds_minis.tiling.core.participation import Memory

# The signs of the factor in rows with a label: 1 in all; 1 in the first half of the rows (sequences), -1 in the second half.
ALIKE, OPPOSED = PATTERNS = ("alike", "opposed")


class Labelled(NamedTuple):
    """The kind of a call, and which of its rows have a label."""

    kind: str
    labelled_R: Tensor


class OneFactor:
    """The incoming gradient of one call, if it is one factor for all tokens with a label.

    Args:
        memory: what earlier calls of the model's modules have shown.
        labelled: the kind of the call, and which rows have a label.

    Attributes:
        labelled_R: which rows have a label.
    """

    def __init__(self, memory: Memory, labelled: Labelled):
        self._seen, (self._kind, self.labelled_R) = memory.one_factor, labelled
        self._factor = 1 / self.labelled_R.sum().clamp(min=1).float()  # a mean's, which needs no scaling then
        # Of this call: another's backward may come between its forward and its backward. The first call expects a mean:
        # learning that from a first step, in another way, would round a resumed run otherwise than one that is not.
        self._pattern = next(iter(self._seen.get(self._kind, PATTERNS)), None)

    def is_expected(self) -> bool:
        return self._pattern is not None

    def expected(self) -> Tensor:
        """The incoming gradient `(R,)` that is expected."""
        return self._signs(self._pattern) * self._factor

    def _signs(self, pattern: str) -> Tensor:
        """1 or -1 where there is a label, else 0: `(R,)`."""
        signs_R = self.labelled_R.to(torch.int8)
        if pattern == OPPOSED:
            signs_R[signs_R.shape[0] // 2 :].neg_()
        return signs_R

    def found(self, grads_N: Sequence[Tensor | None]) -> float | None:
        """The incoming gradient, divided by the expected one; None if that is not one number. Waits for the device, once.

        Args:
            grads_N: the incoming gradient `(R,)` of each number of a row; the first is the one that has a factor.
        """
        first, *others = grads_N
        if first is None:
            self._seen[self._kind] = ()
        if first is None or not first.numel():
            return None
        row = self.labelled_R.long().argmax()
        signs_PR = torch.stack([self._signs(pattern) for pattern in PATTERNS])
        factors_P = first.take(row) * signs_PR.index_select(1, row.view(1))[:, 0]  # indexing would wait for the device
        same_P = (first == factors_P[:, None] * signs_PR).all(1)
        for other in others:
            if other is not None:
                same_P = same_P & (other == 0).all()
        wide = torch.promote_types(first.dtype, torch.float32)
        # The expected factor was rounded to the dtype of the numbers; their ratio is not.
        ratios_P = factors_P.to(wide) / self._factor.to(first.dtype).to(wide)
        same_P, ratios_P = torch.stack([same_P.to(wide), ratios_P]).tolist()
        if not all(map(math.isfinite, ratios_P)):  # a step that overflowed shows nothing
            return None
        fitting = [pattern for pattern, same in zip(PATTERNS, same_P, strict=True) if same]
        if any(ratios_P) or not fitting:  # zeros show nothing either
            self._seen[self._kind] = tuple(p for p in self._seen.get(self._kind, PATTERNS) if p in fitting)
        return ratios_P[PATTERNS.index(self._pattern)] if self._pattern in fitting else None


def columns_of(result: Tensor) -> tuple[Tensor, ...]:
    """The columns of `(R, N)`, or the one that `(R,)` is."""
    # Not `unbind`, whose results autograd does not let a caller write to (transformers' label smoother does).
    return (result,) if result.dim() == 1 else tuple(result[:, column] for column in range(result.shape[1]))
