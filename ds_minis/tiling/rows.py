"""The tiling core: a function of rows, run chunk by chunk, as one autograd node per parameter.

Row i of the result must depend on row i of each input alone. Nothing of a chunk is kept after it: backward runs each
chunk again and sums every parameter's gradient itself, so that the parameter receives ONE gradient per backward. That
is what DDP's buckets, FSDP's post-backward hooks and ZeRO's reduction hooks expect; a `backward()` per chunk fires them
once per chunk.

The operation is split in two autograd nodes. `_Record` saves the inputs and nothing else; `_Compute` produces the
result and saves nothing. Non-reentrant activation checkpointing stops its recomputation once the last saved tensor is
back, hence before `_Compute`: a tiled module at the end of a decoder layer is not run a third time.

Shapes: R rows of the whole input, C rows of one chunk; trailing dimensions are free.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from ds_minis.ranks import has_other_ranks
from ds_minis.tiling.recompute import LastLinear, Replay

Guard = Callable[[], contextlib.AbstractContextManager]


class ParameterSlots:
    """Where a module holds its trainable tensors, and how to put others in their place.

    Besides `_parameters` the modules' `__dict__` is searched: FSDP1 and the replicas of `nn.DataParallel` hold their
    trainable views there. A tensor held twice (tied inside the module) is listed once.
    """

    def __init__(self, module: nn.Module):
        self.tensors: list[Tensor] = []
        self._slots: list[tuple[nn.Module, str, int]] = []
        index_of: dict[int, int] = {}
        for submodule in module.modules():
            for holder in (submodule._parameters, submodule.__dict__):
                for name, value in holder.items():
                    if isinstance(value, Tensor) and value.requires_grad:
                        index = index_of.setdefault(id(value), len(self.tensors))
                        if index == len(self.tensors):
                            self.tensors.append(value)
                        self._slots.append((submodule, name, index))

    @contextlib.contextmanager
    def holding(self, tensors: Sequence[Tensor]) -> Iterator[None]:
        """Puts `tensors` (one for each of `self.tensors`) in place, and what was there back at the end."""
        before = []
        try:
            for submodule, name, index in self._slots:
                # Looked up anew: FSDP1 holds a weight in both places in forward, and in `_parameters` alone in backward.
                places = [holder for holder in (submodule._parameters, submodule.__dict__) if name in holder]
                for holder in places or [submodule.__dict__]:
                    before.append((holder, name, dict.get(holder, name, _NOTHING)))
                    holder[name] = tensors[index]
            yield
        finally:
            for holder, name, value in reversed(before):
                if value is _NOTHING:
                    del holder[name]
                else:
                    holder[name] = value


_NOTHING = object()


def _constants(module: nn.Module) -> list[tuple[nn.Module, dict[str, object]]]:
    """What the parts of a module are set to (training, a scale, whether an adapter is on), but for DeepSpeed's counters."""
    return [
        (part, {k: v for k, v in part.__dict__.items() if type(v) in _CONSTANTS and not k.startswith("ds_")})
        for part in module.modules()
    ]


_CONSTANTS = frozenset((bool, int, float, str, type(None)))


@contextlib.contextmanager
def _set_to(constants: Sequence[tuple[nn.Module, dict[str, object]]]) -> Iterator[None]:
    """Parts are set as they were in forward; an evaluation or another use of the module may have come in between."""
    now = [
        (part, k, part.__dict__[k], v) for part, values in constants for k, v in values.items() if k in part.__dict__
    ]
    changed = [(part.__dict__, name, value, then) for part, name, value, then in now if value != then]
    try:
        for holder, name, _, then in changed:
            holder[name] = then
        yield
    finally:
        for holder, name, value, _ in changed:
            holder[name] = value


