"""A tensor subclass for logits that never exist as a whole.

`DeferredLogits` holds the head's input and records the operations on the logits up to the loss (a cast, a softcap, a scale, a
shift, a reshape). When cross entropy consumes it, head and operations run chunk by chunk. For an operation that it cannot
defer, it computes the logits in full, once: exact, but without saving memory.

Shapes: leading dimensions `*L` (batch, sequence; R rows when flattened), H hidden size, V vocabulary.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ds_minis.tiling.core.params import version_of
from ds_minis.tiling.core.replay import AutocastState, graph_is_kept
from ds_minis.tiling.loss.chunked_head import ChunkedHead
from ds_minis.tiling.loss.logit_ops import CASTS, ELEMENTWISE, Step, Upcast, record_or_run
from ds_minis.tiling.modules.compiling import outside_of_graphs

# Metadata, answered without computing logits.
_FACTS = frozenset(
    "dim size stride numel nelement ndimension is_floating_point is_complex is_contiguous element_size storage_offset "
    "get_device __len__ __hash__ is_same_size".split()
)
_FACT_ATTRIBUTES = frozenset("shape dtype device layout ndim is_cuda is_cpu is_meta is_sparse is_quantized".split())


class DeferredLogits(torch.Tensor):
    """Logits of shape `(*L, V)` that are computed only when needed, by chunks if possible."""

    @staticmethod
    def __new__(cls, head: ChunkedHead, hidden_LH: Tensor, sample_0V: Tensor, steps: tuple[Step, ...], mode: _Mode):
        """See `defer` for the arguments."""
        shape = (*hidden_LH.shape[:-1], sample_0V.shape[-1])
        logits = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=sample_0V.dtype, device=sample_0V.device, requires_grad=mode.grad
        )
        if mode.grad:  # an autograd.Function bypasses __torch_function__
            with torch._C.DisableTorchFunctionSubclass():
                logits.register_hook(_refuse_gradient)
        # `_sample` is zero rows put through all steps; it has the dtype and width of the result.
        logits._head, logits._hidden, logits._sample, logits._steps = head, hidden_LH, sample_0V, steps
        logits._mode, logits._hidden_version = mode, version_of(hidden_LH)
        logits._value = None  # the logits in full, once they were needed
        logits._view = None  # for a view: its base, and the operation that made it
        logits._aliases = _Aliases()
        logits._aliases.add(logits)
        logits._unreadable = ""  # the reason why the logits can no longer be computed
        head.record_output(logits)
        return logits

    def __repr__(self, **_) -> str:
        with torch._C.DisableTorchFunctionSubclass():
            return f"DeferredLogits(rows={tuple(self.shape[:-1])}, vocab_size={self.shape[-1]})"

    def materialize(self) -> Tensor:
        """The logits in full, as an ordinary tensor in the autograd graph; the same one each time."""
        if self._value is None:
            with self._mode.entered():
                if self._view is not None:
                    base, view = self._view
                    self._value = view(base.materialize())
                else:
                    self._value = _run_steps(self._steps, self._head.logits(self.hidden()))
            self._mode.watch(self._value)
        return self._value

    def settle(self, unreadable: str) -> None:
        """Called when backward begins: computes the logits in full, if possible, and frees the hidden states."""
        if self._value is None and not unreadable:
            self._head.warn_materialized("holding them until backward")
            self._mode.grad = False  # the saved tensors of the graph are about to be freed
            try:
                self.materialize()
            except RuntimeError as error:  # cannot be computed in the middle of a backward
                unreadable = str(error)
        self._unreadable, self._hidden, self._steps = unreadable, None, ()

    def mode(self) -> contextlib.AbstractContextManager:
        """Enters the gradient mode and the autocast state that the head was called in."""
        return self._mode.entered()

    def hidden(self) -> Tensor:
        """The head's input. Raises RuntimeError if it was freed or changed in place since."""
        if self._hidden is None:
            raise RuntimeError(self._unreadable)
        if version_of(self._hidden) != self._hidden_version:
            raise RuntimeError(
                "the hidden states were written to between the LM head and the loss, which deferred logits cannot follow. "
                'Set "loss": false in the mini-sequence configuration'
            )
        return self._hidden

    def is_readable(self) -> bool:
        """Whether these logits are still deferred and backward has not begun."""
        return self._hidden is not None and not self._is_known()

    def give_to_be_read(self, output: Any, name: str) -> None:
        """Sets the same logits as an attribute of another output, read-only: their gradient is refused.

        It would bypass the autograd nodes that an engine adds to the outputs that it rebuilds (DDP's static graph).
        """
        mode = copy.copy(self._mode)
        mode.read_only = True
        self._head.give(DeferredLogits(self._head, self._hidden, self._sample, self._steps, mode), output, name)

    def _is_known(self) -> bool:
        """Whether these logits, or a view that shares their memory, were computed in full."""
        return any(alias._value is not None for alias in self._aliases.alive())

    def by_chunks(self, function: Callable[..., Tensor], *aligned_R: Tensor) -> Tensor:
        """`function(logits_CV, *aligned_C)` of each chunk of rows, concatenated: `(R, ...)`, one result per row."""
        return self._watched(self._head.tile(self._after_steps(function), self.hidden(), self._sample, *aligned_R))

    def sum_by_chunks(self, function: Callable[..., Tensor], expected: Tensor, *aligned_R: Tensor) -> Tensor:
        """`by_chunks(function, *aligned_R).sum(0)`, with one matmul of the head less; see `tiled_sum.sum_rows`."""
        rows = self._after_steps(function)
        return self._watched(self._head.sum(rows, self.hidden(), self._sample, expected, *aligned_R))

    def _watched(self, result: Tensor) -> Tensor:
        """Registers a hook on the result by which backward releases the head's input."""
        self._mode.watch(result)
        if result.requires_grad:
            result.register_hook(functools.partial(_release, self._head))
        return result

    def before_upcast(self) -> DeferredLogits:
        """The same logits without a last cast to float32, for a function that computes in float32 for any dtype."""
        last = self._steps[-1] if self._steps else None
        if not isinstance(last, Upcast):
            return self
        return DeferredLogits(
            self._head, self.hidden(), self._sample.to(last.narrow_dtype), self._steps[:-1], self._mode
        )

    def _after_steps(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        steps = self._steps  # only the steps: the graph holds this closure until the end of backward

        def rows(logits_CV: Tensor, *aligned_C: Tensor, **kwargs) -> Tensor:
            return function(_run_steps(steps, logits_CV), *aligned_C, **kwargs)

        return rows

    def _with_step(self, step: Step) -> DeferredLogits | None:
        """These logits with one more step; None if the step changes the shape of a row."""
        with torch.no_grad():
            sample = step(self._sample)
        if sample is self._sample:  # a cast to their own dtype: torch returns the tensor itself
            return self
        if sample.shape != self._sample.shape:
            return None
        return DeferredLogits(self._head, self.hidden(), sample, (*self._steps, step), self._mode)

    def _with_rows(
        self, view: Callable[[Tensor], Tensor], rearrange: Callable[[Tensor], Tensor], *steps: Step
    ) -> DeferredLogits:
        """A view of these logits: `rearrange` of the hidden states, then `steps` along the vocabulary."""
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
            result = record_or_run(func, name, args[0], args[1:], kwargs)
        elif len(args) == 2 and isinstance(args[1], DeferredLogits) and name in ELEMENTWISE and not kwargs:
            result = record_or_run(lambda logits, other: func(other, logits), name, args[1], (args[0],), {})
        elif isinstance(kwargs.get("input"), DeferredLogits):
            rest = dict(kwargs)
            result = record_or_run(func, name, rest.pop("input"), (), rest)
        if result is NotImplemented:
            for head in {logits._head for logits in _deferred_in((args, kwargs))}:
                head.warn_materialized(name)
            return func(*materialized(args), **materialized(kwargs))
        return result


def _run_steps(steps: Sequence[Step], logits: Tensor) -> Tensor:
    for step in steps:
        logits = step(logits)
    return logits


def _release(head: ChunkedHead, _: Tensor) -> None:
    if not graph_is_kept():
        head.release()


def _refuse_gradient(_):
    raise RuntimeError(
        "deferred logits were given to an autograd.Function (a fused cross entropy?), which ds_minis cannot look into: its "
        'gradient would be lost. Set "loss": false in the mini-sequence configuration'
    )


def _refuse_read_only(_):
    raise RuntimeError(
        "a loss of one's own from the logits of a model that DistributedDataParallel wraps with find_unused_parameters=True "
        "or static_graph=True, which rebuilds the model's output: only the output's own loss has gradients then. Set "
        '"return_logits": true in the mini-sequence configuration, or leave these arguments out (HF Trainer: '
        "ddp_find_unused_parameters=False)"
    )


class _Mode:
    """Gradient mode and autocast state under which the model called its head.

    Attributes:
        read_only: whether a gradient of the logits is refused.
    """

    read_only = False

    def __init__(self, device: torch.device):
        self.grad = torch.is_grad_enabled()
        self._device = device
        self._autocast = AutocastState(device)

    def is_on(self, name: str = "") -> bool:
        """Whether the function of that name gives the same result now as in this mode."""
        same_autocast = name in CASTS or self._autocast == AutocastState(self._device)
        return self.grad == torch.is_grad_enabled() and same_autocast

    def watch(self, result: Tensor) -> None:
        """Refuses a gradient of the result if the logits are read-only."""
        if self.read_only and result.requires_grad:
            result.register_hook(_refuse_read_only)

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        with torch.set_grad_enabled(self.grad), self._autocast.entered():
            yield


class _Aliases:
    """Deferred logits that are views of each other. A write to one of them is a write to all."""

    def __init__(self):
        self._members: list[weakref.ref[DeferredLogits]] = []

    def add(self, member: DeferredLogits) -> None:
        self._members.append(weakref.ref(member))

    def alive(self) -> list[DeferredLogits]:
        """The living members in order of creation; a view keeps its base alive."""
        return [member for ref in self._members if (member := ref()) is not None]


def defer(head: ChunkedHead, hidden_LH: Tensor, sample_0V: Tensor) -> DeferredLogits:
    """Returns deferred `head.logits(hidden_LH)`.

    Args:
        head: computes logits, at once or by chunks.
        hidden_LH: the head's input.
        sample_0V: the head's result for zero rows, with its dtype, device and vocabulary size.
    """
    return DeferredLogits(head, hidden_LH, sample_0V, (), _Mode(hidden_LH.device))


def _deferred_in(value: Any) -> Iterator[DeferredLogits]:
    if isinstance(value, DeferredLogits):
        yield value
    elif isinstance(value, tuple | list | dict):
        for v in value.values() if isinstance(value, dict) else value:
            yield from _deferred_in(v)


def materialized(value: Any) -> Any:
    """The value with all deferred logits in it computed in full, also those in lists, tuples and dicts."""
    if isinstance(value, DeferredLogits):
        for alias in value._aliases.alive():  # all of them, since the operation may write (`F.relu(x, inplace=True)`)
            alias.materialize()
        return value.materialize()
    if type(value) in (list, tuple):
        return type(value)(materialized(v) for v in value)
    if hasattr(value, "_fields"):
        return type(value)(*map(materialized, value))
    if type(value) is dict:
        return {k: materialized(v) for k, v in value.items()}
    return value
