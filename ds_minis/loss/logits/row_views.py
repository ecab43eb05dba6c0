"""Other rows of deferred logits, or the same in another order: made on the hidden states.

Shapes: leading dimensions `*L`, V vocabulary, K width of a leaf.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ds_minis.loss.logits.deferred import DeferredLogits


def _view(
    func, logits: DeferredLogits, rearrange: Callable[[Tensor], Tensor], args: tuple = (), kwargs: dict | None = None
):
    """A view of the logits: `rearrange` of each leaf `(*L, K)`."""
    expression = logits.expression().rearranged(rearrange)
    return logits.derived(expression, lambda rows: func(rows, *args, **kwargs or {}))


def _reshape(func, logits: DeferredLogits, args: tuple, kwargs: dict):
    sizes = args[0] if len(args) == 1 and isinstance(args[0], list | tuple) else args
    if kwargs or not sizes or not all(isinstance(size, int) for size in sizes):
        return NotImplemented
    shape = list(sizes)
    if -1 in shape:
        shape[shape.index(-1)] = logits.numel() // max(1, -math.prod(shape))
    if shape[-1] != logits.shape[-1]:
        return NotImplemented
    return _view(func, logits, lambda leaf: leaf.reshape(*shape[:-1], leaf.shape[-1]), args)


def _flatten(func, logits: DeferredLogits, args: tuple, kwargs: dict):
    start = args[0] if args else kwargs.get("start_dim", 0)
    stop = args[1] if len(args) > 1 else kwargs.get("end_dim", -1)
    if stop % logits.dim() == logits.dim() - 1:
        return NotImplemented
    return _view(func, logits, lambda leaf: leaf.flatten(start, stop), args, kwargs)


def _of_dimensions(func, logits: DeferredLogits, args: tuple, kwargs: dict):
    """`transpose`, and `permute` with the vocabulary last."""
    dims = args[0] if len(args) == 1 and isinstance(args[0], list | tuple) else args
    places = [dim % logits.dim() for dim in dims]
    last = logits.dim() - 1
    if kwargs or (last in places and not (len(places) == last + 1 > 2 and places[-1] == last)):
        return NotImplemented
    name = "permute" if len(places) == last + 1 > 2 else "transpose"
    return _view(func, logits, lambda leaf: getattr(leaf, name)(*places), args)


def _of_one_dimension(func, logits: DeferredLogits, args: tuple, kwargs: dict):
    """Functions whose first argument is a dimension other than the vocabulary's."""
    dim = args[0] if args else kwargs.get("dim")
    name = func.__name__
    num_dims = logits.dim() + (name == "unsqueeze")
    if not isinstance(dim, int) or dim % num_dims == num_dims - 1:
        return NotImplemented
    rest, options = args[1:], _without_dim(kwargs)

    def rearrange(leaf: Tensor) -> Tensor:
        return getattr(leaf, name)(dim % num_dims, *rest, **options)

    if name == "index_select":  # a copy
        return logits.derived(logits.expression().rearranged(rearrange))
    return _view(func, logits, rearrange, args, kwargs)


def _without_dim(kwargs: dict) -> dict:
    return {key: value for key, value in kwargs.items() if key != "dim"}


def _contiguous(func, logits: DeferredLogits, args: tuple, kwargs: dict):
    return _view(func, logits, lambda leaf: leaf, args, kwargs)


def _clone(func, logits: DeferredLogits, args: tuple, kwargs: dict):
    return logits.derived(logits.expression().rearranged(lambda leaf: leaf))


ROW_VIEWS = {
    "view": _reshape,
    "reshape": _reshape,
    "flatten": _flatten,
    "transpose": _of_dimensions,
    "swapaxes": _of_dimensions,
    "permute": _of_dimensions,
    "unsqueeze": _of_one_dimension,
    "squeeze": _of_one_dimension,
    "narrow": _of_one_dimension,
    "select": _of_one_dimension,
    "index_select": _of_one_dimension,
    "contiguous": _contiguous,
    "clone": _clone,
}


def _parts(logits: DeferredLogits, dim: int, bounds: list[tuple[int, int]]) -> tuple[DeferredLogits, ...]:
    def part(start: int, length: int) -> DeferredLogits:
        return _view(Tensor.narrow, logits, lambda leaf: leaf.narrow(dim, start, length), (dim, start, length))

    return tuple(part(start, stop - start) for start, stop in bounds)


