"""Cross entropy of one chunk of logits, with the softmax in float32 and no float32 copy of the chunk.

Each row's loss is `logsumexp(row) - row[target]`. Its gradient is `softmax(row) - onehot(target)`, rounded once to the
logits' dtype, as autograd computes for `F.cross_entropy(logits.float(), target)`. If the gradient of the losses is known in
advance and nothing else reads the logits, their gradient overwrites them, so that there is one buffer of the chunk's size.

On CUDA with Triton it is one kernel (`cross_entropy_kernel`); elsewhere torch computes a few rows at a time.

Shapes: C rows of one chunk, B rows of one block of it, V vocabulary.
"""

from __future__ import annotations

import functools
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ds_minis.tiling.core.out_of_memory import is_out_of_memory

DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))
# Elements of a block of rows in float32: it should fit into a core's cache on a CPU, and fill the processors of a device.
BLOCK_ELEMENTS = {"cpu": 2**18}
_DEVICE_BLOCK_ELEMENTS = 2**24
# Operations that return a new tensor and do not save it for backward. Not here: tanh and others that save their result, and
# views, which share memory with another tensor.
_FRESH = frozenset(
    f"{name}Backward0" for name in ("Mm", "Addmm", "Mul", "Div", "Add", "Sub", "ToCopy")
) | {"_LinearBackward"}  # fmt: skip


def token_losses(logits_CV: Tensor, target_C: Tensor, ignore_index: int, expected: Tensor | None = None) -> Tensor:
    """`F.cross_entropy(logits_CV.float(), target_C, ignore_index=ignore_index, reduction="none")`.

    Args:
        logits_CV: logits of one of `DTYPES`.
        expected: the gradient that these losses are sure to receive, one number for all or `(C,)`, once, before any other use
            of the graph. The logits may then be overwritten.
    """
    return _TokenLosses.apply(logits_CV, target_C, ignore_index, expected if is_fresh(logits_CV) else None)


def is_fresh(logits_CV: Tensor) -> bool:
    """Whether the operation that made the logits has not saved them, and they share no memory with another tensor."""
    return logits_CV.grad_fn is not None and logits_CV.grad_fn.name() in _FRESH


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_CV: Tensor, target_C: Tensor, ignore_index: int, factor: Tensor | None):
        ctx.ignore_index, ctx.is_gradient = ignore_index, factor is not None
        losses_C, normalizers_2C = implementation(logits_CV)[0].losses(logits_CV, target_C, ignore_index, factor)
        ctx.save_for_backward(logits_CV, target_C, normalizers_2C)
        return losses_C

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_C: Tensor):
        logits_CV, target_C, normalizers_2C = ctx.saved_tensors
        if ctx.is_gradient:
            return logits_CV, None, None, None
        gradients = implementation(logits_CV)[0].gradients
        return gradients(logits_CV, target_C, ctx.ignore_index, normalizers_2C, grad_C), None, None, None