class _TiledCall:
    """One call of a row function over chunks: what its forward and its backward share."""

    def __init__(
        self, function: Callable[..., Tensor], module: nn.Module, chunk_rows: int, num_rows: int, guard: Guard
    ):
        self.slots = ParameterSlots(module)
        self.grad_output: Tensor | None = None
        self._function = function
        self._module = module
        self._guard = guard
        self._constants = _constants(module)
        self._bounds = [(i, min(i + chunk_rows, num_rows)) for i in range(0, max(num_rows, 1), chunk_rows)]

    def forward(self, rows: Sequence[Tensor], *, with_backward: bool) -> Tensor:
        """The result of all chunks, computed without a graph."""
        try:
            with self._guard():
                return self._forward(rows, with_backward)
        finally:
            # Weights that autocast cast in here were cast without a graph; a later use with gradients must not find them.
            torch.clear_autocast_cache()

    def _forward(self, rows: Sequence[Tensor], with_backward: bool) -> Tensor:
        if with_backward:
            self._replay = Replay(rows[0].device)
            self._last_linear = LastLinear(self._module)
        output = None
        for start, stop in self._bounds:
            chunk = [row[start:stop] for row in rows]
            watch = with_backward and output is None
            with self._last_linear.watched() if watch else contextlib.nullcontext() as decide:
                y = self._function(*chunk)
                if watch:
                    decide(y)
            assert y.shape[0] == stop - start, f"{stop - start} rows in, {y.shape[0]} out: not a function of rows"
            if output is None:
                output = y.new_empty((rows[0].shape[0], *y.shape[1:]))
            output[start:stop].copy_(y)
        return output

    def backward(self, tensors: Sequence[Tensor], needs_grad: Sequence[bool]) -> list[Tensor | None]:
        """Gradients of rows and parameters (in that order) for `self.grad_output`, each chunk run again."""
        with self._guard():
            return self._backward(tensors, needs_grad)

    def _backward(self, tensors: Sequence[Tensor], needs_grad: Sequence[bool]) -> list[Tensor | None]:
        grad_output, self.grad_output = self.grad_output, None
        num_rows = len(tensors) - len(self.slots.tensors)
        rows, params = tensors[:num_rows], tensors[num_rows:]
        row_grads = [torch.empty_like(x) if need else None for x, need in zip(rows, needs_grad, strict=False)]
        leaves = [p.detach().requires_grad_(need) for p, need in zip(params, needs_grad[num_rows:], strict=True)]
        sums = GradientSums(leaves)
        dtype = self._replay.autocast.dtype()
        with contextlib.ExitStack() as stack:
            for context in (self._replay.active(), _set_to(self._constants), torch.enable_grad()):
                stack.enter_context(context)
            stack.enter_context(self.slots.holding(leaves))
            stack.enter_context(self._last_linear.skipped(dtype))
            for start, stop in self._bounds:
                chunk = [x[start:stop].detach().requires_grad_(need) for x, need in zip(rows, needs_grad, strict=False)]
                inputs = [x for x in (*chunk, *leaves) if x.requires_grad]
                y = self._function(*chunk)
                if y.requires_grad:
                    grads = iter(torch.autograd.grad(y, inputs, grad_output[start:stop], allow_unused=True))
                else:  # trainable tensors that took no part, such as a disabled adapter's
                    grads = iter([None] * len(inputs))
                del y
                for total in row_grads:
                    if total is not None:
                        grad = next(grads)
                        total[start:stop].zero_() if grad is None else total[start:stop].copy_(grad)
                sums.add(grads)
        return [*row_grads, *sums.result()]


class GradientSums:
    """Sums of the chunks' parameter gradients, in float32.

    In bfloat16 the sum's own rounding adds to the error with every chunk: 0.9% without chunks, 2.6% at 128 chunks
    (hidden size 512).

    Args:
        single: there is one chunk, so that the gradients are what they are.
    """

    def __init__(self, leaves: Sequence[Tensor], single: bool = False):
        self._leaves = leaves
        self._single = single
        self._sums: list[Tensor | None] = [None] * len(leaves)

    def index_of(self, leaf: Tensor) -> int | None:
        """Where `leaf` stands among the leaves that need a gradient."""
        return next((i for i, own in enumerate(self._leaves) if own is leaf and own.requires_grad), None)

    def add_product(self, index: int, left_CV: Tensor, right_CH: Tensor) -> None:
        """Adds `left_CV.t() @ right_CH` to the gradient of one leaf, without a further tensor of that size."""
        left_VC = left_CV.t()
        if self._sums[index] is not None:
            _add_product(self._sums[index], left_VC, right_CH)
        elif self._single or left_CV.dtype == self._sum_dtype(left_CV):
            self._sums[index] = left_VC @ right_CH
        else:
            shape = left_CV.shape[1], right_CH.shape[1]
            self._sums[index] = right_CH.new_empty(shape, dtype=self._sum_dtype(left_CV))
            _add_product(self._sums[index], left_VC, right_CH, beta=0)

    def _sum_dtype(self, grad: Tensor) -> torch.dtype:
        return grad.dtype if self._single else torch.promote_types(grad.dtype, torch.float32)

    def add(self, grads: Iterator[Tensor | None]) -> None:
        for i, leaf in enumerate(self._leaves):
            grad = next(grads) if leaf.requires_grad else None
            if grad is None:
                continue
            if self._sums[i] is not None:
                self._sums[i].add_(grad)
            else:
                # A copy also where it is float32 already: autograd may hand one tensor to two parameters.
                self._sums[i] = grad.to(self._sum_dtype(grad), copy=True)

    def result(self) -> list[Tensor | None]:
        return [None if s is None else s.to(leaf.dtype) for s, leaf in zip(self._sums, self._leaves, strict=True)]


