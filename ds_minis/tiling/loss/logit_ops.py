"""What makes one result per token of deferred logits, chunk by chunk: cross entropy, and what evaluations ask for.

Shapes: leading dimensions `*L` (R rows when flattened), C rows of one chunk, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ds_minis.tiling.loss.cross_entropy import DTYPES, token_losses


class Deferred(Protocol):
    """The part of `DeferredLogits` that is needed here."""

    shape: torch.Size

    dtype: torch.dtype

    def dim(self) -> int:
        """Number of dimensions."""

    def before_upcast(self) -> Deferred:
        """The same without a last cast to float32."""

    def by_chunks(self, function: Callable[..., Tensor], *aligned_R: Tensor) -> Tensor:
        """`function(logits_CV, *aligned_C)` of each chunk of rows, put together."""

    def sum_by_chunks(self, function: Callable[..., Tensor], expected: Tensor, *aligned_R: Tensor) -> Tensor:
        """The sum of the same, whose incoming gradient will probably be `expected`.

        `function` is given a keyword `expected` too, where that is the gradient that its results are sure to receive.
        """


def _cross_entropy(
    logits: Deferred,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
):
    """`F.cross_entropy` of `(R, V)` logits and `(R,)` class indices; same arguments, same result, see `_token_losses`."""
    loss = functools.partial(F.cross_entropy, label_smoothing=label_smoothing)
    plain = weight is None and label_smoothing == 0.0
    return _token_losses(loss, logits, target, weight, size_average, ignore_index, reduce, reduction, plain)


def _nll_loss(
    log_probs: Deferred,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
):
    """`F.nll_loss` of `(R, V)` log-probabilities and `(R,)` class indices; same arguments, same result."""
    return _token_losses(F.nll_loss, log_probs, target, weight, size_average, ignore_index, reduce, reduction)


def _token_losses(
    loss: Callable[..., Tensor],
    logits: Deferred,
    target: Tensor,
    weight: Tensor | None,
    size_average: bool | None,
    ignore_index: int,
    reduce: bool | None,
    reduction: str,
    plain: bool = False,
):
    """One of torch's losses by chunks, NotImplemented for arguments of other kinds.

    One result differs on purpose: the mean over no token at all (every label is `ignore_index`) is 0 with zero
    gradients, where torch gives NaN.

    Args:
        plain: cross entropy with no more to it than labels, which `token_losses` computes without float32 copies.
    """
    if (
        logits.dim() != 2
        or target.dim() != 1
        or target.is_floating_point()
        or (size_average, reduce) != (None, None)
        or reduction not in ("none", "mean", "sum")
        or (weight is not None and weight.requires_grad)
    ):
        return NotImplemented
    if target.shape[0] != logits.shape[0]:
        raise ValueError(
            f"Expected input batch_size ({logits.shape[0]}) to match target batch_size ({target.shape[0]})."
        )
    dtype, logits_dtype = None, logits.dtype
    plain = plain and logits_dtype in DTYPES
    logits = logits.before_upcast() if plain else logits

    def losses(logits_CV: Tensor, target_C: Tensor, expected: Tensor | None = None) -> Tensor:
        nonlocal dtype
        if dtype is None:  # what torch gives for these logits: bfloat16 stays bfloat16, but for autocast
            sample_0V = logits_CV.detach()[:0].to(logits_dtype)
            dtype = loss(sample_0V, target_C[:0], weight, reduction="none").dtype
        if plain:
            return token_losses(logits_CV, target_C, ignore_index, expected)
        rows = logits_CV.to(torch.promote_types(logits_CV.dtype, torch.float32))
        weight_V = None if weight is None else weight.to(rows.dtype)
        return loss(rows, target_C, weight_V, ignore_index=ignore_index, reduction="none")

    if reduction == "none":
        return logits.by_chunks(losses, target).to(dtype)
    counted = target != ignore_index
    total_weight = counted.sum() if weight is None else (weight[target.masked_fill(~counted, 0)] * counted).sum()
    total_weight = total_weight.masked_fill(total_weight == 0, 1)
    # Whoever asks for a sum divides it by the number of tokens, most of the time of this batch.
    total = logits.sum_by_chunks(losses, 1 / total_weight, target)
    return (total if reduction == "sum" else total / total_weight).to(dtype)


def _argmax(logits: Deferred, dim: int | None = None, keepdim: bool = False):
    """`logits.argmax(-1)`: the predicted tokens."""
    if dim not in (-1, logits.dim() - 1):
        return NotImplemented
    with torch.no_grad():  # whole numbers
        tokens_R = logits.by_chunks(lambda logits_CV: logits_CV.argmax(-1))
    return _unflattened(tokens_R, logits, keepdim)


def _logsumexp(logits: Deferred, dim: int, keepdim: bool = False):
    """`logits.logsumexp(-1)`: the normalizer of each token, with its gradient (z-loss)."""
    if dim not in (-1, logits.dim() - 1):
        return NotImplemented
    return _unflattened(logits.by_chunks(lambda logits_CV: logits_CV.logsumexp(-1)), logits, keepdim)


def _gather(logits: Deferred, dim: int, index: Tensor):
    """`logits.gather(-1, index)`: some tokens' logits, or log-probabilities after `log_softmax`."""
    if dim not in (-1, logits.dim() - 1) or index.shape[:-1] != logits.shape[:-1]:
        return NotImplemented
    gathered = logits.by_chunks(lambda logits_CV, index_C: logits_CV.gather(-1, index_C), index.flatten(0, -2))
    return gathered.view(index.shape)


def _unflattened(result_R: Tensor, logits: Deferred, keepdim: bool) -> Tensor:
    return result_R.view(*logits.shape[:-1], *([1] if keepdim else []))


# Keyed by name, as the function `torch.argmax` and the method `Tensor.argmax` are different objects for one operation.
CONSUMERS = {
    "cross_entropy": _cross_entropy,
    "nll_loss": _nll_loss,
    "argmax": _argmax,
    "logsumexp": _logsumexp,
    "gather": _gather,
}
