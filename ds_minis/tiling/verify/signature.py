"""What a verdict on a module rests on: one walk over its parts, cheap enough for every call.

The parts' classes, their numbers, flags and texts (also in lists, dictionaries and configurations), what is trained of
them, dtypes; and, apart, the versions of buffers and frozen weights. A verdict is asked again when any of these changes.
"""

from __future__ import annotations

import enum
import functools
import types
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

_CONSTANTS = frozenset((bool, int, float, complex, str, bytes, type(None), torch.dtype))
_CONTAINERS = frozenset((list, tuple, set, frozenset))
_MAPPINGS = frozenset((dict, OrderedDict))
_CODE = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType, type, functools.partial)
# What every module holds, and what an engine counts on it.
_OF_EVERY_MODULE = (frozenset(nn.Module().__dict__) - {"training"}) | {"applied_pre_backward_ref_cnt"}  # DeepSpeed's
_NOT_LOOKED_AT = ("ds_", "mini_sequence_")
_MOST_CHANGES = 3
STALE = "tensors that decide what it does change from call to call"


@dataclass
class Signature:
    """
    Attributes:
        stable: classes, constants, what is trained; names in front of their values.
        versions: of buffers and frozen weights.
        hooked: the parts that have hooks, the module itself left out.
        parts: all of them, the module first.
        has_parametrizations, may_be_compiled: whether a part looks like it.
    """

    stable: tuple
    versions: tuple
    hooked: list[nn.Module]
    parts: list[nn.Module]
    has_parametrizations: bool = False
    may_be_compiled: bool = False


def signature_of(module: nn.Module, ignored: dict[int, str] | None = None) -> Signature:
    """Args:
    ignored: place of a value -> its name, of values that are left out.
    """
    values: list[Any] = []
    versions: list[int] = []
    hooked, parts, seen, objects = [], [], set(), []
    parametrized = compiled = False
    append, constants, of_every = values.append, _CONSTANTS, _OF_EVERY_MODULE
    stack = [module]
    while stack:
        part = stack.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        parts.append(part)
        append(part.__class__)
        held = part.__dict__
        for name, value in held.items():
            if name in of_every:
                continue
            kind = value.__class__
            if kind in constants:
                if name[:3] != "ds_":
                    append(name)
                    append(value)
            elif kind in _MAPPINGS or kind in _CONTAINERS:
                if name[:3] != "ds_":
                    append(name)
                    append(_frozen(value, kind))
            else:
                objects.append((name, value))
        for p in held["_parameters"].values():
            if p is not None:
                needs_grad = p.requires_grad
                append(needs_grad)
                append(p.dtype)
                if not needs_grad:
                    versions.append(0 if p.is_inference() else p._version)
        for b in held["_buffers"].values():
            if b is not None:
                append(b.dtype)
                versions.append(0 if b.is_inference() else b._version)
        if (
            held["_forward_hooks"]
            or held["_forward_pre_hooks"]
            or held["_backward_hooks"]
            or held["_backward_pre_hooks"]
            or "forward" in held  # which may be one that transformers put there to capture outputs
        ):
            hooked.append(part)
        compiled = compiled or "_compiled_call_impl" in held or "forward" in held or "_orig_mod" in held["_modules"]
        children = held["_modules"]
        if children:
            parametrized = parametrized or "parametrizations" in children
            stack += [child for child in children.values() if child is not None]
    for name, value in objects:
        if id(value) not in seen:
            seen.add(id(value))
            _add_object(name, value, values, versions)
    for place, name in (ignored or {}).items():
        if place < len(values) and values[place - 1] == name:
            values[place] = None
    if hooked and hooked[0] is module:
        del hooked[0]
    return Signature(tuple(values), tuple(versions), hooked, parts, parametrized, compiled)


def _frozen(value: Any, kind: type) -> Any:
    """A container of constants, as something that can be hashed; of others, how many there are."""
    elements = value.values() if kind in _MAPPINGS else value
    if not _CONSTANTS.issuperset(map(type, elements)):
        return len(value)
    return tuple(value.items()) if kind in _MAPPINGS else frozenset(value) if kind is set else tuple(value)


