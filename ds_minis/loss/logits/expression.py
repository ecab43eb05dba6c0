"""What deferred logits stand for: operations on the rows of LM heads, evaluated for all rows or for those of one chunk.

An expression is a tree. Its leaves are the hidden states of heads (`HeadRows`) and other tensors with one row per token
(`LeafRows`: a temperature of each sequence, say); its nodes are operations that give one row for each row (`Applied`).

Shapes: leading dimensions `*L` (batch, sequence; R rows when flattened), C rows of one chunk, V vocabulary, K any width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ds_minis.tiling.core.params import Constants, restored_flags, version_of
from ds_minis.tiling.core.replay import AutocastState

if TYPE_CHECKING:
    from ds_minis.loss.heads.chunked_head import ChunkedHead

Key = object  # names a leaf: leaves are replaced (sliced, say), and the nodes that read them stay
WRITTEN = (
    "a tensor that the logits were computed with was written to before the loss was computed, which deferred logits cannot "
    'follow. Set "loss": false in the mini-sequence configuration'
)


class Evaluation:
    """One evaluation of an expression. It keeps values that several nodes read.

    Args:
        leaves: the rows of each leaf.
        logits_of: computes the logits of rows of hidden states.
    """

    def __init__(self, root: Node, leaves: Mapping[Key, Tensor], logits_of: Callable[[ChunkedHead, Tensor], Tensor]):
        self.leaves, self.logits_of = leaves, logits_of
        self._values: dict[int, Tensor] = {}
        self._shared = _shared(root)

    def value(self, node: Any) -> Any:
        """The rows of a node; anything else (an operand that is the same for all rows) as it is."""
        if not isinstance(node, Node):
            return node
        if id(node) not in self._shared:
            return node.rows(self)
        if id(node) not in self._values:
            self._values[id(node)] = node.rows(self)
        return self._values[id(node)]


def _shared(root: Node) -> set[int]:
    """The nodes that several others have for an operand."""
    seen, shared, waiting = set(), set(), [root]
    while waiting:
        node = waiting.pop()
        (shared if id(node) in seen else seen).add(id(node))
        if id(node) not in shared:
            waiting += node.children()
    return shared


class Node:
    """One node of an expression."""

    def children(self) -> list[Node]:
        """The nodes whose values it needs, in the order of evaluation."""
        return []

    def rows(self, evaluation: Evaluation) -> Tensor:
        raise NotImplementedError

    def heads(self) -> Iterator[HeadRows]:
        """The heads in it, in the order of evaluation; one may come several times."""
        for child in self.children():
            yield from child.heads()

    def signature(self, order: list[Key]) -> tuple:
        """Equal for expressions that differ in their leaves alone; appends the leaves to `order`."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class HeadRows(Node):
    """The logits of an LM head.

    Attributes:
        head: the head.
        key: the leaf with its hidden states.
        autocast: the autocast state that it was called under.
        grad: whether gradients were on.
        settings: of the head's parts (whether an adapter is on), which may be others when the logits are read.
    """

    head: ChunkedHead
    key: Key
    autocast: AutocastState
    grad: bool
    settings: Constants

    def rows(self, evaluation: Evaluation) -> Tensor:
        with _as_recorded(self.grad, self.autocast), restored_flags(self.settings):
            return evaluation.logits_of(self.head, evaluation.leaves[self.key])

    def heads(self) -> Iterator[HeadRows]:
        yield self

    def signature(self, order: list[Key]) -> tuple:
        order.append(self.key)
        settings = repr([values for _, values in self.settings])
        return "head", id(self.head.module), self.autocast.dtype(), self.grad, settings


@dataclass(frozen=True, eq=False)
class LeafRows(Node):
    """A tensor with one row per token."""

    key: Key

    def rows(self, evaluation: Evaluation) -> Tensor:
        return evaluation.leaves[self.key]

    def signature(self, order: list[Key]) -> tuple:
        order.append(self.key)
        return ("leaf",)


