"""Whole decoder layers over chunks of tokens, in the place of activation checkpointing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ds_minis.ranks import has_other_ranks
from ds_minis.tiling.checkpointed_layer import ItsOwnCheckpointing
from ds_minis.tiling.compiling import compiled_inside, outside_of_graphs
from ds_minis.tiling.layer_call import LayerCall
from ds_minis.tiling.layer_node import LayerNode
from ds_minis.tiling.layer_passes import LayerPasses
from ds_minis.tiling.layer_verify import Finding, examine
from ds_minis.tiling.module import engine_inside, passing_state, require_weights
from ds_minis.tiling.recompute import AutocastState
from ds_minis.tiling.rows import run_call
from ds_minis.tiling.swap import Tiled, own_forward, tell


class TiledLayer(ItsOwnCheckpointing, Tiled):
    """Mixed into a decoder layer's class; runs that class's own forward over chunks, and attention once for all.

    It saves its input and recomputes the rest in backward, so activation checkpointing is left to it. Where a call cannot be
    tiled, the layer runs as its class does, checkpointed if it was asked to be; its norms and its feed-forward part are
    then tiled each for itself.
    """

    def forward(self, *args, **kwargs):
        forward, chunking = own_forward(self, super().forward), self.mini_sequence_chunking
        if chunking is None or chunking.suspended or torch.compiler.is_compiling():
            return self._as_it_is(forward, args, kwargs)
        call = LayerCall(args, kwargs)
        if not call.reason and _runs_whole(self, call):
            return self._as_it_is(forward, args, kwargs)
        finding = _found_out(self, forward, call)
        if finding.reason:
            return self._as_it_is(forward, args, kwargs)
        y = _forward_by_tokens(self, forward, call, finding)
        return y if finding.rest is None else (y, *finding.rest)


def why_one_call(layer: nn.Module) -> str:
    """Why a layer attends to all heads at once where groups were asked for; empty if it does not, or they were not."""
    verdicts = layer.mini_sequence_verdicts.values() if isinstance(layer, TiledLayer) else ()
    return next((finding.one_call for finding in verdicts if finding.one_call), "")


@outside_of_graphs
def _found_out(layer: TiledLayer, forward: Callable[..., Any], call: LayerCall) -> Finding:
    """Examined once for each mode, dtype, way of calling and make-up; a hook on a part may come and go."""
    passing, with_grads = passing_state(layer), torch.is_grad_enabled() or layer.training
    reason = call.reason or passing or engine_inside(layer) or compiled_inside(layer)
    if reason:
        _tell(layer, ("call", reason), Finding(reason))
        return Finding(reason)
    autocast = AutocastState(call.hidden.device).dtype()
    key = layer.training, with_grads, call.hidden.dtype, autocast, call.key, _make_up(layer)
    if key not in layer.mini_sequence_verdicts:
        require_weights(layer)
        chunking, rows = layer.mini_sequence_chunking, call.hidden.shape[:2].numel()
        with chunking.guarded("chunk_size", rows, rows), chunking.untiled():
            finding = examine(layer, forward, call, chunking)
        if finding is None:  # cannot be told from this call
            return Finding("its weights are such that nothing shows")
        _tell(layer, key, finding)
    return layer.mini_sequence_verdicts[key]


def _make_up(layer: nn.Module) -> tuple:
    """What a layer's parts are, what is trained of them and what is switched on.

    An adapter that is added, enabled or unmerged later may read what nobody read before. Names and no types: a copy or a
    pickle of the layer has this among its verdicts' keys.
    """
    return tuple(
        (name, type(part).__module__, type(part).__qualname__, _switches(part)) for name, part in layer.named_modules()
    )


def _switches(part: nn.Module) -> tuple:
    """Which tensors require a gradient; flags and texts; and the texts in lists (PEFT's active and merged adapters)."""
    return tuple(
        value.requires_grad if isinstance(value, Tensor) else _texts(value) if type(value) is list else value
        for holder in (part._parameters, part.__dict__)
        for name, value in holder.items()
        if isinstance(value, Tensor)
        or (type(value) in (bool, str, list) and not name.startswith(("ds_", "mini_sequence_")))
    )


def _texts(values: list) -> tuple[str, ...]:
    return tuple(value for value in values if isinstance(value, str))


def _tell(layer: TiledLayer, key: tuple, finding: Finding) -> None:
    if key not in layer.mini_sequence_verdicts:
        layer.mini_sequence_verdicts[key] = finding
        if finding.reason:
            tell(layer, "is run as a whole", finding.reason)


def _runs_whole(layer: TiledLayer, call: LayerCall) -> bool:
    """Where one chunk is enough, as for a tiled module (`rows.runs_whole`)."""
    chunk = _chunk_tokens(layer, call)
    return call.hidden.shape[1] <= chunk and not (torch.is_grad_enabled() and has_other_ranks())


def _chunk_tokens(layer: TiledLayer, call: LayerCall) -> int:
    """Tokens of each sequence in a chunk; two at least, as models take a single one for a step of a generation."""
    batch, num_tokens, width = call.hidden.shape
    rows = layer.mini_sequence_chunking.module_rows(batch * num_tokens, width, _experts_per_choice(layer))
    return max(2, rows // batch)


def _experts_per_choice(layer: nn.Module) -> float:
    """How many experts there are for each that a token is sent to, in the layer's mixture of experts; else 1."""
    experts = max((p.shape[0] for p in layer.parameters() if p.dim() == 3), default=0)
    names = ("top_k", "num_experts_per_tok", "num_experts_per_token")
    choices = max((getattr(m, n, 0) or 0 for m in layer.modules() for n in names if n in m.__dict__), default=0)
    return max(1.0, experts / choices) if experts and choices else 1.0


@outside_of_graphs
def _forward_by_tokens(layer: TiledLayer, forward: Callable[..., Any], call: LayerCall, finding: Finding) -> Tensor:
    require_weights(layer)
    chunking, x, chunk = layer.mini_sequence_chunking, call.hidden, _chunk_tokens(layer, call)
    num_tokens = x.shape[1]
    starts = [i for i in range(0, num_tokens, chunk) if i == 0 or num_tokens - i > 1]
    bounds = list(zip(starts, [*starts[1:], num_tokens], strict=True))
    source, depth = chunking.checkpoints.source(layer, x) if torch.is_grad_enabled() else (None, 0)
    passes = LayerPasses(layer, forward, call, bounds, chunking)
    node = LayerNode(layer, passes, finding.unread, finding.groups, source, chunking.config.keep_attention)
    y = run_call(node, [x])
    chunking.checkpoints.made(node, y, depth)
    return y
