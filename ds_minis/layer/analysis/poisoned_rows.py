"""Sets some tokens of a layer without attention to NaN and checks that no other token changes.

Zero times NaN is NaN, so this also finds a mixing weight that is zero or that rounding would hide. Without attention, the
layer maps `(x, out)`, the hidden states and the attention's output, to queries, keys, values and its result.

B batch, T tokens, H hidden size, N heads, E width of a value's head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ds_minis.layer.attention.attention import AttentionRequest, attention_answered_by
from ds_minis.layer.passes.layer_args import LayerArgs
from ds_minis.tiling.core.out_of_memory import is_out_of_memory
from ds_minis.tiling.core.params import ParameterSlots
from ds_minis.tiling.verify.token_wise import LARGE, is_close


class PoisonedRows:
    """Runs a call of a layer on poisoned tokens, without gradients of its weights."""

    def __init__(self, forward: Callable[..., Any], call: LayerArgs, slots: ParameterSlots, x: Tensor):
        self._forward, self._call, self._slots, self._x = forward, call, slots, x
        self._out: Tensor | None = None
        self._grads: list[Tensor] | None = None

    def spread(self, tolerance: float) -> bool:
        """Whether a value of one token reaches another one, in forward or in backward."""
        none = torch.zeros(self._x.shape[:2], dtype=torch.bool, device=self._x.device)
        results, grads = self._run(1.0, none)
        clean = torch.rand(self._x.shape[:2], device=self._x.device) < 0.5
        for value in (float("nan"), LARGE):
            try:
                poisoned, poisoned_grads = self._run(value, ~clean)
            except Exception as error:  # proves nothing: the layer may check for NaN
                if is_out_of_memory(error):
                    raise
                continue
            pairs = list(zip(poisoned, results, strict=True))
            if value != value:  # large gradients would find no more than NaN does
                pairs += zip(poisoned_grads, grads, strict=True)
            if not all(b is None or (a is not None and is_close(a[clean], b[clean], tolerance)) for a, b in pairs):
                return True
        return False

    def _run(self, value: float, rows: Tensor) -> tuple[list[Tensor], list[Tensor | None]]:
        """Outputs and input gradients of the layer, `(B, T, ...)`, with `rows` of inputs and gradients times `value`."""
        x, made = _times(self._x, rows, value).requires_grad_(), []
        out_leaf: Tensor | None = None

        def answer(request: AttentionRequest) -> Tensor:
            nonlocal out_leaf
            made.extend(t.transpose(1, 2) for t in request.tensors)
            if self._out is None:
                queries, _, values = request.tensors
                self._out = torch.randn_like(
                    values[:, :1].transpose(1, 2).expand(-1, -1, queries.shape[1], -1).contiguous()
                )
            out_leaf = _times(self._out, rows, value).requires_grad_()
            return out_leaf * 1

        part = self._call.with_tokens(x * 1, 0, x.shape[1])
        detached = [t.detach() for t in self._slots.tensors]
        with torch.enable_grad(), self._slots.reparametrized(detached), attention_answered_by(answer):
            y = self._forward(*part.args, **part.kwargs)
            made.append(y[0] if isinstance(y, tuple) else y)
            self._grads = self._grads or [torch.randn_like(t) for t in made]
            outputs = [(t, _times(g, rows, value)) for t, g in zip(made, self._grads, strict=True) if t.requires_grad]
            tensors, grads_of = zip(*outputs, strict=True)
            grads = torch.autograd.grad(tensors, [x, out_leaf], grads_of, allow_unused=True)
        return [t.detach() for t in made], list(grads)


def _times(t: Tensor, rows: Tensor, value: float) -> Tensor:
    result = t.detach().clone()
    if value != 1:
        result[rows] *= value
    return result


def narrowed_request(request: AttentionRequest, shape: Sequence[int], few: Sequence[int]) -> AttentionRequest | None:
    """The attention's call for a few tokens, with masks cut to match; None if an argument cannot be cut.

    Args:
        shape: shape of the whole call's hidden states, `(B, S, H)`.
        few: shape of the few tokens' hidden states.
    """
    values = [*request.args, *request.kwargs.values()]
    if any(not _can_be_narrowed(v) for v in values):
        return None
    kwargs = {name: _narrowed(value, shape, few) for name, value in request.kwargs.items()}
    kwargs |= {name: 0.0 for name in ("dropout", "dropout_p") if isinstance(kwargs.get(name), float)}
    return request._replace(args=tuple(_narrowed(v, shape, few) for v in request.args), kwargs=kwargs)


def _can_be_narrowed(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_can_be_narrowed, value))
    if isinstance(value, Tensor):  # one-dimensional integers: lengths of packed sequences, which a kernel trusts
        return value.is_floating_point() or value.dtype == torch.bool or value.dim() != 1
    return type(value).__name__ != "BlockMask"


def _narrowed(value: Any, shape: Sequence[int], few: Sequence[int]) -> Any:
    if isinstance(value, tuple | list):
        return type(value)(_narrowed(v, shape, few) for v in value)
    if not isinstance(value, Tensor) or value.dim() < 2:
        return value
    if value.shape[0] == shape[0] and shape[0] > few[0]:
        value = value[: few[0]]
    index = torch.arange(few[1], device=value.device) % shape[1]
    for dim in (-1, -2) if value.dim() > 2 else (-1,):
        if value.shape[dim] == shape[1] and shape[1] != few[1]:
            value = value.index_select(dim, index)
    return value
