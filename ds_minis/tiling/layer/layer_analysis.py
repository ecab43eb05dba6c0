"""What was found out about a layer, and for which lengths; asked again for others, without values."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ds_minis.tiling.layer.dead_value_search import stand_in
from ds_minis.tiling.layer.follow_layer import follow_layer
from ds_minis.tiling.layer.probe import PROBE_BATCH, PROBE_CHUNKS, PROBE_TOKENS
from ds_minis.tiling.passes.attention import attention_answered_by, differing_setting
from ds_minis.tiling.passes.head_groups import HeadGroups
from ds_minis.tiling.passes.layer_args import LayerArgs
from ds_minis.tiling.passes.layer_passes import NO_DEAD_VALUES, DeadValues
from ds_minis.tiling.verify.follow import Reach
from ds_minis.tiling.verify.side_effects import quietly
from ds_minis.tiling.verify.signature import Signature, read_by
from ds_minis.tiling.verify.snapshot import State


@dataclass(frozen=True)
class LayerAnalysis:
    """What was found out about a layer.

    Attributes:
        reason: why it cannot be tiled as a whole; empty if it can.
        rest: what its forward gives behind the hidden states; None where it gives the hidden states alone.
        unread: what need not be computed.
        groups: how its attention can be run in groups of heads, where that was asked for.
        one_call: why it cannot; empty if it can, or was not asked for.
        reach: the lengths for which this holds.
        settings: the arguments of the attention's call that are no tensors; None if they are not known.
        attention_asked: the attention function itself was run, and left nothing behind.
        versions: of the tensors that this rests on; None where their values decide nothing.
    """

    reason: str = ""
    rest: tuple | None = None
    dead_values: DeadValues = NO_DEAD_VALUES
    groups: HeadGroups | None = None
    one_call: str = ""
    reach: Reach = field(default_factory=Reach)
    settings: dict | None = field(default=None, compare=False)
    attention_asked: bool = True
    versions: tuple | None = field(default=None, compare=False, repr=False)


def analyze_again(
    layer: nn.Module, forward: Callable[..., Any], call: LayerArgs, chunk_tokens: int, analysis: LayerAnalysis
) -> LayerAnalysis | None:
    """What was found out, for another length; None where that cannot be told without values."""
    reach = Reach()
    reason, settings = followed(layer, forward, call, chunk_tokens, reach)
    if not reach.complete:
        return None
    if not reason and settings and analysis.settings and differing_setting(settings, analysis.settings):
        settings = None  # they may depend on the length, as long as all chunks agree with the whole
    return dataclasses.replace(analysis, reason=reason, reach=reach.extended(analysis.reach), settings=settings)


def followed(
    layer: nn.Module, forward: Callable[..., Any], call: LayerArgs, chunk_tokens: int, reach: Reach
) -> tuple[str, dict | None]:
    """What shows without values: why the layer cannot be tiled, and the arguments of its attention that are no tensors."""
    state, x = State(layer), call.hidden
    with quietly(layer, x.device, with_dropout=True):
        try:
            return follow_layer(forward, layer, call, x, chunk_tokens or -(-x.shape[1] // PROBE_CHUNKS), reach)
        finally:
            state.restore(layer)


def read_attributes(
    layer: nn.Module, forward: Callable[..., Any], call: LayerArgs, slots: list[tuple[int, str]], signature: Signature
) -> list[str]:
    """Which of some attributes of its parts a layer reads."""
    state, few = State(layer), call.narrowed(PROBE_BATCH, PROBE_TOKENS, torch.randn_like)
    part = few.with_tokens(few.hidden, 0, few.hidden.shape[1])

    def run() -> None:
        with attention_answered_by(lambda request: stand_in(request, request.tensors)):
            forward(*part.args, **part.kwargs)

    with quietly(layer, call.hidden.device), torch.no_grad():
        try:
            return read_by(run, slots, signature)
        finally:
            state.restore(layer)