class PlainTorch:
    """Computes a block of rows at a time, so that float32 temporaries have a block's size."""

    @staticmethod
    def losses(logits_CV: Tensor, target_C: Tensor, ignore_index: int, factor: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns the losses, and for each row its maximum m and `log(sum(exp(row - m)))`.

        With `factor`, overwrites the logits by their gradient.
        """
        losses_C = logits_CV.new_empty(logits_CV.shape[0], dtype=torch.float32)
        normalizers_2C = losses_C.new_empty(2, losses_C.shape[0])
        for start, stop in blocks_of_rows(logits_CV):
            logits_BV, target_B = logits_CV[start:stop], target_C[start:stop]
            ignored_B = target_B == ignore_index
            # Minus the target's logit; 0 where ignored. Raises torch's own error for a target out of range.
            picked_B = F.nll_loss(logits_BV, target_B, ignore_index=ignore_index, reduction="none")
            greatest_B = logits_BV.amax(-1, keepdim=True).float()
            in_place = factor is not None and logits_BV.dtype == torch.float32
            exponentials_BV = torch.sub(logits_BV, greatest_B, out=logits_BV if in_place else None).exp_()
            sums_B = exponentials_BV.sum(-1, keepdim=True)
            logs_B = sums_B.log()
            normalizers_2C[0, start:stop], normalizers_2C[1, start:stop] = greatest_B[:, 0], logs_B[:, 0]
            # Subtract the maximum first: rounding of large logits would hide a small loss.
            losses_B = (picked_B.float() + greatest_B[:, 0]) + logs_B[:, 0]
            losses_C[start:stop] = losses_B.masked_fill_(ignored_B, 0.0)
            if factor is not None:
                factor_B = factor.float().expand_as(losses_C)[start:stop].masked_fill(ignored_B, 0.0)[:, None]
                gradient_BV = exponentials_BV.mul_(factor_B / sums_B)
                gradient_BV.scatter_add_(-1, target_B.masked_fill(ignored_B, 0)[:, None], -factor_B)
                if not in_place:
                    logits_BV.copy_(gradient_BV)
        return losses_C, normalizers_2C

    @staticmethod
    def gradients(
        logits_CV: Tensor, target_C: Tensor, ignore_index: int, normalizers_2C: Tensor, grad_C: Tensor
    ) -> Tensor:
        """The gradient of the logits, given the gradient of the losses."""
        gradients_CV = torch.empty_like(logits_CV)
        for start, stop in blocks_of_rows(logits_CV):
            target_B, logits_BV = target_C[start:stop], logits_CV[start:stop]
            ignored_B = target_B == ignore_index
            factor_B = grad_C[start:stop].float().masked_fill(ignored_B, 0.0)[:, None]
            greatest_B, logs_B = normalizers_2C[:, start:stop, None]
            gradient_BV = torch.sub(logits_BV, greatest_B).sub_(logs_B).exp_().mul_(factor_B)
            gradient_BV.scatter_add_(-1, target_B.masked_fill(ignored_B, 0)[:, None], -factor_B)
            gradients_CV[start:stop] = gradient_BV
        return gradients_CV


def blocks_of_rows(logits_CV: Tensor) -> list[tuple[int, int]]:
    """Bounds of blocks of rows whose float32 temporaries are small."""
    num_rows, vocab_size = logits_CV.shape
    elements = BLOCK_ELEMENTS.get(logits_CV.device.type, _DEVICE_BLOCK_ELEMENTS)
    rows = max(1, elements // max(1, vocab_size))
    return [(start, min(start + rows, num_rows)) for start in range(0, num_rows, rows)]


def implementation(logits_CV: Tensor) -> tuple[type[PlainTorch] | ModuleType, str]:
    """What computes the losses of such a tensor; and, where Triton is installed and fails, why it is not the kernel."""
    # A kernel cannot read a tensor subclass, such as a fake tensor.
    real = type(logits_CV) in (Tensor, torch.nn.Parameter)
    found, reason = kernel() if real and logits_CV.is_cuda else (None, "")
    return found or PlainTorch, reason


@functools.cache
def kernel() -> tuple[ModuleType | None, str]:
    """The module with the Triton kernel, imported for the first CUDA tensor; None and the reason if Triton does not work.

    Triton compiles at the first launch and a machine may lack a compiler, so this launches the kernel once.
    """
    try:
        from ds_minis.loss.kernels import cross_entropy_kernel

        logits = torch.zeros(1, 2, device="cuda")
        cross_entropy_kernel.losses(logits, torch.zeros(1, dtype=torch.long, device="cuda"), -100, None)
    except ImportError:
        return None, ""
    except Exception as error:
        if is_out_of_memory(error):
            raise
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        return None, f"the loss is computed by torch, as the Triton kernel cannot be launched here ({reason})"
    return cross_entropy_kernel, ""
