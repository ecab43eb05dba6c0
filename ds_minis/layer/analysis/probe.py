"""Checks of a layer on a few tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ds_minis.layer.analysis.dead_value_search import stand_in
from ds_minis.layer.attention.attention import AttentionRequest, attention_answered_by
from ds_minis.layer.passes.layer_args import LayerArgs
from ds_minis.tiling.core.out_of_memory import is_out_of_memory
from ds_minis.tiling.core.row_args import CONSTANTS, tensors_in
from ds_minis.tiling.verify.token_wise import are_close, is_close

PROBE_BATCH, PROBE_TOKENS, PROBE_CHUNKS = 2, 37, 3  # 37 is prime: few widths are multiples of it


class CountsTokens(TorchFunctionMode):
    """Detects a `torch.arange` over all tokens: positions that the layer makes itself.

    Their effect may appear only after thousands of tokens: the temperature of Llama 4's attention is 1 below 8,192.
    """

    def __init__(self, num_tokens: int):
        super().__init__()
        self.seen, self._shape = False, (num_tokens,)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.seen = self.seen or (func is torch.arange and tuple(result.shape) == self._shape)
        return result


def all_close(actual: Sequence[Tensor | None], expected: Sequence[Tensor | None], coarse: float) -> bool:
    """Compares the result and the gradient of the hidden states token by token, the other gradients as a whole."""
    pairs = list(zip(actual, expected, strict=True))
    by_tokens = ((None if t is None else t.transpose(0, 1) for t in pair) for pair in pairs[:2])
    return all(are_close(*pair, coarse) for pair in by_tokens) and all(is_close(a, e, coarse) for a, e in pairs[2:])


def gradients_fallback_reason(result: Tensor, qkv: Sequence[Tensor]) -> str:
    """The reason why `autograd.grad` for queries, keys and values fails (reentrant checkpointing); empty if it works."""
    if not result.requires_grad:
        return ""
    try:
        torch.autograd.grad(result, qkv, torch.ones_like(result), allow_unused=True)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        words = " ".join(f"{type(error).__name__}: {error}".split())
        return f"its attention's backward fails where it is run apart from the layer's ({words[:100]})"
    return ""


def a_few_tokens(forward: Callable[..., Any], call: LayerArgs) -> list[Tensor]:
    """Runs the layer on a few random tokens with the stand-in; returns its outputs and the attention's arguments."""
    few = call.narrowed(PROBE_BATCH, PROBE_TOKENS, torch.randn_like)
    part, given = few.with_tokens(few.hidden, 0, few.hidden.shape[1]), []

    def answer(request: AttentionRequest) -> Tensor:
        given.extend((*request.tensors, *request.argument_tensors()))
        return stand_in(request, request.tensors)

    with attention_answered_by(answer):
        y = forward(*part.args, **part.kwargs)
    return [*given, *tensors_in(y)]


def layer_fallback_reason(
    request: AttentionRequest, is_argument: Callable[[Tensor], bool], leaves: Sequence[Tensor], num_tokens: int
) -> str:
    """The reason why a chunk's call of the attention does not determine the call for all tokens; empty if it does."""
    if any(t.shape[2] != num_tokens for t in request.tensors):
        return "its attention is given keys of other tokens too"
    held = {id(t) for t in (*leaves, *request.module.parameters(), *request.module.buffers())}

    def known(value: Any) -> bool:
        if isinstance(value, tuple | list):
            return all(map(known, value))
        if isinstance(value, Tensor):
            return is_argument(value) or id(value) in held
        return isinstance(value, CONSTANTS) or type(value).__name__ == "BlockMask"

    for name, value in (*enumerate(request.args), *request.kwargs.items()):
        if not known(value):
            return f"its attention's argument {name!r} is made in the layer, perhaps of all tokens"
    return ""
