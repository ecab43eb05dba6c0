"""Records the operations of a module's run below autograd, with or without values.

`difference` compares two runs step by step: one for all tokens, one for some. A dimension that differs between them counts
tokens. For a token-wise module nothing else differs: no operation, and no number but such a dimension.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ds_minis.tiling.verify.snapshot import version_of

_aten = torch.ops.aten
_SCANS = {_aten.cumsum, _aten.cumprod, _aten.cummax, _aten.cummin, _aten.logcumsumexp, _aten.cumsum_, _aten.cumprod_}
_ORDERS = {_aten.sort, _aten.topk, _aten.argsort, _aten.kthvalue, _aten.median}
_REDUCTIONS = {
    getattr(_aten, name)
    for name in "sum mean amax amin max min std var var_mean norm linalg_vector_norm prod logsumexp nansum median".split()
}
_SOFTMAX = {_aten._softmax, _aten._log_softmax}
_CONVOLUTIONS = {_aten.convolution, _aten._convolution, _aten.mkldnn_convolution, _aten.cudnn_convolution}
_PRODUCTS = {_aten.mm: 0, _aten.bmm: 0, _aten.addmm: 1, _aten.baddbmm: 1}  # index of the first factor
_READS = {_aten._local_scalar_dense, _aten.is_nonzero, _aten.equal}
_CHOICES = {_aten.where, _aten.masked_fill, _aten.masked_fill_}
_COMPARISONS = {_aten.gt, _aten.lt, _aten.ge, _aten.le, _aten.eq, _aten.ne}


@dataclass(frozen=True)
class _Shape:
    """Sizes and dtype of a tensor."""

    sizes: tuple[int, ...]
    dtype: torch.dtype


@dataclass
class Step:
    """One operation with its arguments and results, flattened; tensors are replaced by their shapes."""

    func: Any
    args: list[Any]
    results: list[Any]

    @property
    def packet(self) -> Any:
        return getattr(self.func, "overloadpacket", None)

    @property
    def draws(self) -> bool:
        return torch.Tag.nondeterministic_seeded in getattr(self.func, "tags", ())


class Watch(TorchDispatchMode):
    """Records each operation inside.

    Args:
        own: tensors that may be written to.

    Attributes:
        steps: the operations, in order.
        makes_indices: whether floats are converted to integers; NaN would become an index out of range.
    """

    def __init__(self, own: Sequence[Tensor] = ()):
        super().__init__()
        self.steps: list[Step] = []
        self.makes_indices = False
        self._own = {memory_of(t) for t in own}
        self._held: list[Any] = []  # so that no address is reused
        self._written: dict[int, tuple[Tensor, Tensor]] = {}
        self._python = random.getstate()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            self._note_writes(func, args, kwargs)
        result = func(*args, **kwargs)
        given = list(flat((args, kwargs)))
        tensors = [t for t in flat(result) if isinstance(t, Tensor)]
        self.steps.append(Step(func, [_described(a) for a in given], [_described(t) for t in tensors]))
        self.makes_indices = self.makes_indices or (
            any(isinstance(a, Tensor) and a.is_floating_point() for a in given)
            and func.overloadpacket in (_aten._to_copy, _aten.copy_)
            and any(t.dtype in _INDICES for t in tensors)
        )
        memories = {memory_of(a) for a in given if isinstance(a, Tensor)}
        for t in tensors:  # a view of an outside tensor is an outside tensor, too
            if memory_of(t) not in memories:
                self._own.add(memory_of(t))
                self._held.append(t.untyped_storage())
        return result

    def __exit__(self, *error):
        self._held.clear()
        return super().__exit__(*error)

    def _note_writes(self, func, args, kwargs) -> None:
        for argument, value in zip(func._schema.arguments, args, strict=False):
            self._note_write(argument, value)
        for argument in func._schema.arguments:
            if argument.name in kwargs:
                self._note_write(argument, kwargs[argument.name])

    def _note_write(self, argument, value) -> None:
        if argument.alias_info is None or not argument.alias_info.is_write:
            return
        for t in flat(value):
            if isinstance(t, Tensor) and not t.is_meta and memory_of(t) not in self._own and id(t) not in self._written:
                self._written[id(t)] = t, t.detach().clone()

    def undo_writes(self) -> str:
        """Restores outside tensors that were written to; returns a description, or "" if there were none."""
        for t, before in self._written.values():
            with torch.no_grad():
                t.detach().copy_(before)
        return "a tensor in place" if self._written else ""

    @property
    def drew_in_python(self) -> bool:
        """Whether Python's random generator was used; restores its state."""
        moved = random.getstate() != self._python
        if moved:
            random.setstate(self._python)
        return moved


_INDICES = frozenset((torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8))


def memory_of(t: Tensor) -> int:
    """Equal for tensors in one storage."""
    try:
        return t.untyped_storage()._cdata
    except (RuntimeError, NotImplementedError):  # a tensor without a storage
        return id(t)


def flat(value: Any) -> Iterator[Any]:
    """The values in nested tuples, lists and dictionaries, in order."""
    stack = [value]
    while stack:
        value = stack.pop()
        if isinstance(value, tuple | list):
            stack.extend(reversed(value))
        elif isinstance(value, dict):
            stack.extend(reversed(value.values()))
        else:
            yield value


def _described(value: Any) -> Any:
    return _Shape(tuple(value.shape), value.dtype) if isinstance(value, Tensor) else value


