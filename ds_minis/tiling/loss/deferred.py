"""A tensor that stands for logits which are never held as a whole.

`DeferredLogits` remembers the hidden states it comes from and what the model does to the logits on their way to the loss
(a cast, a softcap, a scale, a shift, a reshape). When cross entropy consumes it, all of that is run chunk by chunk. What
it does not know how to defer is computed in full, once: exact, without the saving.

Shapes: leading dimensions `*L` (batch, sequence; R rows when flattened), H hidden size, V vocabulary.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ds_minis.ranks import is_main_process
from ds_minis.tiling.core.replay import AutocastState, graph_is_kept
from ds_minis.tiling.loss.logit_ops import CONSUMERS
from ds_minis.tiling.modules.compiling import outside_of_graphs

Step = Callable[[Tensor], Tensor]
logger = logging.getLogger("ds_minis")


class Head(Protocol):
    """What turns hidden states into logits (`ds_minis.tiling.loss.chunked_head`)."""

    def made(self, logits: DeferredLogits) -> None:
        """Deferred logits of this head came into being."""

    def release(self) -> None:
        """Backward has reached what was computed of them."""

    def logits(self, hidden_LH: Tensor) -> Tensor:
        """The logits of all rows, as the model's own head computes them."""

    def tile(self, function: Callable[..., Tensor], hidden_RH: Tensor, sample_0V: Tensor, *aligned_R: Tensor) -> Tensor:
        """`function(logits_CV, *aligned_C)` of each chunk of rows, put together: one result per row.

        `sample_0V` has the dtype and the width of what the logits become before they are used.
        """

    def sum(
        self,
        function: Callable[..., Tensor],
        hidden_RH: Tensor,
        sample_0V: Tensor,
        expected: Tensor,
        *aligned_R: Tensor,
    ) -> Tensor:
        """The sum of these results over all rows, whose incoming gradient will probably be `expected`.

        `function` is given a keyword `expected` too, where that is the gradient that its results are sure to receive.
        """


# Casts: the same whatever autocast does.
_CASTS = frozenset("float half bfloat16 double to type_as".split())
# Functions that act on each element alone: they are recorded. Keyed by name, as the function `torch.tanh` and the method
# `Tensor.tanh` are different objects for one operation.
_ELEMENTWISE = frozenset(
    "tanh sigmoid neg __neg__ abs exp log square sqrt clamp nan_to_num "
    "add sub mul div true_divide multiply divide subtract rsub pow __add__ __sub__ __mul__ __truediv__ __radd__ __rsub__ "
    "__rmul__ __rtruediv__ __pow__".split()
).union(_CASTS)
# The same, writing into the logits: the tensor itself goes on standing for the result.
_IN_PLACE = {
    "add_": "add", "sub_": "sub", "mul_": "mul", "div_": "div", "tanh_": "tanh", "clamp_": "clamp",
    "__iadd__": "add", "__isub__": "sub", "__imul__": "mul", "__itruediv__": "div",
}  # fmt: skip
# Facts of the shell that is handed around; answered without a computation.
_FACTS = frozenset(
    "dim size stride numel nelement ndimension is_floating_point is_complex is_contiguous element_size storage_offset "
    "get_device __len__ __hash__ is_same_size".split()
)
_FACT_ATTRIBUTES = frozenset("shape dtype device layout ndim is_cuda is_cpu is_meta is_sparse is_quantized".split())


