"""Whole decoder layers over chunks of tokens, in the place of activation checkpointing."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ds_minis.ranks import has_other_ranks
from ds_minis.tiling.core.replay import AutocastState, has_values, random_states, set_random_states
from ds_minis.tiling.core.tiled_op import run_call
from ds_minis.tiling.layer.analysis import examine
from ds_minis.tiling.layer.checkpointed_layer import ItsOwnCheckpointing
from ds_minis.tiling.layer.finding import Finding, follow_again, read_attributes
from ds_minis.tiling.layer.probe import a_few_tokens
from ds_minis.tiling.modules.compiling import compiled_inside, outside_of_graphs
from ds_minis.tiling.modules.gate import run_whole
from ds_minis.tiling.modules.swap import Tiled, own_forward, tell
from ds_minis.tiling.modules.tiled_module import engine_inside, passing_state, require_weights
from ds_minis.tiling.passes.layer_args import LayerCall
from ds_minis.tiling.passes.layer_passes import DifferentSettings, LayerPasses, NoAttention
from ds_minis.tiling.passes.node import LayerNode
from ds_minis.tiling.verify.signature import STALE, Signature, signature_of
from ds_minis.tiling.verify.snapshot import State


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
            num_tokens = call.hidden.shape[:2].numel()
            chunking.note("layer", num_tokens, _chunk_tokens(self, call) * call.hidden.shape[0], as_it_is=True)
            return self._as_it_is(forward, args, kwargs)
        hidden = call.hidden  # which a tiled call lets go of
        finding = _found_out(self, forward, call)
        if finding.reason:
            return self._run_whole(forward, args, kwargs, call)
        try:
            y = _forward_by_tokens(self, forward, call, finding)
        except DifferentSettings as error:
            call.hidden = hidden
            _told(self, ("call", str(error)), Finding(str(error)))
            return self._run_whole(forward, args, kwargs, call)
        except NoAttention:
            # Which it chose for this call, by random numbers, say: nothing was drawn yet.
            _leave_whole(self)
            call.hidden = hidden
            return self._run_whole(forward, args, kwargs, call)
        del hidden
        return y if finding.rest is None else (y, *finding.rest)

    @outside_of_graphs
    def _run_whole(self, forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any], call: LayerCall) -> Any:
        own = forward
        self.mini_sequence_chunking.last_calls.pop("layer", None)  # its parts tell

        def run(forward: Callable[..., Any]) -> Any:
            return self._as_it_is(forward, args, kwargs, gated=forward is not own)

        few = None if call.reason else functools.partial(a_few_tokens, forward, call)
        return run_whole(self, forward, run, self.mini_sequence_chunking.memory, call.key, few)


def why_one_call(layer: nn.Module) -> str:
    """Why a layer attends to all heads at once where groups were asked for; empty if it does not, or they were not."""
    verdicts = layer.mini_sequence_verdicts.values() if isinstance(layer, TiledLayer) else ()
    return next((finding.one_call for finding in verdicts if finding.one_call), "")


@outside_of_graphs
def _found_out(layer: TiledLayer, forward: Callable[..., Any], call: LayerCall) -> Finding:
    """Examined once for each way of calling and all that it rests on (`signature`); a hook on a part may come and go."""
    verdicts = layer.mini_sequence_verdicts
    signature = signature_of(layer, verdicts.ignored)
    with_grads = torch.is_grad_enabled() or layer.training
    reason = call.reason or passing_state(layer, signature) or engine_inside(layer, signature)
    reason = reason or (compiled_inside(layer) if signature.may_be_compiled else "") or verdicts.changing
    if reason:
        return _told(layer, ("call", reason), Finding(reason))
    kind = with_grads, call.hidden.dtype, AutocastState(call.hidden.device).dtype(), call.key
    key = (*kind, signature.stable)
    finding, chunk = verdicts.get(key), _chunk_tokens(layer, call)
    if finding is not None and not verdicts.is_stale(finding, signature.versions):
        if finding.reason or finding.reach.holds(call.hidden.shape[1], chunk) or not has_values(call.hidden):
            return _told(layer, key, finding)
        with layer.mini_sequence_chunking.untiled():
            finding = follow_again(layer, forward, call, chunk, finding)
        if finding is not None:
            return _told(layer, key, finding)
    finding = _asked(layer, forward, call, chunk, kind, signature)
    return Finding(_NOTHING_SHOWS) if finding is None else _told(layer, key, finding)


_NOTHING_SHOWS = "its weights are such that nothing shows"


def _asked(
    layer: TiledLayer, forward: Callable[..., Any], call: LayerCall, chunk: int, kind: tuple, signature: Signature
) -> Finding | None:
    """A new finding; None where nothing can be told."""
    require_weights(layer)
    chunking, verdicts = layer.mini_sequence_chunking, layer.mini_sequence_verdicts
    often = verdicts.often_changed(kind, signature.stable)
    with chunking.guarded(), chunking.untiled():
        finding = examine(layer, forward, call, chunking, chunk)
        if finding is not None and often:
            verdicts.settle(often, read_attributes(layer, forward, call, often, signature))
        if finding is not None and not finding.reason and not finding.attention_asked:
            finding = dataclasses.replace(finding, reason=_left_behind(layer, forward, call, chunk))
    if finding is None or not has_values(call.hidden):
        return finding
    reason = finding.reason or verdicts.changing or (STALE if verdicts.often_stale and finding.reach.versions else "")
    versions = None if (reason and verdicts.often_stale) or not finding.reach.versions else signature.versions
    return dataclasses.replace(finding, reason=reason, versions=versions)


def _left_behind(layer: TiledLayer, forward: Callable[..., Any], call: LayerCall, chunk: int) -> str:
    """Whether the attention function leaves something behind, where a few tokens could not show it: by a real call."""
    x = call.hidden
    with torch.no_grad():
        passes = LayerPasses(layer, forward, call, _bounds(x.shape[1], chunk), layer.mini_sequence_chunking)
        request, heads = passes.before(x)
        state, random = State(request.module, request.function), random_states(x.device)
        try:
            with passes.attention_memory():
                request.run(heads)
            changed = state.changed(request.module)
        finally:
            state.restore(request.module)
            set_random_states(x.device, random)
            call.hidden = x
    return f"its attention function leaves something behind ({changed})" if changed else ""


def _told(layer: TiledLayer, key: tuple, finding: Finding) -> Finding:
    verdicts = layer.mini_sequence_verdicts
    if verdicts.get(key) is not finding:
        if key[0] != "call" or key not in verdicts:
            verdicts[key] = finding
        if finding.reason:
            tell(layer, "is run as a whole", finding.reason)
    verdicts.note(layer.training, finding.reason)
    return finding


def _attend_in_one_call(layer: TiledLayer, finding: Finding, reason: str) -> None:
    """From now on, where this was found."""
    for key, known in layer.mini_sequence_verdicts.items():
        if known is finding:
            layer.mini_sequence_verdicts[key] = dataclasses.replace(finding, groups=None, one_call=reason)


def _leave_whole(layer: TiledLayer) -> None:
    """A layer that was found to attend once in each call has not: it does not always."""
    finding = Finding("it does not call its attention in each of its calls")
    for key in layer.mini_sequence_verdicts:
        layer.mini_sequence_verdicts[key] = finding
    layer.mini_sequence_verdicts.note(layer.training, finding.reason)
    tell(layer, "is run as a whole", finding.reason)


def _runs_whole(layer: TiledLayer, call: LayerCall) -> bool:
    """Where one chunk is enough, as for a tiled module (`rows.runs_whole`)."""
    chunk = _chunk_tokens(layer, call)
    # In training without gradients too: dropout must be what it is with them (GradCache).
    trains = torch.is_grad_enabled() or layer.training
    return call.hidden.shape[1] <= chunk and not (trains and has_other_ranks())


def _chunk_tokens(layer: TiledLayer, call: LayerCall) -> int:
    """Tokens of each sequence in a chunk; two at least, as models take a single one for a step of a generation."""
    batch, num_tokens, width = call.hidden.shape
    rows = layer.mini_sequence_chunking.module_rows(batch * num_tokens, width, experts_per_choice(layer))
    return max(2, rows // batch)


def experts_per_choice(layer: nn.Module) -> float:
    """How many experts there are for each that a token is sent to, in the layer's mixture of experts; else 1."""
    experts = max((p.shape[0] for p in layer.parameters() if p.dim() == 3), default=0)
    names = ("top_k", "num_experts_per_tok", "num_experts_per_token")
    choices = max((getattr(m, n, 0) or 0 for m in layer.modules() for n in names if n in m.__dict__), default=0)
    return max(1.0, experts / choices) if experts and choices else 1.0


def _bounds(num_tokens: int, chunk: int) -> list[tuple[int, int]]:
    starts = [i for i in range(0, num_tokens, chunk) if i == 0 or num_tokens - i > 1]
    return list(zip(starts, [*starts[1:], num_tokens], strict=True))


@outside_of_graphs
def _forward_by_tokens(layer: TiledLayer, forward: Callable[..., Any], call: LayerCall, finding: Finding) -> Tensor:
    require_weights(layer)
    chunking, x, chunk = layer.mini_sequence_chunking, call.hidden, _chunk_tokens(layer, call)
    bounds = _bounds(x.shape[1], chunk)
    chunking.note("layer", x.shape[:2].numel(), chunk * x.shape[0])
    source = None
    if torch.is_grad_enabled():
        source = None if chunking.layer_inputs is None else chunking.layer_inputs.source()
        call.until_backward()
    passes = LayerPasses(layer, forward, call, bounds, chunking, finding.settings)
    node = LayerNode(layer, passes, finding.unread, finding.groups, source, chunking.config.keep_attention)
    y = run_call(node, [x])
    if node.one_call:
        _attend_in_one_call(layer, finding, node.one_call)
    return y
