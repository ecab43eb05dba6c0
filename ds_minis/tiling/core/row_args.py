"""The arguments of a token-wise module's call: finds those with a row per token, and rebuilds the call for some rows."""

from __future__ import annotations

import copy
import enum
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ds_minis.tiling.core.params import untouched

CONSTANTS = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, enum.Enum, type(None))


FEW = 32  # rows; fewer would show nothing


def spread(index: Tensor, size: int) -> Tensor:
    """`len(index)` indices below `size`: a third each from its beginning, middle and end."""
    count = len(index)
    if size <= count:
        return index
    third, rest = count // 3, count - 2 * (count // 3)
    middle = (size - third) // 2
    return torch.cat([index[:rest], torch.arange(middle, middle + third), torch.arange(size - third, size)])


class RowArgs:
    """The arguments of a call, seen as rows.

    The first tensor `(*L, H)` has one row for each index of its leading dimensions `*L`. Other tensors must have the same
    leading dimensions (a residual, token ids, the experts chosen for each token), or one leading dimension of all R rows.

    Attributes:
        keys: positions and names of the arguments that have rows.
        num_rows: R, the rows of the whole call.
        reason: why the call cannot be run by rows; empty if it can.
    """

    __slots__ = ("_args", "_kwargs", "_leading", "_leading_of", "keys", "num_rows", "reason")

    def __init__(self, args: tuple, kwargs: dict[str, Any]):
        self._args, self._kwargs = args, kwargs
        self._leading: tuple[int, ...] = ()
        self._leading_of: dict[int | str, int] = {}
        self.keys: tuple[int | str, ...] = ()
        self.num_rows, self.reason = 0, ""
        for key, value in (*enumerate(args), *kwargs.items()):
            if isinstance(value, Tensor):
                self._add(key, value)
            elif not isinstance(value, CONSTANTS):
                self.reason = f"its argument {key!r} is a {type(value).__name__}, which may hold anything"
        if not self.keys:
            self.reason = "no tensor with a row for each token is given to it"

    def _add(self, key: int | str, value: Tensor) -> None:
        if not self.keys:
            if value.dim() < 2:
                return
            self._leading = tuple(value.shape[:-1])
            self.num_rows = math.prod(self._leading)
        elif tuple(value.shape[: len(self._leading)]) != self._leading and value.shape[:1] != (self.num_rows,):
            if value.numel() != 1 or value.requires_grad:
                self.reason = f"its argument {key!r} does not have one row for each token"
            return
        self.keys = (*self.keys, key)
        self._leading_of[key] = self._num_leading(value)

    def _argument(self, key: int | str) -> Any:
        return self._args[key] if isinstance(key, int) else self._kwargs[key]

    @property
    def input(self) -> Tensor:
        """The first tensor, `(*L, H)`."""
        return self._argument(self.keys[0])

    @property
    def width(self) -> int:
        """H, elements of a row of the first tensor."""
        return self.input.shape[-1]

    @property
    def choices(self) -> int:
        """Experts chosen per token: the width of the first integer argument, or 0 if there is none."""
        chosen = (
            v for v in map(self._argument, self.keys) if not v.is_floating_point() and v.dim() > len(self._leading)
        )
        return next((v.shape[-1] for v in chosen), 0)

    @property
    def flags(self) -> tuple:
        """The arguments that say how to run. Numbers are left out: they may differ at each call."""
        flags = bool, str, torch.dtype, enum.Enum, type(None)
        return tuple((k, v) for k, v in (*enumerate(self._args), *self._kwargs.items()) if isinstance(v, flags))

    def rows(self) -> list[Tensor]:
        """The arguments that have rows, each `(R, ...)`."""
        return [v.reshape(self.num_rows, *v.shape[self._num_leading(v) :]) for v in map(self._argument, self.keys)]

    def without_rows(self) -> RowArgs:
        """The same call without its row tensors, which are freed; only `with_rows` may be called on it."""
        # Copy-on-write: a scalar tensor keeps its value if it is written to before backward.
        args = [untouched(v) if isinstance(v, Tensor) else v for v in self._args]
        kwargs = {k: untouched(v) if isinstance(v, Tensor) else v for k, v in self._kwargs.items()}
        for key in self.keys:
            (args if isinstance(key, int) else kwargs)[key] = None
        bare = copy.copy(self)
        bare._args, bare._kwargs = tuple(args), kwargs
        return bare

    def with_rows(self, rows: Sequence[Tensor]) -> tuple[list, dict[str, Any]]:
        """The arguments of the same call for other rows; all leading dimensions but the last are 1."""
        args, kwargs = list(self._args), dict(self._kwargs)
        for key, value in zip(self.keys, rows, strict=True):
            ones = [1] * (self._leading_of[key] - 1)
            (args if isinstance(key, int) else kwargs)[key] = value.view(*ones, *value.shape)
        return args, kwargs

    def whole(self, rows: Sequence[Tensor]) -> tuple[list, dict[str, Any]]:
        """The arguments of this call in their own shapes, with other values in their rows."""
        args, kwargs = list(self._args), dict(self._kwargs)
        for key, value in zip(self.keys, rows, strict=True):
            (args if isinstance(key, int) else kwargs)[key] = value.view(self._argument(key).shape)
        return args, kwargs

    def narrowed(self, batch: int, tokens: int, replace: Callable[[Tensor], Tensor]) -> RowArgs:
        """The same call for the first `tokens` of the last leading dimension, and the first `batch` of those before.

        A call of fewer than `FEW` rows repeats its rows. If the first tensor is floating point, `replace` maps it to other
        values; it gets rows from the beginning, the middle and the end.
        """
        *before, last = self._leading
        rows = math.prod(min(batch, n) for n in before) * min(tokens, last)
        size = last if rows >= FEW else tokens
        index = (*[slice(batch)] * len(before), torch.arange(min(size, tokens)) % last)
        args, kwargs = list(self._args), dict(self._kwargs)
        for key, rows in zip(self.keys, self.rows(), strict=True):
            count = self._num_leading(self._argument(key))
            random = key == self.keys[0] and rows.is_floating_point()
            where = (*index[:-1], spread(index[-1], last)) if random else index
            value = rows.detach().view(*self._leading, *rows.shape[1:])[where]
            value = value if count == len(self._leading) else value.flatten(0, len(before))
            value = replace(value) if random else value.clone()  # the module may write to it
            (args if isinstance(key, int) else kwargs)[key] = value
        return RowArgs(tuple(args), kwargs)

    def _num_leading(self, value: Tensor) -> int:
        """How many leading dimensions of an argument index rows: as many as the first tensor has, or one."""
        count = len(self._leading)
        return count if tuple(value.shape[:count]) == self._leading else 1

    def run(self, forward) -> Any:
        """`forward` with these arguments."""
        return forward(*self._args, **self._kwargs)

    def mapped(self, function: Callable[[Tensor], Tensor]) -> RowArgs:
        """The same call with `function(t)` for each tensor."""
        args = tuple(function(v) if isinstance(v, Tensor) else v for v in self._args)
        return RowArgs(args, {k: function(v) if isinstance(v, Tensor) else v for k, v in self._kwargs.items()})


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors in nested lists, tuples and mappings."""
    if isinstance(value, Tensor):
        return [value]
    values = value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple | list) else ()
    return [t for v in values for t in tensors_in(v)]
