"""Runs whole decoder layers over chunks of tokens, instead of activation checkpointing."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ds_minis.config import AUTO
from ds_minis.layer.analysis.analysis import analyze_layer
from ds_minis.layer.analysis.layer_analysis import LayerAnalysis, analyze_again, attributes_read_by_layer
from ds_minis.layer.analysis.probe import a_few_tokens
from ds_minis.layer.attention.attention import attention_unwrapped
from ds_minis.layer.kept.kept_layer import KeptLayer
from ds_minis.layer.passes.keeping_node import KeepingNode
from ds_minis.layer.passes.layer_args import LayerArgs
from ds_minis.layer.passes.layer_passes import DifferentSettings, LayerPasses, NoAttention
from ds_minis.layer.passes.node import LayerNode
from ds_minis.layer.tiled.checkpointed_layer import ItsOwnCheckpointing
from ds_minis.memory.call_budget import CallBudget
from ds_minis.memory.keep_budget import ALL, ATTENTION, INPUT, MATMULS
from ds_minis.memory.layer_inputs import LayerInput
from ds_minis.ranks import has_other_ranks
from ds_minis.tiling.core.out_of_memory import in_a_chunk
from ds_minis.tiling.core.params import ParameterSlots
from ds_minis.tiling.core.replay import AutocastState, has_values, random_states, set_random_states
from ds_minis.tiling.core.tiled_op import run_call
from ds_minis.tiling.modules.compiling import compiled_inside, outside_of_graphs
from ds_minis.tiling.modules.gate import run_whole
from ds_minis.tiling.modules.state import experts_per_choice
from ds_minis.tiling.modules.swap import Tiled, own_forward, warn_once
from ds_minis.tiling.modules.tiled_module import engine_inside, passing_state, require_weights
from ds_minis.tiling.verify.signature import STALE, Signature, module_signature
from ds_minis.tiling.verify.snapshot import State


class TiledLayer(ItsOwnCheckpointing, Tiled):
    """Mixin for a decoder layer's class: runs that class's own forward over chunks, and attention once for all tokens.

    It saves its input and recomputes the rest in backward, so it replaces activation checkpointing. A call that cannot be
    tiled runs the class's own forward, checkpointed if that is enabled. Its norms and its feed-forward module are then tiled
    on their own.
    """

    def forward(self, *args, **kwargs):
        forward, chunking = own_forward(self, super().forward), self.mini_sequence_chunking
        if chunking is None or chunking.suspended or torch.compiler.is_compiling():
            return self._as_it_is(forward, args, kwargs)
        call = LayerArgs(args, kwargs)
        chunk = 0 if call.reason else _chunk_tokens(self, call)
        if not call.reason and _runs_whole(self, call, chunk) and not _keeps_what_is_checkpointed(self, call.hidden):
            num_tokens, chunk_tokens = call.hidden.shape[:2].numel(), chunk * call.hidden.shape[0]
            chunking.note("layer", num_tokens, chunk_tokens, as_it_is=True)
            with in_a_chunk(chunking.config, "chunk_size", chunk_tokens, num_tokens):
                return self._as_it_is(forward, args, kwargs)
        hidden = call.hidden  # a tiled call frees it
        analysis = _analysis_for(self, forward, call, chunk)
        if analysis.reason:
            if chunking.parallel is not None:
                chunking.parallel.require_token_wise(self, args, kwargs)
            return self._run_whole(forward, args, kwargs, call)
        try:
            y = _forward_by_tokens(self, forward, call, analysis, chunk)
        except DifferentSettings as error:
            call.hidden = hidden
            _record(self, ("call", str(error)), LayerAnalysis(str(error)))
            return self._run_whole(forward, args, kwargs, call)
        except NoAttention:
            # The layer skips its attention in this call, for example at random. The random state has not advanced yet.
            _leave_whole(self)
            call.hidden = hidden
            return self._run_whole(forward, args, kwargs, call)
        del hidden
        return y if analysis.rest is None else (y, *analysis.rest)

    def mini_sequence_state(self) -> str:
        """With the settings that are for whole layers, and what was found out about `head_groups`."""
        settings, reason = self.mini_sequence_chunking.config.to_dict(defaults=False), one_call_fallback_reason(self)
        own = [
            f"{name}={settings[name]}"
            for name in ("head_groups", "offload", "keep", "memory_budget")
            if name in settings
        ]
        own += [f"attention in one call: {reason}"] if reason else []
        return ", ".join([super().mini_sequence_state(), *own])

    @outside_of_graphs
    def _run_whole(self, forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any], call: LayerArgs) -> Any:
        own = forward
        self.mini_sequence_chunking.last_calls.pop("layer", None)  # its tiled submodules report instead

        def run(forward: Callable[..., Any]) -> Any:
            return self._as_it_is(forward, args, kwargs, gated=forward is not own)

        few = None if call.reason else functools.partial(a_few_tokens, forward, call)
        return run_whole(self, forward, run, self.mini_sequence_chunking.memory, call.key, few)


def one_call_fallback_reason(layer: nn.Module) -> str:
    """Reason why `head_groups` fell back to one call of the attention, or ""."""
    analyses = layer.mini_sequence_analyses.values() if isinstance(layer, TiledLayer) else ()
    return next((analysis.one_call for analysis in analyses if analysis.one_call), "")


@outside_of_graphs
def _analysis_for(layer: TiledLayer, forward: Callable[..., Any], call: LayerArgs, chunk: int) -> LayerAnalysis:
    """Analyzes the layer once per kind of call and signature. Hooks are checked at each call: they may come and go."""
    analyses = layer.mini_sequence_analyses
    signature = module_signature(layer, analyses.ignored)
    with_grads = torch.is_grad_enabled() or layer.training
    reason = call.reason or passing_state(layer, signature) or engine_inside(layer, signature)
    reason = reason or (compiled_inside(layer) if signature.may_be_compiled else "") or analyses.changing
    if reason:
        return _record(layer, ("call", reason), LayerAnalysis(reason))
    kind = with_grads, call.hidden.dtype, AutocastState(call.hidden.device).dtype(), call.key
    key = (*kind, signature.stable)
    analysis = analyses.get(key)
    if analysis is not None and not analyses.is_stale(analysis, signature.versions):
        if analysis.reason or analysis.reach.holds(call.hidden.shape[1], chunk) or not has_values(call.hidden):
            return _record(layer, key, analysis)
        with layer.mini_sequence_chunking.untiled():
            analysis = analyze_again(layer, forward, call, chunk, analysis)
        if analysis is not None:
            return _record(layer, key, analysis)
    analysis = _analyze(layer, forward, call, chunk, kind, signature)
    return LayerAnalysis(_NOTHING_SHOWS) if analysis is None else _record(layer, key, analysis)


_NOTHING_SHOWS = "all of its gradients are zero with these weights, which verifies nothing"


def _analyze(
    layer: TiledLayer, forward: Callable[..., Any], call: LayerArgs, chunk: int, kind: tuple, signature: Signature
) -> LayerAnalysis | None:
    """A new analysis; None if the runs cannot tell."""
    require_weights(layer)
    chunking, analyses = layer.mini_sequence_chunking, layer.mini_sequence_analyses
    often = analyses.often_changed(kind, signature.stable)
    with chunking.guarded(), chunking.untiled(), attention_unwrapped():
        analysis = analyze_layer(layer, forward, call, chunking, chunk)
        if analysis is not None and often:
            analyses.ignore_changing(often, attributes_read_by_layer(layer, forward, call, often, signature))
        if analysis is not None and not analysis.reason and not analysis.attention_ran:
            analysis = dataclasses.replace(analysis, reason=_left_behind(layer, forward, call, chunk))
    if analysis is not None and analysis.reason and chunking.parallel is not None:
        chunking.parallel.refuse(layer, analysis.reason)
    if analysis is None or not has_values(call.hidden):
        return analysis
    reason = analysis.reason or analyses.changing or (STALE if analyses.often_stale and analysis.reach.versions else "")
    versions = None if (reason and analyses.often_stale) or not analysis.reach.versions else signature.versions
    return dataclasses.replace(analysis, reason=reason, versions=versions)


def _left_behind(layer: TiledLayer, forward: Callable[..., Any], call: LayerArgs, chunk: int) -> str:
    """Runs the real attention on all tokens, where a few were not enough; the reason if it changes state, else empty."""
    x = call.hidden
    with torch.no_grad():
        random = random_states(x.device)
        passes = LayerPasses(layer, forward, call, _bounds(x.shape[1], chunk), layer.mini_sequence_chunking)
        request, qkv = passes.pre_attention(x)
        state = State(request.module, request.function)
        try:
            with passes.attention_memory():
                request.run(qkv)
            changed = state.changed()
        finally:
            state.restore()
            set_random_states(x.device, random)
            call.hidden = x
    return f"its attention function leaves something behind ({changed})" if changed else ""


def _record(layer: TiledLayer, key: tuple, analysis: LayerAnalysis) -> LayerAnalysis:
    analyses = layer.mini_sequence_analyses
    if analyses.get(key) is not analysis:
        if key[0] != "call" or key not in analyses:
            analyses[key] = analysis
        if analysis.reason:
            warn_once(layer, "is run as a whole", analysis.reason)
    analyses.note(layer.training, analysis.reason)
    return analysis


def _attend_in_one_call(layer: TiledLayer, analysis: LayerAnalysis, reason: str) -> None:
    """Replaces this analysis, wherever it is cached, by one without head groups."""
    for key, known in layer.mini_sequence_analyses.items():
        if known is analysis:
            layer.mini_sequence_analyses[key] = dataclasses.replace(analysis, groups=None, one_call=reason)


def _leave_whole(layer: TiledLayer) -> None:
    """Replaces all cached analyses: the layer called its attention when analyzed, but not in this call."""
    analysis = LayerAnalysis("it does not call its attention in each of its calls")
    for key in layer.mini_sequence_analyses:
        layer.mini_sequence_analyses[key] = analysis
    layer.mini_sequence_analyses.note(layer.training, analysis.reason)
    warn_once(layer, "is run as a whole", analysis.reason)


def _runs_whole(layer: TiledLayer, call: LayerArgs, chunk: int) -> bool:
    """Whether the call fits into one chunk and runs untiled, as for a tiled module (`tiled_op.runs_whole`)."""
    # Also in training without gradients: dropout must draw the same numbers as with gradients (GradCache).
    trains = torch.is_grad_enabled() or layer.training
    return call.hidden.shape[1] <= chunk and not (trains and has_other_ranks())


def _keeps_what_is_checkpointed(layer: TiledLayer, x: Tensor) -> bool:
    """Whether an untiled run would be checkpointed, although the budget may allow to keep all products."""
    store = layer.mini_sequence_chunking.layer_inputs
    if store is None or not (torch.is_grad_enabled() and layer.training and layer.is_checkpointed):
        return False
    return store.budget.may_repeat_nothing(x)


def _chunk_tokens(layer: TiledLayer, call: LayerArgs) -> int:
    """Tokens per sequence in a chunk; at least two, since models treat a single one as a generation step."""
    batch, num_tokens, width = call.hidden.shape
    chunking = layer.mini_sequence_chunking
    experts = layer_experts_per_choice(layer) if chunking.config.chunk_size == AUTO else 1.0
    return max(2, chunking.module_rows(batch * num_tokens, width, experts) // batch)


def layer_experts_per_choice(layer: nn.Module) -> float:
    """`experts_per_choice` of the layer's mixture of experts, whose configured number of choices is used."""
    names = ("top_k", "num_experts_per_tok", "num_experts_per_token")
    choices = max((getattr(m, n, 0) or 0 for m in layer.modules() for n in names if n in m.__dict__), default=0)
    return experts_per_choice(layer.parameters(), choices)