# Elements of a product that is made in the operands' dtype before it is added to a sum in float32.
_PRODUCT_ELEMENTS = 2**22


def _add_product(total_VH: Tensor, left_VC: Tensor, right_CH: Tensor, beta: int = 1) -> None:
    """`total = beta * total + left @ right` in the total's dtype."""
    if left_VC.dtype == total_VH.dtype:
        torch.addmm(total_VH, left_VC, right_CH, beta=beta, out=total_VH)  # as `addmm_`, and counted as FLOPs
    elif _multiplies_into_float32(total_VH, left_VC.dtype):
        torch.addmm(total_VH, left_VC, right_CH, beta=beta, out_dtype=total_VH.dtype, out=total_VH)
    else:
        rows = max(1, _PRODUCT_ELEMENTS // total_VH.shape[1])
        for start in range(0, total_VH.shape[0], rows):
            product = left_VC[start : start + rows] @ right_CH
            block = total_VH[start : start + rows]
            block.add_(product) if beta else block.copy_(product)


def _multiplies_into_float32(total: Tensor, dtype: torch.dtype) -> bool:
    real = type(total) in (Tensor, nn.Parameter)  # a fake one has no kernel to ask
    return real and total.dtype == torch.float32 and _asked_to_multiply(total.device, dtype)


@functools.cache
def _asked_to_multiply(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this torch multiplies matrices of `dtype` on the device into a float32 sum: cuBLAS can, a CPU cannot."""
    if device.type == "cpu":
        return False
    ones, total = torch.ones(16, 16, dtype=dtype, device=device), torch.ones(16, 16, device=device)
    try:
        torch.addmm(total, ones, ones, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):  # NotImplementedError is a RuntimeError
        return False
    return bool((total == 17).all())


class _Record(torch.autograd.Function):
    """Saves the inputs; gives a token that carries the graph; its backward does all the work."""

    @staticmethod
    def forward(ctx, call: _TiledCall, *tensors: Tensor):
        ctx.call = call
        ctx.save_for_backward(*tensors)
        return tensors[0].new_zeros(())

    @staticmethod
    def backward(ctx, _):
        return None, *ctx.call.backward(ctx.saved_tensors, ctx.needs_input_grad[1:])


class _Compute(torch.autograd.Function):
    """Computes the result and saves nothing; hands its gradient to `_Record` beside the graph (shapes may differ)."""

    @staticmethod
    def forward(ctx, call: _TiledCall, token: Tensor, *rows: Tensor):
        ctx.call = call
        return call.forward(rows, with_backward=True)

    @staticmethod
    def backward(ctx, grad_output):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "create_graph=True (a gradient of a gradient) is not supported through mini-sequences: call "
                "revert_mini_sequence(model), or exclude the modules"
            )
        ctx.call.grad_output = grad_output
        return None, grad_output.new_zeros(()), *[None] * (len(ctx.needs_input_grad) - 2)


def runs_whole(num_rows: int, chunk_rows: int) -> bool:
    """Whether a row function is run on all rows at once, without recomputation.

    Not where other ranks may have more rows: a tiled call hands over its parameters' gradients together, and an untiled one
    each as it is computed. ZeRO-2 adds the ranks' gradients up in the order in which they come, so one rank that differs
    would have its gradients added to other parameters' without an error.
    """
    return num_rows <= chunk_rows and not (torch.is_grad_enabled() and has_other_ranks())


def tile_rows(
    function: Callable[..., Tensor],
    module: nn.Module,
    rows: Sequence[Tensor],
    chunk_rows: int,
    guard: Guard = contextlib.nullcontext,
) -> Tensor:
    """Runs `function(*rows)` over chunks of rows, with the gradients of the whole.

    Args:
        function: takes C rows of each input, gives a tensor of C rows; row i of it depends on row i of the inputs alone.
        module: holds every trainable tensor that `function` uses. Frozen ones get no gradient work.
        rows: inputs of R rows each, `(R, ...)`.
        chunk_rows: C, at least 1. What fits into one chunk may be run as it is, see `runs_whole`.
        guard: makes a context for the chunks of forward, and one for those of backward.

    Returns:
        The result of all R rows. A gradient of its gradient is refused (`create_graph=True`).
    """
    num_rows = rows[0].shape[0]
    if runs_whole(num_rows, chunk_rows):
        return function(*rows)
    call = _TiledCall(function, module, chunk_rows, num_rows, guard)
    if not torch.is_grad_enabled() or not any(t.requires_grad for t in (*rows, *call.slots.tensors)):
        with torch.no_grad():
            return call.forward(rows, with_backward=False)
    token = _Record.apply(call, *rows, *call.slots.tensors)
    return _Compute.apply(call, token, *[x.detach() for x in rows])