def _add_object(name: str, value: Any, values: list, versions: list) -> None:
    if isinstance(value, Tensor):  # FSDP1's views of weights, a mean that is no buffer
        values += (name, value.requires_grad, value.dtype)
        if not value.requires_grad:
            versions.append(0 if value.is_inference() else value._version)
    elif isinstance(value, enum.Enum):
        values += (name, value)
    elif not isinstance(value, _CODE) and not isinstance(value, nn.Module) and not name.startswith(_NOT_LOOKED_AT):
        held = getattr(value, "__dict__", None)
        if type(held) is dict:
            for key, v in held.items():
                if v.__class__ in _CONSTANTS:
                    values += (key, v)
                elif v.__class__ in _MAPPINGS or v.__class__ in _CONTAINERS:
                    values += (key, _frozen(v, v.__class__))


class AnalysisCache(dict):
    """What was found out about a module, by what it rests on. A copy or a pickle of the module begins without any.

    Attributes:
        latest: how telling a call is for training -> the reason why the last of its kind ran as a whole, or "".
        ignored: place -> name, of constants that change all the time and that the module does not read.
    """

    def __init__(self):
        super().__init__()
        self.latest: dict[int, str] = {}
        self.ignored: dict[int, str] = {}
        self.changing = ""
        self._last: dict[tuple, tuple] = {}
        self._changes: dict[tuple[int, str], int] = {}
        self._stale = 0

    def __reduce_ex__(self, protocol):
        return AnalysisCache, ()

    def __deepcopy__(self, memo):
        return AnalysisCache()

    def note(self, training: bool, reason: str) -> None:
        """Takes down what became of a call."""
        self.latest[training + torch.is_grad_enabled() if torch.is_grad_enabled() else 0] = reason

    def often_changed(self, kind: tuple, stable: tuple) -> list[tuple[int, str]]:
        """Places and names of numbers that have changed too often between calls of one kind; to be called for a new one."""
        last, self._last[kind] = self._last.get(kind), stable
        if last is None or len(last) != len(stable):
            return []
        places = [i for i, (a, b) in enumerate(zip(last, stable, strict=True)) if a != b]
        if not places or any(not isinstance(stable[i], int | float) or isinstance(stable[i], bool) for i in places):
            return []
        often = []
        for i in places:
            slot = i, stable[i - 1]
            self._changes[slot] = self._changes.get(slot, 0) + 1
            if self._changes[slot] >= _MOST_CHANGES:
                often.append(slot)
        return often

    def ignore_unread(self, slots: list[tuple[int, str]], read: list[str]) -> None:
        """Leaves out numbers that change and are not read; with one that is read, the module is run as a whole."""
        self.ignored |= {place: name for place, name in slots if name not in read}
        if read:
            self.changing = f"its {read[0]!r}, which it reads, changes from call to call"

    def is_stale(self, analysis: Any, versions: tuple) -> bool:
        """Whether tensors that decide what the module does have been written to since."""
        if analysis.versions is None or analysis.versions == versions:
            return False
        self._stale += 1
        return True

    @property
    def often_stale(self) -> bool:
        return self._stale > _MOST_CHANGES

    def whole_fallback_reason(self) -> str:
        """Why calls ran as a whole: those of training, if there were any."""
        if self.latest:
            return self.latest[max(self.latest)]
        return next(filter(None, (getattr(v, "reason", v) for v in self.values())), "")


@dataclass
class ModuleAnalysis:
    """A verdict on a module that is no layer.

    Attributes:
        reason: why it is run as a whole; empty if it is tiled.
        reach: the lengths for which this holds.
        versions: of the tensors that it rests on; None where their values decide nothing.
    """

    reason: str
    reach: Any = None
    versions: tuple | None = field(default=None, repr=False)


def read_by(run: Callable[[], Any], slots: list[tuple[int, str]], signature: Signature) -> list[str]:
    """Which of some attributes a run reads, by name, of any part; all of them if it fails."""
    names, seen = {name for _, name in slots}, set()
    before = [(part, part.__class__) for part in signature.parts if names & part.__dict__.keys()]
    try:
        for part, cls in before:
            part.__class__ = _reading(cls, frozenset(names), seen)
        run()
    except Exception:
        return sorted(names)
    finally:
        for part, cls in before:
            part.__class__ = cls
    held = {name for part, _ in before for name in part.__dict__}
    return sorted(seen | (names - held))  # reads of an object's attributes are not seen


def _reading(cls: type[nn.Module], names: frozenset[str], seen: set[str]) -> type[nn.Module]:
    def __getattribute__(self, name):
        if name in names:
            seen.add(name)
        return cls.__getattribute__(self, name)

    return type(cls.__name__, (cls,), {"__getattribute__": __getattribute__, "__module__": cls.__module__})
