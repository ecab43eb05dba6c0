"""Keeps an attention's graph from forward to backward, so that backward does not recompute the attention.

An attention saves queries, keys and values, its output, and little else (a log-sum-exp per query). Queries, keys, values and
copies of them are cheap to recompute, so only the rest is kept. Source: DistFlashAttn (arXiv 2310.03294, section 3.3), which
places checkpoints so that attention is not recomputed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks

from ds_minis.layer.attention.attention import AttentionRequest
from ds_minis.layer.attention.attention_graph import sources_of
from ds_minis.memory.rematerialize import (
    Copy,
    Groups,
    Layout,
    View,
    copy_of,
    storage_key,
    ways_to_copy,
    whole_storage,
)
from ds_minis.tiling.core.replay import graph_is_kept
from ds_minis.tiling.modules.swap import Tiled, untiled_class, warn_once

Attend = Callable[[AttentionRequest, Sequence[Tensor]], Tensor]

# Kind of call -> for each saved tensor: group and index of its source, transposed, repeats; None if it is no copy.
Plans = dict[tuple, list[tuple[str, int, bool, int] | None]]

_MOST = 2  # most that one call may keep, in multiples of the output's bytes


def recomputes_attention(layer: Tiled, way: tuple) -> bool:
    """Whether it is known that attentions of this kind, in layers of this class, cannot be kept."""
    return (untiled_class(type(layer)).__qualname__, *way) in layer.mini_sequence_chunking.unkept


def recompute_attention(layer: Tiled, reason: str, way: tuple | None = None) -> None:
    """Warns that a layer recomputes its attention in backward; later calls of the same kind will, too."""
    cls = untiled_class(type(layer))
    key = (cls.__qualname__, *((reason,) if way is None else way))
    layer.mini_sequence_chunking.unkept[key] = cls.__name__, reason
    warn_once(layer, "computes its attention once more in backward", reason)


def attend_once(request: AttentionRequest, tensors: Sequence[Tensor]) -> Tensor:
    """Runs the layer's own attention, for all tokens."""
    return request.run(tensors)


class KeptAttention:
    """One call of an attention.

    Args:
        qkv: queries, keys and values, `(B, N, S, D)`, `(B, K, S, D)` and `(B, K, S, E)`; not held afterwards.
        plans: which saved tensors were copies in earlier calls; filled in at the first call of each layout.

    Attributes:
        result: the attention's output, until `free` is called.
        tensors: the tensors to keep from forward to backward, until `free` is called; flat, of different dtypes.
        reason: why this call cannot be kept and must be recomputed; empty if it can be kept.
    """

    def __init__(self, attend: Attend, request: AttentionRequest, qkv: Sequence[Tensor], plans: Plans | None = None):
        self.arguments = request.argument_tensors()
        self._layout = Layout(qkv)
        # Nothing that the graph holds may hold the graph: the garbage collector cannot see such a cycle.
        self._now: dict[str, Sequence[Tensor]] = {}
        weights = {storage_key(t) for t in (*request.module.parameters(), *request.module.buffers())}
        layout = (*request.way, *((t.shape[1], t.shape[3]) for t in qkv))
        packing = _Packing(qkv, self.arguments, weights, {} if plans is None else plans, layout)
        with torch.enable_grad():
            sources, self._inputs = sources_of(qkv)
            with saved_tensors_hooks(packing, functools.partial(_unpack, self._now)):
                out = attend(request, sources)
        del sources
        self.result = out.detach()
        self._out = packing(self.result)
        self._edge = get_gradient_edge(out) if out.requires_grad else None
        self.tensors, self._doubts = packing.end()
        num_bytes = sum(t.nbytes for t in self.tensors)
        if self._edge is None:
            self.reason = "its attention gives no graph"
        elif packing.met_weights:  # an engine may free them after forward
            self.reason = "its attention reads weights"
        elif num_bytes > _MOST * self.result.nbytes:
            self.reason = f"its attention saves {num_bytes / self.result.nbytes:.1f} times its output's bytes"
        else:
            self.reason = _keep_fallback_reason(self._edge, self._inputs)

    def free(self) -> None:
        """Drops all references but the graph; the graph too if the call cannot be kept."""
        self.tensors, self.result = [], None
        if self.reason:
            self._edge = self._inputs = None

    def output(self, qkv: Sequence[Tensor], tensors: Sequence[Tensor]) -> Tensor:
        """The attention's output, from the kept tensors.

        Args:
            qkv: queries, keys and values, recomputed.
            tensors: the kept tensors.

        Raises:
            RuntimeError: on a device, a saved tensor was a copy of an argument in an earlier call, but not in this one.
        """
        if self._doubts is not None and self._doubts.are_justified():
            raise RuntimeError(
                "what an attention saves for its backward was a copy of its arguments in an earlier call, and is none in "
                'this one: set "keep": "input" in the mini-sequence configuration'
            )
        return self._out.of(self._groups(qkv, tensors))

    def backward(self, qkv: Sequence[Tensor], tensors: Sequence[Tensor], grad_out: Tensor) -> list[Tensor | None]:
        """The gradients of queries, keys and values; arguments as for `output`."""
        self._now.update(self._groups(qkv, tensors))
        try:
            grads = torch.autograd.grad(
                self._edge, self._inputs, grad_out, retain_graph=graph_is_kept(), allow_unused=True
            )
        finally:
            self._now.clear()
        return list(grads)

    def _groups(self, qkv: Sequence[Tensor], tensors: Sequence[Tensor]) -> Groups:
        return {"arguments": self.arguments, "heads": self._layout.of(qkv), "kept": tensors}


