"""The tiling core: runs a function of rows chunk by chunk, as one autograd operation.

Row i of the result must depend on row i of each input alone. Forward keeps no activations of a chunk. Backward runs each
chunk again and sums the parameters' gradients itself, so that each parameter receives ONE gradient per backward. DDP's
buckets, FSDP's post-backward hooks and ZeRO's reduction hooks expect that; a `backward()` per chunk would fire them once
per chunk.

The operation is split in two autograd nodes. `_Record` saves the inputs and nothing else; `_Compute` produces the
result and saves nothing. Non-reentrant activation checkpointing stops recomputing once it has the last saved tensor, hence
before `_Compute`: a tiled module at the end of a decoder layer does not run a third time.

Shapes: R rows of the whole input, C rows of one chunk; trailing dimensions are free.
"""

from __future__ import annotations

import abc
import contextlib
import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ds_minis.ranks import has_other_ranks
from ds_minis.tiling.core.chunk_grads import backward_of_chunk
from ds_minis.tiling.core.exclusive import alone
from ds_minis.tiling.core.grad_accum import GradientSums
from ds_minis.tiling.core.linear import LastLinear, chunk_forwards
from ds_minis.tiling.core.params import Constants, ParameterSlots, Untrained, constants_of, restored_flags
from ds_minis.tiling.core.participation import Memory, Walk, call_signature
from ds_minis.tiling.core.replay import Replay, patched_forwards, refuse_gradients_of_gradients
from ds_minis.tiling.core.reuse import can_overwrite

Guard = Callable[[], contextlib.AbstractContextManager]


