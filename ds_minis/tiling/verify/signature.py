"""The signature that an analysis of a module depends on: one walk over its submodules, cheap enough for every call.

It holds their classes, their numbers, flags and strings (also in lists, dictionaries and configurations), which parameters
are trained, and dtypes. Apart from these, it holds the versions of buffers and frozen weights. A module is analyzed again
when any of these changes.
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

from ds_minis.tiling.core.params import OF_EVERY_MODULE

_CONSTANTS = frozenset((bool, int, float, complex, str, bytes, type(None), torch.dtype))
_CONTAINERS = frozenset((list, tuple, set, frozenset))
_MAPPINGS = frozenset((dict, OrderedDict))
_CODE = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType, type, functools.partial)
_NO_SETTINGS = OF_EVERY_MODULE | {"applied_pre_backward_ref_cnt"}  # DeepSpeed's counter
_NOT_LOOKED_AT = ("ds_", "mini_sequence_")
_MOST_CHANGES = 3
STALE = "tensors that decide what it does change from call to call"


@dataclass
class Signature:
    """
    Attributes:
        stable: classes, constants, trained or not; each name comes before its value.
        versions: versions of buffers and frozen weights.
        hooked: the submodules that have hooks, without the module itself.
        parts: all submodules, the module first.
        has_parametrizations, may_be_compiled: whether this may hold for a submodule.
    """

    stable: tuple
    versions: tuple
    hooked: list[nn.Module]
    parts: list[nn.Module]
    has_parametrizations: bool = False
    may_be_compiled: bool = False


def module_signature(module: nn.Module, ignored: dict[int, str] | None = None) -> Signature:
    """Computes the signature of a module.

    Args:
        ignored: index of a value to leave out -> its name.
    """
    values: list[Any] = []
    versions: list[int] = []
    hooked, parts, seen, objects = [], [], set(), []
    parametrized = compiled = False
    append, constants, no_settings = values.append, _CONSTANTS, _NO_SETTINGS
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
            if name in no_settings:
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
            or "forward" in held  # transformers may have set it to capture outputs
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
    """A hashable copy of a container of constants; for any other container, its length."""
    elements = value.values() if kind in _MAPPINGS else value
    if not _CONSTANTS.issuperset(map(type, elements)):
        return len(value)
    return tuple(value.items()) if kind in _MAPPINGS else frozenset(value) if kind is set else tuple(value)


def _add_object(name: str, value: Any, values: list, versions: list) -> None:
    if isinstance(value, Tensor):  # FSDP1's views of weights, or a tensor that is no buffer
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
    """Analyses of a module by kind of call and signature. Copying or pickling the module gives an empty cache.

    Attributes:
        latest: 2 in training with gradients, 1 with gradients alone, else 0 -> why the last such call ran as a whole, or "".
        ignored: index -> name of constants in the signature that keep changing and that the module does not read.
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
        """Records why a call ran as a whole, or "" if it was tiled."""
        self.latest[training + torch.is_grad_enabled() if torch.is_grad_enabled() else 0] = reason

    def often_changed(self, kind: tuple, stable: tuple) -> list[tuple[int, str]]:
        """Indices and names of numbers that keep changing between calls of one kind. Call this for each new signature."""
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

    def ignore_changing(self, slots: list[tuple[int, str]], read: list[str]) -> None:
        """Ignores changing numbers that the module does not read; if it reads one, the module is run as a whole."""
        self.ignored |= {place: name for place, name in slots if name not in read}
        if read:
            self.changing = f"its {read[0]!r}, which it reads, changes from call to call"

    def is_stale(self, analysis: Any, versions: tuple) -> bool:
        """Whether tensors that the analysis depends on were written to since."""
        if analysis.versions is None or analysis.versions == versions:
            return False
        self._stale += 1
        return True

    @property
    def often_stale(self) -> bool:
        return self._stale > _MOST_CHANGES

    def whole_fallback_reason(self) -> str:
        """The reason why calls ran as a whole; those in training take precedence."""
        if self.latest:
            return self.latest[max(self.latest)]
        return next(filter(None, (getattr(v, "reason", v) for v in self.values())), "")


@dataclass
class ModuleAnalysis:
    """The analysis of a token-wise module.

    Attributes:
        reason: why it is run as a whole; empty if it is tiled.
        reach: the lengths for which this holds.
        versions: versions of the tensors that this depends on; None if it depends on no values.
    """

    reason: str
    reach: Any = None
    versions: tuple | None = field(default=None, repr=False)


def read_by(run: Callable[[], Any], slots: list[tuple[int, str]], signature: Signature) -> list[str]:
    """The names of the given attributes that a run reads, on any submodule; all of them if the run fails."""
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
    return sorted(seen | (names - held))  # attributes of other objects cannot be watched, so they count as read


def _reading(cls: type[nn.Module], names: frozenset[str], seen: set[str]) -> type[nn.Module]:
    def __getattribute__(self, name):
        if name in names:
            seen.add(name)
        return cls.__getattribute__(self, name)

    return type(cls.__name__, (cls,), {"__getattribute__": __getattribute__, "__module__": cls.__module__})