def _unpack(now: Groups, packed: Tensor | View | Copy) -> Tensor:
    return packed if isinstance(packed, Tensor) else packed.of(now)


class _Packing:
    """The pack hook: decides for each tensor that the attention saves what is kept instead. Used only in forward.

    Copies are found by comparing values, which waits for the device. So only the first call of a kind compares every pair.
    Later calls compare the copies found then, and read the result in backward.

    Attributes:
        met_weights: whether a saved tensor was a weight.
    """

    def __init__(
        self, qkv: Sequence[Tensor], arguments: Sequence[Tensor], weights: set[tuple], plans: Plans, key: tuple
    ):
        self.met_weights, self._weights = False, weights
        self._kept: list[Tensor] = []
        self._arguments = set(map(storage_key, arguments))
        self._places = {storage_key(t): ("heads", i) for i, t in enumerate(qkv)}
        self._sources = [(t, View.like(t, "heads", i)) for i, t in enumerate(qkv)]
        self._sources += [(t, View.like(t, "arguments", i)) for i, t in enumerate(arguments)]
        self._plan = plans.setdefault(key, [])
        self._num_known = len(self._plan)
        self._num_met, self._same = 0, []

    def __call__(self, t: Tensor) -> Tensor | View | Copy:
        key = storage_key(t)
        self.met_weights = self.met_weights or key in self._weights
        if key in self._arguments:
            return t.detach()
        if key not in self._places:
            copy = self._copy_of(t.detach())
            if copy is not None:
                return copy
            place = self._places[key] = "kept", len(self._kept)
            self._kept.append(whole_storage(t))
            self._sources.append((t.detach(), View.like(t, *place)))
        return View.like(t, *self._places[key])

    def _copy_of(self, t: Tensor) -> Copy | None:
        number, self._num_met = self._num_met, self._num_met + 1
        if number < self._num_known:
            known = self._plan[number]
            if known is None:
                return None
            source, view = next(((s, v) for s, v in self._sources if (v.group, v.index) == known[:2]), (None, None))
            if source is not None and known[2:] in ways_to_copy(source, t):
                copy = Copy(view, *known[2:], t.shape, t.stride(), t.dtype)
                same = copy.is_of(source, t)
                if same.is_cuda:
                    self._same.append(same)
                    return copy
                if same:
                    return copy
        copy = copy_of(t, self._sources)
        if number >= self._num_known:
            self._plan.append(copy and (copy.view.group, copy.view.index, copy.transposed, copy.repeats))
        return copy

    def end(self) -> tuple[list[Tensor], _Doubts | None]:
        """Returns the tensors to keep, and the pending comparisons (None if there are none). Holds neither afterwards."""
        kept, self._kept, self._places, self._sources = self._kept, [], {}, []
        return kept, _Doubts(self._same) if self._same else None


class _Doubts:
    """Results of the comparisons in forward, copied from the device without waiting; read in backward."""

    def __init__(self, granted: Sequence[Tensor]):
        all_granted = torch.stack(list(granted)).all()
        self._answer = torch.empty((), dtype=torch.bool, pin_memory=True)
        self._answer.copy_(all_granted, non_blocking=True)
        self._arrived = torch.cuda.Event()
        self._arrived.record(torch.cuda.current_stream(all_granted.device))

    def are_justified(self) -> bool:
        self._arrived.synchronize()
        return not self._answer


def _keep_fallback_reason(edge: GradientEdge, inputs: Sequence[GradientEdge]) -> str:
    """The reason why a graph cannot give the gradients of these inputs alone; empty if it can."""
    own, seen, todo = {e.node for e in inputs}, set(), [edge.node]
    while todo:
        node = todo.pop()
        if node is None or node in own or node in seen:
            continue
        seen.add(node)
        following = [n for n, _ in node.next_functions]
        if not following:
            return "its attention reads weights"
        if "CheckpointFunction" in node.name():  # it supports backward(), but no gradients of chosen inputs
            return "its attention is checkpointed by itself, in the reentrant way"
        todo += following
    return ""
