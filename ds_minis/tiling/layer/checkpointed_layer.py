"""Layers that see to their activation checkpointing, which runs them twice, themselves, and keep their attentions there."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ds_minis.tiling.core.replay import random_states, refuse_gradients_of_gradients, set_random_states
from ds_minis.tiling.memory.layer_inputs import InMemory
from ds_minis.tiling.modules.compiling import compiled_inside
from ds_minis.tiling.modules.swap import Tiled, own_forward
from ds_minis.tiling.passes.attention import AttentionRequest, attention_handled_by, tensors_in
from ds_minis.tiling.passes.kept_attention import KeptAttention, is_unkept, leave_unkept

_CHECKPOINT = "_gradient_checkpointing_func"


class ItsOwnCheckpointing:
    """Mixed into the class of a decoder layer, in front of `Tiled`: where it is checkpointed, its forward does so."""

    def _as_it_is(self, forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any], gated: bool = False) -> Any:
        """The class's own forward, checkpointed if that was asked for.

        `gated`: the parameters' gradients come from one node, whose place in the graph is lost with the reentrant kind.
        """
        checkpoint = self.__dict__.get(_CHECKPOINT)
        if checkpoint is None or not (self.gradient_checkpointing and self.training):
            return forward(*args, **kwargs)
        chunking = self.mini_sequence_chunking
        keeps = chunking is not None and chunking.config.keep_attention and torch.is_grad_enabled()
        if keeps and not torch.compiler.is_compiling():
            compiled = compiled_inside(self)
            if compiled:
                leave_unkept(self, compiled)
            else:
                forward = _KeepingAttentions(self, forward)
        if gated and isinstance(checkpoint, functools.partial) and checkpoint.keywords.get("use_reentrant"):
            checkpoint = functools.partial(checkpoint, use_reentrant=False)
        return checkpoint(functools.partial(forward, **kwargs), *args)

    @property
    def _gradient_checkpointing_func(self) -> Callable[..., Any]:
        """What transformers checkpoints a layer with; for transformers, nothing."""
        if _CHECKPOINT not in self.__dict__:
            raise AttributeError(_CHECKPOINT)
        return _run

    @_gradient_checkpointing_func.setter
    def _gradient_checkpointing_func(self, value: Callable[..., Any]) -> None:
        self.__dict__[_CHECKPOINT] = value


def _run(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


class UntiledLayer(ItsOwnCheckpointing, Tiled):
    """Mixed into the class of a decoder layer of which parts alone are tiled, for its attentions to be kept."""

    def forward(self, *args, **kwargs):
        return self._as_it_is(own_forward(self, super().forward), args, kwargs)


class _KeepingAttentions:
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
            self._calls = []
            handler = functools.partial(self._first, tensors_in((args, kwargs)))
        else:
            handler = functools.partial(_again, iter(self._calls))
        with attention_handled_by(handler):
            result = self._forward(*args, **kwargs)
        if not self._calls:
            leave_unkept(self._layer, "it calls no attention by transformers' interface")
        return result

    def _first(
        self, others: Sequence[Tensor], function: Callable[..., Any], args: tuple, kwargs: dict[str, Any]
    ) -> tuple:
        self._calls.append(self._kept(others, function, args, kwargs))
        return _again(iter(self._calls[-1:]), function, args, kwargs)

    def _kept(
        self, others: Sequence[Tensor], function: Callable[..., Any], args: tuple, kwargs: dict[str, Any]
    ) -> _Kept | None:
        try:
            request = AttentionRequest.of_call(function, args, kwargs)
        except TypeError as error:
            leave_unkept(self._layer, str(error))
            return None
        if is_unkept(self._layer, request.way):
            return None
        kept = _Kept(request, others)
        if not kept.reason:
            return kept
        leave_unkept(self._layer, kept.reason, request.way)
        return None


def _again(kept: Iterator[_Kept | None], function: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> tuple:
    """The result of a call, from what was kept of it, if it was."""
    kept = next(kept)
    if kept is None or kept.memory.is_empty:  # after a backward of its own, as the reentrant kind of checkpointing runs
        return function(*args, **kwargs)
    if any(t.requires_grad for t in tensors_in((args[4:], kwargs))):  # which that kind does not show the first time
        return function(*args, **kwargs)
    return _Answer.apply(kept, *args[1:4]), None


class _Kept:
    """An attention with what is kept of it.

    Attributes:
        reason: why it cannot be kept. Nothing has happened then.
    """

    def __init__(self, request: AttentionRequest, others: Sequence[Tensor]):
        self.reason, self.memory = "", InMemory()
        heads, device = [t.detach() for t in request.tensors], request.tensors[0].device
        before, versions = random_states(device), [t._version for t in heads]
        try:
            self.attention = KeptAttention(self._attend, request, heads, others)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # one that writes to its queries, say
            if [t._version for t in heads] != versions:
                raise
            self.reason = f"its attention cannot be run with a graph of its own ({str(error)[:100]})"
        else:
            self.reason = self.reason or self.attention.reason
            if not all(map(torch.equal, before, random_states(device))):
                # What is drawn behind it would be other numbers the second time.
                self.reason = self.reason or "its attention draws random numbers"
            if not self.reason:
                self.memory.keep(*self.attention.tensors)
            self.attention.let_go()
        if self.reason:
            self.attention = None
            set_random_states(device, before)

    def _attend(self, request: AttentionRequest, heads: Sequence[Tensor]) -> Tensor:
        out, *weights = request.call(heads)
        if any(w is not None for w in weights):
            self.reason = "its attention gives its weights too"
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
        refuse_gradients_of_gradients()
        kept = ctx.kept
        grads = kept.attention.backward(ctx.saved_tensors, kept.memory.fetch(), grad_out)
        kept.memory.release()
        return None, *grads
