"""An attention whose graph lives from forward to backward, so that backward does not run its forward once more.

What an attention saves for its backward are queries, keys and values, its output, and little else (a log-sum-exp per query).
Queries, keys and values, and copies of them, are cheap to make again; the output is kept. Source: DistFlashAttn (arXiv
2310.03294, section 3.3), which places checkpoints so that attention is not recomputed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks

from ds_minis.tiling.core.replay import graph_is_kept
from ds_minis.tiling.modules.swap import Tiled, untiled_class, warn_once
from ds_minis.tiling.passes.attention import AttentionRequest
from ds_minis.tiling.passes.rematerialize import Copy, Groups, Layout, View, copy_of, storage_key, whole_storage

Attend = Callable[[AttentionRequest, Sequence[Tensor]], Tensor]

_MOST = 2  # times the bytes of the output: what may be kept for one call


def recomputes_attention(layer: Tiled, way: tuple) -> bool:
    """Whether attentions that layers of this class call in this way are known not to be kept."""
    return (untiled_class(type(layer)).__qualname__, *way) in layer.mini_sequence_chunking.unkept


def recompute_attention(layer: Tiled, reason: str, way: tuple | None = None) -> None:
    """Tells why a layer's attention is computed again in backward; from now on, so is any that is called in this way."""
    cls = untiled_class(type(layer))
    key = (cls.__qualname__, *((reason,) if way is None else way))
    layer.mini_sequence_chunking.unkept[key] = cls.__name__, reason
    warn_once(layer, "computes its attention once more in backward", reason)


def attend_once(request: AttentionRequest, tensors: Sequence[Tensor]) -> Tensor:
    """The attention of the layer itself, for all tokens."""
    return request.run(tensors)


class KeptAttention:
    """One call of an attention.

    Args:
        heads: queries, keys and values, `(B, N, S, D)`, `(B, K, S, D)` and `(B, K, S, E)`; not held after this.

    Attributes:
        result: the attention's output, until `free` is called.
        tensors: what has to be kept from forward to backward, until then too; flat, of different dtypes.
        reason: why this call cannot be kept, and has to be run once more; empty if it can.
    """

    def __init__(self, attend: Attend, request: AttentionRequest, qkv: Sequence[Tensor]):
        self._arguments = request.argument_tensors()
        self._layout = Layout(qkv)
        # Nothing that the graph holds may hold the graph: such a cycle is out of the garbage collector's sight.
        self._now: dict[str, Sequence[Tensor]] = {}
        weights = {storage_key(t) for t in (*request.module.parameters(), *request.module.buffers())}
        packing = _Packing(qkv, self._arguments, weights)
        with torch.enable_grad():
            # Heads by way of a node of ours, as a leaf would be held by the graph.
            sources = _Source.apply(qkv[0].new_empty((), requires_grad=True), *qkv)
            self._inputs = [get_gradient_edge(t) for t in sources]
            with saved_tensors_hooks(packing, functools.partial(_unpack, self._now)):
                out = attend(request, sources)
        del sources
        self.result = out.detach()
        self._out = packing(self.result)
        self._edge = get_gradient_edge(out) if out.requires_grad else None
        self.tensors = packing.end()
        num_bytes = sum(t.nbytes for t in self.tensors)
        if self._edge is None:
            self.reason = "its attention gives no graph"
        elif packing.met_weights:  # which an engine may take away after forward
            self.reason = "its attention reads weights"
        elif num_bytes > _MOST * self.result.nbytes:
            self.reason = f"its attention saves {num_bytes / self.result.nbytes:.1f} times its output's bytes"
        else:
            self.reason = _keep_fallback_reason(self._edge, self._inputs)

    def free(self) -> None:
        """Holds nothing but the graph from now on; not even that if the call cannot be kept."""
        self.tensors, self.result = [], None
        if self.reason:
            self._edge = self._inputs = None

    def output(self, qkv: Sequence[Tensor], tensors: Sequence[Tensor]) -> Tensor:
        """The attention's output again.

        Args:
            heads: the same as in forward, computed again.
            tensors: what was kept.
        """
        return self._out.of(self._groups(qkv, tensors))

    def backward(self, qkv: Sequence[Tensor], tensors: Sequence[Tensor], grad_out: Tensor) -> list[Tensor | None]:
        """Gradients of queries, keys and values; heads and tensors are as above."""
        self._now.update(self._groups(qkv, tensors))
        try:
            grads = torch.autograd.grad(
                self._edge, self._inputs, grad_out, retain_graph=graph_is_kept(), allow_unused=True
            )
        finally:
            self._now.clear()
        return list(grads)

    def _groups(self, qkv: Sequence[Tensor], tensors: Sequence[Tensor]) -> Groups:
        return {"arguments": self._arguments, "heads": self._layout.of(qkv), "kept": tensors}


def _unpack(now: Groups, packed: Tensor | View | Copy) -> Tensor:
    return packed if isinstance(packed, Tensor) else packed.of(now)


class _Packing:
    """Decides of each tensor that the attention saves what is kept in its place. Used in forward alone.

    Attributes:
        met_weights: whether one of them was a weight.
    """

    def __init__(self, qkv: Sequence[Tensor], arguments: Sequence[Tensor], weights: set[tuple]):
        self.met_weights, self._weights = False, weights
        self._kept: list[Tensor] = []
        self._arguments = set(map(storage_key, arguments))
        self._places = {storage_key(t): ("heads", i) for i, t in enumerate(qkv)}
        self._sources = [(t, View.like(t, "heads", i)) for i, t in enumerate(qkv)]
        self._sources += [(t, View.like(t, "arguments", i)) for i, t in enumerate(arguments)]

    def __call__(self, t: Tensor) -> Tensor | View | Copy:
        key = storage_key(t)
        self.met_weights = self.met_weights or key in self._weights
        if key in self._arguments:
            return t.detach()
        if key not in self._places:
            copy = copy_of(t.detach(), self._sources)
            if copy is not None:
                return copy
            place = self._places[key] = "kept", len(self._kept)
            self._kept.append(whole_storage(t))
            self._sources.append((t.detach(), View.like(t, *place)))
        return View.like(t, *self._places[key])

    def end(self) -> list[Tensor]:
        """What has to be kept. Lets go of it, and of what it knows of memory that may be gone soon."""
        kept, self._kept, self._places, self._sources = self._kept, [], {}, []
        return kept


class _Source(torch.autograd.Function):
    """Gives heads that take part in a graph, which holds none of them."""

    @staticmethod
    def forward(ctx, token: Tensor, *qkv: Tensor):
        return tuple(t.view_as(t) for t in qkv)

    @staticmethod
    def backward(ctx, *grads):  # never run: gradients are asked for at its outputs
        return None, *grads


def _keep_fallback_reason(edge: GradientEdge, inputs: Sequence[GradientEdge]) -> str:
    """Why a graph cannot be used for gradients of these inputs alone; empty if it can."""
    own, seen, todo = {e.node for e in inputs}, set(), [edge.node]
    while todo:
        node = todo.pop()
        if node is None or node in own or node in seen:
            continue
        seen.add(node)
        following = [n for n, _ in node.next_functions]
        if not following:
            return "its attention reads weights"
        if "CheckpointFunction" in node.name():  # which wants backward(), and no gradients of some inputs
            return "its attention is checkpointed by itself, in the reentrant way"
        todo += following
    return ""
