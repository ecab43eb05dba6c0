"""What a decoder layer must be for a part of its tokens to be enough: token-wise but for one attention."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch
from torch import nn

from ds_minis.layer.analysis.analysis import analyze_layer
from ds_minis.layer.attention.attention import attention_unwrapped
from ds_minis.layer.passes.layer_args import LayerArgs
from ds_minis.layer.tiled.tiled_layer import TiledLayer
from ds_minis.parallel.attention.masks import Refused, SequenceMask
from ds_minis.parallel.attention.state import Parallel
from ds_minis.tiling.core.row_args import tensors_in
from ds_minis.tiling.modules.compiling import outside_of_graphs
from ds_minis.tiling.modules.swap import untiled_class
from ds_minis.tiling.verify.snapshot import State


class CheckLayer:
    """Forward pre-hook of a decoder layer: refuses one that cannot run on a part of the sequence."""

    def __init__(self, parallel: Parallel):
        self._parallel = parallel

    @outside_of_graphs
    def __call__(self, layer: nn.Module, args: tuple, kwargs: dict) -> None:
        parallel = self._parallel
        if not parallel.is_running:
            return
        if not any(isinstance(t, SequenceMask) for t in tensors_in((args, tuple(kwargs.values())))):
            raise Refused(
                f"sequence_parallel: {untiled_class(type(layer)).__name__} is given no mask of transformers' masking "
                "functions, from which the mask for all tokens could be made"
            )
        if not isinstance(layer, TiledLayer):
            require_token_wise(layer, args, kwargs, parallel)


def require_token_wise(layer: nn.Module, args: tuple, kwargs: dict, parallel: Parallel) -> None:
    """Refuses a layer that mixes tokens outside of its attention; analyzed once per kind of layer.

    Weights that ZeRO-3 has partitioned, and that each submodule gathers for itself, are not there for an analysis: the
    structure of the layer must do then.
    """
    if not parallel.is_running or any(param.numel() == 0 for param in layer.parameters()):
        return
    kind = type(layer), tuple((name, type(part)) for name, part in layer.named_modules())
    if kind in parallel.known_layers:
        return
    forward = functools.partial(untiled_class(type(layer)).forward, layer)
    with torch.no_grad():  # arguments with gradients can be cut here
        call, state = LayerArgs(args, kwargs), State(layer)
    if call.reason:
        parallel.refuse(layer, call.reason)
    try:
        tiled = isinstance(layer, TiledLayer)
        layer.mini_sequence_chunking = parallel.chunking  # which a run by chunks reads
        with (
            parallel.chunking.guarded(),
            parallel.chunking.untiled(),
            attention_unwrapped(),
            _not_checkpointed(layer),
        ):
            analysis = analyze_layer(layer, forward, call, parallel.chunking)
    finally:
        if not tiled:
            del layer.mini_sequence_chunking
        state.restore()
    if analysis is not None and analysis.reason:
        parallel.refuse(layer, analysis.reason)
    parallel.known_layers.add(kind)


@contextlib.contextmanager
def _not_checkpointed(layer: nn.Module) -> Iterator[None]:
    """Inside, transformers does not checkpoint the layer's forward."""
    before = layer.__dict__.get("gradient_checkpointing")
    layer.gradient_checkpointing = False
    try:
        yield
    finally:
        if before is None:
            del layer.gradient_checkpointing
        else:
            layer.gradient_checkpointing = before


def attach(layer: nn.Module, parallel: Parallel) -> None:
    """Registers the hook of a decoder layer."""
    layer.register_forward_pre_hook(CheckLayer(parallel), with_kwargs=True, prepend=True)
