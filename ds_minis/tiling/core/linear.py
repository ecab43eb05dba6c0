"""`nn.Linear` inside of a chunk loop.

- Its weight gradient goes straight into the sum over all chunks. Autograd would first make each chunk's gradient in the
  weight's dtype: a second tensor of that size (1 GiB for the LM head of Llama-3-8B), and a rounding to bfloat16 each.
- Its output is not computed where it is a dead value (the backward reads only input and weight), or where it is given.

Shapes: C rows of one chunk, V outputs and H inputs.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ds_minis.tiling.core.grad_accum import GradientSums
from ds_minis.tiling.core.params import submodules
from ds_minis.tiling.core.replay import autocast_dtype, matmul_dtype, patched_forwards

Forwards = dict[nn.Module, Callable]
Result = Callable[[Tensor], Tensor | None]  # from a layer's input to its result; None: to be computed
Results = Mapping[nn.Linear, Result]
_NONE: Results = MappingProxyType({})


class _Linear(torch.autograd.Function):
    """`F.linear(x, weight, bias)`.

    Args:
        leaf: the parameter that `weight` was cast from; it gives the result a graph where nothing else is trained.
        add: accumulates the weight gradient from its two operands; None leaves that to autograd.
        result: gives the result from `x`, without a graph; where it is None or gives None, the product is computed.
    """

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        leaf: Tensor | None,
        add: Callable[[Tensor, Tensor], None] | None,
        result: Result | None,
    ):
        ctx.save_for_backward(x, weight)
        ctx.add = add
        y = None if result is None else result(x)
        if y is not None:
            return y.detach()  # autograd makes what is returned part of the graph
        if bias is None:
            return F.linear(x, weight)
        # Not a view, which `F.linear` returns with a bias: the module may write to the result in place.
        y = F.linear(x.flatten(0, -2), weight, bias)
        return torch.ops.aten._unsafe_view.default(y, (*x.shape[:-1], weight.shape[0]))

    @staticmethod
    def backward(ctx, grad: Tensor):  # never differentiated, but `once_differentiable` would cost time at each call
        if autocast_dtype(grad.device.type) is None:
            return _gradients(ctx, grad)
        with torch.autocast(grad.device.type, enabled=False):  # the operands are cast; the float32 sum must not be
            return _gradients(ctx, grad)


def _gradients(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    need_x, need_weight, need_bias, *_ = ctx.needs_input_grad
    grad_2d, grad_weight = grad.flatten(0, -2), None
    if ctx.add is not None:
        ctx.add(grad_2d, x.flatten(0, -2))
    elif need_weight:
        grad_weight = grad_2d.t() @ x.flatten(0, -2)
    grad_x = (grad_2d @ weight).view(x.shape) if need_x else None
    return grad_x, grad_weight, grad_2d.sum(0) if need_bias else None, None, None, None


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a call runs `nn.Linear.forward` and nothing else: no quantized class, patched forward or hook."""
    return runs_linear_forward(module) and not (module._forward_hooks or module._forward_pre_hooks)


def runs_linear_forward(module: nn.Module) -> bool:
    """Whether the module's forward is `nn.Linear.forward`: neither overridden in its class nor patched."""
    return type(module).forward is nn.Linear.forward and "forward" not in module.__dict__


def chunk_forwards(
    module: nn.Module,
    sums: Sequence[GradientSums],
    dead: Sequence[nn.Linear] = (),
    value: float = 0.0,
    results: Results = _NONE,
) -> Forwards:
    """Forwards for the plain linear layers in `module`, to be patched in while leaves replace its parameters.

    Other linear layers (`plain_linears`) are left to autograd.

    Args:
        sums: accumulate the gradients of the weights that are among their leaves.
        dead: layers whose result is a dead value.
        value: fills the results of `dead`.
        results: give the results of other layers, which are not computed either.
    """
    forwards: Forwards = {}
    for linear in plain_linears(module):
        add = _adder(linear.weight, sums)
        result = _filled(linear, value) if linear in dead else results.get(linear)
        if add is not None or result is not None:
            forwards[linear] = _forward(linear, add, result)
    return forwards


def plain_linears(module: nn.Module) -> Iterator[nn.Linear]:
    """The layers in `module` that run `nn.Linear.forward`, and whose weight is no tensor subclass (DTensor)."""
    for linear in submodules(module):
        if runs_linear_forward(linear) and not is_traceable_wrapper_subclass(linear.weight):
            yield linear


def _filled(linear: nn.Linear, value: float) -> Callable[[Tensor], Tensor]:
    return lambda x: x.new_full((), value).expand(*x.shape[:-1], linear.weight.shape[0])


def _adder(leaf: Tensor, all_sums: Sequence[GradientSums]) -> Callable[[Tensor, Tensor], None] | None:
    for sums in all_sums:
        index = sums.index_of(leaf)
        if index is not None:
            return functools.partial(sums.add_product, index)
    return None


def _forward(
    linear: nn.Linear,
    add: Callable[[Tensor, Tensor], None] | None,
    result: Result | None,
) -> Callable:
    cast: dict[torch.dtype, Tensor] = {}  # cast once for all chunks

    def forward(input: Tensor) -> Tensor:
        leaf, bias, dtype = linear.weight, linear.bias, matmul_dtype(input)
        if input.dim() < 2:
            return F.linear(input, leaf, bias)
        if dtype is not None:
            input, bias = input.to(dtype), None if bias is None else bias.to(dtype)
        if add is None:
            return _Linear.apply(input, leaf if dtype is None else leaf.to(dtype), bias, None, None, result)
        if dtype is None:
            return _Linear.apply(input, leaf.detach(), bias, leaf, add, result)
        if dtype not in cast:
            cast[dtype] = leaf.detach().to(dtype)
        return _Linear.apply(input, cast[dtype], bias, leaf, add, result)

    return forward


class LastLinear:
    """Finds the `nn.Linear` whose output is the module's result, so that recomputation can skip its matmul.

    The backward of a linear layer reads its input and its weight, never its output. Without this, tiling would cost one
    matmul more than activation checkpointing, which stops recomputing before it.
    """

    def __init__(self, module: nn.Module):
        # Plain layers only: a quantized or patched forward may do something else.
        self._linears = list(plain_linears(module))
        self._found: nn.Linear | None = None

    @contextlib.contextmanager
    def watched(self) -> Iterator[Callable[[Tensor], None]]:
        """Yields a function; call it with the result of the run."""
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
                # Same memory, not written since: the backward of a later in-place operation might read the value.
                is_result = _base(result) is _base(y) and result.numel() == y.numel() and y._version == version
                if is_result and calls.count(linear) == 1:
                    self._found = linear

        with patched_forwards({linear: watch(linear) for linear in self._linears}):
            yield decide

    def found(self) -> tuple[nn.Linear, ...]:
        """The layer, if one was found and its forward is still plain."""
        return (self._found,) if self._found is not None and is_plain_linear(self._found) else ()


def _base(tensor: Tensor) -> Tensor:
    return tensor if tensor._base is None else tensor._base