class DeferredLogits(torch.Tensor):
    """Logits of shape `(*L, V)` that are computed when, and as far as, they are needed."""

    @staticmethod
    def __new__(cls, head: Head, hidden_LH: Tensor, sample_0V: Tensor, steps: tuple[Step, ...], mode: _Mode):
        """See `defer` for the arguments."""
        shape = (*hidden_LH.shape[:-1], sample_0V.shape[-1])
        logits = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=sample_0V.dtype, device=sample_0V.device, requires_grad=mode.grad
        )
        if mode.grad:  # an autograd.Function takes tensors without asking __torch_function__
            with torch._C.DisableTorchFunctionSubclass():
                logits.register_hook(_refuse_gradient)
        # `_sample`, zero rows that went through all steps, tells dtype and width of the result without any rule of ours.
        logits._head, logits._hidden, logits._sample, logits._steps = head, hidden_LH, sample_0V, steps
        logits._mode, logits._hidden_version = mode, _version(hidden_LH)
        logits._value = None  # the logits in full, once somebody needed them
        logits._view = None  # where this is a view: of which deferred logits, and by which operation
        logits._aliases = _Aliases()
        logits._aliases.add(logits)
        logits._unreadable = ""  # why the logits cannot be computed any more
        head.made(logits)
        return logits

    def __repr__(self, **_) -> str:
        with torch._C.DisableTorchFunctionSubclass():
            return f"DeferredLogits(rows={tuple(self.shape[:-1])}, vocab_size={self.shape[-1]})"

    def materialize(self) -> Tensor:
        """The logits in full, an ordinary tensor in the autograd graph; the same one each time."""
        if self._value is None:
            with self._mode.entered():
                if self._view is not None:
                    base, view = self._view
                    self._value = view(base.materialize())
                else:
                    self._value = _run_steps(self._steps, self._head.logits(self.hidden()))
        return self._value

    def settle(self, unreadable: str) -> None:
        """Backward has begun: the hidden states are let go of, and the logits, if they can be, computed in full."""
        if self._value is None and not unreadable:
            tell_materialized("holding them until backward")
            self._mode.grad = False  # what the graph has saved is about to be freed
            try:
                self.materialize()
            except RuntimeError as error:  # not in the middle of a backward
                unreadable = str(error)
        self._unreadable, self._hidden, self._steps = unreadable, None, ()

    def mode(self) -> contextlib.AbstractContextManager:
        """The gradient mode and the autocast state that the head was called under, in which it runs by chunks."""
        return self._mode.entered()

    def hidden(self) -> Tensor:
        """The head's input, as it was when the model called its head."""
        if self._hidden is None:
            raise RuntimeError(self._unreadable)
        if _version(self._hidden) != self._hidden_version:
            raise RuntimeError(
                "the hidden states were written to between the LM head and the loss, which deferred logits cannot follow. "
                'Set "loss": false in the mini-sequence configuration'
            )
        return self._hidden

    def _is_known(self) -> bool:
        """Whether these logits, or others that stand for the same memory, were computed in full."""
        return any(alias._value is not None for alias in self._aliases.alive())

    def by_chunks(self, function: Callable[..., Tensor], *aligned_R: Tensor) -> Tensor:
        """`function(logits_CV, *aligned_C)` of each chunk of rows, put together: `(R, ...)`, one result per row."""
        return self._watched(self._head.tile(self._after_steps(function), self.hidden(), self._sample, *aligned_R))

    def sum_by_chunks(self, function: Callable[..., Tensor], expected: Tensor, *aligned_R: Tensor) -> Tensor:
        """`by_chunks(function, *aligned_R).sum(0)`, for one matmul of the head less; see `sums.sum_rows`."""
        rows = self._after_steps(function)
        return self._watched(self._head.sum(rows, self.hidden(), self._sample, expected, *aligned_R))

    def _watched(self, result: Tensor) -> Tensor:
        """The result, whose backward tells the head."""
        if result.requires_grad:
            result.register_hook(functools.partial(_release, self._head))
        return result

    def before_upcast(self) -> DeferredLogits:
        """The same without a last cast to float32, for a function that computes in float32 whatever it is given."""
        last = self._steps[-1] if self._steps else None
        if not isinstance(last, _Upcast):
            return self
        return DeferredLogits(
            self._head, self.hidden(), self._sample.to(last.narrow_dtype), self._steps[:-1], self._mode
        )

    def _after_steps(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        steps = self._steps  # and nothing else: the graph holds this until the end of backward

        def rows(logits_CV: Tensor, *aligned_C: Tensor, **kwargs) -> Tensor:
            return function(_run_steps(steps, logits_CV), *aligned_C, **kwargs)

        return rows

    def _with_step(self, step: Step) -> DeferredLogits | None:
        """What `step` makes of these logits; None if it is not a function of each row."""
        with torch.no_grad():
            sample = step(self._sample)
        if sample is self._sample:  # a cast to the dtype they have: torch gives the tensor itself
            return self
        if sample.shape != self._sample.shape:
            return None
        return DeferredLogits(self._head, self.hidden(), sample, (*self._steps, step), self._mode)

    def _with_rows(
        self, view: Callable[[Tensor], Tensor], rearrange: Callable[[Tensor], Tensor], *steps: Step
    ) -> DeferredLogits:
        """`view` on logits is `rearrange` on the hidden states, and `steps` for what it does along the vocabulary."""
        sample = self._sample
        with torch.no_grad():
            for step in steps:
                sample = step(sample)
        result = DeferredLogits(self._head, rearrange(self.hidden()), sample, (*self._steps, *steps), self._mode)
        result._view, result._aliases = (self, view), self._aliases
        self._aliases.add(result)
        return result

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(
            f"{func} was called on logits that ds_minis computes only as far as they are needed, where it cannot see it. "
            'Call it on `logits.clone()`, or set "return_logits": true in the mini-sequence configuration'
        )

    @classmethod
    @outside_of_graphs
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "__get__" or name in _FACTS:
            attribute = getattr(getattr(func, "__self__", None), "__name__", "")
            if attribute == "requires_grad":
                return args[0]._mode.grad
            if name in _FACTS or attribute in _FACT_ATTRIBUTES:
                with torch._C.DisableTorchFunctionSubclass():
                    return func(*args, **kwargs)
        result = NotImplemented
        if args and isinstance(args[0], DeferredLogits):
            result = _handle(func, name, args[0], args[1:], kwargs)
        elif len(args) == 2 and isinstance(args[1], DeferredLogits) and name in _ELEMENTWISE and not kwargs:
            result = _handle(lambda logits, other: func(other, logits), name, args[1], (args[0],), {})
        elif isinstance(kwargs.get("input"), DeferredLogits):
            rest = dict(kwargs)
            result = _handle(func, name, rest.pop("input"), (), rest)
        if result is NotImplemented:
            tell_materialized(name)
            return func(*materialized(args), **materialized(kwargs))
        return result


def _run_steps(steps: Sequence[Step], logits: Tensor) -> Tensor:
    for step in steps:
        logits = step(logits)
    return logits


def _release(head: Head, _: Tensor) -> None:
    if not graph_is_kept():
        head.release()


def _refuse_gradient(_):
    raise RuntimeError(
        "deferred logits were given to an autograd.Function (a fused cross entropy?), which ds_minis cannot look into: its "
        'gradient would be lost. Set "loss": false in the mini-sequence configuration'
    )


class _Mode:
    """Gradient mode and autocast state under which the model called its head."""

    def __init__(self, device: torch.device):
        self.grad = torch.is_grad_enabled()
        self._device = device
        self._autocast = AutocastState(device)

    def is_on(self, name: str = "") -> bool:
        """Whether the function of that name would do now what it does in this mode."""
        same_autocast = name in _CASTS or self._autocast == AutocastState(self._device)
        return self.grad == torch.is_grad_enabled() and same_autocast

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        with torch.set_grad_enabled(self.grad), self._autocast.entered():
            yield


class _Aliases:
    """Deferred logits that stand for one memory: views of each other. They share their fate once it is written to."""

    def __init__(self):
        self._members: list[weakref.ref[DeferredLogits]] = []

    def add(self, member: DeferredLogits) -> None:
        self._members.append(weakref.ref(member))

    def alive(self) -> list[DeferredLogits]:
        """From the first on; a view's base is alive as long as the view is."""
        return [member for ref in self._members if (member := ref()) is not None]


def defer(head: Head, hidden_LH: Tensor, sample_0V: Tensor) -> DeferredLogits:
    """Stands for `head.logits(hidden_LH)`.

    Args:
        head: computes logits, at once or by chunks.
        hidden_LH: the head's input.
        sample_0V: the head's result for zero rows; gives dtype, device and vocabulary size.
    """
    return DeferredLogits(head, hidden_LH, sample_0V, (), _Mode(hidden_LH.device))


@functools.cache
def tell_materialized(name: str) -> None:
    """Once per operation."""
    if is_main_process():
        logger.warning("logits are computed in full, without saving memory, for the operation %r on them", name)


def materialized(value: Any) -> Any:
    """The value with every deferred logits in it computed in full; looks into lists, tuples and dicts."""
    if isinstance(value, DeferredLogits):
        for alias in value._aliases.alive():  # all of them now, as the operation may write (`F.relu(x, inplace=True)`)
            alias.materialize()
        return value.materialize()
    if type(value) in (list, tuple):
        return type(value)(materialized(v) for v in value)
    if hasattr(value, "_fields"):
        return type(value)(*map(materialized, value))
    if type(value) is dict:
        return {k: materialized(v) for k, v in value.items()}
    return value


def _handle(func, name: str, logits: DeferredLogits, args: tuple, kwargs: dict):
    """The deferred (or, for cross entropy, final) result; NotImplemented where the logits are needed in full."""
    if name in ("register_hook", "retain_grad"):
        raise RuntimeError(
            f'{name} on logits, whose gradient as a whole never exists when the loss is tiled. Set "loss": false in the '
            "mini-sequence configuration"
        )
    if name == "__setitem__" or name in _IN_PLACE or (name.endswith("_") and not name.endswith("__")):
        return _write(name, logits, args, kwargs)
    if logits._is_known() or not logits._mode.is_on(name):
        return NotImplemented
    if name in CONSUMERS:
        return CONSUMERS[name](logits, *args, **kwargs)
    if name in _CASTS:
        return _cast(func, logits, args, kwargs)
    if name in _ELEMENTWISE:
        return _elementwise(func, logits, args, kwargs)
    if name in ("softmax", "log_softmax"):
        return _along_vocabulary(func, logits, args, kwargs)
    if name in _ROW_VIEWS:
        return _ROW_VIEWS[name](lambda rows: func(rows, *args, **kwargs), logits, args, kwargs)
    return NotImplemented


def _write(name: str, logits: DeferredLogits, args: tuple, kwargs: dict):
    """Records an elementwise write; else leaves the writing to torch, on the logits and all their aliases in full."""
    alone = len(logits._aliases.alive()) == 1
    if alone and not logits._is_known() and logits._mode.is_on():
        result = NotImplemented
        if name in _IN_PLACE:
            result = _elementwise(getattr(torch, _IN_PLACE[name]), logits, args, kwargs)
        elif name == "__setitem__":
            result = _set_items(logits, *args)
        if result is not NotImplemented and result._sample.dtype == logits._sample.dtype:
            logits._sample, logits._steps = result._sample, result._steps
            return logits
    return NotImplemented


def _set_items(logits: DeferredLogits, index: Any, value: Any):
    """Records `logits[..., tokens] = value` (tokens that may not be predicted): the same for every row."""
    leading, tokens = _split_index(index, logits.dim())
    if any(i != slice(None) for i in leading if isinstance(i, slice)) or not all(isinstance(i, slice) for i in leading):
        return NotImplemented

    tokens = list(tokens) if isinstance(tokens, list) else tokens  # as it is now

    def written(rows: Tensor, tokens: Any, value: Any) -> Tensor:
        rows = rows.clone()
        rows[..., tokens] = value
        return rows

    scalar = isinstance(value, int | float) or (isinstance(value, Tensor) and value.dim() == 0)
    return _elementwise(written, logits, (tokens, value), {}) if scalar else NotImplemented


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _elementwise(func, logits: DeferredLogits, args: tuple, kwargs: dict):
    """Records `func`, if its other operands are the same for every row and need no gradient."""
    operands = [operand for operand in (*args, *kwargs.values()) if isinstance(operand, Tensor)]
    if any(isinstance(o, DeferredLogits) or o.dim() > 1 or o.requires_grad for o in operands):
        return NotImplemented
    versions = [_version(operand) for operand in operands]

    def step(rows: Tensor) -> Tensor:
        if versions != [_version(operand) for operand in operands]:
            raise RuntimeError(
                "a tensor that the model used on its logits was written to before the loss was computed, "
                'which deferred logits cannot follow. Set "loss": false in the mini-sequence configuration'
            )
        return func(rows, *args, **kwargs)

    result = logits._with_step(step)
    return NotImplemented if result is None else result


@dataclass(frozen=True)
class _Upcast:
    """A step that casts to float32, in a form that `before_upcast` knows."""

    step: Step
    narrow_dtype: torch.dtype

    def __call__(self, rows: Tensor) -> Tensor:
        return self.step(rows)


def _cast(func, logits: DeferredLogits, args: tuple, kwargs: dict):
    narrow, result = logits._sample.dtype, _elementwise(func, logits, args, kwargs)
    if result is not NotImplemented and result._sample.dtype == torch.float32 and narrow.itemsize == 2:
        result._steps = (*result._steps[:-1], _Upcast(result._steps[-1], narrow))
    return result


def _along_vocabulary(func, logits: DeferredLogits, args: tuple, kwargs: dict):
    """Records a softmax: a function of each row, if it runs along the vocabulary."""
    dim, *args = (kwargs.get("dim"),) if "dim" in kwargs else args
    if dim not in (-1, logits.dim() - 1):
        return NotImplemented
    return _elementwise(func, logits, (-1, *args), {key: value for key, value in kwargs.items() if key != "dim"})


def _reshape(view, logits: DeferredLogits, args: tuple, kwargs: dict):
    sizes = args[0] if len(args) == 1 and isinstance(args[0], list | tuple) else args
    if kwargs or not sizes or not all(isinstance(size, int) for size in sizes):
        return NotImplemented
    shape = list(sizes)
    if -1 in shape:
        shape[shape.index(-1)] = logits.numel() // max(1, -math.prod(shape))
    if shape[-1] != logits.shape[-1]:
        return NotImplemented
    return logits._with_rows(view, lambda hidden: hidden.reshape(*shape[:-1], hidden.shape[-1]))


def _flatten(view, logits: DeferredLogits, args: tuple, kwargs: dict):
    start, stop = (*args, 0, -1)[:2] if len(args) != 1 else (args[0], -1)
    if kwargs or stop % logits.dim() == logits.dim() - 1:
        return NotImplemented
    return logits._with_rows(view, lambda hidden: hidden.flatten(start, stop))


def _transpose(view, logits: DeferredLogits, args: tuple, kwargs: dict):
    if kwargs or logits.dim() - 1 in [dim % logits.dim() for dim in args]:
        return NotImplemented
    return logits._with_rows(view, lambda hidden: hidden.transpose(*args))


def _getitem(view, logits: DeferredLogits, args: tuple, kwargs: dict):
    """Slices and integers on the leading dimensions, slices of the vocabulary."""
    index, vocabulary = _split_index(args[0], logits.dim())
    if not all(isinstance(i, slice | int) for i in index) or not isinstance(vocabulary, slice):
        return NotImplemented
    steps = [] if vocabulary == slice(None) else [lambda rows: rows[..., vocabulary]]
    return logits._with_rows(view, lambda hidden: hidden[index], *steps)


def _split_index(index: Any, num_dims: int) -> tuple[tuple, Any]:
    """An index in square brackets: what it says of the leading dimensions (an ellipsis written out), of the vocabulary."""
    index = index if isinstance(index, tuple) else (index,)
    ellipses = [i for i, part in enumerate(index) if part is Ellipsis]
    at = ellipses[0] if ellipses else len(index)
    missing = num_dims - len(index) + len(ellipses)
    whole = (*index[:at], *[slice(None)] * missing, *index[at + 1 :])
    if len(whole) != num_dims:  # None makes a dimension
        return (None,), None
    return whole[:-1], whole[-1]


def _contiguous(view, logits: DeferredLogits, args: tuple, kwargs: dict):
    return logits._with_rows(view, lambda hidden: hidden)


_ROW_VIEWS = {
    "view": _reshape,
    "reshape": _reshape,
    "flatten": _flatten,
    "transpose": _transpose,
    "__getitem__": _getitem,
    "contiguous": _contiguous,
}
