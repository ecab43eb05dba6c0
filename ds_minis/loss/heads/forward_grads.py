"""The gradients of rows and parameters while a chunk's intermediates (its logits) exist: one loop for all who want that.

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
from ds_minis.tiling.core.params import Copies, ParameterSlots, Untrained, constants_of, restored_flags
from ds_minis.tiling.core.replay import Replay, patched_forwards, unseen_graph
from ds_minis.tiling.core.tiled_op import Guard

# `(chunk, start, stop)` -> the outputs of these rows with their graph, and their incoming gradients.
Outputs = Callable[[Sequence[Tensor], int, int], tuple[list[Tensor], list[Tensor]]]


class ForwardGrads:
    """One call of a function of rows, whose gradients are computed in forward.

    Attributes:
        slots: the trainable tensors of the module.
        bounds: first and last row of each chunk.
    """

    def __init__(
        self, function: Callable[..., Tensor], module: nn.Module, rows: Sequence[Tensor], chunk_rows: int, guard: Guard
    ):
        self.slots = ParameterSlots(module)
        self.function, self._module, self._guard = function, module, guard
        self._replay, self._constants = Replay(rows[0].device), constants_of(module)
        self._untrained = Untrained(module, self.slots, Copies())
        num_rows = rows[0].shape[0]
        self.bounds = [(i, min(i + chunk_rows, num_rows)) for i in range(0, max(num_rows, 1), chunk_rows)]

    def grads_of_chunks(
        self, tensors: Sequence[Tensor], needs_grad: Sequence[bool], outputs: Outputs
    ) -> list[Tensor | None]:
        """Runs each chunk, forward and backward; the gradients of rows and parameters (in that order, as `tensors`)."""
        num_rows = len(tensors) - len(self.slots.tensors)
        rows, params = tensors[:num_rows], tensors[num_rows:]
        row_grads = [torch.empty_like(x) if need else None for x, need in zip(rows, needs_grad, strict=False)]
        leaves = [p.detach().requires_grad_(need) for p, need in zip(params, needs_grad[num_rows:], strict=True)]
        sums = GradientSums(leaves, single=len(self.bounds) == 1)
        with contextlib.ExitStack() as stack:
            for context in (self.running(), torch.enable_grad(), self.slots.reparametrized(leaves)):
                stack.enter_context(context)
            stack.enter_context(patched_forwards(chunk_forwards(self._module, [sums])))
            for start, stop in self.bounds:
                chunk = [x[start:stop].detach().requires_grad_(need) for x, need in zip(rows, needs_grad, strict=False)]
                places = [None if row_grad is None else row_grad[start:stop] for row_grad in row_grads]
                run = functools.partial(outputs, chunk, start, stop)
                backward_of_chunk(run, chunk, places, leaves, [sums])
        return [*row_grads, *sums.result()]

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        try:
            with alone(self._module), self._guard(), unseen_graph():
                yield
        finally:
            # Autocast has cached weights with no graph, or one that ends at our leaves; a later forward must not use them.
            torch.clear_autocast_cache()

    @contextlib.contextmanager
    def as_in_forward(self) -> Iterator[None]:
        """Restores the random state, autocast, settings and buffers of forward, for a run in backward."""
        with self._replay.active(), restored_flags(self._constants), self._untrained.as_in_forward():
            yield
