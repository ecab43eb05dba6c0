"""Kept attentions of a layer that is not tiled as a whole: inside of activation checkpointing, which runs it twice."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ds_minis.tiling.attention import AttentionRequest, attention_handled_by
from ds_minis.tiling.checkpoints import InMemory
from ds_minis.tiling.kept_attention import ATTENDS_TWICE, KeptAttention
from ds_minis.tiling.recompute import random_states
from ds_minis.tiling.swap import Tiled, tell


class CheckpointedAttention:
    """One call of a layer's forward, for activation checkpointing to run and to run again.

    The first time each attention is kept; later its result is given from there. An attention that cannot be kept is run each
    time, as ever.

    Args:
        forward: the layer's own.
    """

    def __init__(self, layer: Tiled, forward: Callable[..., Any]):
        self._layer, self._forward = layer, forward
        self._calls: list[_Kept | None] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._calls is None:
            self._calls, handler = [], self._first
        else:
            handler = functools.partial(_again, iter(self._calls))
        with attention_handled_by(handler):
            return self._forward(*args, **kwargs)

    def _first(self, function: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> tuple:
        self._calls.append(self._kept(function, args, kwargs))
        return _again(iter(self._calls[-1:]), function, args, kwargs)

    def _kept(self, function: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> _Kept | None:
        unkept = self._layer.mini_sequence_chunking.unkept
        try:
            request = AttentionRequest.of_call(function, args, kwargs)
        except TypeError:
            return None
        if request.way in unkept:
            return None
        kept = _Kept(request)
        if not kept.attention.reason:
            return kept
        tell(self._layer, ATTENDS_TWICE, kept.attention.reason)
        unkept.add(request.way)
        return None


def _again(kept: Iterator[_Kept | None], function: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> tuple:
    """The result of a call, from what was kept of it, if it was."""
    kept = next(kept)
    return function(*args, **kwargs) if kept is None else (_Answer.apply(kept, *args[1:4]), None)


class _Kept:
    """An attention with what is kept of it."""

    def __init__(self, request: AttentionRequest):
        heads, self._reason = [t.detach() for t in request.tensors], ""
        before = random_states(heads[0].device)
        self.attention, self.memory = KeptAttention(self._attend, request, heads), InMemory()
        after = random_states(heads[0].device)
        if not all(map(torch.equal, before, after)):  # what is drawn behind it would be other numbers the second time
            self._reason = "its attention draws random numbers"
        self.attention.reason = self.attention.reason or self._reason
        if not self.attention.reason:
            self.memory.keep(*self.attention.tensors)
        self.attention.let_go()

    def _attend(self, request: AttentionRequest, heads: Sequence[Tensor]) -> Tensor:
        out, *weights = request.call(heads)
        if any(w is not None for w in weights):
            self._reason = "its attention gives its weights too"
        return out


class _Answer(torch.autograd.Function):
    """The attention's result, in a graph that saves queries, keys and values, which a checkpointed layer is run again for."""

    @staticmethod
    def forward(ctx, kept: _Kept, *heads: Tensor):
        ctx.kept = kept
        ctx.save_for_backward(*heads)
        return kept.attention.output(heads, kept.memory.fetch())

    @staticmethod
    def backward(ctx, grad_out: Tensor):
        kept = ctx.kept
        grads = kept.attention.backward(ctx.saved_tensors, kept.memory.fetch(), grad_out)
        kept.memory.release()
        return None, *grads
