"""Finds the dead values of a layer: those that may be NaN without changing any result or gradient."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ds_minis.layer.analysis.value_trace import ValueTrace
from ds_minis.layer.attention.attention import AttentionRequest, attention_answered_by
from ds_minis.layer.passes.layer_args import LayerArgs
from ds_minis.layer.passes.layer_passes import NO_DEAD_VALUES, DeadValues, LayerPasses
from ds_minis.tiling.core.linear import is_plain_linear
from ds_minis.tiling.core.params import ParameterSlots
from ds_minis.tiling.modules.state import Chunking
from ds_minis.tiling.verify.token_wise import is_close

_MOST_LINEARS = 32  # linear layers checked after the attention; a mixture of experts may have hundreds


class DeadValueSearch:
    """The search in one layer.

    Args:
        forward: the layer's own forward.
        call: the call for a few tokens.
        x: its hidden states.
        slots: the layer's trainable tensors.
        large: ids of those whose gradients are not computed because they are too large.
        by_chunks: computes result and gradients of the layer without the given dead values.
    """

    def __init__(
        self,
        layer: nn.Module,
        forward: Callable[..., Any],
        call: LayerArgs,
        x: Tensor,
        slots: ParameterSlots,
        large: Collection[int],
        chunking: Chunking,
        by_chunks: Callable[..., list[Tensor | None]],
    ):
        self._layer, self._forward, self._call, self._x = layer, forward, call, x
        self._slots, self._large, self._chunking, self._by_chunks = slots, large, chunking, by_chunks

    def found(self, expected: Sequence[Tensor | None]) -> DeadValues:
        """Follows the values of all candidates, and checks together those that nothing reads.

        Args:
            expected: result and gradients without dead values.
        """
        found = self._followed()
        if self._matter(found, expected):
            found = self._each(found, expected)
            if self._matter(found, expected):
                return NO_DEAD_VALUES
        return found

    def found_by_shapes(self) -> DeadValues:
        """Those that no operation reads, of tensors without values; none where a run without them fails."""
        try:
            found = self._followed()
            self._by_chunks(found)
        except RuntimeError:
            return NO_DEAD_VALUES
        return found

    def _matter(self, dead_values: DeadValues, expected: Sequence[Tensor | None]) -> bool:
        """Whether NaN in place of these values changes the result or a gradient."""
        try:
            actual = self._by_chunks(dataclasses.replace(dead_values, value=float("nan")))
        except RuntimeError:  # such as an in-place write to an expanded fill value
            return True
        pairs = zip(actual, expected, strict=True)
        return not all(a is e or (a is not None and e is not None and is_close(a, e, 1e-6)) for a, e in pairs)

    def _each(self, found: DeadValues, expected: Sequence[Tensor | None]) -> DeadValues:
        """Checks one value at a time, since one that fails hides the others: an operation may reject a fill value."""

        def dead(kind: str) -> tuple:
            values = getattr(found, kind)
            return tuple(v for v in values if not self._matter(DeadValues(**{kind: (v,)}), expected))

        return DeadValues(dead("outputs"), dead("values_pre_attention"), dead("values_post_attention"))

    def _followed(self) -> DeadValues:
        """The values that no operation reads on the way to a result or a gradient."""
        before, after = self.calls()
        linears_before = [m for m in before if is_plain_linear(m)]
        linears_after = [m for m in after if is_plain_linear(m) and m not in before][-_MOST_LINEARS:]
        readers = self._with_large_weights()
        leaves = [t.detach().requires_grad_(id(t) not in self._large) for t in self._slots.tensors]
        x = self._x.detach().requires_grad_()
        self._call.hidden = self._x
        passes = LayerPasses(self._layer, self._forward, self._call, [(0, x.shape[1])], self._chunking)
        with passes.running(), passes.again(), self._slots.reparametrized(leaves), torch.enable_grad():
            pre_attention = ValueTrace(linears_before, readers)
            with pre_attention.watching():
                request, _ = passes.reach(x, 0)
                read_before = pre_attention.read_by(_gradients(request.tensors, [x, *leaves]))
            out = stand_in(request, [t.detach() for t in request.tensors]).requires_grad_()
            del request
            post_attention = ValueTrace([*before, *linears_after], readers)
            with post_attention.watching():
                y = passes.post_attention(x, out, 0)
                grads = _gradients([y], [x, out, *leaves])
                read_after = post_attention.read_by(grads)
                used = post_attention.read_by([y, *grads])
        outputs = _outermost(self._layer, before, lambda module: module not in used)
        return DeadValues(
            tuple(outputs),
            tuple(m for m in linears_before if m not in read_before),
            tuple(m for m in linears_after if m not in read_after),
        )

    def _with_large_weights(self) -> list[nn.Module]:
        """Submodules whose weight gradients read their input, but are not computed here: no result depends on it."""
        return [m for m in self._layer.modules() if any(id(p) in self._large for p in m._parameters.values())]

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


def _gradients(results: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor | None]:
    results = [t for t in results if t.requires_grad]
    inputs = [t for t in inputs if t.requires_grad]
    return torch.autograd.grad(results, inputs, [torch.randn_like(t) for t in results], allow_unused=True)


def _draws(part: nn.Module) -> bool:
    return "drop" in type(part).__name__.lower() and bool(getattr(part, "p", 1))


def _outermost(
    module: nn.Module, before: dict[nn.Module, tuple[int, torch.dtype]], is_dead: Callable[[nn.Module], bool]
) -> Iterator[tuple[nn.Module, int, torch.dtype]]:
    """The outermost submodules called before the attention whose output is dead after it.

    Submodules that draw random numbers are left out: skipping them would change the numbers drawn later.
    """
    for child in module.children():
        if child in before and not any(map(_draws, child.modules())) and is_dead(child):
            yield child, *before[child]
        else:
            yield from _outermost(child, before, is_dead)


def stand_in(request: AttentionRequest, tensors: Sequence[Tensor]) -> Tensor:
    """An attention without a mask, over all tokens, `(B, T, N, E)`.

    No softmax: its result would not depend on the keys' bias, whose gradient would be pure rounding error.
    """
    queries, keys, values = tensors
    groups = queries.shape[1] // keys.shape[1]
    keys, values = (t.repeat_interleave(groups, 1) for t in (keys, values))
    weights = (queries @ keys.transpose(-1, -2) * queries.shape[-1] ** -0.5).sigmoid() / keys.shape[2] ** 0.5
    return (weights @ values).transpose(1, 2).contiguous()