def _leading(logits: DeferredLogits, dim: Any) -> int | None:
    """The dimension, counted from the first; None if it is the vocabulary's."""
    return dim % logits.dim() if isinstance(dim, int) and dim % logits.dim() != logits.dim() - 1 else None


def _chunk(logits: DeferredLogits, args: tuple, kwargs: dict):
    count, dim = (*args, *[kwargs[k] for k in ("chunks", "dim") if k in kwargs], 0)[:2]
    dim = _leading(logits, dim)
    if dim is None:
        return NotImplemented
    return _split(logits, (-(-logits.shape[dim] // count) or 1, dim), {})


def _split(logits: DeferredLogits, args: tuple, kwargs: dict):
    sizes, dim = (*args, *[kwargs[k] for k in ("split_size_or_sections", "split_size", "dim") if k in kwargs], 0)[:2]
    dim = _leading(logits, dim)
    if dim is None:
        return NotImplemented
    total = logits.shape[dim]
    if isinstance(sizes, int):
        bounds = [(i, min(i + sizes, total)) for i in range(0, max(total, 1), sizes)]
    else:
        ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
        if not ends or ends[-1] != total:
            return NotImplemented
        bounds = list(zip([0, *ends[:-1]], ends, strict=True))
    return _parts(logits, dim, bounds)


def _unbind(logits: DeferredLogits, args: tuple, kwargs: dict):
    dim = _leading(logits, args[0] if args else kwargs.get("dim", 0))
    if dim is None:
        return NotImplemented
    return tuple(
        _view(Tensor.select, logits, lambda leaf, i=i: leaf.select(dim, i), (dim, i)) for i in range(logits.shape[dim])
    )


def _iterate(logits: DeferredLogits, args: tuple, kwargs: dict) -> Iterator[DeferredLogits]:
    parts = _unbind(logits, (0,), {})
    return NotImplemented if parts is NotImplemented else iter(parts)


LISTS = {"chunk": _chunk, "split": _split, "unbind": _unbind, "__iter__": _iterate}


def getitem(func, logits: DeferredLogits, index: Any):
    """`logits[index]`: rows by slices, numbers or a mask; a slice of the vocabulary; or some tokens' logits, by chunks."""
    leading, vocabulary = split_index(index, logits.dim())
    copies = any(isinstance(i, Tensor | list) for i in leading)
    if vocabulary is None or not all(i is None or isinstance(i, slice | int | Tensor | list) for i in leading):
        return NotImplemented
    if isinstance(vocabulary, slice):
        rows = logits.expression().rearranged(lambda leaf: leaf[leading] if leading else leaf)
        if vocabulary != slice(None):
            rows = rows.applied(_columns, [rows, vocabulary], {})
        return logits.derived(rows, None if copies else lambda all_rows: func(all_rows, index))
    if copies or not (isinstance(vocabulary, int | list) or vocabulary.dim() == 1):
        return NotImplemented
    rows = logits.derived(logits.expression().rearranged(lambda leaf: leaf[leading] if leading else leaf))
    columns_R = rows.by_chunks(lambda rows_CV: rows_CV[..., vocabulary])
    return columns_R.view(*rows.shape[:-1], *columns_R.shape[1:])


def _columns(rows: Tensor, vocabulary: slice) -> Tensor:
    return rows[..., vocabulary]


def split_index(index: Any, num_dims: int) -> tuple[tuple, Any]:
    """Splits an index into that of the leading dimensions, with an ellipsis expanded, and that of the vocabulary.

    The latter is None if they cannot be told apart.
    """
    index = index if isinstance(index, tuple) else (index,)
    ellipses = [i for i, part in enumerate(index) if part is Ellipsis]
    if len(ellipses) > 1 or any(isinstance(part, bool) for part in index):
        return (), None
    at = ellipses[0] if ellipses else len(index)
    used = sum(_num_dims(part) for part in index if part is not Ellipsis)
    whole = [*index[:at], *[slice(None)] * (num_dims - used), *index[at + 1 :]]
    if used > num_dims or not whole or whole[-1] is None or _num_dims(whole[-1]) != 1:
        return (), None
    return tuple(whole[:-1]), whole[-1]


def _num_dims(part: Any) -> int:
    if part is None:
        return 0
    return part.dim() if isinstance(part, Tensor) and part.dtype == torch.bool else 1