@dataclass(frozen=True, eq=False)
class Applied(Node):
    """An operation.

    Attributes:
        operands: nodes, or what is the same for all rows.
        options: its keyword arguments, without nodes.
        narrow_dtype: for a cast to float32 the dtype before, see `Expression.before_upcast`; else None.
    """

    function: Callable[..., Tensor]
    operands: tuple
    options: dict[str, Any]
    autocast: AutocastState
    grad: bool
    narrow_dtype: torch.dtype | None = None
    versions: tuple[int, ...] = field(init=False, default=())

    def __post_init__(self):
        object.__setattr__(self, "versions", self._versions())

    def _versions(self) -> tuple[int, ...]:
        values = (*self.operands, *self.options.values())
        return tuple(version_of(value) for value in values if isinstance(value, Tensor))

    def rows(self, evaluation: Evaluation) -> Tensor:
        if self.versions and self.versions != self._versions():
            raise RuntimeError(WRITTEN)
        operands = [evaluation.value(operand) for operand in self.operands]
        with _as_recorded(self.grad, self.autocast):
            return self.function(*operands, **self.options)

    def children(self) -> list[Node]:
        return [operand for operand in self.operands if isinstance(operand, Node)]

    def signature(self, order: list[Key]) -> tuple:
        operands = tuple(o.signature(order) if isinstance(o, Node) else _constant(o) for o in self.operands)
        options = tuple((name, _constant(value)) for name, value in self.options.items())
        return "applied", self.function, operands, options, self.autocast.dtype(), self.grad


@dataclass(frozen=True, eq=False)
class Renamed(Node):
    """An expression whose leaves have other names here."""

    node: Node
    names: Mapping[Key, Key]

    def rows(self, evaluation: Evaluation) -> Tensor:
        leaves = {key: evaluation.leaves[name] for key, name in self.names.items()}
        return Evaluation(self.node, leaves, evaluation.logits_of).value(self.node)

    def heads(self) -> Iterator[HeadRows]:
        for own in self.node.heads():
            yield replace(own, key=self.names[own.key])

    def signature(self, order: list[Key]) -> tuple:
        own: list[Key] = []
        signature = self.node.signature(own)
        order += [self.names[key] for key in own]
        return signature


def _constant(value: Any) -> Any:
    return ("tensor", id(value)) if isinstance(value, Tensor) else repr(value)


@contextlib.contextmanager
def _as_recorded(grad: bool, autocast: AutocastState) -> Iterator[None]:
    with torch.set_grad_enabled(grad and torch.is_grad_enabled()), autocast.entered():
        yield


class Expression:
    """A node, and the tensors that its leaves stand for.

    Attributes:
        node: the root.
        leaves: a tensor `(*L, K)` for each leaf; empty once they were freed.
        sample_0V: the value for zero rows, with its dtype, device and width.
        grad: whether the value has a gradient.
        overwritten: whether a write has given the deferred logits another expression.
    """

    overwritten = False

    def __init__(self, node: Node, leaves: Mapping[Key, Tensor], sample_0V: Tensor, grad: bool):
        self.node, self.leaves, self.sample_0V, self.grad = node, dict(leaves), sample_0V, grad
        self._versions = [version_of(leaf) for leaf in self.leaves.values()]

    @property
    def shape(self) -> tuple[int, ...]:
        return (*next(iter(self.leaves.values())).shape[:-1], self.sample_0V.shape[-1])

    def require_unwritten(self) -> None:
        """Raises RuntimeError if a leaf was changed in place."""
        hidden = {own.key for own in self.node.heads()}
        for (key, leaf), version in zip(self.leaves.items(), self._versions, strict=True):
            if version_of(leaf) != version:
                written = "the hidden states were written to between the LM head and the loss"
                way_out = 'which deferred logits cannot follow. Set "loss": false in the mini-sequence configuration'
                raise RuntimeError(f"{written}, {way_out}" if key in hidden else WRITTEN)

    def applied(
        self, function: Callable[..., Tensor], operands: Sequence[Any], options: dict, **attributes: Any
    ) -> Expression:
        """The expression with an operation on it; `operands` are expressions, and what is the same for all rows."""
        parts = [operand for operand in operands if isinstance(operand, Expression)]
        leaves, nodes = _merged(parts)
        waiting = iter(nodes)
        arguments = tuple(next(waiting) if isinstance(o, Expression) else o for o in operands)
        samples = [o.sample_0V if isinstance(o, Expression) else o for o in operands]
        with torch.no_grad():
            sample = function(*samples, **options)
        grad = torch.is_grad_enabled() and function is not Tensor.detach and any(part.grad for part in parts)
        autocast = AutocastState(self.sample_0V.device)
        node = Applied(function, arguments, options, autocast, torch.is_grad_enabled(), **attributes)
        return Expression(node, leaves, sample, grad)

    def rearranged(self, rearrange: Callable[[Tensor], Tensor]) -> Expression:
        """The expression with other rows, or the same in another order."""
        self.require_unwritten()
        if self.grad and not torch.is_grad_enabled():
            return self.detached().rearranged(rearrange)
        return Expression(self.node, {k: rearrange(leaf) for k, leaf in self.leaves.items()}, self.sample_0V, self.grad)

    def detached(self) -> Expression:
        return self.applied(Tensor.detach, [self], {}) if self.grad else self

    def before_upcast(self) -> Expression:
        """The same without a last cast to float32, for a function that computes in float32 for any dtype."""
        narrow = getattr(self.node, "narrow_dtype", None)
        if narrow is None:
            return self
        return Expression(self.node.operands[0], self.leaves, self.sample_0V.to(narrow), self.grad)

    def evaluated(self, logits_of: Callable[[ChunkedHead, Tensor], Tensor]) -> Tensor:
        """The value of all rows, `(*L, V)`."""
        self.require_unwritten()
        return Evaluation(self.node, self.leaves, logits_of).value(self.node)


