"""The gradients of parameters, summed over chunks.

Shapes: C rows of one chunk, V outputs and H inputs of a linear layer.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from ds_minis.tiling.core.out_of_memory import for_weight_gradients


def drain(tensors: Sequence[Tensor | None]) -> Iterator[Tensor | None]:
    """Yields the tensors and drops each reference: all gradients of a layer together are as large as its weights."""
    waiting = list(reversed(tensors))
    del tensors
    while waiting:
        yield waiting.pop()


class GradientSums:
    """Sums of the chunks' parameter gradients, in float32.

    In bfloat16 the sum's own rounding adds to the error with every chunk: 0.9% without chunks, 2.6% at 128 chunks
    (hidden size 512).

    Args:
        leaves: the parameters.
        single: keep gradients in their own dtype: there is only one chunk, or the sums are only compared (an analysis).

    Attributes:
        sums: of each leaf, as it is now: float32 until `result`; None if it has no gradient yet.
    """

    def __init__(self, leaves: Sequence[Tensor], single: bool = False):
        self._leaves = leaves
        self._single = single
        self.sums: list[Tensor | None] = [None] * len(leaves)

    def index_of(self, leaf: Tensor) -> int | None:
        """The index of `leaf`; None if it is not here or needs no gradient."""
        return next((i for i, own in enumerate(self._leaves) if own is leaf and own.requires_grad), None)

    @for_weight_gradients
    def add_product(self, index: int, left_CV: Tensor, right_CH: Tensor) -> None:
        """Adds `left_CV.t() @ right_CH` to one leaf's gradient, without a temporary of that size."""
        left_VC, total, wide = left_CV.t(), self.sums[index], self._sum_dtype(left_CV)
        if total is not None:
            if total.dtype != wide:
                self.sums[index] = total = total.to(wide)  # back to float32: it was rounded
            _add_product(total, left_VC, right_CH)
        elif left_CV.dtype == wide:
            self.sums[index] = left_VC @ right_CH
        else:
            self.sums[index] = right_CH.new_empty(left_CV.shape[1], right_CH.shape[1], dtype=wide)
            _add_product(self.sums[index], left_VC, right_CH, beta=0)

    def _sum_dtype(self, grad: Tensor) -> torch.dtype:
        return grad.dtype if self._single else torch.promote_types(grad.dtype, torch.float32)

    @for_weight_gradients
    def add(self, grads: Iterator[Tensor | None]) -> None:
        for i, leaf in enumerate(self._leaves):
            grad = next(grads) if leaf.requires_grad else None
            if grad is None:
                continue
            if self.sums[i] is not None:
                wide = self._sum_dtype(grad)
                self.sums[i] = self.sums[i].to(wide).add_(grad)  # back to float32 if it was rounded
            else:
                # Copy even if it is float32 already: autograd may return one tensor for two parameters.
                self.sums[i] = grad.to(self._sum_dtype(grad), copy=True)

    def watch(self) -> None:
        """Call this after appending a leaf to the list given to the constructor."""
        self.sums.append(None)

    @for_weight_gradients
    def add_rows(self, index: int, rows: slice, grad: Tensor) -> None:
        """Adds `grad` to some rows of one sum."""
        leaf = self._leaves[index]
        before = self.sums[index]
        wide = torch.promote_types(leaf.dtype, torch.float32)
        self.sums[index] = torch.zeros_like(leaf, dtype=wide) if before is None else before.to(wide)
        self.sums[index][rows].add_(grad)

    def round_to_param_dtype(self) -> None:
        """Rounds to the parameters' dtypes early, to free the float32 sums before the attention's backward."""
        self.result()

    @for_weight_gradients
    def result(self) -> list[Tensor | None]:
        """Rounds each sum to its parameter's dtype, freeing the float32 sum, and returns them."""
        for i, leaf in enumerate(self._leaves):
            if self.sums[i] is not None:
                self.sums[i] = self.sums[i].to(leaf.dtype)
        return self.sums


# Elements of a temporary product in the operands' dtype, before it is added to the float32 sum.
PRODUCT_ELEMENTS = 2**22


def _add_product(total_VH: Tensor, left_VC: Tensor, right_CH: Tensor, beta: int = 1) -> None:
    """`total = beta * total + left @ right` in the total's dtype."""
    if left_VC.dtype == total_VH.dtype:
        torch.addmm(total_VH, left_VC, right_CH, beta=beta, out=total_VH)  # `addmm_`, but counted as FLOPs
    elif _multiplies_into_float32(total_VH, left_VC.dtype):
        torch.addmm(total_VH, left_VC, right_CH, beta=beta, out_dtype=total_VH.dtype, out=total_VH)
    else:
        rows = max(1, PRODUCT_ELEMENTS // total_VH.shape[1])
        for start in range(0, total_VH.shape[0], rows):
            product = left_VC[start : start + rows] @ right_CH
            block = total_VH[start : start + rows]
            block.add_(product) if beta else block.copy_(product)


def _multiplies_into_float32(total: Tensor, dtype: torch.dtype) -> bool:
    real = type(total) in (Tensor, nn.Parameter) and not total.is_meta  # a fake tensor has no kernel to try
    return real and total.dtype == torch.float32 and addmm_takes(total.device, dtype)


@functools.cache
def addmm_takes(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `addmm` on the device takes `dtype` operands and a float32 sum: cuBLAS does, the CPU does not."""
    if device.type == "cpu":
        return False
    ones, total = torch.ones(16, 16, dtype=dtype, device=device), torch.ones(16, 16, device=device)
    try:
        torch.addmm(total, ones, ones, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):  # NotImplementedError is a RuntimeError
        return False
    return bool((total == 17).all())
