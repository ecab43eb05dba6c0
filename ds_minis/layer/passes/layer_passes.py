"""Runs a decoder layer on chunks of tokens: up to its attention, and again with the attention's output given.

Shapes: B batch, S tokens of the whole sequence, C of a chunk, H hidden size, N heads, K KV heads.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ds_minis.layer.attention.attention import (
    AttentionReached,
    AttentionRequest,
    attention_answered_by,
    attention_replaced,
    differing_setting,
    settings_of,
)
from ds_minis.layer.attention.attention_tail import AttentionTail
from ds_minis.layer.passes.layer_args import ChunkArgs, LayerArgs
from ds_minis.layer.passes.seeds import Seeds
from ds_minis.tiling.core.exclusive import alone
from ds_minis.tiling.core.out_of_memory import OutOfMemoryNote, for_layer_inputs, in_attention
from ds_minis.tiling.core.params import constants_of, restored_flags
from ds_minis.tiling.core.replay import AutocastState, has_values
from ds_minis.tiling.modules.state import Chunking
from ds_minis.tiling.modules.swap import untiled_class


@dataclass(frozen=True)
class DeadValues:
    """Values of a layer that are never read and need not be computed; found by `ds_minis.layer.analysis.dead_value_search`.

    Attributes:
        outputs: modules before the attention whose output only the attention reads, with its width and dtype.
        values_pre_attention, values_post_attention: linear layers before and after the attention whose output no gradient
            depends on.
        value: the fill value: NaN during analysis, 0 in training.
    """

    outputs: tuple[tuple[nn.Module, int, torch.dtype], ...] = ()
    values_pre_attention: tuple[nn.Linear, ...] = ()
    values_post_attention: tuple[nn.Linear, ...] = ()
    value: float = 0.0

    def output_forwards(self) -> dict[nn.Module, Callable]:
        return {module: self._without_output(width, dtype) for module, width, dtype in self.outputs}

    def _without_output(self, width: int, dtype: torch.dtype) -> Callable[..., Tensor]:
        def forward(input, *args, **kwargs):
            return input.new_full((), self.value, dtype=dtype).expand(*input.shape[:-1], width)

        return forward


NO_DEAD_VALUES = DeadValues()


class DifferentSettings(RuntimeError):
    """A layer calls its attention with other settings for a chunk than for all tokens."""


class NoAttention(RuntimeError):
    """A layer did not call the attention interface."""


class LayerPasses:
    """One call of a layer. Its chunks can be run any number of times, with the same result each time.

    Args:
        forward: the layer's own forward.
        bounds: start and end (exclusive) of each chunk, in tokens, in the order in which the chunks run.
        settings: the non-tensor arguments that the attention must get; None for those of the first chunk.
        shorten: skip what the attention module does before its attention where only its output counts (`attention_tail`).

    Attributes:
        constants: the settings of the layer's submodules.
        way: the call's key.
        chunk: the number of the chunk that runs, or ran last.
        tail: shortens runs behind the attention.
    """

    def __init__(
        self,
        module: nn.Module,
        forward: Callable[..., Any],
        call: LayerArgs,
        bounds: Sequence[tuple[int, int]],
        chunking: Chunking,
        settings: dict | None = None,
        shorten: bool = False,
    ):
        self._settings, self._shorten = settings, shorten
        self.tail: AttentionTail | None = None
        x, call.hidden = call.hidden, None  # autograd or the layer-input store saves them
        self.bounds, self._batch, self.chunk = bounds, x.shape[0], 0
        self.autocast = AutocastState(x.device)
        self._module = module
        self._forward, self._call, self._chunking = forward, call, chunking
        self.way = call.key
        self.constants = constants_of(module)
        self._parts: dict[int, ChunkArgs] = {}  # without hidden states
        self._seeds = Seeds(x.device) if has_values(x) and any(m.training for m, _ in self.constants) else None

    def pre_attention(
        self, x: Tensor, seen: Callable[..., Sequence[Tensor]] | None = None
    ) -> tuple[AttentionRequest, list[Tensor]]:
        """The attention's call for all tokens, and its queries, keys and values, without a graph.

        `seen` detaches tensors that have a graph; None runs without graphs.
        """
        whole: list[Tensor] = []
        with contextlib.nullcontext() if seen is not None else torch.no_grad():
            for i, (start, stop) in enumerate(self.bounds):
                request, part = self.reach(chunk_of(x, start, stop), i)
                self._require_settings(request)
                if not whole:
                    if self._shorten and self.tail is None and request.module is not self._module:
                        self.tail = AttentionTail(request.module)
                    first = request.for_whole(part.whole_of)
                    with self.attention_memory():
                        whole = [_for_all_tokens(t, x.shape[1]) for t in request.tensors]
                tensors = request.tensors if seen is None else seen(*request.tensors)
                for t, chunk in zip(whole, tensors, strict=True):
                    t[:, :, start:stop].copy_(chunk)
        return first, whole

    def _require_settings(self, request: AttentionRequest) -> None:
        settings = settings_of(request)
        self._settings = settings if self._settings is None else self._settings
        name = differing_setting(self._settings, settings)
        if name:
            raise DifferentSettings(f"its attention's argument {name} depends on the number of tokens")

    def reach(self, chunk: Tensor, index: int) -> tuple[AttentionRequest, ChunkArgs]:
        """Runs the layer on a chunk up to its attention."""
        part = self._part(index)
        args, kwargs = part.given(chunk)
        reached: list[AttentionRequest] = []

        def stop_here(request: AttentionRequest) -> Tensor:
            reached.append(request)
            raise AttentionReached

        try:
            with attention_answered_by(stop_here), self._seeded(index + 1):
                self._forward(*args, **kwargs)
        except AttentionReached:
            pass
        if not reached:
            raise NoAttention
        return reached[0], part

    def post_attention(self, chunk: Tensor, out: Tensor, index: int) -> Tensor:
        """The layer's result for a chunk, given the attention's output."""
        args, kwargs = self._part(index).given(chunk)
        out, tail = out.contiguous(), self.tail
        with (
            contextlib.nullcontext() if tail is None else tail.run(out),
            attention_answered_by(lambda request: out if tail is None else tail.answer(out)),
            self._seeded(index + 1),
        ):
            y = self._forward(*args, **kwargs)
        return y[0] if isinstance(y, tuple) else y

    def _part(self, index: int) -> ChunkArgs:
        """The other arguments for a chunk: views, made once for all passes over the chunk."""
        self.chunk = index
        if index not in self._parts:
            self._parts[index] = self._call.with_tokens(None, *self.bounds[index])
        return self._parts[index]

    @contextlib.contextmanager
    def attending(self, group: int = 0) -> Iterator[None]:
        """Context for the attention of one group of heads."""
        with self.attention_memory(), self._seeded(-group):
            yield

    def attention_memory(self) -> OutOfMemoryNote:
        """Context for allocations of the attention, for all tokens."""
        return OutOfMemoryNote(lambda: in_attention(self._chunking.config, *self._size()))

    def layer_memory(self) -> OutOfMemoryNote:
        """Context for allocations of hidden states, for all tokens."""
        return OutOfMemoryNote(lambda: for_layer_inputs(self._chunking.config, *self._size()))

    def _size(self) -> tuple[str, int]:
        """The name of the layer's class, and the number of tokens in the batch."""
        return untiled_class(type(self._module)).__name__, self._batch * sum(
            stop - start for start, stop in self.bounds
        )

    def advance(self) -> None:
        """Call this once, after forward."""
        if self._seeds is not None:
            self._seeds.advance()

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """Context for runs in backward: restores autocast and settings of forward."""
        self._call.require_unchanged()
        with self.autocast.entered(), restored_flags(self.constants):
            yield

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Context for all runs."""
        rows = [self._batch * (stop - start) for start, stop in self.bounds]
        try:
            with (
                attention_replaced(),
                alone(self._module),
                self._chunking.guarded("chunk_size", rows[0], sum(rows)),
                self._chunking.untiled(),
                contextlib.nullcontext() if self._seeds is None else self._seeds.restored(),
            ):
                yield
        finally:
            # Autocast has cached weights that were cast without a graph; a later forward with gradients must not use them.
            torch.clear_autocast_cache()

    def _seeded(self, index: int) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if self._seeds is None else self._seeds.part(index)


def chunk_of(x: Tensor, start: int, stop: int) -> Tensor:
    """Tokens of all sequences, contiguous: layers view them as rows."""
    return x[:, start:stop].contiguous()


def _for_all_tokens(qkv: Tensor, num_tokens: int) -> Tensor:
    """An empty tensor `(B, N, S, D)` for a chunk's `(B, N, C, D)`, in the same memory order of tokens and heads."""
    batch, num_heads, _, width = qkv.shape
    if qkv.stride(1) < qkv.stride(2):
        return qkv.new_empty(batch, num_tokens, num_heads, width).transpose(1, 2)
    return qkv.new_empty(batch, num_heads, num_tokens, width)
