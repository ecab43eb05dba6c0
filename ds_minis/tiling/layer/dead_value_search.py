"""Finds the dead values of a layer: those that may be NaN without changing any result or gradient."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ds_minis.tiling.core.linear import is_plain_linear
from ds_minis.tiling.core.replay import AutocastState
from ds_minis.tiling.modules.state import Chunking
from ds_minis.tiling.passes.attention import AttentionRequest, attention_answered_by
from ds_minis.tiling.passes.layer_args import LayerArgs
from ds_minis.tiling.passes.layer_passes import NO_DEAD_VALUES, DeadValues
from ds_minis.tiling.verify.token_wise import is_close

_MOST_LINEARS = 32  # linear layers checked after the attention; a mixture of experts may have hundreds


class DeadValueSearch:
    """The search in one layer.

    Args:
        forward: the layer's own forward.
        call: the call for a few tokens.
        x: its hidden states.
        without_grad: weights whose gradients are not computed because they are too large.
        by_chunks: computes result and gradients of the layer without the given dead values.
    """

    def __init__(
        self,
        layer: nn.Module,
        forward: Callable[..., Any],
        call: LayerArgs,
        x: Tensor,
        without_grad: Sequence[Tensor],
        chunking: Chunking,
        by_chunks: Callable[..., list[Tensor | None]],
    ):
        self._layer, self._forward, self._call, self._x = layer, forward, call, x
        self._without_grad, self._chunking, self._by_chunks = without_grad, chunking, by_chunks

    def found(self, expected: Sequence[Tensor | None]) -> DeadValues:
        """Tries the dead values of a layer with the same signature, else searches by bisection and checks all together."""

        def matters(dead_values: DeadValues, at_once: list[Tensor | None] | None = None) -> bool:
            wanted = expected if at_once is None else at_once
            try:
                with self._large_weights_watched() as reached:
                    actual = (
                        self._by_chunks(dead_values) if at_once is None else self._by_chunks(dead_values, None, True)
                    )
            except RuntimeError:  # such as an in-place write to an expanded fill value
                return True
            if reached and not dead_values.outputs:
                return True
            pairs = zip(actual, wanted, strict=True)
            return not all(a is e or (a is not None and e is not None and is_close(a, e, 1e-6)) for a, e in pairs)

        nan, known, parts = float("nan"), self._chunking.dead_values, dict(self._layer.named_modules())
        make = self._layer_signature(parts)
        if make in known:
            found = known[make].map_modules(parts.__getitem__)
            values = dataclasses.replace(found, outputs=(), value=nan)
            if not matters(values) and not matters(dataclasses.replace(found, value=nan)):
                return found
        before, after = self.calls()
        # Candidates are checked with all tokens in one chunk, which is faster; the result is checked with several chunks.
        whole = self._by_chunks(NO_DEAD_VALUES, None, True)
        outputs = tuple(
            _dead_outputs(self._layer, before, lambda o: not matters(DeadValues(outputs=(o,), value=nan), whole))
        )
        linears_before = [m for m in before if is_plain_linear(m)]
        linears_after = [m for m in after if is_plain_linear(m) and m not in before]
        values_pre_attention = _which(
            linears_before, lambda some: not matters(DeadValues(values_pre_attention=some, value=nan), whole)
        )
        values_post_attention = _which(
            linears_after[-_MOST_LINEARS:],
            lambda some: not matters(DeadValues(values_post_attention=some, value=nan), whole),
        )
        everything = DeadValues(outputs, values_pre_attention, values_post_attention, value=nan)
        if matters(everything):
            return NO_DEAD_VALUES
        found = DeadValues(outputs, values_pre_attention, values_post_attention)
        known[make] = found.map_modules({part: name for name, part in parts.items()}.__getitem__)
        return found

    def _layer_signature(self, layer_parts: dict[str, nn.Module]) -> tuple:
        """Cache key: names and classes of the parts, weights' shapes, dtypes, active dropout.

        Classes by name: a tiled class is created at run time and could not be pickled with the model.
        """
        autocast = AutocastState(self._x.device).dtype()
        parts = (
            (name, type(part).__module__, type(part).__qualname__, _draws(part), *_shapes(part))
            for name, part in layer_parts.items()
        )
        return self._x.dtype, autocast, *parts

    @contextlib.contextmanager
    def _large_weights_watched(self) -> Iterator[list[nn.Module]]:
        """Yields a list of the submodules with large weights that get NaN as input.

        Their weight gradients read that input, but are not computed here, so no result would show the NaN.
        """
        large = {id(p) for p in self._without_grad}
        parts = [m for m in self._layer.modules() if large and any(id(p) in large for p in m._parameters.values())]
        reached: list[nn.Module] = []

        def watch(module, args):
            if any(isinstance(t, Tensor) and t.is_floating_point() and t.isnan().any() for t in args):
                reached.append(module)

        handles = [part.register_forward_pre_hook(watch) for part in parts]
        try:
            yield reached
        finally:
            for handle in handles:
                handle.remove()

    def calls(self) -> tuple[dict[nn.Module, tuple[int, torch.dtype]], dict[nn.Module, tuple[int, torch.dtype]]]:
        """Submodules called exactly once, before and after the attention, with width and dtype of their outputs."""
        calls: dict[nn.Module, list] = {}
        before: list[nn.Module] = []
        handles = []

        def watch(module, args, output):
            row_wise = (
                isinstance(output, Tensor)
                and bool(args)
                and isinstance(args[0], Tensor)
                and output.shape[:-1] == args[0].shape[:-1]
                and output.numel() > 0  # an expert without tokens looks dead only in this run
            )
            calls.setdefault(module, []).append((output.shape[-1], output.dtype) if row_wise else None)

        def answer(request: AttentionRequest) -> Tensor:
            before.extend(calls)
            return stand_in(request, request.tensors)

        part = self._call.with_tokens(self._x, 0, self._x.shape[1])
        try:
            for module in self._layer.modules():
                if module is not self._layer:
                    handles.append(module.register_forward_hook(watch))
            with torch.no_grad(), attention_answered_by(answer):
                self._forward(*part.args, **part.kwargs)
        finally:
            for handle in handles:
                handle.remove()
        once = {module: seen[0] for module, seen in calls.items() if len(seen) == 1 and seen[0] is not None}
        return {m: v for m, v in once.items() if m in before}, {m: v for m, v in once.items() if m not in before}


def _which(linears: Sequence[nn.Module], dead_values: Callable[[tuple], bool]) -> tuple:
    """The dead ones among some layers, by bisection: if all are dead together, each one is."""
    if not linears or dead_values(tuple(linears)):
        return tuple(linears)
    if len(linears) == 1:
        return ()
    half = len(linears) // 2
    return _which(linears[:half], dead_values) + _which(linears[half:], dead_values)


def _draws(part: nn.Module) -> bool:
    return "drop" in type(part).__name__.lower() and bool(getattr(part, "p", 1))


def _shapes(part: nn.Module) -> tuple:
    return tuple((name, p.shape, p.dtype) for name, p in part._parameters.items() if p is not None)


def _dead_outputs(
    module: nn.Module, before: dict[nn.Module, tuple[int, torch.dtype]], is_dead: Callable[[tuple], bool]
) -> Iterator[tuple[nn.Module, int, torch.dtype]]:
    """The outermost submodules called before the attention whose output is dead after it.

    Submodules that draw random numbers are left out: skipping them would change the numbers drawn later.
    """
    for child in module.children():
        output = (child, *before[child]) if child in before and not any(map(_draws, child.modules())) else None
        if output is not None and is_dead(output):
            yield output
        else:
            yield from _dead_outputs(child, before, is_dead)


def stand_in(request: AttentionRequest, tensors: Sequence[Tensor]) -> Tensor:
    """An attention without a mask, over all tokens, `(B, T, N, E)`.

    No softmax: its result would not depend on the keys' bias, whose gradient would be pure rounding error.
    """
    queries, keys, values = tensors
    groups = queries.shape[1] // keys.shape[1]
    keys, values = (t.repeat_interleave(groups, 1) for t in (keys, values))
    weights = (queries @ keys.transpose(-1, -2) * queries.shape[-1] ** -0.5).sigmoid() / keys.shape[2] ** 0.5
    return (weights @ values).transpose(1, 2).contiguous()
