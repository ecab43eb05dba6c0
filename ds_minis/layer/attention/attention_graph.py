"""The graph of one attention, which holds no more than the attention's own backward reads.

An attention need not read its queries, keys and values in backward, nor its output or the output's gradient: under sequence
parallelism it reads what it got from other ranks in exchange for them. So nothing else may hold them.

Shapes: B batch, S tokens, N heads, K KV heads, D and E their widths.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge


def sources_of(qkv: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], list[GradientEdge]]:
    """The same tensors as the beginnings of a graph, and where the graph gives their gradients.

    They are no leaves: AccumulateGrad would hold them as long as the graph is there.
    """
    sources = _Source.apply(qkv[0].new_empty((), requires_grad=True), *qkv)
    return sources, [get_gradient_edge(t) for t in sources]


class _Source(torch.autograd.Function):
    @staticmethod
    def forward(ctx, token: Tensor, *qkv: Tensor):
        return tuple(t.view_as(t) for t in qkv)

    @staticmethod
    def backward(ctx, *grads):  # never run: gradients are taken at its outputs
        return None, *grads


class AttentionGraph:
    """One attention, with a graph. Its output's gradient is freed as soon as the graph has read it.

    Args:
        attend: runs the attention on such queries, keys and values.
        qkv: `(B, N, S, D)`, `(B, K, S, D)` and `(B, K, S, E)`; emptied, so that the caller does not hold them either.

    Attributes:
        out: the output, `(B, S, N, E)`, until `take_out` is called.
    """

    def __init__(self, attend: Callable[[Sequence[Tensor]], Tensor], qkv: list[Tensor]):
        self._grad_out: list[Tensor] = []
        with torch.enable_grad():
            sources, self._inputs = sources_of(qkv)
            qkv.clear()
            out = _HandedOver.apply(attend(sources), self._grad_out)
        self.out = out.detach()
        self._seed = out.new_zeros((), requires_grad=False).expand(out.shape)
        self._edge = get_gradient_edge(out)  # which does not hold the output

    def take_out(self) -> Tensor:
        """The output, which is not held afterwards."""
        out, self.out = self.out, None
        return out

    def backward(self, grad_out: list[Tensor], leaves: Sequence[Tensor]) -> tuple[list[Tensor | None], list]:
        """The gradients of queries, keys and values, and those of `leaves`; None where there is none.

        Args:
            grad_out: the gradient of the output, as a list of one tensor, which is emptied.
        """
        self._grad_out.append(grad_out.pop())
        grads = torch.autograd.grad(self._edge, [*self._inputs, *leaves], self._seed, allow_unused=True)
        num_inputs = len(self._inputs)
        return list(grads[:num_inputs]), list(grads[num_inputs:])


class _HandedOver(torch.autograd.Function):
    """Takes its gradient from a list: `autograd.grad` would hold its own argument until it returns."""

    @staticmethod
    def forward(ctx, out: Tensor, grads: list[Tensor]) -> Tensor:
        ctx.grads = grads
        return out.view_as(out)

    @staticmethod
    def backward(ctx, seed: Tensor):
        return ctx.grads.pop(), None
