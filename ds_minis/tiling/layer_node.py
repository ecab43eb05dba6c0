"""A whole decoder layer as one autograd node that saves the layer's input alone. Source: issue 5 and DESIGN finding 4.

All but the attention is token-wise. So the layer is run on one chunk after the other up to its attention (*before*), then
the attention once for all tokens, then the layer on each chunk once more with the attention answered (*after*). Backward
does the same and goes back: *after* chunk by chunk, the attention, *before* chunk by chunk.

Shapes: B batch, S tokens of the whole, C of a chunk, H hidden size, N heads of D.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ds_minis.tiling.attention import AttentionReached, AttentionRequest, attention_answered_by
from ds_minis.tiling.chunking import Chunking
from ds_minis.tiling.layer_call import LayerCall, TokensOfCall
from ds_minis.tiling.recompute import AutocastState, Seeds, forwards_set, has_values, linear_without_value
from ds_minis.tiling.reuse import is_ours_alone
from ds_minis.tiling.rows import Call, GradientSums, ParameterSlots, constants_of, let_go, set_to

_ATTENTION_SEED = 0
Attend = Callable[[AttentionRequest, Sequence[Tensor]], Tensor]


@dataclass(frozen=True)
class Unread:
    """What nobody reads in a run of a layer, and need not be computed; found by `layer_verify`.

    Attributes:
        outputs: modules in front of the attention whose output only the attention sees, with its width and dtype.
        values_before, values_after: linear layers in front of and behind the attention whose output no gradient depends on.
        value: what stands in their place; not a number where it is tested that nobody reads it.
    """

    outputs: tuple[tuple[nn.Module, int, torch.dtype], ...] = ()
    values_before: tuple[nn.Linear, ...] = ()
    values_after: tuple[nn.Linear, ...] = ()
    value: float = 0.0

    def output_forwards(self) -> dict[nn.Module, Callable]:
        return {module: self._without_output(width, dtype) for module, width, dtype in self.outputs}

    def value_forwards(
        self, linears: Sequence[nn.Linear], autocast_dtype: torch.dtype | None
    ) -> dict[nn.Module, Callable]:
        return {linear: linear_without_value(linear, autocast_dtype, self.value) for linear in linears}

    def _without_output(self, width: int, dtype: torch.dtype) -> Callable[..., Tensor]:
        def forward(input, *args, **kwargs):
            return input.new_full((), self.value, dtype=dtype).expand(*input.shape[:-1], width)

        return forward


NOTHING_UNREAD = Unread()


def attend_once(request: AttentionRequest, tensors: Sequence[Tensor]) -> Tensor:
    """The attention of the layer itself, for all tokens and heads."""
    return request.run(tuple(tensors))


class LayerNode(Call):
    """One call of a layer over chunks of tokens.

    Args:
        forward: the layer's own forward.
        bounds: first and last token of each chunk, in the order in which they are run.
        attend: stands for the attention while a layer is being verified.
    """

    def __init__(
        self,
        module: nn.Module,
        forward: Callable[..., Any],
        call: LayerCall,
        bounds: Sequence[tuple[int, int]],
        chunking: Chunking,
        unread: Unread,
        attend: Attend = attend_once,
    ):
        x, call.hidden = call.hidden, None  # which autograd saves, or somebody keeps
        self.slots = ParameterSlots(module)
        self._forward_of_layer, self._call, self._bounds = forward, call, bounds
        self._chunking, self._unread, self._attend = chunking, unread, attend
        self._autocast = AutocastState(x.device)
        self._constants = constants_of(module)
        self._seeds = Seeds(x.device) if module.training and has_values(x) else None

    def forward(self, rows: Sequence[Tensor], *, with_backward: bool) -> Tensor:
        with self._running():
            request, heads = self._before(rows[0])
            with self._seeded(_ATTENTION_SEED):
                out = self._attend(request, heads)
            del request, heads
            output = None
            with forwards_set(self._unread.output_forwards()):
                for i, (start, stop) in enumerate(self._bounds):
                    y = self._after(_chunk(rows[0], start, stop), out[:, start:stop], i)
                    if output is None:
                        output = y.new_empty(y.shape[0], rows[0].shape[1], y.shape[2])
                    output[:, start:stop].copy_(y)
        if self._seeds is not None:
            self._seeds.advance()
        return output

    def backward(self, tensors: Sequence[Tensor], needs_grad: Sequence[bool]) -> list[Tensor | None]:
        grad_y, self.grad_output = self.grad_output, None
        reuse = is_ours_alone(grad_y)
        (x, *params), (x_needs_grad, *params_need_grad) = tensors, needs_grad
        leaves = [p.detach().requires_grad_(need) for p, need in zip(params, params_need_grad, strict=True)]
        sums = GradientSums(leaves)
        with self._running(), self._autocast.entered(), set_to(self._constants), self.slots.holding(leaves):
            request, heads = self._before(x)
            heads = [t.requires_grad_() for t in heads]
            with torch.enable_grad(), self._seeded(_ATTENTION_SEED):
                out = self._attend(request, heads)
            edge, out = torch.autograd.graph.get_gradient_edge(out), out.detach()
            grad_x, grad_out = self._backward_of_after(x, out, grad_y, sums, leaves, reuse, x_needs_grad)
            del out, grad_y
            sums.settle()
            of_attention = [leaf for leaf in leaves if leaf.requires_grad and request.uses(leaf)]
            grads = torch.autograd.grad(edge, [*heads, *of_attention], grad_out, allow_unused=True)
            del edge, heads, grad_out, request
            by_leaf = dict(zip(map(id, of_attention), grads[3:], strict=True))
            sums.add(by_leaf.get(id(leaf)) for leaf in leaves if leaf.requires_grad)
            grads = list(grads[:3])
            self._backward_of_before(x, grads, grad_x, sums, leaves)
        return [grad_x, *sums.result()]

    def _backward_of_after(
        self,
        x: Tensor,
        out: Tensor,
        grad_y: Tensor,
        sums: GradientSums,
        leaves: Sequence[Tensor],
        reuse: bool,
        x_needs_grad: bool,
    ) -> tuple[Tensor | None, Tensor]:
        """Gradients of the layer's input (but for what came by way of the attention) and of the attention's output."""
        grad_x = None
        if x_needs_grad:
            # A chunk of the incoming gradient is not needed any more once the chunk is done.
            reuse = reuse and grad_y.dtype == x.dtype and grad_y.shape == x.shape
            grad_x = grad_y if reuse else torch.empty_like(x)
        grad_out = torch.empty_like(out)
        forwards = {
            **self._unread.output_forwards(),
            **self._unread.value_forwards(self._unread.values_after, self._autocast.dtype()),
        }
        with torch.enable_grad(), forwards_set(forwards):
            for i, (start, stop) in enumerate(self._bounds):
                chunk = _chunk(x, start, stop).detach().requires_grad_(x_needs_grad)
                out_chunk = out[:, start:stop].detach().requires_grad_()
                inputs = [t for t in (chunk, out_chunk, *leaves) if t.requires_grad]
                y = self._after(chunk, out_chunk, i)
                grads = let_go(torch.autograd.grad(y, inputs, grad_y[:, start:stop], allow_unused=True))
                del y
                if x_needs_grad:
                    _put(grad_x[:, start:stop], next(grads))
                _put(grad_out[:, start:stop], next(grads))
                sums.add(grads)
                del grads  # or they would be there beside the next chunk's
        return grad_x, grad_out

    def _backward_of_before(
        self,
        x: Tensor,
        grads_of_heads: list[Tensor],
        grad_x: Tensor | None,
        sums: GradientSums,
        leaves: Sequence[Tensor],
    ) -> None:
        forwards = self._unread.value_forwards(self._unread.values_before, self._autocast.dtype())
        with torch.enable_grad(), forwards_set(forwards):
            for i, (start, stop) in enumerate(self._bounds):
                chunk = _chunk(x, start, stop).detach().requires_grad_(grad_x is not None)
                inputs = [t for t in (chunk, *leaves) if t.requires_grad]
                heads = self._reach(chunk, i)[0].tensors
                pairs = [
                    (t, g[:, :, start:stop])
                    for t, g in zip(heads, grads_of_heads, strict=True)
                    if t.requires_grad and g is not None
                ]
                if not pairs or not inputs:
                    continue
                outputs, grads = zip(*pairs, strict=True)
                grads = let_go(torch.autograd.grad(outputs, inputs, grads, allow_unused=True))
                del heads, pairs, outputs
                if grad_x is not None:
                    grad = next(grads)
                    if grad is not None:
                        grad_x[:, start:stop].add_(grad)
                sums.add(grads)
                del grads  # or they would be there beside the next chunk's

    def _before(self, x: Tensor) -> tuple[AttentionRequest, list[Tensor]]:
        """The attention's call, for all tokens, and its queries, keys and values."""
        whole: list[Tensor] = []
        with torch.no_grad():
            for i, (start, stop) in enumerate(self._bounds):
                request, part = self._reach(_chunk(x, start, stop), i)
                if not whole:
                    first = request.for_whole(part.whole_of)
                    whole = [_for_all_tokens(t, x.shape[1]) for t in request.tensors]
                for t, chunk in zip(whole, request.tensors, strict=True):
                    t[:, :, start:stop].copy_(chunk)
        return first, whole

    def _reach(self, chunk: Tensor, index: int) -> tuple[AttentionRequest, TokensOfCall]:
        """Runs the layer on a chunk up to its attention."""
        part = self._call.with_tokens(chunk, *self._bounds[index])
        reached: list[AttentionRequest] = []

        def stop_here(request: AttentionRequest) -> Tensor:
            reached.append(request)
            raise AttentionReached

        with contextlib.suppress(AttentionReached), attention_answered_by(stop_here), self._seeded(index + 1):
            self._forward_of_layer(*part.args, **part.kwargs)
        if not reached:
            raise NoAttention
        return reached[0], part

    def _after(self, chunk: Tensor, out: Tensor, index: int) -> Tensor:
        """The layer's result for a chunk, given the attention's."""
        part = self._call.with_tokens(chunk, *self._bounds[index])
        with attention_answered_by(lambda request: out), self._seeded(index + 1):
            y = self._forward_of_layer(*part.args, **part.kwargs)
        return y[0] if isinstance(y, tuple) else y

    def _seeded(self, index: int) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if self._seeds is None else self._seeds.part(index)

    @contextlib.contextmanager
    def _running(self) -> Iterator[None]:
        start, stop = self._bounds[0]
        try:
            with self._chunking.guarded("chunk_size", stop - start, self._bounds[-1][1]), self._chunking.untiled():
                yield
        finally:
            # Weights that autocast cast in here were cast without a graph; a later use with gradients must not find them.
            torch.clear_autocast_cache()


class NoAttention(RuntimeError):
    """A layer did not call the attention interface."""


def _chunk(x: Tensor, start: int, stop: int) -> Tensor:
    """Tokens of all sequences, without gaps: layers view them as rows."""
    return x[:, start:stop].contiguous()


def _put(place: Tensor, grad: Tensor | None) -> None:
    if grad is None:
        place.zero_()
    else:
        place.copy_(grad)


def _for_all_tokens(heads: Tensor, num_tokens: int) -> Tensor:
    """Memory like that of queries `(B, N, C, D)`, for S tokens; with the heads of a token side by side if they are here."""
    batch, num_heads, _, width = heads.shape
    if heads.stride(1) < heads.stride(2):
        return heads.new_empty(batch, num_tokens, num_heads, width).transpose(1, 2)
    return heads.new_empty(batch, num_heads, num_tokens, width)