def leaf(tensor: Tensor) -> Expression:
    """A tensor `(*L, K)` with one row per token."""
    key = object()
    return Expression(LeafRows(key), {key: tensor}, tensor.new_empty((0, tensor.shape[-1])), tensor.requires_grad)


def concatenated(parts: Sequence[Expression]) -> Expression | None:
    """One expression whose rows are those of all parts, one after the other; None if their operations differ."""
    orders: list[list[Key]] = []
    signatures = set()
    for part in parts:
        part.require_unwritten()
        orders.append([])
        signatures.add(part.node.signature(orders[-1]))
    if len(signatures) > 1 or len({len(order) for order in orders}) > 1 or len({part.grad for part in parts}) > 1:
        return None
    leaves = {
        keys[0]: torch.cat([part.leaves[key] for part, key in zip(parts, keys, strict=True)])
        for keys in zip(*orders, strict=True)
    }
    return Expression(parts[0].node, leaves, parts[0].sample_0V, parts[0].grad)


def _merged(parts: Sequence[Expression]) -> tuple[dict[Key, Tensor], list[Node]]:
    """The leaves of all parts, and the nodes of the parts that read them."""
    leaves: dict[Key, Tensor] = {}
    nodes = []
    for part in parts:
        names = {}
        for key, tensor in part.leaves.items():
            same = next((k for k, other in leaves.items() if _is_same(tensor, other)), None)
            names[key] = key if same is None and key not in leaves else object() if same is None else same
            leaves.setdefault(names[key], tensor)
        renamed = any(key is not name for key, name in names.items())
        nodes.append(Renamed(part.node, names) if renamed else part.node)
    return leaves, nodes


def _is_same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same part of the same tensor."""
    if a is b:
        return True
    if a._base is None or a._base is not b._base or a.requires_grad != b.requires_grad:
        return False
    return (a.shape, a.stride(), a.storage_offset(), a.dtype) == (b.shape, b.stride(), b.storage_offset(), b.dtype)


def operand_of(value: Any, like: Expression) -> Any:
    """An operand of an expression: deferred, another tensor, or anything else. NotImplemented if it has no rows to cut."""
    if not isinstance(value, Tensor):
        return value
    if isinstance(getattr(value, "_expression", None), Expression):
        if not value.is_open():
            return leaf(value.materialize())
        return value.expression()
    *lead, width = like.shape
    if value.dim() == 0 and not value.requires_grad:
        return value
    if value.dim() == 0 and value.dtype != like.sample_0V.dtype:  # as a tensor with rows it would promote
        return NotImplemented
    rows = value if value.dim() else value.view(1)
    if rows.dim() > len(lead) + 1 or rows.shape[-1] not in (1, width):
        return NotImplemented
    if rows.shape[:-1].numel() == 1 and not value.requires_grad:
        return rows.reshape(-1)
    own = (*[1] * (len(lead) + 1 - rows.dim()), *rows.shape[:-1])
    if any(size not in (1, whole) for size, whole in zip(own, lead, strict=True)):
        return NotImplemented
    if rows.shape[-1] != 1 and own != tuple(lead):  # would be as large as the logits
        return NotImplemented
    return leaf(rows.expand(*lead, rows.shape[-1]))
