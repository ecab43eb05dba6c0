"""A whole decoder layer as one autograd node that saves only the layer's input.

All but the attention is token-wise. Forward runs the layer on each chunk up to its attention (`pre_attention`), then the
attention once for all tokens, then the layer on each chunk again with the attention's output given (`post_attention`).
Backward recomputes `pre_attention` and the attention. Then it goes back: `post_attention` by chunks, the attention,
`pre_attention` by chunks.

With `head_groups`, queries, keys, values and their gradients exist for one group at a time. `pre_attention` and the attention
run group by group, and once more in backward than without groups. `keeping_node` keeps more than the layer's input.

Shapes: B batch, S tokens, H hidden size, N heads of D.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from ds_minis.layer.attention.attention import AttentionRequest
from ds_minis.layer.attention.attention_graph import AttentionGraph
from ds_minis.layer.attention.head_groups import CutWeights, HeadGroups
from ds_minis.layer.attention.kept_attention import Attend, KeptAttention, attend_once
from ds_minis.layer.passes.layer_passes import DeadValues, LayerPasses, chunk_of
from ds_minis.memory.kept_products import KeptProducts
from ds_minis.memory.layer_inputs import LayerInput
from ds_minis.tiling.core.chunk_grads import backward_of_chunk
from ds_minis.tiling.core.grad_accum import GradientSums
from ds_minis.tiling.core.linear import Forwards, chunk_forwards
from ds_minis.tiling.core.out_of_memory import is_out_of_memory
from ds_minis.tiling.core.params import ParameterSlots, Untrained
from ds_minis.tiling.core.replay import graph_is_kept, patched_forwards
from ds_minis.tiling.core.reuse import can_overwrite
from ds_minis.tiling.core.tiled_op import TiledOp
from ds_minis.tiling.modules.swap import Tiled, warn_once

PRE, POST = "pre_attention", "post_attention"  # the passes over the chunks


class LayerNode(TiledOp):
    """One call of a layer over chunks of tokens.

    Args:
        groups: groups of heads; None for one call of the attention.
        layer_input: stores the layer's input until backward; None leaves that to autograd.
        attend: replaces the attention while the layer is analyzed.
        compared: gradients are only compared, so they need no sums in float32, which may take twice the weights' memory.
        slots: the module's tensors; None finds them now. bitsandbytes replaces a weight in the first forward under FSDP1.

    Attributes:
        layer_input: as above.
        one_call: reason why head_groups fell back to one call, for all calls of this kind; empty if it did not.
    """

    one_call = ""

    def __init__(
        self,
        module: Tiled,
        passes: LayerPasses,
        dead_values: DeadValues,
        groups: HeadGroups | None = None,
        layer_input: LayerInput | None = None,
        attend: Attend = attend_once,
        compared: bool = False,
        slots: ParameterSlots | None = None,
    ):
        self.module, self.slots = module, slots or ParameterSlots(module)
        self.constants, self.way = passes.constants, passes.way
        self.memory = module.mini_sequence_chunking.memory
        self._untrained = Untrained(module, self.slots, self.memory.copies)
        self._passes, self._dead_values, self._groups = passes, dead_values, groups
        self.layer_input, self._attend, self._compared = layer_input, attend, compared
        self._kept: KeptAttention | None = None
        self._products: KeptProducts | None = None

    def saved(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        if self.layer_input is None:
            return tensors
        with self._passes.layer_memory():
            self.layer_input.keep(tensors[0])
        return tensors[1:]

    def forward(self, rows: Sequence[Tensor], *, with_backward: bool) -> Tensor:
        with self._passes.running():
            y = self._forward_with_backward(rows[0]) if with_backward else self._forward(rows[0])
        self._passes.advance()
        return y

    def _forward_with_backward(self, x: Tensor) -> Tensor:
        return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        return self._post_attention_all(x, self._attended(x))

    def _post_attention_all(self, x: Tensor, out: Tensor) -> Tensor:
        """The layer's result, given the attention's output."""
        output = None
        with (
            self._recorded(POST, self._dead_values.values_post_attention),
            patched_forwards(self._dead_values.output_forwards()),
        ):
            for i, (start, stop) in enumerate(self._passes.bounds):
                (y,) = self.seen(self._passes.post_attention(chunk_of(x, start, stop), out[:, start:stop], i))
                if output is None:
                    with self._passes.layer_memory():
                        output = y.new_empty(y.shape[0], x.shape[1], y.shape[2])
                output[:, start:stop].copy_(y)
        return output

    def _attended(self, x: Tensor) -> Tensor:
        """The attention's output for all tokens and heads."""
        if self._groups is None:
            request, qkv = self._pre_attention(x)
            with self._passes.attending():
                return self.seen(self._attend(request, qkv))[0]
        out = None
        for group in range(self._groups.count):
            with self._groups.cut(group):
                request, qkv = self._pre_attention(x)
            name = request.per_head(qkv[0].shape[1] * self._groups.count)
            if name:
                return self._attended_at_once(x, f"its attention's argument {name} has a part for each head")
            try:
                with self._passes.attending(group):
                    (part,) = self.seen(self._attend(request, qkv))
            except Exception as error:  # the function may need all heads; another error is raised again below
                if is_out_of_memory(error):
                    raise
                if group:
                    raise
                words = f"{type(error).__name__}: {error}".split()
                self.one_call = f"its attention fails on a group of heads ({' '.join(words)[:100]})"
                return self._attended_at_once(x, self.one_call)
            if part.dim() != 4:
                self.one_call = "its attention gives all heads in one dimension"
                return self._attended_at_once(x, self.one_call)
            if out is None:
                with self._passes.attention_memory():
                    out = part.new_empty(*part.shape[:2], part.shape[2] * self._groups.count, part.shape[3])
            self._groups.of_output(out, group).copy_(part)
        return out

    def _attended_at_once(self, x: Tensor, reason: str) -> Tensor:
        warn_once(self.module, "attends to all heads at once", reason)
        self._groups = None
        return self._attended(x)

    def backward(self, tensors: Sequence[Tensor], needs_grad: Sequence[bool]) -> list[Tensor | None]:
        grad_y, self.grad_output = self.grad_output, None
        reuse = can_overwrite(grad_y)
        if self.layer_input is None:
            (x, *params), kept = tensors, []
        else:
            with self._passes.layer_memory():
                params, (x, *kept) = tensors, self.layer_input.fetch()
        x = x.detach()  # its slices need no graph
        x_needs_grad, *params_need_grad = needs_grad
        leaves = [p.detach().requires_grad_(need) for p, need in zip(params, params_need_grad, strict=True)]
        single = len(self._passes.bounds) == 1 and self._groups is None
        sums, grad_x = GradientSums(leaves, single=single or self._compared), None
        if x_needs_grad:
            # Once a chunk is done, its part of the incoming gradient may be overwritten.
            reuse = reuse and grad_y.dtype == x.dtype and grad_y.shape == x.shape
            with self._passes.layer_memory():
                grad_x = grad_y if reuse else torch.empty_like(x)
        with self._passes.running(), self._passes.again(), self._as_in_forward(leaves):
            if self._kept is not None:
                _, qkv = self._qkv_again(x)
                with self._passes.attention_memory():
                    out = self._kept.output(qkv, kept)
                    grad_out = torch.empty_like(out)
            elif self._groups is None:
                graph = self._attended_with_graph(x)
                out = graph.take_out()
                with self._passes.attention_memory():
                    grad_out = torch.empty_like(out)
            else:
                out = grad_out = self._attended(x)  # recomputed, so its gradient may overwrite it
            self._backward_of_post_attention(x, out, grad_y, grad_x, grad_out, sums, leaves)
            del out, grad_y
            sums.round_to_param_dtype()
            if self._kept is not None:
                with self._passes.attention_memory():
                    grads = self._kept.backward(qkv, kept, grad_out)
                del qkv, kept, grad_out
                self._backward_of_pre_attention(x, grads, grad_x, sums, leaves)
            elif self._groups is None:
                handed_over = [grad_out]
                del grad_out
                grads = self._backward_of_attention(graph, handed_over, sums, leaves)
                del graph
                self._backward_of_pre_attention(x, grads, grad_x, sums, leaves)
            else:
                self._backward_by_groups(x, grad_out, grad_x, sums, leaves)
        if self.layer_input is not None:
            self.layer_input.release()
        if not graph_is_kept():
            self._free()
        return [grad_x, *sums.result()]

    def _free(self) -> None:
        """Frees what is kept beside the layer's input."""

    @contextlib.contextmanager
    def _as_in_forward(self, leaves: Sequence[Tensor]) -> Iterator[None]:
        with self._untrained.as_in_forward(), self.slots.reparametrized(leaves):
            yield

    def _pre_attention(self, x: Tensor) -> tuple[AttentionRequest, list[Tensor]]:
        with self._recorded(PRE):
            return self._passes.pre_attention(x, self.seen)

    def _recorded(self, name: str, without: Sequence[nn.Linear] = ()) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if self._products is None else self._products.recorded(name, without)

    def _qkv_again(self, x: Tensor) -> tuple[AttentionRequest, list[Tensor]]:
        with contextlib.nullcontext() if self._products is None else self._products.replayed(PRE):
            return self._passes.pre_attention(x)

    def _forwards_in_backward(self, name: str, sums: Sequence[GradientSums], dead: Sequence[nn.Linear]) -> Forwards:
        results = {} if self._products is None else self._products.results(name)
        return chunk_forwards(self.module, sums, dead, self._dead_values.value, results)

    def _attended_with_graph(self, x: Tensor, group: int = 0) -> AttentionGraph:
        request, qkv = self._qkv_again(x)
        with self._passes.attending(group):
            return AttentionGraph(functools.partial(self._attend, request), qkv)

    def _backward_of_post_attention(
        self,
        x: Tensor,
        out: Tensor,
        grad_y: Tensor,
        grad_x: Tensor | None,
        grad_out: Tensor,
        sums: GradientSums,
        leaves: Sequence[Tensor],
    ) -> None:
        """Gradients of the attention's output, and of the layer's input except through the attention."""
        forwards = self._forwards_in_backward(POST, [sums], self._dead_values.values_post_attention)
        forwards |= self._dead_values.output_forwards()
        with torch.enable_grad(), patched_forwards(forwards):
            for i, (start, stop) in enumerate(self._passes.bounds):
                chunk = chunk_of(x, start, stop).detach().requires_grad_(grad_x is not None)
                out_chunk = out[:, start:stop].detach().requires_grad_()
                places = [None if grad_x is None else grad_x[:, start:stop], grad_out[:, start:stop]]
                run = functools.partial(self._after_with_graph, chunk, out_chunk, i, grad_y[:, start:stop])
                backward_of_chunk(run, [chunk, out_chunk], places, leaves, [sums])

    def _after_with_graph(self, chunk: Tensor, out_chunk: Tensor, index: int, grad: Tensor):
        return [self._passes.post_attention(chunk, out_chunk, index)], [grad]

    def _backward_of_attention(
        self, graph: AttentionGraph, grad_out: list[Tensor], sums: GradientSums, leaves: Sequence[Tensor]
    ) -> list[Tensor | None]:
        """Gradients of queries, keys and values; those of parameters that the attention uses are added to `sums`.

        `grad_out` is a list of one tensor, which is emptied.
        """
        # All leaves: an attention function may read weights from its module, beside those among its arguments.
        own = [leaf for leaf in leaves if leaf.requires_grad]
        with self._passes.attention_memory():
            grads, of_own = graph.backward(grad_out, own)
        by_leaf = dict(zip(map(id, own), of_own, strict=True))
        sums.add(by_leaf.get(id(leaf)) for leaf in leaves if leaf.requires_grad)
        return grads

    def _backward_of_pre_attention(
        self,
        x: Tensor,
        grads_of_qkv: list[Tensor | None],
        grad_x: Tensor | None,
        sums: GradientSums,
        leaves: Sequence[Tensor],
        cut: CutWeights | None = None,
    ) -> None:
        all_sums, cut_leaves = ([sums], []) if cut is None else ([cut.sums, sums], cut.leaves)
        forwards = self._forwards_in_backward(PRE, all_sums, self._dead_values.values_pre_attention)
        with torch.enable_grad(), patched_forwards(forwards):
            for i, (start, stop) in enumerate(self._passes.bounds):
                chunk = chunk_of(x, start, stop).detach().requires_grad_(grad_x is not None)
                places = [None if grad_x is None else grad_x[:, start:stop]]
                grads = [None if grad is None else grad[:, :, start:stop] for grad in grads_of_qkv]
                run = functools.partial(self._before_with_graph, chunk, i, grads)
                backward_of_chunk(run, [chunk], places, [*cut_leaves, *leaves], all_sums, add=True)

    def _before_with_graph(self, chunk: Tensor, index: int, grads: Sequence[Tensor | None]):
        qkv = self._passes.reach(chunk, index)[0].tensors
        pairs = [(t, grad) for t, grad in zip(qkv, grads, strict=True) if t.requires_grad and grad is not None]
        return tuple(zip(*pairs, strict=True)) or ((), ())

    def _backward_by_groups(
        self, x: Tensor, grad_out: Tensor, grad_x: Tensor | None, sums: GradientSums, leaves: Sequence[Tensor]
    ) -> None:
        for group in range(self._groups.count):
            cut = CutWeights(leaves)
            with self._groups.cut(group, cut):
                graph = self._attended_with_graph(x, group)
                graph.take_out()
                grads = self._backward_of_attention(graph, [self._groups.of_output(grad_out, group)], sums, leaves)
                del graph
                self._backward_of_pre_attention(x, grads, grad_x, sums, leaves, cut)
            cut.add_to(sums)
