"""Computes a few numbers for each row, and the gradient of the first one in forward: backward runs no chunk again.

The gradient of a row's number by that row is known but for its factor, the number's incoming gradient. It is computed while
a chunk's intermediates (its logits) exist, and scaled in backward: two matmuls of a frozen LM head instead of three. The
gradient of a trained weight is a sum over rows, each with a factor of its own: it can be kept only where all factors are
expected to be one (`one_factor`). Then backward scales it too, three matmuls instead of four, or, if they are not one,
computes all gradients anew.

Shapes: R rows of the whole input, C rows of one chunk, N numbers of each row; trailing dimensions are free.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ds_minis.loss.heads.forward_grads import ForwardGrads
from ds_minis.loss.heads.one_factor import OneFactor, columns_of
from ds_minis.tiling.core.params import ParameterSlots
from ds_minis.tiling.core.replay import AutocastState, refuse_gradients_of_gradients
from ds_minis.tiling.core.tiled_op import Guard, runs_whole, tile_rows


class RowColumns(ForwardGrads):
    """One call: the state that its forward and its backward share.

    Args:
        labels: which rows have a label, and what a loss of them weighs alike; None where that is not known.

    Attributes:
        grads: the gradients of forward, until backward.
    """

    def __init__(self, *call, labels: OneFactor | None):
        super().__init__(*call)
        self._labels, self._trained = labels, bool(self.slots.tensors)
        self.grads: list[Tensor | None] | None = None

    def forward(
        self, tensors: Sequence[Tensor], grads_N: Sequence[Tensor | None] | None = None
    ) -> tuple[Tensor, list[Tensor | None]]:
        """The numbers, `(R, N)` or `(R,)`, and the gradients of rows and parameters (in that order).

        Args:
            grads_N: the incoming gradient `(R,)` of each number; None: the expected one for the first number, zero for all
                others.
        """
        results: list[Tensor] = []
        labels = self._labels if grads_N is None else None
        expected_R = None if labels is None else labels.expected() if self._trained else labels.labelled_R.float()

        def outputs(chunk: Sequence[Tensor], start: int, stop: int) -> tuple[list[Tensor], list[Tensor]]:
            options = {} if expected_R is None else {"expected": expected_R[start:stop]}
            y = self.function(*chunk, **options)
            results.append(y.detach())
            incoming = torch.zeros_like(y)
            places = columns_of(incoming)
            if grads_N is None:
                places[0].copy_(options.get("expected", 1))
            for place, grad_R in zip(places, grads_N or (), strict=False):
                if grad_R is not None:
                    place.copy_(grad_R[start:stop])
            return [y], [incoming]

        grads = self.grads_of_chunks(tensors, [t.requires_grad for t in tensors], outputs)
        return torch.cat(results), grads

    def run(self, rows: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The columns of the result, in the autograd graph."""
        with torch.no_grad():
            result, grads = self.forward((*rows, *self.slots.tensors))
        idle = [i for i, grad in enumerate(grads[len(rows) :]) if grad is None]
        self.slots.leave_out(idle)  # autograd would run their hooks without a gradient
        self.grads = [grad for i, grad in enumerate(grads) if i - len(rows) not in idle]
        return _Columns.apply(self, result, *rows, *self.slots.tensors)

    def grads_again(self, tensors: Sequence[Tensor], grads_N: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The gradients for other incoming gradients; runs each chunk again."""
        with self.as_in_forward():
            return self.forward(tensors, grads_N)[1]

    def found(self, grads_N: Sequence[Tensor | None]) -> float | Tensor | None:
        """What the gradients of forward are to be scaled with, a number or one for each row; None if they are of no use."""
        if self._trained:
            return self._labels.found(grads_N)
        return grads_N[0] if all(grad is None for grad in grads_N[1:]) else None


class _Columns(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call: RowColumns, result: Tensor, *tensors: Tensor):
        ctx.call = call
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        return tuple(column_R.clone() for column_R in columns_of(result))

    @staticmethod
    def backward(ctx, *grads_N):
        refuse_gradients_of_gradients('set "loss": false')
        call, tensors = ctx.call, ctx.saved_tensors  # raises torch's own error if they are freed
        # Scaled in place and handed over without a copy; a second backward (`retain_graph=True`) computes them again.
        grads, call.grads = call.grads, None
        factor = None if grads is None else call.found(grads_N)
        if factor is None:
            del grads
            return None, None, *call.grads_again(tensors, grads_N)
        return None, None, *[None if grad is None else grad.mul_(_like(factor, grad)) for grad in grads]


def _like(factor: float | Tensor, grad: Tensor) -> float | Tensor:
    return factor.view(-1, *[1] * (grad.dim() - 1)) if isinstance(factor, Tensor) else factor


def row_columns(
    function: Callable[..., Tensor],
    module: nn.Module,
    rows: Sequence[Tensor],
    chunk_rows: int,
    guard: Guard = contextlib.nullcontext,
    labels: OneFactor | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """`function(*rows)` or its columns, over chunks of rows, with the gradients of one untiled call.

    Args:
        function: maps C rows of each input to `(C, N)`, or `(C,)` for one number; its row i depends on row i of the inputs
            alone. With `labels`, it also gets the keyword `expected` `(C,)` if the first number is sure to receive that
            gradient, and no other number any.
        module: holds every trainable tensor that `function` uses.
        rows: inputs of R rows each, `(R, ...)`.
        chunk_rows: C, at least 1. Input of one chunk may run untiled, see `tiled_op.runs_whole`.
        guard: makes a context for the chunks.
        labels: which rows have a label: the incoming gradients of others are sure to be zero. It says whether one factor is
            expected, and learns whether it is one.

    Returns:
        N tensors `(R,)` if gradients are computed in forward. Otherwise the result: not views of it, of which FSDP2 warns
        where a module returns them (`columns_of` makes them).
    """
    trained = bool(ParameterSlots(module).tensors)
    with_grad = torch.is_grad_enabled() and (trained or any(x.requires_grad for x in rows))
    # In float16 a gradient of 1 underflows where the loss scale, which is known only in backward, keeps it.
    narrow = torch.float16 in (rows[0].dtype, AutocastState(rows[0].device).dtype())
    in_forward = with_grad and not narrow and not runs_whole(rows[0].shape[0], chunk_rows)
    if in_forward and (not trained or (labels is not None and labels.is_expected())):
        return RowColumns(function, module, rows, chunk_rows, guard, labels=labels).run(rows)
    return tile_rows(function, module, rows, chunk_rows, guard=guard)
