"""The Triton kernel of `cross_entropy`: one program per row. Imported only for CUDA tensors.

A row is read twice. The second read, for the gradient, mostly hits the cache, since the same program has just read the row.
Row offsets are 64 bits wide: a chunk of logits may have more than 2**31 elements.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_BLOCK = 8192


@triton.jit
def loss_of_rows(
    logits,
    row_stride,
    targets,
    losses,
    normalizers,
    gradients,
    gradient_stride,
    factors,
    factor_stride,
    vocab_size,
    ignore_index,
    WITH_LOSS: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    target = tl.load(targets + row).to(tl.int64)
    counted = target != ignore_index
    columns = tl.arange(0, BLOCK)
    read_size = tl.where(counted, vocab_size, 0)  # an ignored row is not read at all

    if WITH_LOSS:
        greatest = tl.full((), float("-inf"), tl.float32)
        total = tl.full((), 0.0, tl.float32)
        for start in range(0, read_size, BLOCK):
            x = tl.load(logits + start + columns, mask=start + columns < vocab_size, other=float("-inf")).to(tl.float32)
            new_greatest = tl.maximum(greatest, tl.max(x, 0))
            # All -inf so far: -inf minus itself would be NaN.
            shift = tl.where(new_greatest == float("-inf"), 0.0, new_greatest)
            total = total * tl.exp(greatest - shift) + tl.sum(tl.exp(x - shift), 0)
            greatest = new_greatest
        log_total = tl.log(total)
        picked = tl.load(logits + tl.where(counted, target, 0)).to(tl.float32)
        # Subtract the maximum first: rounding of large logits would hide a small loss.
        tl.store(losses + row, tl.where(counted, (greatest - picked) + log_total, 0.0))
        tl.store(normalizers + row, greatest)
        tl.store(normalizers + tl.num_programs(0).to(tl.int64) + row, log_total)
    else:
        greatest = tl.load(normalizers + row)
        log_total = tl.load(normalizers + tl.num_programs(0).to(tl.int64) + row)

    if WITH_GRADIENT:
        if WITH_LOSS:
            tl.debug_barrier()  # another thread may not have read the target's logit yet
        gradients += row * gradient_stride
        factor = tl.load(factors + row * factor_stride).to(tl.float32)
        for start in range(0, vocab_size, BLOCK):
            offsets = start + columns
            x = tl.load(logits + offsets, mask=offsets < read_size, other=0.0).to(tl.float32)
            gradient = tl.exp((x - greatest) - log_total) * factor
            gradient = tl.where(offsets == target, gradient - factor, gradient)
            gradient = tl.where(counted, gradient, 0.0)
            tl.store(gradients + offsets, gradient.to(gradients.dtype.element_ty), mask=offsets < vocab_size)


def losses(logits_CV: Tensor, target_C: Tensor, ignore_index: int, factor: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns the losses, and for each row its maximum m and `log(sum(exp(row - m)))`.

    With `factor`, overwrites the logits by their gradient.
    """
    require_targets_in_range(target_C, ignore_index, logits_CV.shape[1])
    rows_CV = logits_CV if logits_CV.stride(1) == 1 else logits_CV.contiguous()
    losses_C = rows_CV.new_empty(rows_CV.shape[0], dtype=torch.float32)
    normalizers_2C = losses_C.new_empty(2, losses_C.shape[0])
    gradients_CV = None if factor is None else rows_CV
    _launch(rows_CV, target_C, ignore_index, losses_C, normalizers_2C, gradients_CV, factor)
    if factor is not None and rows_CV is not logits_CV:
        logits_CV.copy_(rows_CV)
    return losses_C, normalizers_2C


def gradients(logits_CV: Tensor, target_C: Tensor, ignore_index: int, normalizers_2C: Tensor, grad_C: Tensor) -> Tensor:
    """The gradient of the logits, given the gradient of the losses."""
    rows_CV = logits_CV if logits_CV.stride(1) == 1 else logits_CV.contiguous()
    gradients_CV = torch.empty_like(rows_CV, memory_format=torch.contiguous_format)
    _launch(rows_CV, target_C, ignore_index, None, normalizers_2C, gradients_CV, grad_C)
    return gradients_CV


def _launch(
    rows_CV: Tensor,
    target_C: Tensor,
    ignore_index: int,
    losses_C: Tensor | None,
    normalizers_2C: Tensor,
    gradients_CV: Tensor | None,
    factor: Tensor | None,
) -> None:
    num_rows, vocab_size = rows_CV.shape
    if num_rows == 0:
        return
    block = min(MAX_BLOCK, triton.next_power_of_2(vocab_size))
    with torch.cuda.device_of(rows_CV):  # Triton launches on the current device
        loss_of_rows[(num_rows,)](
            rows_CV,
            rows_CV.stride(0),
            target_C.contiguous(),
            normalizers_2C if losses_C is None else losses_C,
            normalizers_2C,
            rows_CV if gradients_CV is None else gradients_CV,
            rows_CV.stride(0) if gradients_CV is None else gradients_CV.stride(0),
            normalizers_2C if factor is None else factor,
            0 if factor is None or factor.dim() == 0 else factor.stride(0),
            vocab_size,
            ignore_index,
            WITH_LOSS=losses_C is not None,
            WITH_GRADIENT=gradients_CV is not None,
            BLOCK=block,
            num_warps=max(1, min(8, block // 256)),
        )


def require_targets_in_range(target_C: Tensor, ignore_index: int, vocab_size: int) -> None:
    """Asserts on the device, without synchronizing, as torch's own loss does."""
    fine_C = ((target_C >= 0) & (target_C < vocab_size)) | (target_C == ignore_index)
    torch._assert_async(fine_C.all(), "a label is out of the range of the vocabulary and is not ignore_index")
