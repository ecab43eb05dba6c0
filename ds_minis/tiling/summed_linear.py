"""`nn.Linear` inside of a chunk loop, its weight gradient added to the sum of all chunks as it is computed.

Autograd would make each chunk's weight gradient first, in the weight's dtype: a second tensor of the weight's size (1 GiB
for the LM head of Llama-3-8B), and a rounding to bfloat16 per chunk.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ds_minis.tiling.recompute import AutocastState
from ds_minis.tiling.rows import GradientSums


class _SummedLinear(torch.autograd.Function):
    """`F.linear(x, weight, bias)` that gives `add` the operands of its weight gradient, and autograd none for it.

    `leaf` is the parameter, so that the result has a graph also where nothing else of it is trained.
    """

    @staticmethod
    def forward(
        ctx, x: Tensor, leaf: Tensor, weight: Tensor, bias: Tensor | None, add: Callable[[Tensor, Tensor], None]
    ):
        ctx.save_for_backward(x, weight)
        ctx.add = add
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        need_x, _, _, need_bias, _ = ctx.needs_input_grad
        with torch.autocast(grad.device.type, enabled=False):  # the operands are cast; the float32 sum must not be
            grad_2d = grad.flatten(0, -2)
            ctx.add(grad_2d, x.flatten(0, -2))
            return grad @ weight if need_x else None, None, None, grad_2d.sum(0) if need_bias else None, None


def summed_forwards(module: nn.Module, sums: GradientSums) -> dict[nn.Module, Callable[[Tensor], Tensor]]:
    """Forwards for the plain linear layers in `module` whose weight is one of the leaves of `sums`.

    To be set while the leaves are in place. A layer whose `forward` is not `nn.Linear`'s own, or whose weight is a tensor
    of another kind (DTensor), is left to autograd.
    """
    found = {}
    for linear in module.modules():
        if type(linear).forward is not nn.Linear.forward or "forward" in linear.__dict__:
            continue
        index = sums.index_of(linear.weight)
        if index is not None and not is_traceable_wrapper_subclass(linear.weight):
            found[linear] = _forward(linear, index, sums)
    return found


def _forward(linear: nn.Linear, index: int, sums: GradientSums) -> Callable[[Tensor], Tensor]:
    cast: dict[torch.dtype, Tensor] = {}  # once for all chunks

    def forward(input: Tensor) -> Tensor:
        leaf, bias = linear.weight, linear.bias
        dtype = AutocastState(input.device).dtype()
        if dtype is None:
            return _SummedLinear.apply(input, leaf, leaf.detach(), bias, add)
        weight = cast.setdefault(dtype, leaf.detach().to(dtype)) if dtype not in cast else cast[dtype]
        return _SummedLinear.apply(input.to(dtype), leaf, weight, None if bias is None else bias.to(dtype), add)

    def add(grad_CV: Tensor, x_CH: Tensor) -> None:
        sums.add_product(index, grad_CV, x_CH)

    return forward
