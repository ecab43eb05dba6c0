"""Operations on deferred logits: some are recorded, others run chunk by chunk and give one result per token.

Casts, softcaps, scales, shifts and reshapes are recorded. Cross entropy and the operations of evaluations are run.

Shapes: leading dimensions `*L` (R rows when flattened), C rows of one chunk, V vocabulary.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ds_minis.tiling.core.params import version_of
from ds_minis.tiling.loss.cross_entropy import DTYPES, token_losses

if TYPE_CHECKING:
    from ds_minis.tiling.loss.deferred import DeferredLogits

Step = Callable[[Tensor], Tensor]
# Casts: autocast does not change them.
CASTS = frozenset("float half bfloat16 double to type_as".split())
# Elementwise functions: they are recorded. Keyed by name, since the function `torch.tanh` and the method `Tensor.tanh` are
# different objects for one operation.
ELEMENTWISE = frozenset(
    "tanh sigmoid neg __neg__ abs exp log square sqrt clamp nan_to_num "
    "add sub mul div true_divide multiply divide subtract rsub pow __add__ __sub__ __mul__ __truediv__ __radd__ __rsub__ "
    "__rmul__ __rtruediv__ __pow__".split()
).union(CASTS)
# In-place versions: the same deferred tensor then represents the result.
_IN_PLACE = {
    "add_": "add", "sub_": "sub", "mul_": "mul", "div_": "div", "tanh_": "tanh", "clamp_": "clamp",
    "__iadd__": "add", "__isub__": "sub", "__imul__": "mul", "__itruediv__": "div",
}  # fmt: skip


def record_or_run(func, name: str, logits: DeferredLogits, args: tuple, kwargs: dict):
    """The result, deferred or (for cross entropy) final; NotImplemented if the logits are needed in full."""
    if name in ("register_hook", "retain_grad"):
        raise RuntimeError(
            f'{name} on logits, whose gradient as a whole never exists when the loss is tiled. Set "loss": false in the '
            "mini-sequence configuration"
        )
    if name == "__setitem__" or name in _IN_PLACE or (name.endswith("_") and not name.endswith("__")):
        return _write(name, logits, args, kwargs)
    if logits._is_known() or not logits._mode.is_on(name):
        return NotImplemented
    if name in CONSUMERS:
        return CONSUMERS[name](logits, *args, **kwargs)
    if name in CASTS:
        return _cast(func, logits, args, kwargs)
    if name in ELEMENTWISE:
        return _elementwise(func, logits, args, kwargs)
    if name in ("softmax", "log_softmax"):
        return _along_vocabulary(func, logits, args, kwargs)
    if name in _ROW_VIEWS:
        return _ROW_VIEWS[name](lambda rows: func(rows, *args, **kwargs), logits, args, kwargs)
    return NotImplemented


def _write(name: str, logits: DeferredLogits, args: tuple, kwargs: dict):
    """Records an elementwise write; NotImplemented leaves it to torch, on the logits and all their views in full."""
    alone = len(logits._aliases.alive()) == 1
    if alone and not logits._is_known() and logits._mode.is_on():
        result = NotImplemented
        if name in _IN_PLACE:
            result = _elementwise(getattr(torch, _IN_PLACE[name]), logits, args, kwargs)
        elif name == "__setitem__":
            result = _set_items(logits, *args)
        if result is not NotImplemented and result._sample.dtype == logits._sample.dtype:
            logits._sample, logits._steps = result._sample, result._steps
            return logits
    return NotImplemented


def _set_items(logits: DeferredLogits, index: Any, value: Any):
    """Records `logits[..., tokens] = value`, equal for every row (tokens that must not be predicted)."""
    leading, tokens = _split_index(index, logits.dim())
    if any(i != slice(None) for i in leading if isinstance(i, slice)) or not all(isinstance(i, slice) for i in leading):
        return NotImplemented

    tokens = list(tokens) if isinstance(tokens, list) else tokens  # a later change of the list must not show

    def written(rows: Tensor, tokens: Any, value: Any) -> Tensor:
        rows = rows.clone()
        rows[..., tokens] = value
        return rows

    scalar = isinstance(value, int | float) or (isinstance(value, Tensor) and value.dim() == 0)
    return _elementwise(written, logits, (tokens, value), {}) if scalar else NotImplemented


def _elementwise(func, logits: DeferredLogits, args: tuple, kwargs: dict):
    """Records `func` if its other operands are equal for every row and need no gradient."""
    operands = [operand for operand in (*args, *kwargs.values()) if isinstance(operand, Tensor)]
    if any(type(o) is type(logits) or o.dim() > 1 or o.requires_grad for o in operands):
        return NotImplemented
    versions = [version_of(operand) for operand in operands]

    def step(rows: Tensor) -> Tensor:
        if versions != [version_of(operand) for operand in operands]:
            raise RuntimeError(
                "a tensor that the model used on its logits was written to before the loss was computed, "
                'which deferred logits cannot follow. Set "loss": false in the mini-sequence configuration'
            )
        return func(rows, *args, **kwargs)

    result = logits._with_step(step)
    return NotImplemented if result is None else result


@dataclass(frozen=True)
class Upcast:
    """A step that casts to float32, which `before_upcast` can drop."""

    step: Step
    narrow_dtype: torch.dtype

    def __call__(self, rows: Tensor) -> Tensor:
        return self.step(rows)


def _cast(func, logits: DeferredLogits, args: tuple, kwargs: dict):
    narrow, result = logits._sample.dtype, _elementwise(func, logits, args, kwargs)
    if result is not NotImplemented and result._sample.dtype == torch.float32 and narrow.itemsize == 2:
        result._steps = (*result._steps[:-1], Upcast(result._steps[-1], narrow))
    return result


def _along_vocabulary(func, logits: DeferredLogits, args: tuple, kwargs: dict):
    """Records a softmax along the vocabulary, which is a function of each row."""
    dim, *args = (kwargs.get("dim"),) if "dim" in kwargs else args
    if dim not in (-1, logits.dim() - 1):
        return NotImplemented
    return _elementwise(func, logits, (-1, *args), {key: value for key, value in kwargs.items() if key != "dim"})


def _reshape(view, logits: DeferredLogits, args: tuple, kwargs: dict):
    sizes = args[0] if len(args) == 1 and isinstance(args[0], list | tuple) else args
    if kwargs or not sizes or not all(isinstance(size, int) for size in sizes):
        return NotImplemented
    shape = list(sizes)
    if -1 in shape:
        shape[shape.index(-1)] = logits.numel() // max(1, -math.prod(shape))
    if shape[-1] != logits.shape[-1]:
        return NotImplemented
    return logits._with_rows(view, lambda hidden: hidden.reshape(*shape[:-1], hidden.shape[-1]))


def _flatten(view, logits: DeferredLogits, args: tuple, kwargs: dict):
    start, stop = (*args, 0, -1)[:2] if len(args) != 1 else (args[0], -1)
    if kwargs or stop % logits.dim() == logits.dim() - 1:
        return NotImplemented
    return logits._with_rows(view, lambda hidden: hidden.flatten(start, stop))


def _transpose(view, logits: DeferredLogits, args: tuple, kwargs: dict):
    if kwargs or logits.dim() - 1 in [dim % logits.dim() for dim in args]:
        return NotImplemented
    return logits._with_rows(view, lambda hidden: hidden.transpose(*args))


def _getitem(view, logits: DeferredLogits, args: tuple, kwargs: dict):
    """Records slices and integers on the leading dimensions, and slices of the vocabulary."""
    index, vocabulary = _split_index(args[0], logits.dim())
    if not all(isinstance(i, slice | int) for i in index) or not isinstance(vocabulary, slice):
        return NotImplemented
    steps = [] if vocabulary == slice(None) else [lambda rows: rows[..., vocabulary]]
    return logits._with_rows(view, lambda hidden: hidden[index], *steps)


def _split_index(index: Any, num_dims: int) -> tuple[tuple, Any]:
    """Splits an index into that of the leading dimensions, with an ellipsis expanded, and that of the vocabulary."""
    index = index if isinstance(index, tuple) else (index,)
    ellipses = [i for i, part in enumerate(index) if part is Ellipsis]
    at = ellipses[0] if ellipses else len(index)
    missing = num_dims - len(index) + len(ellipses)
    whole = (*index[:at], *[slice(None)] * missing, *index[at + 1 :])
    if len(whole) != num_dims:  # None adds a dimension
        return (None,), None
    return whole[:-1], whole[-1]


def _contiguous(view, logits: DeferredLogits, args: tuple, kwargs: dict):
    return logits._with_rows(view, lambda hidden: hidden)


_ROW_VIEWS = {
    "view": _reshape,
    "reshape": _reshape,
    "flatten": _flatten,
    "transpose": _transpose,
    "__getitem__": _getitem,
    "contiguous": _contiguous,
}


def _cross_entropy(
    logits: DeferredLogits,
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
    log_probs: DeferredLogits,
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
    logits: DeferredLogits,
    target: Tensor,
    weight: Tensor | None,
    size_average: bool | None,
    ignore_index: int,
    reduce: bool | None,
    reduction: str,
    plain: bool = False,
):
    """One of torch's losses by chunks; NotImplemented for unsupported arguments.

    One result differs on purpose: the mean over no tokens (every label is `ignore_index`) is 0 with zero gradients, where
    torch returns NaN.

    Args:
        plain: cross entropy without weights or smoothing, which `token_losses` computes without float32 copies.
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
        if dtype is None:  # torch's result dtype: bfloat16 stays bfloat16, except under autocast
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
    # A caller of reduction="sum" usually divides by the number of tokens in this batch.
    total = logits.sum_by_chunks(losses, 1 / total_weight, target)
    return (total if reduction == "sum" else total / total_weight).to(dtype)


