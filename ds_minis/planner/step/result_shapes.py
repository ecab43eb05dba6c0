"""Runs operations on meta tensors; what one gave for operands of some shapes, it gives again for others of the same shapes.

Most meta kernels are Python, and a step repeats the same few: this takes a third of the time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_NEW = (
    "mm addmm bmm baddbmm add sub mul div pow neg rsqrt mean sum silu silu_backward sigmoid tanh gelu gelu_backward exp log "
    "cat clone empty_like zeros_like ones_like empty zeros new_empty new_zeros _to_copy embedding _softmax _log_softmax "
    "maximum minimum where cos sin flash flash_backward native_dropout"
)
_IN_PLACE = "add_ sub_ mul_ div_ copy_ zero_ fill_ addmm_ addcmul_ neg_ masked_fill_"
_NEW_NAMES, _IN_PLACE_NAMES = frozenset(_NEW.split()), frozenset(_IN_PLACE.split())


class ResultShapes:
    """The shapes of results, by operation and shapes of operands."""

    def __init__(self):
        self._kinds: dict[Any, str] = {}
        self._known: dict[tuple, Any] = {}

    def run(self, func, args: tuple, kwargs: dict) -> Any:
        """What `func(*args, **kwargs)` gives."""
        kind = self._kinds.get(func)
        if kind is None:
            name = func.overloadpacket.__name__
            kind = "new" if name in _NEW_NAMES else "in place" if name in _IN_PLACE_NAMES else "other"
            self._kinds[func] = kind
        if kind == "other":
            return func(*args, **kwargs)
        if kind == "in place":
            return args[0] if args[0].is_meta else func(*args, **kwargs)
        key = _key(func, args, kwargs)
        if key is None:
            return func(*args, **kwargs)
        found = self._known.get(key)
        if found is None:
            out = func(*args, **kwargs)
            self._known[key] = _shape(out) or ()
            return out
        if not found:
            return func(*args, **kwargs)
        made = [torch.empty_strided(size, stride, dtype=dtype, device="meta") for size, stride, dtype in found[1]]
        return made[0] if found[0] == "one" else tuple(made)


def _key(func, args: tuple, kwargs: dict) -> tuple | None:
    """None where an operand is on the host, or none is a tensor."""
    parts: list = [func]
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            if not value.is_meta:
                return None
            parts.append((value.shape, value.stride(), value.dtype))
        elif isinstance(value, list | tuple):
            for item in value:
                if isinstance(item, Tensor):
                    if not item.is_meta:
                        return None
                    parts.append((item.shape, item.stride(), item.dtype))
                else:
                    parts.append(item)
            parts.append(len(value))
        else:
            parts.append((type(value), value))
    parts.append(tuple(kwargs))
    try:
        hash(key := tuple(parts))
    except TypeError:
        return None
    return key


def _shape(out: Any) -> tuple | None:
    """How to make such a result again; None where it has to be computed."""
    tensors = (out,) if isinstance(out, Tensor) else out
    if not isinstance(tensors, tuple) or not all(
        isinstance(t, Tensor) and t.is_meta and t._base is None for t in tensors
    ):
        return None
    whole = all(t.untyped_storage().nbytes() == t.numel() * t.element_size() for t in tensors)
    if not whole:
        return None
    return "one" if isinstance(out, Tensor) else "many", [(t.shape, t.stride(), t.dtype) for t in tensors]
