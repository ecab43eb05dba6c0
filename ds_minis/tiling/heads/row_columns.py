"""Computes a few numbers for each row, and the gradient of the first one in forward: backward runs no chunk again.

The gradient of a row's number by that row is known but for its factor, the number's incoming gradient. It is computed while
a chunk's intermediates (its logits) exist, and scaled in backward: two matmuls of a frozen LM head instead of three. The
gradient of a trained weight is a sum over rows, each with a factor of its own, so there is none that could be kept.

Shapes: R rows of the whole input, C rows of one chunk, N numbers of each row; trailing dimensions are free.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ds_minis.tiling.core.chunk_grads import backward_of_chunk
from ds_minis.tiling.core.exclusive import alone
from ds_minis.tiling.core.params import ParameterSlots, constants_of, restored_flags
from ds_minis.tiling.core.replay import (
    AutocastState,
    Replay,
    refuse_gradients_of_gradients,
    unseen_graph,
)
from ds_minis.tiling.core.tiled_op import Guard, runs_whole, tile_rows


class RowColumns:
    """One call: the state that its forward and its backward share."""

    def __init__(
        self, function: Callable[..., Tensor], module: nn.Module, rows: Sequence[Tensor], chunk_rows: int, guard: Guard
    ):
        self._function, self._module, self._guard = function, module, guard
        self._replay, self._constants = Replay(rows[0].device), constants_of(module)
        num_rows = rows[0].shape[0]
        self._bounds = [(i, min(i + chunk_rows, num_rows)) for i in range(0, max(num_rows, 1), chunk_rows)]

    def forward(
        self, rows: Sequence[Tensor], needs_grad: Sequence[bool], grads_N: Sequence[Tensor | None] | None = None
    ) -> tuple[Tensor, list[Tensor | None]]:
        """The numbers, `(R, N)` or `(R,)`, and the gradients of the rows.

        Args:
            grads_N: the incoming gradient `(R,)` of each number; None for 1 of the first one and 0 of all others.
        """
        results: list[Tensor] = []
        row_grads = [torch.empty_like(x) if need else None for x, need in zip(rows, needs_grad, strict=True)]
        with contextlib.ExitStack() as stack:
            for context in (alone(self._module), self._guard(), unseen_graph(), torch.enable_grad()):
                stack.enter_context(context)
            stack.callback(torch.clear_autocast_cache)
            for start, stop in self._bounds:
                chunk = [x[start:stop].detach().requires_grad_(need) for x, need in zip(rows, needs_grad, strict=True)]
                places = [None if row_grad is None else row_grad[start:stop] for row_grad in row_grads]
                parts = None if grads_N is None else [None if g is None else g[start:stop] for g in grads_N]
                run = functools.partial(self._with_graph, chunk, parts, results)
                backward_of_chunk(run, chunk, places, (), ())
        return torch.cat(results), row_grads

    def _with_graph(
        self, chunk: Sequence[Tensor], grads_N: Sequence[Tensor | None] | None, results: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        y = self._function(*chunk)
        results.append(y.detach())
        incoming = torch.zeros_like(y)
        for place, grad_C in zip(columns_of(incoming), [1.0] if grads_N is None else grads_N, strict=False):
            if grad_C is not None:
                place.copy_(grad_C) if isinstance(grad_C, Tensor) else place.fill_(grad_C)
        return [y], [incoming]

    def grads_again(
        self, rows: Sequence[Tensor], needs_grad: Sequence[bool], grads_N: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        """The gradients of the rows for other incoming gradients; runs each chunk again."""
        with self._replay.active(), restored_flags(self._constants):
            return self.forward(rows, needs_grad, grads_N)[1]


class _Columns(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call: RowColumns, *rows: Tensor):
        ctx.call = call
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*rows)
        result, ctx.grads = call.forward(rows, ctx.needs_input_grad[1:])
        return tuple(column_R.clone() for column_R in columns_of(result))

    @staticmethod
    def backward(ctx, *grads_N):
        refuse_gradients_of_gradients('set "loss": false')
        rows, needs_grad = ctx.saved_tensors, ctx.needs_input_grad[1:]  # raises torch's own error if they are freed
        first, others = grads_N[0], [grad for grad in grads_N[1:] if grad is not None]
        if others or ctx.grads is None or first is None:
            return None, *ctx.call.grads_again(rows, needs_grad, grads_N)
        # Scaled in place and handed over without a copy.
        grads, ctx.grads = ctx.grads, None
        return None, *[None if grad is None else grad.mul_(_like(first, grad)) for grad in grads]


def columns_of(result: Tensor) -> tuple[Tensor, ...]:
    """The columns of `(R, N)`, or the one that `(R,)` is."""
    # Not `unbind`, whose results autograd does not let a caller write to (transformers' label smoother does).
    return (result,) if result.dim() == 1 else tuple(result[:, column] for column in range(result.shape[1]))


def _like(factor_R: Tensor, grad: Tensor) -> Tensor:
    return factor_R.view(-1, *[1] * (grad.dim() - 1))


def row_columns(
    function: Callable[..., Tensor],
    module: nn.Module,
    rows: Sequence[Tensor],
    chunk_rows: int,
    guard: Guard = contextlib.nullcontext,
) -> Tensor | tuple[Tensor, ...]:
    """`function(*rows)` or its columns, over chunks of rows, with the gradients of one untiled call.

    Args:
        function: maps C rows of each input to `(C, N)`, or `(C,)` for one number; its row i depends on row i of the inputs
            alone.
        module: holds every trainable tensor that `function` uses.
        rows: inputs of R rows each, `(R, ...)`.
        chunk_rows: C, at least 1. Input of one chunk may run untiled, see `tiled_op.runs_whole`.
        guard: makes a context for the chunks.

    Returns:
        N tensors `(R,)` if nothing in `module` is trained, the first with its gradient computed in forward. Otherwise the
        result: not views of it, of which FSDP2 warns where a module returns them (`columns_of` makes them).
    """
    with_grad = torch.is_grad_enabled() and any(x.requires_grad for x in rows)
    # In float16 a gradient of 1 underflows where the loss scale, which is known only in backward, keeps it.
    narrow = torch.float16 in (rows[0].dtype, AutocastState(rows[0].device).dtype())
    whole = runs_whole(rows[0].shape[0], chunk_rows)
    if not with_grad or narrow or whole or ParameterSlots(module).tensors:
        return tile_rows(function, module, rows, chunk_rows, guard=guard)
    return _Columns.apply(RowColumns(function, module, rows, chunk_rows, guard), *rows)
