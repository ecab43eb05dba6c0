"""Sums a function of rows over chunks and computes the gradients in forward: backward runs no chunk again.

The gradients of a sum are proportional to its incoming gradient, a scalar, so backward only scales them. They are computed
while a chunk's intermediates (its logits) exist: three matmuls of the LM head instead of four.

Shapes: R rows of the whole input, C rows of one chunk; trailing dimensions are free.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ds_minis.loss.heads.forward_grads import ForwardGrads
from ds_minis.tiling.core.replay import refuse_gradients_of_gradients
from ds_minis.tiling.core.tiled_op import Guard


class TiledSum(ForwardGrads):
    """One call: the state that its forward and its backward share."""

    def __init__(
        self,
        function: Callable[..., Tensor],
        module: nn.Module,
        rows: Sequence[Tensor],
        chunk_rows: int,
        expected: Tensor,
        guard: Guard,
    ):
        super().__init__(function, module, rows, chunk_rows, guard)
        self.expected = expected

    def value(self, rows: Sequence[Tensor]) -> Tensor:
        """The sum alone, without a graph."""
        with self.running(), torch.no_grad():
            return sum(self.function(*[x[start:stop] for x in rows]).sum(0) for start, stop in self.bounds)

    def value_and_grads(
        self, tensors: Sequence[Tensor], needs_grad: Sequence[bool]
    ) -> tuple[Tensor, list[Tensor | None]]:
        """The sum, and the gradients of rows and parameters (in that order) for the expected incoming gradient."""
        totals: list[Tensor] = []

        def outputs(chunk: Sequence[Tensor], start: int, stop: int) -> tuple[list[Tensor], list[Tensor]]:
            y = self.function(*chunk).sum(0)
            totals.append(y.detach())
            return [y], [self.expected.to(y.dtype)]

        grads = self.grads_of_chunks(tensors, needs_grad, outputs)
        return sum(totals), grads

    def grads_again(self, tensors: Sequence[Tensor], needs_grad: Sequence[bool]) -> list[Tensor | None]:
        with self.as_in_forward():
            return self.value_and_grads(tensors, needs_grad)[1]


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call: TiledSum, *tensors: Tensor):
        ctx.call = call
        ctx.save_for_backward(*tensors)
        total, ctx.grads = call.value_and_grads(tensors, ctx.needs_input_grad[1:])
        return total

    @staticmethod
    def backward(ctx, grad_total):
        refuse_gradients_of_gradients('set "loss": false')
        tensors = ctx.saved_tensors  # raises torch's own error if they are freed
        # Scaled in place and handed over without a copy; a second backward (`retain_graph=True`) computes them again.
        grads, ctx.grads = ctx.grads, None
        grads = ctx.call.grads_again(tensors, ctx.needs_input_grad[1:]) if grads is None else grads
        factor = grad_total / ctx.call.expected
        return None, *[None if grad is None else grad.mul_(factor) for grad in grads]


def sum_rows(
    function: Callable[..., Tensor],
    module: nn.Module,
    rows: Sequence[Tensor],
    chunk_rows: int,
    expected: Tensor,
    guard: Guard = contextlib.nullcontext,
) -> Tensor:
    """`function(*rows).sum(0)` over chunks of rows, with the gradients of one untiled call.

    Args:
        function: maps C rows of each input to a tensor of C rows; its row i depends on row i of the inputs alone.
        module: holds every trainable tensor that `function` uses.
        rows: inputs of R rows each, `(R, ...)`.
        chunk_rows: C, at least 1.
        expected: the incoming gradient that backward will probably get, a nonzero scalar. For any other, the gradients are
            the same up to one more rounding in bfloat16.
        guard: makes a context for the chunks.

    Returns:
        The sum. Its backward raises RuntimeError under `create_graph=True`.
    """
    call = TiledSum(function, module, rows, chunk_rows, expected, guard)
    if not torch.is_grad_enabled() or not any(t.requires_grad for t in (*rows, *call.slots.tensors)):
        return call.value(rows)
    return _Sum.apply(call, *rows, *call.slots.tensors)
