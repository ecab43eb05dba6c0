"""The graph of one call of a whole layer, kept from forward to backward: nothing is computed twice.

Weights among the saved tensors are references (`saved_weights`). The graph has an end for the layer's input and for each
trainable tensor, so that one autograd node outside can give all of their gradients at once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks

from ds_minis.layer.attention.attention_graph import sources_of
from ds_minis.memory.saved_weights import NotAView, SavedWeights, WeightView
from ds_minis.ranks import has_other_ranks
from ds_minis.tiling.core.params import ParameterSlots
from ds_minis.tiling.core.replay import autocast_dtype, graph_is_kept


class TooLarge(RuntimeError):
    """A graph saves more than it may."""


class LayerGraph:
    """One call of a layer, with its graph.

    Args:
        run: the layer's own forward, for all tokens, given the input.
        x: the input, `(B, S, H)`.
        x_needs_grad: whether its gradient is asked for.
        slots: the layer's tensors.
        limit: bytes that the graph may save, without weights.

    Attributes:
        result: the layer's result, without a graph; the caller takes it.
        num_bytes: what is saved, without weights.
        pair_bytes: the part of it with a value for each pair of tokens.
        reason: why the graph cannot be kept; empty if it can be.
        used: the indices of the trainable tensors that the graph reaches.
        is_uncertain: whether a weight had fewer references after the run (the thread of a collective lets go of it late):
            an operation that holds the weight may not have been noticed.

    Raises:
        TooLarge: the graph saves more than `limit` bytes.
    """

    is_uncertain = False

    def __init__(
        self, run: Callable[[Tensor], Tensor], x: Tensor, x_needs_grad: bool, slots: ParameterSlots, limit: float
    ):
        self._x_needs_grad, self._weights = x_needs_grad, SavedWeights(slots)
        self._trainable: list[Tensor | None] = []
        self._ids = list(map(id, slots.tensors))
        before = self._weights.uses() if has_other_ranks() else None
        with torch.enable_grad():
            sources, edges = sources_of([*([x] if x_needs_grad else []), *(t.detach() for t in slots.tensors)])
        packing = _Packing(self._weights, edges[0].node if edges else None, int(x_needs_grad), limit, x.shape[1])
        held = list(sources)
        del sources
        try:
            with (
                torch.enable_grad(),
                saved_tensors_hooks(packing, functools.partial(_unpack, self._weights, self._trainable)),
            ):
                given = held.pop(0) if x_needs_grad else x
                with slots.reparametrized(held):
                    y = run(given)
            del given
            held.clear()
            self._inputs = edges
            self.used, self.reason = _reached(y, edges, int(x_needs_grad))
            self.result = y.detach()
            if packing.holds(self.result) or self.result.untyped_storage()._cdata == x.untyped_storage()._cdata:
                self.result = self.result.clone()  # a write to it outside would not be noticed
            self._edge: GradientEdge | None = get_gradient_edge(y) if y.requires_grad else None
            self.reason = self.reason or ("" if y.requires_grad else "it gives no graph")
            del y
            self.num_bytes, self.pair_bytes = packing.num_bytes, packing.pair_bytes
            self.reason = self.reason or packing.reason or self._held_by_others(before, x)
        finally:
            held.clear()
            packing.end()
            self._weights.end()

    def _held_by_others(self, before: list[int] | None, x: Tensor) -> str:
        if before is None:
            return ""
        if self._weights.has_casts(autocast_dtype(x.device.type)):
            return "autocast copies weights that are not trained, which would stay beside those that an engine frees"
        now = self._weights.uses()
        if any(uses > earlier for uses, earlier in zip(now, before, strict=True)):
            return "an operation holds a weight until backward by itself, where an engine may free it"
        self.is_uncertain = now != before
        return ""

    @staticmethod
    def is_retained() -> bool:
        """Whether the backward in progress runs with `retain_graph=True`."""
        return graph_is_kept()

    def backward(self, grad_y: Tensor, slots: ParameterSlots, params: Sequence[Tensor]) -> list[Tensor | None]:
        """The gradients of the input (None if not asked for) and of `slots.tensors`.

        Args:
            params: `slots.tensors` as they are in backward.
        """
        now = dict(zip(map(id, slots.tensors), params, strict=True))
        wanted = [self._ids.index(id(t)) + int(self._x_needs_grad) for t in slots.tensors]
        inputs = [*self._inputs[: int(self._x_needs_grad)], *(self._inputs[i] for i in wanted)]
        self._trainable[:] = [now.get(key) for key in self._ids]
        try:
            grads = list(
                torch.autograd.grad(self._edge, inputs, grad_y, retain_graph=graph_is_kept(), allow_unused=True)
            )
        finally:
            self._trainable.clear()
        return grads if self._x_needs_grad else [None, *grads]


def _unpack(weights: SavedWeights, trainable: Sequence[Tensor | None], packed) -> Tensor:
    if isinstance(packed, WeightView):
        return weights.now(packed, trainable)
    t, version = packed
    if t._version != version:
        raise RuntimeError(
            "what a decoder layer saves for its backward was changed in place between forward and backward: change it after "
            "backward, or make the operation that changes it give a new tensor"
        )
    return t


class _Packing:
    """The pack hook. Counts the bytes of the memory that is saved.

    Attributes:
        num_bytes: so far, without weights.
        pair_bytes: the part of it with two dimensions of as many tokens.
        reason: why the graph cannot be kept; empty if it can be.
    """

    def __init__(self, weights: SavedWeights, source, first: int, limit: float, num_tokens: int):
        self.num_bytes, self.pair_bytes, self.reason = 0, 0, ""
        self._num_tokens = num_tokens
        self._weights, self._source, self._first, self._limit = weights, source, first, limit
        self._seen: set[int] = set()

    def __call__(self, t: Tensor):
        storage = t.untyped_storage()
        if storage._cdata not in self._seen:
            view = self._view(t)
            if view is not None:
                return view
            self._count(t, storage)
        # Detached: an operation that saves its own output would otherwise form a reference cycle and never be freed.
        return t.detach(), t._version

    def _view(self, t: Tensor) -> WeightView | None:
        try:
            return self._weights.view_of(t) or self._cast(t)
        except NotAView as error:
            self.reason = self.reason or str(error)
            return None

    def _count(self, t: Tensor, storage: torch.UntypedStorage) -> None:
        self._seen.add(storage._cdata)
        self.num_bytes += storage.nbytes()
        if sum(n == self._num_tokens for n in t.shape) > 1:
            self.pair_bytes += storage.nbytes()
        if self.num_bytes > self._limit:
            raise TooLarge

    def _cast(self, t: Tensor) -> WeightView | None:
        """For a copy of a trainable weight that autocast made."""
        node = t.grad_fn
        if node is not None and node.name() in ("TBackward0", "TransposeBackward0"):
            node = node.next_functions[0][0]
        if node is None or node.name() != "ToCopyBackward0":
            return None
        source, number = node.next_functions[0]
        number -= self._first
        if source is not self._source or number < 0 or not self._weights.is_whole(number, t):
            return None
        return self._weights.cast(number, t)

    def holds(self, t: Tensor) -> bool:
        """Whether the tensor's memory is saved."""
        return t.untyped_storage()._cdata in self._seen

    def end(self) -> None:
        self._source = None
        self._seen.clear()


def _reached(y: Tensor, edges: Sequence[GradientEdge], first: int) -> tuple[set[int], str]:
    """The indices of the trainable tensors that a graph reaches, and why it cannot give their gradients alone, or ""."""
    source = edges[0].node if edges else None
    used: set[int] = set()
    seen, todo = set(), [y.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        following = node.next_functions
        if not following:
            return used, "it reads a weight that is not in it"
        if "CheckpointFunction" in node.name():  # it supports backward(), but no gradients of chosen inputs
            return used, "a part of it is checkpointed by itself, in the reentrant way"
        for after, number in following:
            if after is source and source is not None:
                used.add(number - first)
            else:
                todo.append(after)
    used.discard(-1)
    return used, ""
