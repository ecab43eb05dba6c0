"""What reads deferred logits chunk by chunk: losses, and functions of each row that give few numbers per token.

Shapes: leading dimensions `*L` (R rows when flattened), C rows of one chunk, V vocabulary, N results per row.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ds_minis.loss.heads.one_factor import Labelled
from ds_minis.loss.kernels.cross_entropy import DTYPES, token_losses
from ds_minis.loss.logits.expression import Expression, operand_of

if TYPE_CHECKING:
    from ds_minis.loss.logits.deferred import DeferredLogits

_REDUCTIONS = "none", "mean", "sum"


def _cross_entropy(
    func,
    logits: DeferredLogits,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
):
    """`F.cross_entropy` of `(R, V)` logits and `(R,)` class indices or `(R, V)` probabilities; see `_token_losses`."""
    if (size_average, reduce) != (None, None) or logits.dim() != 2:
        return NotImplemented
    loss = functools.partial(F.cross_entropy, label_smoothing=label_smoothing)
    if target.is_floating_point():
        return _of_probabilities(loss, logits, target, weight, reduction)
    plain = weight is None and label_smoothing == 0.0
    return _token_losses(loss, logits, target, weight, ignore_index, reduction, plain)


def _nll_loss(
    func,
    log_probs: DeferredLogits,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
):
    """`F.nll_loss` of `(R, V)` log-probabilities and `(R,)` class indices; same arguments, same result."""
    if (size_average, reduce) != (None, None):
        return NotImplemented
    return _token_losses(F.nll_loss, log_probs, target, weight, ignore_index, reduction)


def _of_probabilities(loss, logits: DeferredLogits, target_RV: Tensor, weight: Tensor | None, reduction: str):
    """Cross entropy with a probability for each token of the vocabulary, given in full or deferred."""
    if target_RV.shape != logits.shape or reduction not in _REDUCTIONS or (weight is not None and weight.requires_grad):
        return NotImplemented

    def losses(rows: Tensor, target_CV: Tensor) -> Tensor:
        return loss(rows, target_CV, weight, reduction="none")[:, None]

    losses_R1 = _joint(losses, logits, target_RV)
    if losses_R1 is NotImplemented:
        return NotImplemented
    return _reduced(losses_R1, logits, reduction, 1, logits.shape[0])


def _joint(function: Callable[..., Tensor], logits: DeferredLogits, other: Tensor):
    """The expression of a function of the logits' rows and another tensor's, deferred or not."""
    own = logits.expression()
    operand = operand_of(other, own)
    return NotImplemented if operand is NotImplemented else own.applied(function, [own, operand], {})


def _reduced(expression: Expression, logits: DeferredLogits, reduction: str, width: int, count: float):
    """A loss `(*L, width)` per element: its sum, its sum divided by `count`, or (of width 1) itself."""
    rows = logits.derived(expression)
    if reduction == "none":
        result_R = rows.by_chunks(lambda rows_C: rows_C[..., 0] if width == 1 else rows_C)
        return result_R.view(*logits.shape[:-1], *result_R.shape[1:])
    scale = 1.0 if reduction == "sum" else 1.0 / max(count, 1e-30)
    dtype = expression.sample_0V.dtype
    expected = torch.tensor(scale, device=logits.device, dtype=torch.promote_types(dtype, torch.float32))
    total = rows.sum_by_chunks(_row_sums, expected)
    return (total if reduction == "sum" else total / count).to(dtype)


def _row_sums(rows: Tensor, expected: Tensor | None = None) -> Tensor:
    return rows.sum(-1, dtype=torch.promote_types(rows.dtype, torch.float32))


def _token_losses(
    loss: Callable[..., Tensor],
    logits: DeferredLogits,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
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
        or reduction not in _REDUCTIONS
        or (weight is not None and weight.requires_grad)
    ):
        return NotImplemented
    if target.shape[0] != logits.shape[0]:
        raise ValueError(
            f"Expected input batch_size ({logits.shape[0]}) to match target batch_size ({target.shape[0]})."
        )
    dtype, logits_dtype = None, logits.dtype
    plain = plain and logits_dtype in DTYPES
    rows = logits.derived(logits.expression().before_upcast()) if plain else logits

    def losses(logits_CV: Tensor, target_C: Tensor, expected: Tensor | None = None) -> Tensor:
        nonlocal dtype
        if dtype is None:  # torch's result dtype: bfloat16 stays bfloat16, except under autocast
            sample_0V = logits_CV.detach()[:0].to(logits_dtype)
            dtype = loss(sample_0V, target_C[:0], weight, reduction="none").dtype
        if plain:
            return token_losses(logits_CV, target_C, ignore_index, expected)
        rows_CV = logits_CV.to(torch.promote_types(logits_CV.dtype, torch.float32))
        weight_V = None if weight is None else weight.to(rows_CV.dtype)
        return loss(rows_CV, target_C, weight_V, ignore_index=ignore_index, reduction="none")

    counted = target != ignore_index
    if reduction == "none":
        (losses_R,) = rows.columns_by_chunks(losses, target, labelled=Labelled("losses", counted))
        return losses_R.masked_fill(~counted, 0).to(dtype)  # they are 0, and so are now their incoming gradients
    total_weight = counted.sum() if weight is None else (weight[target.masked_fill(~counted, 0)] * counted).sum()
    total_weight = total_weight.masked_fill(total_weight == 0, 1)
    # A caller of reduction="sum" usually divides by the number of tokens in this batch.
    total = rows.sum_by_chunks(losses, 1 / total_weight, target)
    return (total if reduction == "sum" else total / total_weight).to(dtype)


def _pointwise_loss(func, logits: DeferredLogits, args: tuple, kwargs: dict):
    """A loss of two tensors of one shape, element by element (`kl_div`, `mse_loss`); either may be deferred."""
    target = args[0] if args else kwargs.get("target")
    names = ("reduction", "log_target", "delta", "beta")
    options = {key: value for key, value in kwargs.items() if key != "target" and value is not None}
    reduction = options.pop("reduction", "mean")
    if len(args) > 1 or not isinstance(target, Tensor) or target.shape != logits.shape or set(options) - set(names):
        return NotImplemented
    if reduction not in (*_REDUCTIONS, "batchmean"):
        return NotImplemented
    function = functools.partial(func, reduction="none", **options)
    losses = _joint(function, logits, target)
    if losses is NotImplemented:
        return NotImplemented
    if reduction == "none":
        return logits.derived(losses)
    count = logits.shape[0] if reduction == "batchmean" else logits.numel()
    return _reduced(losses, logits, "sum" if reduction == "sum" else "mean", logits.shape[-1], count)


def _sum_or_mean(func, logits: DeferredLogits, args: tuple, kwargs: dict):
    """`sum` and `mean` over the vocabulary, over it and other dimensions, or over everything."""
    options = dict(kwargs)
    dim = args[0] if args else options.pop("dim", None)
    keepdim = args[1] if len(args) > 1 else options.pop("keepdim", False)
    dtype = options.pop("dtype", None)
    is_mean = func.__name__ == "mean"
    if options or len(args) > 2 or isinstance(dim, torch.dtype):
        return NotImplemented
    every = dim is None or dim == () or dim == []
    dims = sorted({d % logits.dim() for d in ((dim,) if isinstance(dim, int) else dim)}) if not every else None
    rows = (
        logits
        if dtype is None
        else logits.derived(logits.expression().applied(Tensor.to, [logits.expression(), dtype], {}))
    )
    if every or len(dims) == logits.dim():
        if keepdim:
            return NotImplemented
        return _reduced(rows.expression(), rows, "mean" if is_mean else "sum", logits.shape[-1], logits.numel())
    if dims[-1] != logits.dim() - 1:
        return NotImplemented
    function = functools.partial(torch.mean if is_mean else torch.sum, dim=-1)
    result = rows.by_chunks(function).view(logits.shape[:-1])
    if len(dims) > 1:
        result = (torch.mean if is_mean else torch.sum)(result, dims[:-1], keepdim=keepdim)
    return result.unsqueeze(-1) if keepdim else result


def _of_rows(logits: DeferredLogits, args: tuple, kwargs: dict, function: Callable[[Tensor], Tensor]):
    """A function of each row, given as `dim` and `keepdim`, with one number as its result."""
    options = dict(kwargs)
    dim = args[0] if args else options.pop("dim", None)
    keepdim = args[1] if len(args) > 1 else options.pop("keepdim", False)
    if isinstance(dim, tuple | list) and len(dim) == 1:
        dim = dim[0]
    if options or len(args) > 2 or not isinstance(dim, int) or dim % logits.dim() != logits.dim() - 1:
        return NotImplemented
    (result_R,) = logits.columns_by_chunks(function)
    result = result_R.view(logits.shape[:-1])
    return result.unsqueeze(-1) if keepdim else result


def _reduce(func, logits: DeferredLogits, args: tuple, kwargs: dict):
    """`logsumexp` (a z-loss), `amax`, `amin`."""
    function = getattr(torch, func.__name__)
    return _of_rows(logits, args, kwargs, lambda rows_CV: function(rows_CV, -1))


def _arg(func, logits: DeferredLogits, args: tuple, kwargs: dict):
    """`argmax` and `argmin`: integers, which have no gradient."""
    with torch.no_grad():
        return _of_rows(logits, args, kwargs, lambda rows_CV: getattr(rows_CV, func.__name__)(-1))


def _extreme(func, logits: DeferredLogits, args: tuple, kwargs: dict):
    """`max` and `min` along the vocabulary: values and indices."""
    name = func.__name__
    if (not args and "dim" not in kwargs) or (args and not isinstance(args[0], int)):
        return NotImplemented
    dim = args[0] if args else kwargs["dim"]
    keepdim = args[1] if len(args) > 1 else kwargs.get("keepdim", False)
    if dim % logits.dim() != logits.dim() - 1:
        return NotImplemented
    values, indices = _values_and_indices(logits, lambda rows_CV: getattr(rows_CV, name)(-1, keepdim=True), 1)
    shown = (values, indices) if keepdim else (values.squeeze(-1), indices.squeeze(-1))
    return getattr(torch.return_types, name)(shown)


def _topk(func, logits: DeferredLogits, args: tuple, kwargs: dict):
    options = dict(zip(("k", "dim", "largest", "sorted"), args, strict=False)) | kwargs
    dim, count = options.pop("dim", -1), options.pop("k")
    if dim % logits.dim() != logits.dim() - 1:
        return NotImplemented
    return torch.return_types.topk(
        _values_and_indices(logits, lambda rows_CV: rows_CV.topk(count, -1, **options), count)
    )


def _values_and_indices(logits: DeferredLogits, function: Callable[[Tensor], Any], count: int) -> tuple[Tensor, Tensor]:
    """Both from one run over the chunks: in float64, which holds any float32 and any index."""

    def both(rows_CV: Tensor) -> Tensor:
        values_CN, indices_CN = function(rows_CV)
        return torch.cat([values_CN.double(), indices_CN.double()], -1)

    both_R2N = logits.by_chunks(both)
    shape = (*logits.shape[:-1], count)
    values, indices = both_R2N.split(count, -1)
    return values.to(logits.dtype).reshape(shape), indices.detach().long().reshape(shape)


def _gather(func, logits: DeferredLogits, args: tuple, kwargs: dict):
    """`logits.gather(-1, index)`: logits of chosen tokens, or log-probabilities after `log_softmax`."""
    names = ("indices", "dim") if func.__name__ == "take_along_dim" else ("dim", "index")
    given = dict(zip(names, args, strict=False)) | kwargs
    dim, index = given.get("dim"), given.get("index", given.get("indices"))
    if not isinstance(dim, int) or not isinstance(index, Tensor) or index.dim() != logits.dim():
        return NotImplemented
    if dim % logits.dim() != logits.dim() - 1 or index.shape[:-1] != logits.shape[:-1]:
        return NotImplemented
    index_RN = index.reshape(-1, index.shape[-1])
    run = logits.columns_by_chunks if index.shape[-1] == 1 else logits.by_chunks
    gathered = run(lambda rows_CV, index_CN: rows_CV.gather(-1, index_CN), index_RN)
    return (gathered[0] if type(gathered) is list else gathered).view(index.shape)


def _with_arguments(consumer: Callable) -> Callable:
    return lambda func, logits, args, kwargs: consumer(func, logits, *args, **kwargs)


# Keyed by name, since the function `torch.argmax` and the method `Tensor.argmax` are different objects for one operation.
CONSUMERS: dict[str, Callable] = {
    "cross_entropy": _with_arguments(_cross_entropy),
    "nll_loss": _with_arguments(_nll_loss),
    **dict.fromkeys(("kl_div", "mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss"), _pointwise_loss),
    **dict.fromkeys(("sum", "mean"), _sum_or_mean),
    **dict.fromkeys(("logsumexp", "amax", "amin"), _reduce),
    **dict.fromkeys(("argmax", "argmin"), _arg),
    **dict.fromkeys(("max", "min"), _extreme),
    "topk": _topk,
    **dict.fromkeys(("gather", "take_along_dim"), _gather),
}


class Stack(torch.Tensor):
    """Several deferred tensors of one shape along a new first dimension: a mixture, whose log-probability is a logsumexp."""

    @staticmethod
    def __new__(cls, parts: list[DeferredLogits], combine: Callable):
        shape = (len(parts), *parts[0].shape)
        grad = any(part.requires_grad for part in parts)
        stack = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=parts[0].dtype, device=parts[0].device, requires_grad=grad
        )
        if grad:
            with torch._C.DisableTorchFunctionSubclass():
                stack.register_hook(_refuse_gradient)
        stack._parts, stack._combine = list(parts), combine
        return stack

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} was called on a stack of deferred logits: call it on `torch.stack(...).clone()`")

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        dim = args[1] if len(args) > 1 else kwargs.get("dim")
        reduces = name in ("logsumexp", "sum", "mean", "amax", "amin") and isinstance(args[0], Stack)
        if reduces and dim in (0, (0,)) and set(kwargs) <= {"dim"} and len(args) <= 2:
            combine = getattr(torch, name)
            result = args[0]._combine(lambda *rows: combine(torch.stack(rows), 0), args[0]._parts, {})
            if result is not NotImplemented:
                return result
        if name == "__get__" or name in ("dim", "size", "numel", "__len__"):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if name == "__getitem__" and isinstance(args[1], int):
            return args[0]._parts[args[1]]
        whole = [torch.stack([part.materialize() for part in a._parts]) if isinstance(a, Stack) else a for a in args]
        return func(*whole, **kwargs)


def _refuse_gradient(_: Tensor) -> None:
    raise RuntimeError("a stack of deferred logits was given to an autograd.Function: give it `torch.stack(...) + 0`")


def reduced_stack(parts, combine: Callable) -> Stack:
    """A stack of deferred logits, which is combined with `combine(function, parts, {})` where it is reduced to one."""
    return Stack(list(parts), combine)