class TiledOp(abc.ABC):
    """One call of a tiled module: the state that its forward and its backward share.

    Attributes:
        module: the module that is called.
        slots: the trainable tensors that it uses.
        constants: the settings of its submodules.
        way: how it is called, as part of a cache key: calls of one way use the same tensors.
        memory: what earlier calls of the model's modules have shown.
        walk: finds the trainable tensors that the call uses; None at other times.
        grad_output: the gradient of the result; set by `_Compute`, consumed by `backward`.
        after_backward: called after each backward, if set.
    """

    module: nn.Module
    slots: ParameterSlots
    constants: Constants
    way: object = None
    memory: Memory
    walk: Walk | None = None
    grad_output: Tensor | None = None
    after_backward: Callable[[], None] | None = None
    _result: Tensor | None = None

    def saved(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """The tensors to save for backward, out of rows and parameters (in that order)."""
        return tensors

    @abc.abstractmethod
    def forward(self, rows: Sequence[Tensor], *, with_backward: bool) -> Tensor:
        """Computes the result of all chunks without a graph."""

    @abc.abstractmethod
    def backward(self, tensors: Sequence[Tensor], needs_grad: Sequence[bool]) -> list[Tensor | None]:
        """The gradients of rows and parameters, given the saved tensors and `self.grad_output`."""

    def leave_out_idle(self, rows: Sequence[Tensor]) -> None:
        """Drops the trainable tensors that the call does not use: autograd would run their hooks without a gradient.

        Unless an earlier call used all of them, this runs the forward, with the graph of one chunk at a time, and keeps its
        result for `result`.
        """
        signature = call_signature(self.slots, self.constants, self.way)
        if self.memory.all_take_part(self.module, signature):
            return
        self.walk = Walk(self.slots)
        try:
            with self.walk.running():
                self._result = self.forward([x.detach() for x in rows], with_backward=True)
            idle = self.walk.idle()
        finally:
            self.walk = None
        self.memory.note(self.module, signature, idle)
        if len(idle) < len(self.slots.tensors) or any(x.requires_grad for x in rows):
            self.slots.leave_out(idle)

    def result(self, rows: Sequence[Tensor]) -> Tensor:
        """The result of forward; computed only if `leave_out_idle` has not done so."""
        result, self._result = self._result, None
        return self.forward(rows, with_backward=True) if result is None else result

    def seen(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The tensors; while `walk` is set, their graphs are recorded and they come back detached."""
        return tensors if self.walk is None else self.walk.seen(tensors)


class TiledRows(TiledOp):
    """One call of a row function over chunks."""

    def __init__(
        self,
        function: Callable[..., Tensor],
        module: nn.Module,
        chunk_rows: int,
        num_rows: int,
        guard: Guard,
        memory: Memory,
        way: object,
    ):
        self.module, self.memory, self.way = module, memory, way
        self.slots, self.constants = ParameterSlots(module), constants_of(module)
        self._untrained = Untrained(module, self.slots, memory.copies)
        self._function = function
        self._guard = guard
        self._bounds = [(i, min(i + chunk_rows, num_rows)) for i in range(0, max(num_rows, 1), chunk_rows)]

    def forward(self, rows: Sequence[Tensor], *, with_backward: bool) -> Tensor:
        try:
            with alone(self.module), self._guard():
                return self._forward(rows, with_backward)
        finally:
            # Autocast has cached weights that were cast without a graph; a later forward with gradients must not use them.
            torch.clear_autocast_cache()

    def _forward(self, rows: Sequence[Tensor], with_backward: bool) -> Tensor:
        if with_backward:
            self._replay = Replay(rows[0].device)
            self._last_linear = LastLinear(self.module)
        output = None
        for start, stop in self._bounds:
            chunk = [row[start:stop] for row in rows]
            watch = with_backward and output is None
            with self._last_linear.watched() if watch else contextlib.nullcontext() as decide:
                y = self._function(*chunk)
                if watch:
                    decide(y)
            (y,) = self.seen(y)
            assert y.shape[0] == stop - start, f"{stop - start} rows in, {y.shape[0]} out: not a function of rows"
            if output is None:
                output = y.new_empty((rows[0].shape[0], *y.shape[1:]))
            output[start:stop].copy_(y)
        return output

    def _with_graph(self, chunk: Sequence[Tensor], grad: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        return [self._function(*chunk)], [grad]

    def backward(self, tensors: Sequence[Tensor], needs_grad: Sequence[bool]) -> list[Tensor | None]:
        with alone(self.module), self._guard():
            return self._backward(tensors, needs_grad)

    def _backward(self, tensors: Sequence[Tensor], needs_grad: Sequence[bool]) -> list[Tensor | None]:
        grad_output, self.grad_output = self.grad_output, None
        reuse = can_overwrite(grad_output)
        num_rows = len(tensors) - len(self.slots.tensors)
        rows, params = tensors[:num_rows], tensors[num_rows:]
        reuse = reuse and needs_grad[0] and grad_output.dtype == rows[0].dtype and grad_output.shape == rows[0].shape
        # Once a chunk is done, its part of the incoming gradient may be overwritten.
        row_grads = [grad_output if reuse else torch.empty_like(rows[0]) if needs_grad[0] else None]
        row_grads += [torch.empty_like(x) if need else None for x, need in zip(rows[1:], needs_grad[1:], strict=False)]
        leaves = [p.detach().requires_grad_(need) for p, need in zip(params, needs_grad[num_rows:], strict=True)]
        sums = GradientSums(leaves, single=len(self._bounds) == 1)
        with contextlib.ExitStack() as stack:
            for context in (
                self._replay.active(),
                restored_flags(self.constants),
                self._untrained.as_in_forward(),
                torch.enable_grad(),
            ):
                stack.enter_context(context)
            stack.enter_context(self.slots.reparametrized(leaves))
            stack.enter_context(patched_forwards(chunk_forwards(self.module, [sums], self._last_linear.found())))
            for start, stop in self._bounds:
                chunk = [x[start:stop].detach().requires_grad_(need) for x, need in zip(rows, needs_grad, strict=False)]
                places = [None if total is None else total[start:stop] for total in row_grads]
                run = functools.partial(self._with_graph, chunk, grad_output[start:stop])
                backward_of_chunk(run, chunk, places, leaves, [sums])
        return [*row_grads, *sums.result()]


class _Record(torch.autograd.Function):
    """Saves the inputs and returns a scalar token that carries the graph. Its backward does all the work."""

    @staticmethod
    def forward(ctx, call: TiledOp, *tensors: Tensor):
        ctx.call = call
        ctx.save_for_backward(*call.saved(tensors))
        return tensors[0].new_zeros(())

    @staticmethod
    def backward(ctx, _):
        grads = ctx.call.backward(ctx.saved_tensors, ctx.needs_input_grad[1:])
        if ctx.call.after_backward is not None:
            ctx.call.after_backward()
        return None, *grads


class _Compute(torch.autograd.Function):
    """Computes the result and saves nothing. Its gradient reaches `_Record` through `call`, since the token is a scalar."""

    @staticmethod
    def forward(ctx, call: TiledOp, token: Tensor, *rows: Tensor):
        ctx.call = call
        return call.result(rows)

    @staticmethod
    def backward(ctx, grad_output):
        refuse_gradients_of_gradients()
        ctx.call.grad_output = grad_output
        return None, grad_output.new_zeros(()), *[None] * (len(ctx.needs_input_grad) - 2)


def runs_whole(num_rows: int, chunk_rows: int) -> bool:
    """Whether a row function runs on all rows at once, without recomputation.

    Not while training with other ranks, which may have more rows. A tiled call returns its parameters' gradients together, an
    untiled one returns each when it is computed. ZeRO-2 reduces gradients in the order of their arrival, so a rank with
    another order would have its gradients added to those of other parameters, without an error.
    """
    return num_rows <= chunk_rows and not (torch.is_grad_enabled() and has_other_ranks())


def tile_rows(
    function: Callable[..., Tensor],
    module: nn.Module,
    rows: Sequence[Tensor],
    chunk_rows: int,
    guard: Guard = contextlib.nullcontext,
    memory: Memory | None = None,
    way: object = None,
) -> Tensor:
    """Runs `function(*rows)` over chunks of rows, with the gradients of one untiled call.

    Args:
        function: maps C rows of each input to a tensor of C rows; its row i depends on row i of the inputs alone.
        module: holds every trainable tensor that `function` uses. No gradients are computed for frozen ones.
        rows: inputs of R rows each, `(R, ...)`.
        chunk_rows: C, at least 1. Input of one chunk may run untiled, see `runs_whole`.
        guard: makes a context for the chunks of forward, and one for those of backward.
        memory: what earlier calls of the model's modules have shown; None for nothing.
        way: how the module is called, if there are several ways.

    Returns:
        The result of all R rows. Its backward raises RuntimeError under `create_graph=True`.
    """
    num_rows = rows[0].shape[0]
    if runs_whole(num_rows, chunk_rows):
        return function(*rows)
    call = TiledRows(function, module, chunk_rows, num_rows, guard, memory or Memory(), way)
    return run_call(call, rows)


def run_call(call: TiledOp, rows: Sequence[Tensor]) -> Tensor:
    """The result of a call, with one autograd node for the gradients of all rows and parameters."""
    if not torch.is_grad_enabled() or not any(t.requires_grad for t in (*rows, *call.slots.tensors)):
        with torch.no_grad():
            return call.forward(rows, with_backward=False)
    call.leave_out_idle(rows)
    token = _Record.apply(call, *rows, *call.slots.tensors)
    return _Compute.apply(call, token, *[x.detach() for x in rows])
