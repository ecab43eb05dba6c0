"""Whether the incoming gradient of a number per token is one factor for all tokens that have a label, and zero elsewhere.

It is for a mean and for a sum over them (supervised fine-tuning); not for a loss that weighs tokens or sequences (DPO), or
that reads another number too (an entropy bonus). Which one it is shows in backward. What a backward has shown of a model is
expected of the next pass, and checked in its backward.

Shapes: R rows (tokens).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ds_minis.tiling.core.participation import Memory


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
        expected: the gradient that is expected where there is a label.
    """

    def __init__(self, memory: Memory, labelled: Labelled):
        self._seen, (self._kind, self.labelled_R) = memory.one_factor, labelled
        self.expected = 1 / self.labelled_R.sum().clamp(min=1).float()  # a mean's, which needs no scaling then

    def is_expected(self) -> bool:
        return self._seen.get(self._kind, False)

    def is_unknown(self) -> bool:
        """Whether no backward has shown anything yet."""
        return self._kind not in self._seen

    def found(self, grads_N: Sequence[Tensor | None]) -> float | None:
        """The incoming gradient, divided by the expected one; None if that is not one number. Waits for the device, once.

        Args:
            grads_N: the incoming gradient `(R,)` of each number of a row; the first is the one that has a factor.
        """
        first, *others = grads_N
        if first is None:
            self._seen[self._kind] = False
        if first is None or not first.numel():
            return None
        factor = first.take(self.labelled_R.long().argmax())
        same = (first == torch.where(self.labelled_R, factor, 0)).all()
        for other in others:
            if other is not None:
                same = same & (other == 0).all()
        ratio = factor / self.expected.to(factor.dtype)
        same, ratio = torch.stack([same.to(ratio.dtype), ratio]).tolist()
        if not math.isfinite(ratio):  # of a step that is lost shows nothing
            return None
        if ratio or not same:  # nor do zeros
            self._seen[self._kind] = bool(same) and self._seen.get(self._kind, True)
        return ratio if same else None

    def learn(self, grad: Tensor) -> None:
        """A hook on the numbers of all rows, `(R, N)` or `(R,)`."""
        self.found(columns_of(grad))


def columns_of(result: Tensor) -> tuple[Tensor, ...]:
    """The columns of `(R, N)`, or the one that `(R,)` is."""
    # Not `unbind`, whose results autograd does not let a caller write to (transformers' label smoother does).
    return (result,) if result.dim() == 1 else tuple(result[:, column] for column in range(result.shape[1]))