def _bounds(num_tokens: int, chunk: int) -> list[tuple[int, int]]:
    starts = [i for i in range(0, num_tokens, chunk) if i == 0 or num_tokens - i > 1]
    return list(zip(starts, [*starts[1:], num_tokens], strict=True))


@outside_of_graphs
def _forward_by_tokens(
    layer: TiledLayer, forward: Callable[..., Any], call: LayerArgs, analysis: LayerAnalysis, chunk: int
) -> Tensor:
    require_weights(layer)
    chunking, x = layer.mini_sequence_chunking, call.hidden
    bounds = _bounds(x.shape[1], chunk)
    chunking.note("layer", x.shape[:2].numel(), chunk * x.shape[0])
    store, level, layer_input = chunking.layer_inputs, INPUT, None
    if torch.is_grad_enabled():
        if store is not None:
            level = store.budget.level(layer, x, store.num_layers)
            layer_input = store.new_input(x, level)
        call.until_backward()
    keeping = CallBudget(store.budget, layer, x, level) if level in (ATTENTION, MATMULS) else None
    nodes: list[LayerNode] = []

    def by_chunks(slots: ParameterSlots | None = None, layer_input: LayerInput | None = layer_input) -> LayerNode:
        passes = LayerPasses(layer, forward, call, bounds, chunking, analysis.settings, shorten=True)
        node = LayerNode if keeping is None else functools.partial(KeepingNode, keeping=keeping)
        nodes.append(node(layer, passes, analysis.dead_values, analysis.groups, layer_input, slots=slots))
        return nodes[-1]

    if level == ALL:
        call.hidden = None
        node = KeptLayer(layer, forward, call, store.budget, by_chunks, layer_input)
    else:
        node = by_chunks()
    y = run_call(node, [x])
    if store is not None and y.requires_grad:
        node.after_backward = store.budget.after_backward(x)
    if nodes and nodes[0].one_call:
        _attend_in_one_call(layer, analysis, nodes[0].one_call)
    return y
