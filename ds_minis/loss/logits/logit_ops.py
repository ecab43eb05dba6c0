"""Operations on deferred logits: which are recorded, which run chunk by chunk, and which need all logits.

Elementwise operations, also between two deferred tensors (a student's and a teacher's), and softmaxes are recorded. Slices,
masks and reshapes are made on the hidden states (`row_views`). What gives one number per token, or a sum, is run by chunks
(`consumers`).

Shapes: leading dimensions `*L` (R rows when flattened), V vocabulary, K any width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ds_minis.loss.logits.consumers import CONSUMERS, reduced_stack
from ds_minis.loss.logits.expression import Expression, concatenated, operand_of
from ds_minis.loss.logits.row_views import LISTS, ROW_VIEWS, getitem, split_index

if TYPE_CHECKING:
    from ds_minis.loss.logits.deferred import DeferredLogits

# Casts: autocast does not change them.
CASTS = frozenset("float half bfloat16 double to type_as".split())
# Elementwise functions. Keyed by name, since the function `torch.tanh` and the method `Tensor.tanh` are different objects for
# one operation.
ELEMENTWISE = frozenset(
    "tanh sigmoid neg __neg__ negative abs exp expm1 log log1p square sqrt clamp clip nan_to_num logsigmoid log_sigmoid "
    "softplus add sub mul div true_divide multiply divide subtract rsub pow __add__ __sub__ __mul__ __truediv__ __radd__ "
    "__rsub__ __rmul__ __rtruediv__ __pow__ __rpow__ maximum minimum logaddexp masked_fill where lerp xlogy detach".split()
).union(CASTS)
# In-place versions: the same deferred tensor then represents the result.
_IN_PLACE = {
    "add_": "add", "sub_": "sub", "mul_": "mul", "div_": "div", "tanh_": "tanh", "clamp_": "clamp",
    "masked_fill_": "masked_fill", "__iadd__": "add", "__isub__": "sub", "__imul__": "mul", "__itruediv__": "div",
}  # fmt: skip


def record_or_run(func, name: str, first: Any, args: tuple, kwargs: dict):
    """The result, deferred or final; NotImplemented if the logits are needed in full.

    Args:
        first: deferred logits; for `stack` and `cat`, a list of tensors.
    """
    if isinstance(first, tuple | list):
        return _joined(name, first, args, kwargs)
    if name in ("register_hook", "retain_grad") and not first.is_known():
        _require_no_reader(name, first)
        return NotImplemented
    if name == "__setitem__" or name in _IN_PLACE or (name.endswith("_") and not name.endswith("__")):
        return _write(name, first, args, kwargs)
    if not first.is_open():
        return NotImplemented
    if name in CONSUMERS:
        result = CONSUMERS[name](func, first, args, kwargs)
        if result is not NotImplemented:
            return _told(name, result, first)
    if name in ELEMENTWISE:
        return elementwise(func, (first, *args), kwargs)
    if name in ("softmax", "log_softmax"):
        return _along_vocabulary(func, first, args, kwargs)
    if name == "__getitem__":
        return _told("__getitem__", getitem(func, first, *args), first)
    if name in ROW_VIEWS:
        return ROW_VIEWS[name](func, first, args, kwargs)
    return LISTS[name](first, args, kwargs) if name in LISTS else NotImplemented


def record_reversed(func, name: str, args: tuple):
    """The same where another tensor or number comes first: an elementwise operation, or a loss of given logits."""
    deferred = [arg for arg in args if _is_deferred(arg)]
    if not deferred or not all(d.is_open() for d in deferred):
        return NotImplemented
    return elementwise(func, args, {}) if name in ELEMENTWISE else NotImplemented


def _is_deferred(value: Any) -> bool:
    return hasattr(value, "_expression") and isinstance(value, Tensor)


def _told(name: str, result: Any, logits: DeferredLogits) -> Any:
    if result is not NotImplemented and not _is_deferred(result):
        for head in logits.heads():
            head.note_reader(name)
    return result


def _require_no_reader(name: str, logits: DeferredLogits) -> None:
    """Raises RuntimeError if the gradient of all logits would be incomplete."""
    if any(head.was_read or not head.without_labels for head in logits.heads()):
        raise RuntimeError(
            f'{name} on logits, whose gradient as a whole never exists when the loss is tiled. Set "loss": false in the '
            "mini-sequence configuration"
        )


def _write(name: str, logits: DeferredLogits, args: tuple, kwargs: dict):
    """Records an elementwise write; NotImplemented leaves it to torch, on the logits and all their views in full."""
    if len(logits._aliases.alive()) == 1 and logits.is_open():
        result = NotImplemented
        if name in _IN_PLACE and torch.is_grad_enabled() >= logits.requires_grad:
            result = elementwise(getattr(torch, _IN_PLACE[name]), (logits, *args), kwargs)
        elif name == "__setitem__" and torch.is_grad_enabled() >= logits.requires_grad:
            result = _set_items(logits, *args)
        if (
            result is not NotImplemented
            and result.dtype == logits.dtype
            and result.requires_grad == logits.requires_grad
        ):
            logits.become(result)
            return logits
    return NotImplemented


def _set_items(logits: DeferredLogits, index: Any, value: Any):
    """Records `logits[..., tokens] = value`, equal for every row (tokens that must not be predicted)."""
    leading, tokens = split_index(index, logits.dim())
    if (
        tokens is None
        or any(i != slice(None) for i in leading if isinstance(i, slice))
        or not all(isinstance(i, slice) for i in leading)
    ):
        return NotImplemented

    tokens = list(tokens) if isinstance(tokens, list) else tokens  # a later change of the list must not show

    def written(rows: Tensor, tokens: Any, value: Any) -> Tensor:
        rows = rows.clone()
        rows[..., tokens] = value
        return rows

    scalar = isinstance(value, int | float) or (
        isinstance(value, Tensor) and value.dim() == 0 and not value.requires_grad
    )
    constant = not isinstance(tokens, Tensor) or tokens.dim() == 1
    return (
        _applied(written, logits, (logits.expression(), tokens, value), {}) if scalar and constant else NotImplemented
    )


def elementwise(func, args: Sequence[Any], kwargs: dict):
    """Records an operation whose deferred operands have the same rows, and whose others have one row, or one per token."""
    deferred = [arg for arg in args if _is_deferred(arg)]
    others = [value for value in kwargs.values() if isinstance(value, Tensor)]
    logits = deferred[0]
    if any(not d.is_open() or d.shape != logits.shape for d in deferred[1:]) or any(
        t.dim() or t.requires_grad for t in others
    ):
        return NotImplemented
    operands = []
    for arg in args:
        operands.append(operand_of(arg, logits.expression()))
        if operands[-1] is NotImplemented:
            return NotImplemented
    return _applied(func, logits, operands, kwargs)


def _applied(func, logits: DeferredLogits, operands: Sequence[Any], kwargs: dict, **attributes: Any):
    before = logits.expression()
    cast = getattr(func, "__name__", "") in CASTS and before.sample_0V.dtype.itemsize == 2
    if cast:
        attributes["narrow_dtype"] = before.sample_0V.dtype
    result = before.applied(func, operands, kwargs, **attributes)
    if cast and result.sample_0V.dtype != torch.float32:
        result = before.applied(func, operands, kwargs)
    if result.sample_0V is before.sample_0V:  # a cast to their own dtype: torch returns the tensor itself
        return logits
    if result.sample_0V.shape != before.sample_0V.shape:
        return NotImplemented
    return logits.derived(result)


def _along_vocabulary(func, logits: DeferredLogits, args: tuple, kwargs: dict):
    """Records a softmax along the vocabulary, which is a function of each row."""
    dim, *args = (kwargs.get("dim"), *args) if "dim" in kwargs else args or (None,)
    if dim not in (-1, logits.dim() - 1):
        return NotImplemented
    options = {key: value for key, value in kwargs.items() if key not in ("dim", "_stacklevel")}
    return _applied(func, logits, (logits.expression(), -1, *args), options)


def _joined(name: str, parts: Sequence[Any], args: tuple, kwargs: dict):
    """`stack` and `cat` along the first dimension."""
    dim = args[0] if args else kwargs.get("dim", 0)
    if name not in ("stack", "cat", "concat") or dim != 0 or not parts or not all(map(_is_deferred, parts)):
        return NotImplemented
    if not all(part.is_open() for part in parts) or len({part.shape[1:] for part in parts}) > 1:
        return NotImplemented
    expressions: list[Expression] = [part.expression() for part in parts]
    if name == "stack":
        if len({part.shape for part in parts}) > 1:
            return NotImplemented
        joined = concatenated([e.rearranged(lambda rows: rows.unsqueeze(0)) for e in expressions])
        return reduced_stack(parts, elementwise) if joined is None else parts[0].derived(joined)
    joined = concatenated(expressions)
    return NotImplemented if joined is None else parts[0].derived(joined)