def _argmax(logits: DeferredLogits, dim: int | None = None, keepdim: bool = False):
    """`logits.argmax(-1)`: the predicted tokens."""
    if dim not in (-1, logits.dim() - 1):
        return NotImplemented
    with torch.no_grad():  # integers have no gradient
        tokens_R = logits.by_chunks(lambda logits_CV: logits_CV.argmax(-1))
    return _unflattened(tokens_R, logits, keepdim)


def _logsumexp(logits: DeferredLogits, dim: int, keepdim: bool = False):
    """`logits.logsumexp(-1)`: the normalizer of each token, with its gradient (z-loss)."""
    if dim not in (-1, logits.dim() - 1):
        return NotImplemented
    return _unflattened(logits.by_chunks(lambda logits_CV: logits_CV.logsumexp(-1)), logits, keepdim)


def _gather(logits: DeferredLogits, dim: int, index: Tensor):
    """`logits.gather(-1, index)`: logits of chosen tokens, or log-probabilities after `log_softmax`."""
    if dim not in (-1, logits.dim() - 1) or index.shape[:-1] != logits.shape[:-1]:
        return NotImplemented
    gathered = logits.by_chunks(lambda logits_CV, index_C: logits_CV.gather(-1, index_C), index.flatten(0, -2))
    return gathered.view(index.shape)


def _unflattened(result_R: Tensor, logits: DeferredLogits, keepdim: bool) -> Tensor:
    return result_R.view(*logits.shape[:-1], *([1] if keepdim else []))


# Keyed by name, since the function `torch.argmax` and the method `Tensor.argmax` are different objects for one operation.
CONSUMERS = {
    "cross_entropy": _cross_entropy,
    "nll_loss": _nll_loss,
    "argmax": _argmax,
    "logsumexp": _logsumexp,
    "gather": _gather,
}
