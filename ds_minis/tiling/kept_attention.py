"""An attention whose graph lives from forward to backward, so that backward does not run its forward once more.

What an attention saves for its backward are queries, keys and values, its output, and little else (a log-sum-exp per query).
Queries, keys and values, and copies of them, are cheap to make again; the output is kept. Source: DistFlashAttn (arXiv
2310.03294, section 3.3), which places checkpoints so that attention is not recomputed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks

from ds_minis.tiling.attention import AttentionRequest
from ds_minis.tiling.recompute import graph_is_kept
from ds_minis.tiling.remade import Copy, Groups, View, copy_of

Attend = Callable[[AttentionRequest, Sequence[Tensor]], Tensor]

ATTENDS_TWICE = "computes its attention once more in backward"  # what is told of a layer whose attention cannot be kept
_MOST = 2  # times the bytes of the output: what may be kept for one call


def attend_once(request: AttentionRequest, tensors: Sequence[Tensor]) -> Tensor:
    """The attention of the layer itself, for all tokens."""
    return request.run(tensors)


class KeptAttention:
    """One call of an attention.

    Args:
        heads: queries, keys and values, `(B, N, S, D)`, `(B, K, S, D)` and `(B, K, S, E)`; not held after this.

    Attributes:
        result: the attention's output, until `let_go` is called.
        tensors: what has to be kept from forward to backward, until then too; flat, of different dtypes.
        reason: why this call cannot be kept, and has to be run once more; empty if it can.
    """

    def __init__(self, attend: Attend, request: AttentionRequest, heads: Sequence[Tensor]):
        self.tensors: list[Tensor] = []
        self.reason = ""
        self._arguments = _tensors((request.args, request.kwargs))
        self._now: Groups | None = None
        weights = {_key(t) for t in (*request.module.parameters(), *request.module.buffers())}
        packing = _Packing(self, heads, weights)
        with torch.enable_grad():
            # Heads by way of a node of ours, as a leaf would be held by the graph.
            sources = _Source.apply(heads[0].new_empty((), requires_grad=True), *heads)
            self._inputs = [get_gradient_edge(t) for t in sources]
            with saved_tensors_hooks(packing, self._unpack):
                out = attend(request, sources)
        del sources
        if not out.requires_grad:
            self.reason = self.reason or "its attention gives no graph"
        else:
            self._edge = get_gradient_edge(out)
            if _other_leaves(self._edge, self._inputs):
                self.reason = self.reason or "its attention reads weights"
        self.result = out.detach()
        self._out = packing(self.result)
        packing.end()
        num_bytes = sum(t.nbytes for t in self.tensors)
        if num_bytes > _MOST * self.result.nbytes:
            self.reason = (
                self.reason or f"its attention saves {num_bytes / self.result.nbytes:.1f} times its output's bytes"
            )

    def let_go(self) -> None:
        """Holds nothing but the graph from now on; all of that if the call cannot be kept."""
        self.tensors, self.result = [], None
        if self.reason:
            self._edge = self._inputs = None

    def output(self, heads: Sequence[Tensor], tensors: Sequence[Tensor]) -> Tensor:
        """The attention's output again.

        Args:
            heads: the same as in forward, computed again.
            tensors: what was kept.
        """
        return self._out.of(self._groups(heads, tensors))

    def backward(self, heads: Sequence[Tensor], tensors: Sequence[Tensor], grad_out: Tensor) -> list[Tensor | None]:
        """Gradients of queries, keys and values; heads and tensors are as above."""
        self._now = self._groups(heads, tensors)
        try:
            grads = torch.autograd.grad(
                self._edge, self._inputs, grad_out, retain_graph=graph_is_kept(), allow_unused=True
            )
        finally:
            self._now = None
        return list(grads)

    def _groups(self, heads: Sequence[Tensor], tensors: Sequence[Tensor]) -> Groups:
        return {"arguments": self._arguments, "heads": heads, "kept": tensors}

    def _unpack(self, packed: Tensor | View | Copy) -> Tensor:
        return packed if isinstance(packed, Tensor) else packed.of(self._now)


class _Packing:
    """Decides of each tensor that the attention saves what is kept in its place. Used in forward alone."""

    def __init__(self, kept: KeptAttention, heads: Sequence[Tensor], weights: set[tuple]):
        self._kept, self._weights = kept, weights
        self._arguments = {_key(t) for t in kept._arguments}
        self._places = {_key(t): ("heads", i) for i, t in reversed([*enumerate(heads)])}
        self._sources = [(t, View.like(t, "heads", i)) for i, t in enumerate(heads)]
        self._sources += [(t, View.like(t, "arguments", i)) for i, t in enumerate(kept._arguments)]

    def __call__(self, t: Tensor) -> Tensor | View | Copy:
        key = _key(t)
        if key in self._weights:  # which an engine may take away after forward
            self._kept.reason = self._kept.reason or "its attention reads weights"
        if key in self._arguments:
            return t.detach()
        if key not in self._places:
            copy = copy_of(t.detach(), self._sources)
            if copy is not None:
                return copy
            place = self._places[key] = "kept", len(self._kept.tensors)
            self._kept.tensors.append(_whole_storage(t))
            self._sources.append((t.detach(), View.like(t, *place)))
        return View.like(t, *self._places[key])

    def end(self) -> None:
        """Lets go of what it knows: memory that may be gone soon."""
        self._places, self._sources = {}, []


class _Source(torch.autograd.Function):
    """Gives heads that take part in a graph, which holds none of them."""

    @staticmethod
    def forward(ctx, token: Tensor, *heads: Tensor):
        return tuple(t.view_as(t) for t in heads)

    @staticmethod
    def backward(ctx, *grads):  # never run: gradients are asked for at its outputs
        return None, *grads


def _key(t: Tensor) -> tuple:
    return t.untyped_storage()._cdata, t.dtype


def _whole_storage(t: Tensor) -> Tensor:
    """All memory that a tensor is a view of, flat."""
    return t.detach().as_strided((t.untyped_storage().nbytes() // t.element_size(),), (1,), 0)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    values = value.values() if isinstance(value, dict) else value if isinstance(value, tuple | list) else ()
    return [t for v in values for t in _tensors(v)]


def _other_leaves(edge: GradientEdge, inputs: Sequence[GradientEdge]) -> bool:
    """Whether a graph leads to more than the given inputs."""
    own, seen, todo = {e.node for e in inputs}, set(), [edge.node]
    while todo:
        node = todo.pop()
        if node is None or node in own or node in seen:
            continue
        seen.add(node)
        following = [n for n, _ in node.next_functions]
        if not following:
            return True
        todo += following
    return False