def difference(
    whole: Sequence[Step], part: Sequence[Step], num_tokens: int, part_tokens: int, *, ended: bool = True
) -> str:
    """The reason why a run for some tokens is not a part of the run for all of them; empty if no step shows one.

    Args:
        ended: whether both runs were traced to their end. Otherwise only the steps of both are compared.
    """
    for all_, some in zip(whole, part, strict=False):
        reason = _step_difference(all_, some, num_tokens, part_tokens)
        if reason:
            return reason
    if ended and len(whole) != len(part):
        return f"it runs other operations for {num_tokens} tokens than for {part_tokens}"
    return ""


_SETTINGS = bool, float, complex, str, torch.dtype


def _step_difference(whole: Step, part: Step, n: int, m: int) -> str:
    name = str(whole.packet or whole.func).removeprefix("aten.")
    if whole.func is not part.func or len(whole.args) != len(part.args) or len(whole.results) != len(part.results):
        return f"it runs other operations for {n} tokens than for {m} ({name})"
    pairs = list(zip((*whole.args, *whole.results), (*part.args, *part.results), strict=True))
    for a, b in pairs:
        if isinstance(a, _Shape) and isinstance(b, _Shape):
            if a.dtype != b.dtype or len(a.sizes) != len(b.sizes):
                return f"it runs {name} in other ways for {n} tokens than for {m}"
            if not all(_scales(s, t, n, m) for s, t in zip(a.sizes, b.sizes, strict=True)):
                return f"{name} has {a.sizes} for {n} tokens and {b.sizes} for {m}: more than a row for each"
        elif type(a) is int and type(b) is int:
            if not _scales(a, b, n, m):
                return f"an argument of {name} depends on the number of tokens ({a} for {n}, {b} for {m})"
        elif (type(a) is not type(b) or (isinstance(a, _SETTINGS) and a != b)) and not (a != a and b != b):
            return f"an argument of {name} depends on the number of tokens ({a} for {n}, {b} for {m})"
    if n == m:
        return ""
    if whole.draws and whole.results and not any(_differing(a, b) for a, b in pairs[len(whole.args) :]):
        return SHARED_DRAW
    return _mixing(whole, part, name)


SHARED_DRAW = "it draws random numbers that all tokens share"


def _scales(a: int, b: int, n: int, m: int) -> bool:
    """Whether a number is constant, or proportional to the number of tokens."""
    return a == b or a * m == b * n


def _differing(a: Any, b: Any) -> list[int]:
    """The dimensions that differ: they count tokens."""
    if not isinstance(a, _Shape) or not isinstance(b, _Shape):
        return []
    return [i for i, (s, t) in enumerate(zip(a.sizes, b.sizes, strict=True)) if s != t]


def _mixing(whole: Step, part: Step, name: str) -> str:
    """The reason if the step is a known operation that mixes along a dimension that counts tokens; else empty."""
    first = next((i for i, a in enumerate(whole.args) if isinstance(a, _Shape)), None)
    if first is None or whole.packet is None:
        return ""
    shape, rest = whole.args[first], whole.args[first + 1 :]
    tokens = _differing(shape, part.args[first])
    is_float, rank, packet = shape.dtype.is_floating_point, len(shape.sizes), whole.packet
    if packet in _PRODUCTS:
        factor = whole.args[_PRODUCTS[packet]]
        contracted = _differing(factor, part.args[_PRODUCTS[packet]])
        mixes = is_float and isinstance(factor, _Shape) and len(factor.sizes) - 1 in contracted
    elif not tokens:
        return ""
    elif packet in _SCANS or packet in _SOFTMAX:
        mixes = bool(rest) and type(rest[0]) is int and rest[0] % rank in tokens
    elif packet in _ORDERS:
        dims = [d for d in rest if type(d) is int]
        dim = (
            dims[1] if packet is _aten.topk and len(dims) > 1 else dims[0] if dims and packet is not _aten.topk else -1
        )
        mixes = is_float and dim % rank in tokens
    elif packet in (_aten.roll, _aten.flip):
        dims = rest[len(rest) // 2 :] if packet is _aten.roll else rest
        mixes = any(type(d) is int and d % rank in tokens for d in dims) or (packet is _aten.roll and len(rest) == 1)
    elif packet in _CONVOLUTIONS:
        mixes = any(d >= 2 for d in tokens)
    elif packet in _REDUCTIONS:
        results = [(a, b) for a, b in zip(whole.results, part.results, strict=True) if isinstance(a, _Shape)]
        mixes = is_float and bool(results) and not any(_differing(a, b) for a, b in results)
    else:
        return ""
    return f"it mixes tokens ({name} over the dimension that counts them)" if mixes else ""


def versions_matter(whole: Sequence[Step], part: Sequence[Step]) -> bool:
    """Whether a value shared by all tokens decides what runs or is chosen, such as a gate that is compared with 0."""
    if any(s.packet in _READS for s in (*whole, *part)):
        return True
    for a, b in zip(whole, part, strict=False):
        if a.packet in _COMPARISONS or a.packet in _CHOICES:
            if not any(_differing(r, s) for r, s in zip(a.results, b.results, strict=False)):
                return True
            conditions = [i for i, v in enumerate(a.args) if isinstance(v, _Shape) and v.dtype == torch.bool]
            if any(not _differing(a.args[i], b.args[i]) for i in conditions if i < len(b.args)):
                return True
    return False


def shares_draws(whole: Sequence[Step], num_tokens: int) -> bool:
    """Whether a draw's size is no multiple of the number of tokens; for runs that cannot be compared by steps."""
    return any(s.draws and any(_numel(r) % num_tokens for r in s.results) for s in whole)


def _numel(shape: Any) -> int:
    return torch.Size(shape.sizes).numel() if isinstance(shape, _Shape) else 0


__all__ = [
    "SHARED_DRAW",
    "Step",
    "Watch",
    "difference",
    "flat",
    "memory_of",
    "shares_draws",
    "version_of",
    "versions_matter",
]
