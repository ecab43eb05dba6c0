"""A decoder layer over chunks that keeps its attention's output and the results of its linear layers beside its input."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ds_minis.layer.attention.attention import AttentionRequest
from ds_minis.layer.attention.kept_attention import KeptAttention, recompute_attention, recomputes_attention
from ds_minis.layer.passes.node import POST, LayerNode
from ds_minis.memory.call_budget import CallBudget
from ds_minis.memory.keep_budget import AFTER_TOO_LARGE, ATTENTION, INPUT, MATMULS
from ds_minis.memory.kept_products import KeptProducts


class KeepingNode(LayerNode):
    """A `LayerNode` that keeps its attention's output beside its input, and its products where the level is "matmuls".

    Backward then runs no attention again; at the level "matmuls" no matrix product either, only what lies between them.

    Args:
        keeping: what is kept, and how much of it may be. It falls back to less where that is too much.
    """

    def __init__(self, *args: Any, keeping: CallBudget, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._keeping, self._plans = keeping, self.module.mini_sequence_chunking.kept_plans

    def saved(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        return tensors[1:]  # forward stores the input

    def _forward_with_backward(self, x: Tensor) -> Tensor:
        keeping = self._keeping
        if keeping.level == MATMULS:
            chunk = functools.partial(getattr, self._passes, "chunk")
            self._products = KeptProducts(self.module, x.shape[2], chunk, keeping.take, keeping.give_back)
        attended = self._unless_out_of_memory(lambda: self._attended_keeping(x))
        out, tensors = (self._attended(x), []) if attended is None else attended
        del attended
        (out,) = self.seen(out)
        with self._passes.layer_memory():
            self.layer_input.keep(x, *tensors)
        num_bytes = sum(t.nbytes for t in tensors)
        del tensors
        y = self._unless_out_of_memory(lambda: self._post_attention_all(x, out)) if self._products is not None else None
        y = self._post_attention_all(x, out) if y is None else y
        if self._products is not None:
            self._end_products(num_bytes)
        return y

    def _unless_out_of_memory(self, run: Callable[[], Any]) -> Any:
        """The result; None if there was too little memory for what is kept beside it, which is dropped."""
        try:
            return run()
        except Exception as error:
            if not self._keeping.gives_up(error):
                raise
        if self._products is not None:
            self._products.drop()
        self._products = None
        self._keeping.falls_back(INPUT if self._kept is None else ATTENTION)
        return None

    def _attended_keeping(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The attention's output, and what of it is kept."""
        request, qkv = self._pre_attention(x)
        with self._passes.attending():
            if recomputes_attention(self.module, request.way):
                return self._attend(request, qkv), []
            kept = KeptAttention(self._attend_with_graph, request, qkv, self._plans)
            out, tensors = kept.result, kept.tensors
            fits = not kept.reason and self._may_keep(sum(t.nbytes for t in tensors))
            kept.free()
            if kept.reason:
                recompute_attention(self.module, kept.reason, request.way)
            self._kept = kept if fits else None
            return out, tensors if fits else []

    def _may_keep(self, num_bytes: int) -> bool:
        self._keeping.needs(ATTENTION, num_bytes)
        fits = self._keeping.take(num_bytes)
        if not fits and self._keeping.level == ATTENTION:
            self._keeping.falls_back(INPUT)
        return fits

    def _end_products(self, attention_bytes: int) -> None:
        """Notes what the products took, or that they were too much."""
        products = self._products
        products.leave_out(POST, self._passes.tail.skipped if self._passes.tail else ())
        grows = AFTER_TOO_LARGE if products.is_too_large else 1.0
        self._keeping.needs(MATMULS, attention_bytes + grows * products.num_bytes)
        if products.is_too_large:
            self._products = None
            self._keeping.falls_back(INPUT if self._kept is None else ATTENTION)

    def _attend_with_graph(self, request: AttentionRequest, qkv: Sequence[Tensor]) -> Tensor:
        out = self._attend(request, qkv)
        self.seen(out)  # the attention function may use weights, too
        return out

    def _free(self) -> None:
        self._products = None
        self._keeping.release()
