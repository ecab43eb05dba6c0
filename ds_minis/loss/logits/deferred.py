"""A tensor subclass for logits that never exist as a whole.

`DeferredLogits` holds an expression (`ds_minis.loss.logits.expression`): the head's input and the operations on the logits
up to a loss (a cast, a softcap, a temperature, a shift, a softmax). What makes one number per token of them, or a sum, runs
head and operations chunk by chunk. For an operation that it cannot defer, it computes the logits in full, once: exact, but
without saving memory.

Shapes: leading dimensions `*L` (batch, sequence; R rows when flattened), H hidden size, V vocabulary.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.utils.hooks
from torch import Tensor

from ds_minis.loss.heads.chunked_head import ChunkedHead
from ds_minis.loss.heads.one_factor import Labelled
from ds_minis.loss.logits.chunk_runs import by_chunks, columns_by_chunks, sum_by_chunks
from ds_minis.loss.logits.expression import Expression, HeadRows
from ds_minis.loss.logits.logit_ops import record_or_run, record_reversed
from ds_minis.tiling.core.params import ParameterSlots, is_partitioned
from ds_minis.tiling.core.replay import AutocastState, graph_is_kept, refuse_gradients_of_gradients
from ds_minis.tiling.modules.compiling import outside_of_graphs
from ds_minis.tiling.modules.hooks import is_engines

# Metadata, answered without computing logits.
_FACTS = frozenset(
    "dim size stride numel nelement ndimension is_floating_point is_complex is_contiguous element_size storage_offset "
    "get_device __len__ __hash__ is_same_size".split()
)
_FACT_ATTRIBUTES = frozenset(
    "shape dtype device layout ndim is_cuda is_cpu is_meta is_sparse is_quantized requires_grad grad_fn is_leaf _base "
    "is_nested is_mps is_xpu".split()
)


class DeferredLogits(torch.Tensor):
    """Logits of shape `(*L, V)` that are computed only when needed, by chunks if possible. Made by `represent`."""

    @staticmethod
    def __new__(cls, expression: Expression, view: tuple[DeferredLogits, Callable] | None, read_only: bool):
        sample = expression.sample_0V
        logits = torch.Tensor._make_wrapper_subclass(cls, expression.shape, dtype=sample.dtype, device=sample.device)
        logits._expression, logits._read_only = expression, read_only
        logits._value = None  # the logits in full, once they were needed
        logits._view = view  # for a view: its base, and the operation that made it
        logits._aliases = _Aliases() if view is None else view[0]._aliases
        logits._aliases.add(logits)
        logits._unreadable = ""  # the reason why the logits can no longer be computed
        for head in logits.heads():
            head.record_output(logits)
        return logits

    def __repr__(self, **_) -> str:
        with torch._C.DisableTorchFunctionSubclass():
            return f"DeferredLogits(rows={tuple(self.shape[:-1])}, vocab_size={self.shape[-1]})"

    def heads(self) -> list[ChunkedHead]:
        """The heads of the passes that the logits come from."""
        return list(dict.fromkeys(own.head for own in self._expression.node.heads()))

    def expression(self) -> Expression:
        """What the logits stand for. Raises RuntimeError if the hidden states were freed or changed in place since."""
        if not self._expression.leaves:
            raise RuntimeError(self._unreadable)
        self._expression.require_unwritten()
        return self._expression

    def materialize(self) -> Tensor:
        """The logits in full, as an ordinary tensor in the autograd graph; the same one each time."""
        if self._value is None:
            value = self._in_full()
            if self._read_only and value.requires_grad:
                value.register_hook(_refuse_read_only)
            self._value = self._passed_on(value)
        return self._value

    def _in_full(self) -> Tensor:
        if self._view is not None:
            base, view = self._view
            with torch.set_grad_enabled(self._expression.grad):
                return view(base.materialize())
        with torch.set_grad_enabled(self._expression.grad):
            return self.expression().evaluated(ChunkedHead.logits)

    def compute_or_refuse(self, unreadable: str) -> None:
        """Called when backward begins: computes the logits in full, if possible, and frees the hidden states."""
        if self._value is None and not unreadable:
            for head in self.heads():
                head.warn_materialized("holding them until backward")
            try:
                with torch.no_grad():  # the saved tensors of the graph are about to be freed
                    self._value = self._in_full_without_graph()
            except RuntimeError as error:  # cannot be computed in the middle of a backward
                unreadable = str(error)
        self._unreadable, self._expression.leaves = unreadable, {}

    def _in_full_without_graph(self) -> Tensor:
        if self._view is not None and self._view[0]._value is not None:
            return self._view[1](self._view[0]._value)
        return self.expression().evaluated(ChunkedHead.logits)

    def is_readable(self) -> bool:
        """Whether these logits are still deferred and backward has not begun."""
        return bool(self._expression.leaves) and not self.is_known()

    def give_to_be_read(self, output: Any, name: str) -> None:
        """Sets the same logits as an attribute of another output, read-only: their gradient is refused.

        It would bypass the autograd nodes that an engine adds to the outputs that it rebuilds (DDP's static graph).
        """
        self.heads()[0].give(represent(self._expression, read_only=True), output, name)

    def is_open(self) -> bool:
        """Whether operations on these logits are recorded. Otherwise they are made on all logits."""
        return not self.is_known() and not self._is_passed_on()

    def is_known(self) -> bool:
        """Whether these logits, or a view that shares their memory, were computed in full."""
        return any(alias._value is not None for alias in self._aliases.alive())

    def _is_passed_on(self) -> bool:
        """Whether an autograd.Function has returned these logits: their gradient is its gradient."""
        with torch._C.DisableTorchFunctionSubclass():
            node = self.grad_fn
        return node is not None and not isinstance(node, _Represented._backward_cls)

    def _passed_on(self, value: Tensor) -> Tensor:
        return _PassedOn.apply(self, value.detach()) if self._is_passed_on() else value

    def by_chunks(self, function: Callable[..., Tensor], *aligned_R: Tensor) -> Tensor:
        """`function(logits_CV, *aligned_C)` of each chunk of rows, concatenated: `(R, ...)`, one result per row."""
        return self._watched(by_chunks(self.expression(), function, aligned_R))

    def columns_by_chunks(self, function: Callable, *aligned_R: Tensor, labelled: Labelled | None = None) -> list:
        """The columns of a `function` that gives `(C, N)`, with one matmul less than `by_chunks` where possible."""
        return list(map(self._watched, columns_by_chunks(self.expression(), function, aligned_R, labelled)))

    def sum_by_chunks(self, function: Callable[..., Tensor], expected: Tensor, *aligned_R: Tensor) -> Tensor:
        """`by_chunks(function, *aligned_R).sum(0)`, with one matmul of the head less; see `tiled_sum.sum_rows`."""
        return self._watched(sum_by_chunks(self.expression(), function, expected, aligned_R))

    def _watched(self, result: Tensor) -> Tensor:
        """Registers hooks on the result by which backward releases the head's input, and an engine knows of backward."""
        if result.requires_grad:
            if self._read_only:
                result.register_hook(_refuse_read_only)
            for head in self.heads():
                head.register_hooks(result)
                result.register_hook(functools.partial(_release, head))
        return result

    def derived(self, expression: Expression, view: Callable[[Tensor], Tensor] | None = None) -> DeferredLogits:
        """Deferred logits that were made from these: a view of them, if `view` says how."""
        return represent(expression, None if view is None else (self, view), self._read_only)

    def become(self, other: DeferredLogits) -> None:
        """Represents from now on what `other` does, as after a write."""
        self._expression.overwritten = True  # for the autograd node, which has the gradients of the former
        self._expression = other._expression

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        """Code below autograd gets the values; a gradient of its result comes back through `_Represented`."""
        with torch._C.DisableTorchFunctionSubclass():
            for logits in _deferred_in((args, kwargs or {})):
                for head in logits.heads():
                    head.warn_materialized(str(func))
        return func(*_values(args), **_values(kwargs or {}))

    @classmethod
    @outside_of_graphs
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        attribute = getattr(getattr(func, "__self__", None), "__name__", "") if name == "__get__" else ""
        if name in _FACTS or attribute in _FACT_ATTRIBUTES:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if attribute == "grad" and not args[0].is_known():
            return None
        result = NotImplemented
        if name == "register_hook" and is_engines(args[1]) and not args[0].is_known():
            return args[0].heads()[0].add_hook(args[1])
        if args and isinstance(args[0], DeferredLogits | tuple | list):
            result = record_or_run(func, name, args[0], args[1:], kwargs)
        elif len(args) >= 2 and not kwargs:
            result = record_reversed(func, name, args)
        elif isinstance(kwargs.get("input"), DeferredLogits):
            rest = dict(kwargs)
            result = record_or_run(func, name, rest.pop("input"), (), rest)
        if result is NotImplemented:
            for head in {head for logits in _deferred_in((args, kwargs)) for head in logits.heads()}:
                head.warn_materialized(attribute or name)
            return func(*materialized(args), **materialized(kwargs))
        return result


def represent(
    expression: Expression, view: tuple[DeferredLogits, Callable] | None = None, read_only: bool = False
) -> DeferredLogits:
    """Deferred logits with the value of an expression, in the autograd graph."""
    if not (expression.grad and torch.is_grad_enabled()):
        return DeferredLogits(expression, view, read_only)
    inputs = _trained(expression)
    with torch._C.DisableTorchFunctionSubclass():
        return _Represented.apply((expression, view, read_only), *inputs)


def _trained(expression: Expression) -> list[Tensor]:
    """The tensors that an expression has gradients for: leaves, and weights of heads."""
    modules = dict.fromkeys(own.head.module for own in expression.node.heads() if own.grad)
    leaves = [leaf for leaf in expression.leaves.values() if leaf.requires_grad]
    weights = [t for module in modules for t in ParameterSlots(module).tensors]
    # ZeRO-3's have no shape here: autograd would remember that.
    return leaves + [weight for weight in weights if not is_partitioned(weight)]


class _Represented(torch.autograd.Function):
    """Deferred logits as an autograd node, for code that ends its own nodes at them (a fused cross entropy, DDP).

    Its backward gets the gradient of all logits. What `by_chunks` computes is in nodes of its own, and does not come here.
    """

    @staticmethod
    def forward(ctx, logits: tuple, *inputs: Tensor):
        ctx.expression = logits[0]
        ctx.set_materialize_grads(False)
        return DeferredLogits(*logits)

    @staticmethod
    def backward(ctx, grad_LV: Tensor | None):
        if grad_LV is None:
            return None, *[None] * (len(ctx.needs_input_grad) - 1)
        refuse_gradients_of_gradients('set "loss": false')
        expression = ctx.expression
        if not expression.leaves:
            raise RuntimeError("the gradient of all logits came after their hidden states were freed")
        if expression.overwritten:
            raise RuntimeError("an autograd.Function was given logits that were written to in place: give it a clone")
        for own in expression.node.heads():
            own.head.require_readable()
            if any(map(is_partitioned, own.head.module.parameters())):
                raise RuntimeError(
                    "an autograd.Function (a fused cross entropy?) was given deferred logits whose LM head ZeRO-3 holds in "
                    'parts. Set "loss": false in the mini-sequence configuration'
                )
        leaves = {key: leaf.detach().requires_grad_(leaf.requires_grad) for key, leaf in expression.leaves.items()}
        copy = Expression(expression.node, leaves, expression.sample_0V, True)
        with contextlib.ExitStack() as stack:
            for own in expression.node.heads():
                stack.enter_context(own.head.trained_as_then())
            stack.enter_context(torch.enable_grad())
            grads = torch.autograd.grad(copy.evaluated(ChunkedHead.logits), _trained(copy), grad_LV, allow_unused=True)
        return None, *grads


class _PassedOn(torch.autograd.Function):
    """The values of deferred logits that somebody's autograd.Function returned; their gradient is that of its result."""

    @staticmethod
    def forward(ctx, logits: DeferredLogits, value: Tensor):
        return value.view_as(value)

    @staticmethod
    def backward(ctx, grad_LV: Tensor):
        return grad_LV, None


def _release(head: ChunkedHead, _: Tensor) -> None:
    if not graph_is_kept():
        head.release()


def _refuse_read_only(_):
    raise RuntimeError(
        "a loss of one's own from the logits of a model that DistributedDataParallel wraps with find_unused_parameters=True "
        "or static_graph=True, which rebuilds the model's output: only the output's own loss has gradients then. Set "
        '"return_logits": true in the mini-sequence configuration, or leave these arguments out (HF Trainer: '
        "ddp_find_unused_parameters=False)"
    )


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
    key, grad = object(), torch.is_grad_enabled()
    node = HeadRows(head, key, AutocastState(hidden_LH.device), grad, head.settings())
    return represent(
        Expression(node, {key: hidden_LH}, sample_0V, grad and (hidden_LH.requires_grad or head.is_trained()))
    )


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
    return _mapped(materialized, value)


def _values(value: Any) -> Any:
    """The same, without graphs."""
    if isinstance(value, DeferredLogits):
        return value.materialize().detach()
    return _mapped(_values, value)


def _mapped(function: Callable[[Any], Any], value: Any) -> Any:
    if type(value) in (list, tuple):
        return type(value)(map(function, value))
    if hasattr(value, "_fields"):
        return type(value)(*map(function, value))
    return {k: function(v) for k, v in value.items()} if type(value) is dict else value
