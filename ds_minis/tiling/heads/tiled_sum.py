"""Sums a function of rows over chunks and computes the gradients in forward: backward runs no chunk again.

The gradients of a sum are proportional to its incoming gradient, a scalar, so backward only scales them. They are computed
while a chunk's intermediates (its logits) exist: three matmuls of the LM head instead of four.

Shapes: R rows of the whole input, C rows of one chunk; trailing dimensions are free.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from ds_minis.tiling.core.chunk_grads import backward_of_chunk
from ds_minis.tiling.core.exclusive import alone
from ds_minis.tiling.core.grad_accum import GradientSums
from ds_minis.tiling.core.linear import chunk_forwards
from ds_minis.tiling.core.params import ParameterSlots, constants_of, restored_flags
from ds_minis.tiling.core.replay import Replay, patched_forwards, refuse_gradients_of_gradients, unseen_graph
from ds_minis.tiling.core.tiled_op import Guard


class TiledSum:
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
        self.slots = ParameterSlots(module)
        self.expected = expected
        self._function, self._module, self._guard = function, module, guard
        self._replay, self._constants = Replay(rows[0].device), constants_of(module)
        num_rows = rows[0].shape[0]
        self._bounds = [(i, min(i + chunk_rows, num_rows)) for i in range(0, max(num_rows, 1), chunk_rows)]

    def value(self, rows: Sequence[Tensor]) -> Tensor:
        """The sum alone, without a graph."""
        with self._running(), torch.no_grad():
            return sum(self._function(*[x[start:stop] for x in rows]).sum(0) for start, stop in self._bounds)

    def value_and_grads(
        self, tensors: Sequence[Tensor], needs_grad: Sequence[bool]
    ) -> tuple[Tensor, list[Tensor | None]]:
        """The sum, and the gradients of rows and parameters (in that order) for the expected incoming gradient."""
        num_rows = len(tensors) - len(self.slots.tensors)
        rows, params = tensors[:num_rows], tensors[num_rows:]
        row_grads = [torch.empty_like(x) if need else None for x, need in zip(rows, needs_grad, strict=False)]
        leaves = [p.detach().requires_grad_(need) for p, need in zip(params, needs_grad[num_rows:], strict=True)]
        sums, totals = GradientSums(leaves, single=len(self._bounds) == 1), []
        with contextlib.ExitStack() as stack:
            for context in (self._running(), torch.enable_grad(), self.slots.reparametrized(leaves)):
                stack.enter_context(context)
            stack.enter_context(patched_forwards(chunk_forwards(self._module, [sums])))
            for start, stop in self._bounds:
                chunk = [x[start:stop].detach().requires_grad_(need) for x, need in zip(rows, needs_grad, strict=False)]
                places = [None if row_grad is None else row_grad[start:stop] for row_grad in row_grads]
                backward_of_chunk(functools.partial(self._with_graph, chunk, totals), chunk, places, leaves, [sums])
        return sum(totals), [*row_grads, *sums.result()]

    def _with_graph(self, chunk: Sequence[Tensor], totals: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        y = self._function(*chunk).sum(0)
        totals.append(y.detach())
        return [y], [self.expected.to(y.dtype)]

    @contextlib.contextmanager
    def _running(self) -> Iterator[None]:
        try:
            with alone(self._module), self._guard(), unseen_graph():
                yield
        finally:
            # Autocast has cached weights with no graph, or one that ends at our leaves; a later forward must not use them.
            torch.clear_autocast_cache()

    def grads_again(self, tensors: Sequence[Tensor], needs_grad: Sequence[bool]) -> list[Tensor | None]:
        with self._replay.active(), restored_flags(self._constants):
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
