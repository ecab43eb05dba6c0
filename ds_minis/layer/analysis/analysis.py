"""Analyzes whether a layer is token-wise outside of its attention, from its behavior (as `verify` does for modules).

A few random tokens run through the layer, at once and by chunks in reversed order. Both runs use a stand-in for the attention
that mixes all tokens, and must agree. Then dead values are searched: those that may be NaN without changing any result or
gradient.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ds_minis.layer.analysis.dead_value_search import DeadValueSearch, stand_in
from ds_minis.layer.analysis.layer_analysis import LayerAnalysis, followed
from ds_minis.layer.analysis.poisoned_rows import PoisonedRows, narrowed_request
from ds_minis.layer.analysis.probe import (
    PROBE_BATCH,
    PROBE_CHUNKS,
    PROBE_TOKENS,
    CountsTokens,
    all_close,
    gradients_fallback_reason,
    layer_fallback_reason,
)
from ds_minis.layer.attention.attention import (
    AttentionRequest,
    attention_answered_by,
    differing_setting,
    settings_of,
)
from ds_minis.layer.attention.head_groups import HeadGroups, WrongGroups, count_groups
from ds_minis.layer.passes.layer_args import LayerArgs
from ds_minis.layer.passes.layer_passes import NO_DEAD_VALUES, DeadValues, LayerPasses, NoAttention, chunk_of
from ds_minis.layer.passes.node import LayerNode
from ds_minis.tiling.core.grad_accum import drain
from ds_minis.tiling.core.linear import is_plain_linear
from ds_minis.tiling.core.out_of_memory import is_out_of_memory
from ds_minis.tiling.core.params import ParameterSlots
from ds_minis.tiling.core.replay import has_values
from ds_minis.tiling.modules.state import Chunking
from ds_minis.tiling.verify.fingerprints import fingerprints
from ds_minis.tiling.verify.follow import Reach
from ds_minis.tiling.verify.op_trace import SHARED_DRAW, Watch, shares_draws
from ds_minis.tiling.verify.side_effects import WithoutDropout, guarded, is_held, quietly
from ds_minis.tiling.verify.snapshot import State
from ds_minis.tiling.verify.token_wise import (
    HELD,
    LARGEST_WEIGHT,
    LONGEST_PROBE,
    WRITES_GRADIENTS,
    WRITES_INPUT,
    foreign_weight,
    is_close,
    long_probe,
    real_and_random,
    tolerance,
    writes_gradients,
)

_MIXES = "its result or gradients for a token depend on others, other than by way of its attention"
_HEADS_DIFFER = "its attention function gives something else for a part of the heads"


def analyze_layer(
    layer: nn.Module, forward: Callable[..., Any], call: LayerArgs, chunking: Chunking, chunk_tokens: int = 0
) -> LayerAnalysis | None:
    """Traces a call on the meta device, and runs a few of its tokens on detached weights, forward and backward.

    Args:
        chunk_tokens: tokens in a chunk of this call; 0 for a third of all.

    Returns:
        None if the runs cannot tell: all gradients are zero.
    """
    x = call.hidden
    if not has_values(x):
        return LayerProbe(
            layer, forward, call.narrowed(PROBE_BATCH, PROBE_TOKENS, torch.empty_like), chunking
        ).analysis_by_shapes()
    reach = Reach()
    reason, settings = followed(layer, forward, call, chunk_tokens, reach)
    with quietly(layer, x.device, with_dropout=not reach.draws):  # its attention was not traced, and may have some
        analysis = _analyze(layer, forward, call, chunking, reach)
        if analysis is not None and analysis.reason == _MIXES:
            # Again, with other random numbers: a single gradient may happen to be near zero, and pure rounding error in
            # bfloat16.
            analysis = _analyze(layer, forward, call, chunking, reach)
        if analysis is None:
            return None
        return dataclasses.replace(analysis, reason=analysis.reason or reason, reach=reach, settings=settings)


def _analyze(
    layer: nn.Module, forward: Callable[..., Any], call: LayerArgs, chunking: Chunking, reach: Reach
) -> LayerAnalysis | None:
    first_state = State(layer)
    tokens = PROBE_TOKENS if reach.complete else long_probe(layer, call.hidden) // PROBE_BATCH
    if not reach.complete and min(call.hidden.shape[1], LONGEST_PROBE // PROBE_BATCH) <= tokens:
        reach.without_end()
    shape = call.hidden.shape
    try:
        few = call.narrowed(PROBE_BATCH, tokens, real_and_random)
        return LayerProbe(layer, forward, few, chunking, shape).analysis()
    except WrongGroups:
        raise  # a wrong setting, not a property of the layer
    except NoAttention:
        return LayerAnalysis("it does not call the attention interface")
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return LayerAnalysis(f"it fails on a part of the tokens ({type(error).__name__}: {str(error)[:100]})")
    finally:
        first_state.restore()


class LayerProbe:
    """Runs a layer on a few tokens of a call.

    Attributes:
        layer: the layer.

    Args:
        shape: that of the whole call's hidden states.
    """

    def __init__(
        self,
        layer: nn.Module,
        forward: Callable[..., Any],
        call: LayerArgs,
        chunking: Chunking,
        shape: Sequence[int] = (),
    ):
        self.layer, self._forward, self._call, self._chunking = layer, forward, call, chunking
        self._x, self._shape = call.hidden, shape
        num_tokens, size = self._x.shape[1], -(-self._x.shape[1] // PROBE_CHUNKS)
        self._bounds = [(i, min(i + size, num_tokens)) for i in reversed(range(0, num_tokens, size))]
        self._slots = ParameterSlots(layer)
        self._params = [p.detach() for p in self._slots.tensors]
        self._with_grad = [p.numel() <= LARGEST_WEIGHT for p in self._params]
        self._grad = torch.empty_like(self._x)
        self._settings: dict[int | str, Any] = {}  # of the attention, called for all tokens
        self._num_counting = 0  # chunks that call torch.arange
        self._sentinels: list = []

    def analysis(self) -> LayerAnalysis | None:
        watch = Watch([self._x, *self._params])
        try:
            with torch.enable_grad(), watch:
                expected, rest, reason = self._whole()
        finally:
            written = watch.undo_writes()
        if reason or written:
            return LayerAnalysis(reason or f"it keeps state from one call to the next ({written})")
        if watch.drew_in_python or shares_draws(watch.steps, self._x.shape[1]):
            return LayerAnalysis(SHARED_DRAW)
        if is_held(self._sentinels):
            return LayerAnalysis(HELD)
        state = State(self.layer)
        differing = self._differing_setting()
        if self._num_counting == len(self._bounds):
            return LayerAnalysis(
                "it counts the positions of its tokens itself (torch.arange), from the first that it is given"
            )
        if differing:
            return LayerAnalysis(f"its attention's argument {differing} depends on the number of tokens")
        actual = self.by_chunks(NO_DEAD_VALUES)
        changed = state.changed()
        if changed:
            return LayerAnalysis(f"it keeps state from one call to the next ({changed})")
        if not any(g is not None and g.any() for g in expected[1:]):
            return None
        coarse = tolerance([self._x, *self._params, *actual])
        if not all_close(actual, expected, coarse):
            return LayerAnalysis(_MIXES)
        if not watch.makes_indices and PoisonedRows(self._forward, self._call, self._slots, self._x).spread(coarse):
            return LayerAnalysis(_MIXES)
        reason, attention_ran = self._attention_fallback_reason()
        if reason:
            return LayerAnalysis(reason)
        analysis = LayerAnalysis(rest=rest, dead_values=self._search().found(actual), attention_ran=attention_ran)
        return analysis if self._chunking.config.head_groups == 1 else self._with_groups(analysis, actual)

    def analysis_by_shapes(self) -> LayerAnalysis:
        """The analysis on meta tensors: compares no values; head groups are accepted if the numbers of heads match."""
        cut, found = False, LayerAnalysis(dead_values=self._search().found_by_shapes())
        if self._chunking.config.head_groups == 1:
            return found
        groups, shapes = self._groups()
        with contextlib.suppress(RuntimeError), torch.no_grad(), groups.cut(0):
            _, qkv = self._passes().pre_attention(self._x)
            cut = [t.shape[1] * groups.count for t in qkv] == [shape[1] for shape in shapes]
        return dataclasses.replace(found, groups=groups) if cut else found

    def _whole(self) -> tuple[list[Tensor | None], tuple | None, str]:
        """Runs the layer at once: results as of `by_chunks`, further outputs, the reason why it cannot be tiled."""
        leaves = [p.detach().requires_grad_(wanted) for p, wanted in zip(self._params, self._with_grad, strict=True)]
        x = self._x.clone().requires_grad_()
        requests: list[AttentionRequest] = []
        given, reason = guarded(x, self._sentinels), ""
        version = given._version
        part = self._call.with_tokens(given, 0, x.shape[1])

        def answer(request: AttentionRequest) -> Tensor:
            nonlocal reason
            requests.append(request._replace(tensors=()))
            self._settings = settings_of(request)
            reason = reason or layer_fallback_reason(request, part.is_argument, leaves, x.shape[1])
            return stand_in(request, request.tensors)

        with self._slots.reparametrized(leaves), attention_answered_by(answer):
            y = self._forward(*part.args, **part.kwargs)
        if given._version != version:
            return [], None, WRITES_INPUT
        if len(requests) != 1:
            return [], None, f"it calls the attention interface {len(requests)} times, not once"
        rest = y[1:] if isinstance(y, tuple) else None
        y = y[0] if isinstance(y, tuple) else y
        if not isinstance(y, Tensor) or y.dim() != 3 or y.shape[:2] != x.shape[:2]:
            reason = reason or "it does not give hidden states of its input's length"
        if any(value is not None for value in rest or ()):
            reason = reason or "it gives more than hidden states"
        reason = reason or foreign_weight(y, [x, *leaves])
        if reason:
            return [], None, reason
        self._grad = torch.randn_like(y)
        inputs = [t for t in (x, *leaves) if t.requires_grad]
        with self._slots.reparametrized(leaves):  # backward may call the module again
            grads = drain(torch.autograd.grad(y, inputs, self._grad.clone(), allow_unused=True))
        if writes_gradients(leaves):
            return [], None, WRITES_GRADIENTS
        grad_x = next(grads)
        return [y.detach(), grad_x, *fingerprints(next(grads) if t.requires_grad else None for t in leaves)], rest, ""

    def _differing_setting(self) -> str:
        """The name of an argument of the attention that differs between a chunk and all tokens; empty if none does.

        The stand-in for the attention ignores scale and window, so results would not show the difference.
        """
        passes = self._passes()
        with torch.no_grad():
            for i, (start, stop) in enumerate(self._bounds):
                with CountsTokens(stop - start) as counting:
                    settings = settings_of(passes.reach(chunk_of(self._x, start, stop), i)[0])
                self._num_counting += counting.seen
                differing = differing_setting(self._settings, settings)
                if differing:
                    return differing
        return ""

    def _passes(self) -> LayerPasses:
        self._call.hidden = self._x
        return LayerPasses(self.layer, self._forward, self._call, self._bounds, self._chunking)

    def by_chunks(self, dead_values: DeadValues, groups: HeadGroups | None = None) -> list[Tensor | None]:
        """Result and gradients (of weights: fingerprints) by chunks in reversed order, run as a tiled layer runs them."""
        passes = self._passes()
        node = LayerNode(self.layer, passes, dead_values, groups, attend=stand_in, compared=True, slots=self._slots)
        with torch.no_grad():
            y = node.forward([self._x], with_backward=True)
            node.grad_output = self._grad.clone()  # backward may overwrite it
            grad_x, *grads = node.backward([self._x, *self._params], [True, *self._with_grad])
            return [y, grad_x, *fingerprints(grads)]

    def _search(self) -> DeadValueSearch:
        large = {id(p) for p, wanted in zip(self._slots.tensors, self._with_grad, strict=True) if not wanted}
        return DeadValueSearch(
            self.layer, self._forward, self._call, self._x, self._slots, large, self._chunking, self.by_chunks
        )

    def _attention_fallback_reason(self) -> tuple[str, bool]:
        """The reason why the real attention cannot run apart from the layer, and whether it could run on a few tokens."""
        request, qkv = self._passes().pre_attention(self._x)
        few = narrowed_request(request, self._shape, self._x.shape)
        if few is None:
            return "", False
        state, sentinels = State(request.module, request.function), []
        result, failed = None, ""
        try:
            with torch.enable_grad(), WithoutDropout():
                given = [guarded(t.requires_grad_(), sentinels).clone() for t in qkv]
                result = few.run(given)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            return "", False
        else:
            written = any(t._version for t in given)
            failed = gradients_fallback_reason(result, qkv)
        finally:
            changed = state.changed()
            state.restore()
            result = given = None
        if written:
            return "its attention function writes to its queries, keys or values", True
        if changed or is_held(sentinels):
            return f"its attention function leaves something behind ({changed or 'a part of its graph'})", True
        return failed, True

    def _with_groups(self, analysis: LayerAnalysis, expected: Sequence[Tensor | None]) -> LayerAnalysis:
        """The analysis with the configured head groups, or with the reason for falling back to one call."""
        groups, _ = self._groups()
        try:
            actual = self.by_chunks(analysis.dead_values, groups)
        except RuntimeError:
            actual = [None] * len(expected)
        coarse = tolerance([self._x, *self._params, *expected])
        if not all_close(actual, expected, coarse):
            why = "the projections in front of its attention cannot be cut by heads"
        else:
            why = self._head_groups_fallback_reason(groups, coarse)
        return dataclasses.replace(analysis, one_call=why) if why else dataclasses.replace(analysis, groups=groups)

    def _head_groups_fallback_reason(self, groups: HeadGroups, coarse: float) -> str:
        """The reason why the real attention function cannot run on some of the heads; empty if it can."""
        with torch.no_grad(), WithoutDropout():
            request, qkv = self._passes().pre_attention(self._x)
            name = request.per_head(qkv[0].shape[1])
            if name:
                return f"its attention's argument {name} has a part for each head"
            few = narrowed_request(request, self._shape, self._x.shape)
            if few is None:
                return ""
            try:
                whole = few.run(qkv)
                for group in range(groups.count):
                    with groups.cut(group):
                        request, qkv = self._passes().pre_attention(self._x)
                    part = narrowed_request(request, self._shape, self._x.shape).run(qkv)
                    if part.dim() == 4 and not is_close(part, groups.of_output(whole, group), coarse):
                        return _HEADS_DIFFER
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                return _HEADS_DIFFER
        return ""

    def _groups(self) -> tuple[HeadGroups, list[torch.Size]]:
        """The configured groups, of the linear layers as wide as all heads; and the shapes of queries, keys and values."""
        wanted = self._chunking.config.head_groups
        _, (queries, keys, values) = self._passes().pre_attention(self._x)
        count = count_groups(wanted, keys.shape[1])
        widths = {t.shape[1] * t.shape[3] for t in (queries, keys, values)}
        linears = tuple(m for m in self._search().calls()[0] if is_plain_linear(m) and m.out_features in widths)
        return HeadGroups(count, linears), [t.shape for t in (queries, keys, values)]
