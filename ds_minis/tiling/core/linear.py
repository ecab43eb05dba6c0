"""`nn.Linear` inside of a chunk loop.

- Its weight gradient is added to the sum of all chunks as it is computed. Autograd would make each chunk's first, in the
  weight's dtype: a second tensor of the weight's size (1 GiB for the LM head of Llama-3-8B), and a rounding to bfloat16 each.
- Where nobody reads its result, that is not computed: its backward reads its input and its weight.

Shapes: C rows of one chunk, V outputs and H inputs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ds_minis.tiling.core.grad_accum import GradientSums
from ds_minis.tiling.core.replay import AutocastState, patched_forwards

Forwards = dict[nn.Module, Callable]


class _Linear(torch.autograd.Function):
    """`F.linear(x, weight, bias)`.

    Args:
        leaf: the parameter that the weight was cast from, so that the result has a graph also where nothing else is trained.
        add: given the operands of the weight gradient, in the place of autograd; None for autograd.
        value: given as the result, expanded, where nobody reads it; None for the product.
    """

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        leaf: Tensor | None,
        add: Callable[[Tensor, Tensor], None] | None,
        value: float | None,
    ):
        ctx.save_for_backward(x, weight)
        ctx.add = add
        if value is None:
            # Not a view, as which `F.linear` gives three dimensions: the module may write to it.
            y = F.linear(x.flatten(0, -2), weight, bias)
            return torch.ops.aten._unsafe_view.default(y, (*x.shape[:-1], weight.shape[0]))
        return x.new_full((), value).expand(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias, *_ = ctx.needs_input_grad
        with _without_autocast(grad.device.type):  # the operands are cast; the float32 sum must not be
            grad_2d, grad_weight = grad.flatten(0, -2), None
            if ctx.add is not None:
                ctx.add(grad_2d, x.flatten(0, -2))
            elif need_weight:
                grad_weight = grad_2d.t() @ x.flatten(0, -2)
            grad_x = (grad_2d @ weight).view(x.shape) if need_x else None
            return grad_x, grad_weight, grad_2d.sum(0) if need_bias else None, None, None, None


def _without_autocast(device_type: str) -> contextlib.AbstractContextManager:
    if not torch.amp.is_autocast_available(device_type):
        return contextlib.nullcontext()
    return torch.autocast(device_type, enabled=False)


def is_plain_linear(module: nn.Module) -> bool:
    """Whether nothing but the product of a linear layer is run by the module: not quantized, no forward of an instance's."""
    hooks = module._forward_hooks or module._forward_pre_hooks
    return type(module).forward is nn.Linear.forward and "forward" not in module.__dict__ and not hooks


def chunk_forwards(
    module: nn.Module, sums: Sequence[GradientSums], unread: Sequence[nn.Linear] = (), value: float = 0.0
) -> Forwards:
    """Forwards for the plain linear layers in `module`, to be set while leaves are in the places of its parameters.

    A layer whose `forward` is not `nn.Linear`'s own, or whose weight is a tensor of another kind (DTensor), is left to
    autograd.

    Args:
        sums: where the weight gradients of those layers go whose weight is among their leaves.
        unread: layers whose result nobody reads.
        value: what stands in the place of that.
    """
    forwards: Forwards = {}
    for linear in module.modules():
        own = type(linear).forward is nn.Linear.forward and "forward" not in linear.__dict__
        if not own or is_traceable_wrapper_subclass(linear.weight):
            continue
        add = _adder(linear.weight, sums)
        if linear in unread:
            forwards[linear] = _forward(linear, add, value)
        elif add is not None:
            forwards[linear] = _forward(linear, add, None)
    return forwards


def _adder(leaf: Tensor, all_sums: Sequence[GradientSums]) -> Callable[[Tensor, Tensor], None] | None:
    for sums in all_sums:
        index = sums.index_of(leaf)
        if index is not None:
            return lambda grad_CV, x_CH, sums=sums, index=index: sums.add_product(index, grad_CV, x_CH)
    return None


def _forward(linear: nn.Linear, add: Callable[[Tensor, Tensor], None] | None, value: float | None) -> Callable:
    cast: dict[torch.dtype, Tensor] = {}  # once for all chunks

    def forward(input: Tensor) -> Tensor:
        leaf, bias, autocast = linear.weight, linear.bias, AutocastState(input.device)
        dtype = autocast.dtype_of(input) if autocast.dtype() is not None else None
        if input.dim() < 2:
            return F.linear(input, leaf, bias)
        if dtype is not None:
            input, bias = input.to(dtype), None if bias is None else bias.to(dtype)
        if add is None:
            return _Linear.apply(input, leaf if dtype is None else leaf.to(dtype), bias, None, None, value)
        if dtype is None:
            return _Linear.apply(input, leaf.detach(), bias, leaf, add, value)
        if dtype not in cast:
            cast[dtype] = leaf.detach().to(dtype)
        return _Linear.apply(input, cast[dtype], bias, leaf, add, value)

    return forward


class LastLinear:
    """Finds the `nn.Linear` whose output is a module's result, to leave its product out of the recomputation.

    The backward of a linear layer reads its input and its weight, never its output. Without this, tiling would cost one
    matmul more than activation checkpointing, which stops before that product.
    """

    def __init__(self, module: nn.Module):
        # Only the plain layer: a quantized or hooked forward may do something else.
        self._linears = [
            m for m in module.modules() if type(m).forward is nn.Linear.forward and "forward" not in m.__dict__
        ]
        self._found: nn.Linear | None = None

    @contextlib.contextmanager
    def watched(self) -> Iterator[Callable[[Tensor], None]]:
        """Yields a function to be given the result of the run inside."""
        outputs: list[tuple[nn.Linear, Tensor, int]] = []

        def watch(linear: nn.Linear):
            def forward(input):
                y = type(linear).forward(linear, input)
                outputs.append((linear, y, y._version))
                return y

            return forward

        def decide(result: Tensor) -> None:
            calls = [linear for linear, _, _ in outputs]
            for linear, y, version in outputs:
                # The same memory, not written since: a later in-place operation might need the value in its backward.
                is_result = _base(result) is _base(y) and result.numel() == y.numel() and y._version == version
                if is_result and calls.count(linear) == 1:
                    self._found = linear

        with patched_forwards({linear: watch(linear) for linear in self._linears}):
            yield decide

    def found(self) -> tuple[nn.Linear, ...]:
        """The layer, if there is one and nothing has come to stand around it since."""
        return (self._found,) if self._found is not None and is_plain_linear(self._found) else ()


def _base(tensor: Tensor) -> Tensor:
    return tensor if tensor._base is None else tensor._base
