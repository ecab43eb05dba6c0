"""What a trainer asks of each token's distribution: log-probability of the label, entropy, and a few more numbers.

All are computed from one pass over a chunk of logits, a few rows at a time, in float32 (or the logits' wider dtype). The
gradient of the label's log-probability is `onehot - p`, that of the entropy `-p (log p + entropy)`; the others have none.

Shapes: C rows of one chunk, B rows of one block of it, V vocabulary, N statistics.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ds_minis.loss.kernels.cross_entropy import blocks_of_rows, is_fresh
from ds_minis.tiling.core.replay import graph_is_kept

LOG_PROB, ENTROPY = "log_probs", "entropy"
NAMES = (LOG_PROB, ENTROPY, "log_sum_sq_probs", "mean_logits", "is_top1")


def token_statistics(
    logits_CV: Tensor, target_C: Tensor, temperature: float, names: Sequence[str], expected_C: Tensor | None = None
) -> Tensor:
    """Statistics `(C, N)` of the distribution `softmax(logits / temperature)`, in the order of `names` out of `NAMES`.

    `log_sum_sq_probs` is `log(sum(p * p))`, `mean_logits` the mean of `logits / temperature`, `is_top1` 1 or 0.

    Args:
        expected_C: the gradient that the log-probabilities are sure to receive, once, and all others none, before any other
            use of the graph. The logits may then be overwritten.
    """
    return _Statistics.apply(
        logits_CV, target_C, temperature, tuple(names), expected_C if is_fresh(logits_CV) else None
    )


class _Statistics(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, logits_CV: Tensor, target_C: Tensor, temperature: float, names: tuple[str, ...], expected_C: Tensor | None
    ):
        dtype = torch.promote_types(logits_CV.dtype, torch.float32)
        result_CN = logits_CV.new_empty(logits_CV.shape[0], len(names), dtype=dtype)
        kept_3C = logits_CV.new_zeros(3, logits_CV.shape[0], dtype=dtype)  # maximum, log of the sum, entropy
        ctx.is_gradient = expected_C is not None
        for start, stop in blocks_of_rows(logits_CV):
            z_BV = (
                logits_CV[start:stop].to(dtype) if temperature == 1 else logits_CV[start:stop].to(dtype) / temperature
            )
            can_overwrite = ctx.is_gradient or temperature != 1 or dtype != logits_CV.dtype
            values, kept, exponentials_BV, sum_B = _of_block(z_BV, target_C[start:stop], names, can_overwrite)
            result_CN[start:stop] = torch.stack(values, -1)
            kept_3C[: len(kept), start:stop] = torch.stack(kept)
            if ctx.is_gradient:
                factor_B = expected_C[start:stop, None].to(dtype) / temperature
                gradient_BV = exponentials_BV.mul_(-factor_B / sum_B[:, None])
                gradient_BV.scatter_add_(-1, target_C[start:stop, None], factor_B)
                logits_CV[start:stop] = gradient_BV
                del gradient_BV
            del exponentials_BV  # not beside the next block's
        ctx.save_for_backward(logits_CV, target_C, kept_3C)
        ctx.temperature, ctx.names, ctx.is_ours = temperature, names, is_fresh(logits_CV)
        return result_CN

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_CN: Tensor):
        logits_CV, target_C, kept_3C = ctx.saved_tensors
        if ctx.is_gradient:
            return logits_CV, None, None, None, None
        grads = dict(zip(ctx.names, (grad_CN / ctx.temperature).unbind(-1), strict=True))
        of_log_prob, of_entropy = grads[LOG_PROB][:, None], grads.get(ENTROPY)
        if of_entropy is not None:
            # The entropy is usually only logged. A test for zeros would wait for the device, so it is made on a CPU alone.
            of_entropy = None if of_entropy.device.type == "cpu" and not of_entropy.any() else of_entropy[:, None]
        # A chunk's logits, which nothing else has saved, are overwritten by their gradient: one buffer of their size.
        result_CV = logits_CV if ctx.is_ours and not graph_is_kept() else torch.empty_like(logits_CV)
        for start, stop in blocks_of_rows(logits_CV):
            greatest_B, log_sum_B, entropy_B = kept_3C[:, start:stop, None]
            z_BV = logits_CV[start:stop].to(kept_3C.dtype, copy=True)
            log_p_BV = (z_BV if ctx.temperature == 1 else z_BV.div_(ctx.temperature)).sub_(greatest_B).sub_(log_sum_B)
            factor_B = -of_log_prob[start:stop]
            if of_entropy is None:
                gradient_BV = log_p_BV.exp_().mul_(factor_B)
            else:
                p_BV = log_p_BV.exp()
                gradient_BV = p_BV.mul_(factor_B - of_entropy[start:stop] * _finite_(log_p_BV).add_(entropy_B))
            gradient_BV.scatter_add_(-1, target_C[start:stop, None], -factor_B)
            result_CV[start:stop] = gradient_BV
        return result_CV, None, None, None, None


def _finite_(log_p: Tensor) -> Tensor:
    """Makes the log-probabilities of tokens of probability 0 finite, as their product with it must be 0."""
    return log_p.clamp_(min=torch.finfo(log_p.dtype).min / 4)


def _of_block(
    z_BV: Tensor, target_B: Tensor, names: Sequence[str], can_overwrite: bool
) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    """The statistics of some rows; what their gradients need; `exp(z - maximum)`, and its sums."""
    known: dict[str, Tensor] = {}
    if "mean_logits" in names:
        known["mean_logits"] = z_BV.mean(-1)
    greatest_B = z_BV.amax(-1, keepdim=True)
    if "is_top1" in names:
        known["is_top1"] = _is_top1(z_BV, target_B, greatest_B).to(z_BV.dtype)
    centered_BV = torch.sub(z_BV, greatest_B, out=z_BV if can_overwrite else None)
    picked_B = centered_BV.gather(-1, target_B[:, None])[:, 0]
    exponentials_BV = centered_BV.exp()
    sum_B = exponentials_BV.sum(-1)
    log_sum_B = sum_B.log()
    known[LOG_PROB] = picked_B - log_sum_B
    kept = [greatest_B[:, 0], log_sum_B]
    if ENTROPY in names:
        known[ENTROPY] = log_sum_B - _finite_(centered_BV).mul_(exponentials_BV).sum(-1) / sum_B
        kept.append(known[ENTROPY])
    if "log_sum_sq_probs" in names:
        known["log_sum_sq_probs"] = torch.square(exponentials_BV, out=centered_BV).sum(-1).log() - 2 * log_sum_B
    return [known[name] for name in names], kept, exponentials_BV, sum_B


def _is_top1(z_BV: Tensor, target_B: Tensor, greatest_B: Tensor) -> Tensor:
    """`z.argmax(-1) == target`. On a CPU, where argmax takes as long as exp, only of rows whose target has the maximum."""
    if z_BV.device.type != "cpu":
        return z_BV.argmax(-1) == target_B
    is_top1_B = z_BV.gather(-1, target_B[:, None])[:, 0] == greatest_B[:, 0]
    is_top1_B[is_top1_B.clone()] = z_BV[is_top1_B].argmax(-1) == target_B[is_top1_B]  # the first of several maxima
    return is_top1_B
