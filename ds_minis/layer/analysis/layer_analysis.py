"""The result of analyzing a layer, the lengths it holds for, and its extension to other lengths on the meta device."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ds_minis.layer.analysis.dead_value_search import stand_in
from ds_minis.layer.analysis.follow_layer import follow_layer
from ds_minis.layer.analysis.probe import PROBE_BATCH, PROBE_CHUNKS, PROBE_TOKENS
from ds_minis.layer.attention.attention import attention_answered_by, differing_setting
from ds_minis.layer.attention.head_groups import HeadGroups
from ds_minis.layer.passes.layer_args import LayerArgs
from ds_minis.layer.passes.layer_passes import NO_DEAD_VALUES, DeadValues
from ds_minis.tiling.verify.follow import Reach
from ds_minis.tiling.verify.side_effects import quietly
from ds_minis.tiling.verify.signature import Signature, read_by
from ds_minis.tiling.verify.snapshot import State


@dataclass(frozen=True)
class LayerAnalysis:
    """The result of analyzing a layer.

    Attributes:
        reason: why it cannot be tiled as a whole; empty if it can.
        rest: what its forward returns after the hidden states; None if it returns the hidden states alone.
        dead_values: values that need not be computed.
        groups: how its attention runs in groups of heads; None for one call.
        one_call: reason why head_groups fell back to one call; empty if it did not, or is not set.
        reach: the lengths for which this holds.
        settings: the non-tensor arguments of the attention's call; None if unknown.
        attention_ran: whether the real attention function was run on a few tokens.
        versions: versions of the tensors that this depends on; None if it depends on no values.
    """

    reason: str = ""
    rest: tuple | None = None
    dead_values: DeadValues = NO_DEAD_VALUES
    groups: HeadGroups | None = None
    one_call: str = ""
    reach: Reach = field(default_factory=Reach)
    settings: dict | None = field(default=None, compare=False)
    attention_ran: bool = True
    versions: tuple | None = field(default=None, compare=False, repr=False)


def analyze_again(
    layer: nn.Module, forward: Callable[..., Any], call: LayerArgs, chunk_tokens: int, analysis: LayerAnalysis
) -> LayerAnalysis | None:
    """The analysis for another length; None if a trace without values cannot tell."""
    reach = Reach()
    reason, settings = followed(layer, forward, call, chunk_tokens, reach)
    if not reach.complete:
        return None
    if not reason and settings and analysis.settings and differing_setting(settings, analysis.settings):
        settings = None  # may depend on the length if all chunks agree with the whole
    return dataclasses.replace(analysis, reason=reason, reach=reach.extended(analysis.reach), settings=settings)


def followed(
    layer: nn.Module, forward: Callable[..., Any], call: LayerArgs, chunk_tokens: int, reach: Reach
) -> tuple[str, dict | None]:
    """Traces a call without values: why the layer cannot be tiled, and the attention's non-tensor arguments."""
    state, x = State(layer), call.hidden
    with quietly(layer, x.device, with_dropout=True):
        try:
            return follow_layer(forward, layer, call, x, chunk_tokens or -(-x.shape[1] // PROBE_CHUNKS), reach)
        finally:
            state.restore()


def attributes_read_by_layer(
    layer: nn.Module, forward: Callable[..., Any], call: LayerArgs, slots: list[tuple[int, str]], signature: Signature
) -> list[str]:
    """Which of the given attributes of its submodules a layer reads."""
    state, few = State(layer), call.narrowed(PROBE_BATCH, PROBE_TOKENS, torch.randn_like)
    part = few.with_tokens(few.hidden, 0, few.hidden.shape[1])

    def run() -> None:
        with attention_answered_by(lambda request: stand_in(request, request.tensors)):
            forward(*part.args, **part.kwargs)

    with quietly(layer, call.hidden.device), torch.no_grad():
        try:
            return read_by(run, slots, signature)
        finally:
            state.restore()
