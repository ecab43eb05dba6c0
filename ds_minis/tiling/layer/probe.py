"""What is looked for where a few tokens are run through a layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ds_minis.tiling.core.out_of_memory import is_out_of_memory
from ds_minis.tiling.core.row_args import CONSTANTS, tensors_in
from ds_minis.tiling.layer.dead_value_search import stand_in
from ds_minis.tiling.passes.attention import AttentionRequest, attention_answered_by
from ds_minis.tiling.passes.layer_args import LayerArgs
from ds_minis.tiling.verify.token_wise import are_close, is_close

PROBE_BATCH, PROBE_TOKENS, PROBE_CHUNKS = 2, 37, 3  # a prime, which hardly any width is a multiple of


class CountsTokens(TorchFunctionMode):
    """Sees whether as many numbers are counted as there are tokens: positions that are no argument of the layer.

    What is made of them may show at thousands of tokens alone: the temperature of Llama 4's attention is 1 below 8,192.
    """

    def __init__(self, num_tokens: int):
        super().__init__()
        self.seen, self._shape = False, (num_tokens,)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.seen = self.seen or (func is torch.arange and tuple(result.shape) == self._shape)
        return result


def all_close(actual: Sequence[Tensor | None], expected: Sequence[Tensor | None], coarse: float) -> bool:
    """Result and gradient of the hidden states by tokens, the other gradients as they are."""
    pairs = list(zip(actual, expected, strict=True))
    by_tokens = ((None if t is None else t.transpose(0, 1) for t in pair) for pair in pairs[:2])
    return all(are_close(*pair, coarse) for pair in by_tokens) and all(is_close(a, e, coarse) for a, e in pairs[2:])


def gradients_fallback_reason(result: Tensor, heads: Sequence[Tensor]) -> str:
    """Whether gradients of queries, keys and values alone can be asked for; the reentrant kind of checkpointing refuses."""
    if not result.requires_grad:
        return ""
    try:
        torch.autograd.grad(result, heads, torch.ones_like(result), allow_unused=True)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        words = " ".join(f"{type(error).__name__}: {error}".split())
        return f"its attention's backward fails where it is run apart from the layer's ({words[:100]})"
    return ""


def a_few_tokens(forward: Callable[..., Any], call: LayerArgs) -> list[Tensor]:
    """What the layer makes of a few random tokens, with the stand-in for its attention, and what it gives that."""
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
    """Whether a call of the attention for a part of the tokens tells what the call for all of them would be."""
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
