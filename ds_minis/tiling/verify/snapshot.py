"""A snapshot of a module's state: detects what a run changes, and restores it.

Tensors are compared by version and restored by value. Containers and plain objects of the user are compared and restored by
their elements. State outside of instances is included: attributes of the user's classes, and the globals and closures that
their code names.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ds_minis.tiling.core.params import OF_EVERY_MODULE, version_of

_CONTAINERS = frozenset((list, dict, set, deque, OrderedDict, defaultdict))
_OPAQUE = (nn.Module, type, types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType)
# Packages whose classes hold caches and loggers, which are not state of a model.
_LIBRARIES = frozenset(
    "torch transformers peft trl accelerate deepspeed ds_minis numpy builtins logging typing functools collections abc "
    "threading enum dataclasses weakref contextlib".split()
)
_MOST_OBJECTS = 20_000


class State:
    """The state of a module and its submodules: tensors, containers and plain objects by value, all else by identity.

    Args:
        function: a function whose globals and closure are included.
    """

    def __init__(self, module: nn.Module, function: Any = None):
        self._attributes = {m: dict(m.__dict__) for m in module.modules()}
        self._buffers = {m: dict(m._buffers) for m in module.modules()}
        self._tensors: list[tuple[str, Tensor, int, Tensor | None]] = []
        self._containers: list[tuple[str, Any, Any]] = []
        self._objects: list[tuple[str, Any, dict[str, Any]]] = []
        self._seen = {id(m) for m in self._attributes}
        parameters = {id(p) for p in module.parameters()}
        for p in module.parameters():
            self._tensors.append(("a tensor in place", p, version_of(p), None))
        for m in self._attributes:
            for value in m._buffers.values():
                if value is not None:
                    self._look("a tensor in place", value)
            for name, value in m.__dict__.items():
                if (
                    name not in OF_EVERY_MODULE
                    and not name.startswith("mini_sequence_")
                    and id(value) not in parameters
                ):
                    self._look(name, value)
        for cls in dict.fromkeys(type(m) for m in self._attributes):
            for name, value in _beyond(cls):
                self._look(name, value)
        function = inspect.unwrap(function) if callable(function) else None
        if isinstance(function, types.FunctionType) and not (function.__module__ or "").startswith(
            ("torch", "transformers")
        ):
            for name, value in _reached_by(function, depth=1):
                self._look(name, value)

    def _look(self, name: str, value: Any) -> None:
        """Records a value and, recursively, what it holds."""
        todo = [(name, value)]
        while todo and len(self._seen) < _MOST_OBJECTS:
            name, value = todo.pop()
            kind = type(value)
            if kind in _CONSTANTS or id(value) in self._seen:
                continue
            if isinstance(value, Tensor):
                self._seen.add(id(value))
                kept = None if isinstance(value, nn.Parameter) or value.is_meta else value.detach().clone()
                self._tensors.append(("a tensor in place", value, version_of(value), kept))
            elif kind in _CONTAINERS:
                self._seen.add(id(value))
                self._containers.append((name, value, value.copy()))
                todo += [(name, v) for v in _elements(value)]
            elif kind is tuple:
                todo += [(name, v) for v in value]
            elif _is_users_class(value):
                self._seen.add(id(value))
                attributes = {k: v for k, v in vars(value).items() if not _is_code(k, v)}
                self._objects.append((name, value, attributes))
                todo += attributes.items()
            elif not isinstance(value, _OPAQUE) and not _is_library(kind):
                held = getattr(value, "__dict__", None)
                if type(held) is dict:
                    self._seen.add(id(value))
                    self._objects.append((name, value, dict(held)))
                    todo += held.items()

    def changed(self) -> str:
        """The name of something that has changed; empty if nothing has."""
        for m, attributes in self._attributes.items():
            for holder, before in ((m.__dict__, attributes), (m._buffers, self._buffers[m])):
                for name in _differences(holder, before):
                    if not _is_same_memory(before.get(name), getattr(m, name, None)):
                        return name
        for name, value, before in self._containers:
            if isinstance(before, dict):
                if _difference(value, before) is not None or len(value) != len(before):
                    return name
            elif len(value) != len(before) or not all(map(_alike, value, before)):
                return name
        for _, value, before in self._objects:
            name = _difference(_attributes_of(value), before)
            if name:
                return name
        return next((name for name, t, version, _ in self._tensors if version_of(t) != version), "")

    def restore(self) -> None:
        """Restores everything except parameters that were written to."""
        for m, attributes in self._attributes.items():
            m.__dict__.clear()
            m.__dict__.update(attributes)
            m._buffers.clear()
            m._buffers.update(self._buffers[m])
        for _, value, before in self._containers:
            if type(value) is set or isinstance(before, dict):
                value.clear()
                value.update(before)
            else:
                value.clear()
                value.extend(before)
        for _, value, before in self._objects:
            _restore_object(value, before)
        with torch.no_grad():
            for _, tensor, version, value in self._tensors:
                if value is not None and version_of(tensor) != version:
                    tensor.copy_(value)


_CONSTANTS = frozenset((bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size))


def _difference(now: Any, before: dict) -> Any:
    """The first key whose value has changed; None if there is none."""
    return next(_differences(now, before), None)


def _differences(now: Any, before: dict) -> Iterator[Any]:
    keys = now.keys() | before.keys()
    return (name for name in keys if not _alike(now.get(name, _NOTHING), before.get(name, _NOTHING)))


def _is_same_memory(a: Any, b: Any) -> bool:
    """Whether two tensors are the same view of memory: bitsandbytes wraps FSDP1's weights again in each forward."""
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)) or a.is_meta or b.is_meta:
        return False
    places = [(t.untyped_storage().data_ptr(), t.storage_offset(), t.shape, t.stride(), t.dtype) for t in (a, b)]
    return places[0] == places[1]


_NOTHING = object()


def _alike(a: Any, b: Any) -> bool:
    return a is b or (type(a) is type(b) and isinstance(a, bool | int | float | str) and a == b)


def _elements(container: Any) -> Iterator[Any]:
    return iter(list(container.values() if isinstance(container, dict) else container))


def _is_library(cls: type) -> bool:
    return (cls.__module__ or "").partition(".")[0] in _LIBRARIES


def _is_users_class(value: Any) -> bool:
    return isinstance(value, type) and not _is_library(value)


def _is_code(name: str, value: Any) -> bool:
    return (name.startswith("__") and name.endswith("__")) or callable(value) or hasattr(type(value), "__get__")


def _attributes_of(value: Any) -> dict[str, Any]:
    return {k: v for k, v in vars(value).items() if not (isinstance(value, type) and _is_code(k, v))}


def _restore_object(value: Any, before: dict[str, Any]) -> None:
    if not isinstance(value, type):
        value.__dict__.clear()
        value.__dict__.update(before)
        return
    now = _attributes_of(value)
    for name in now.keys() - before.keys():
        delattr(value, name)
    for name, then in before.items():
        if name not in now or not _alike(now[name], then):
            setattr(value, name, then)


@functools.lru_cache(maxsize=512)
def _functions_of(cls: type) -> tuple[types.FunctionType, ...]:
    functions = (getattr(f, "__func__", f) for f in vars(cls).values())
    return tuple(f for f in functions if isinstance(f, types.FunctionType))


def _beyond(cls: type) -> Iterator[tuple[str, Any]]:
    """State of a user's module class outside of its instances: class attributes, and what its code reaches."""
    for base in cls.__mro__:
        if _is_library(base):
            continue
        yield base.__name__, base
        for function in _functions_of(base):
            yield from _reached_by(function, depth=1)


def _reached_by(function: types.FunctionType, depth: int) -> Iterator[tuple[str, Any]]:
    """Containers, tensors, objects and classes in a function's closure and among the globals that it names."""
    names = [(n, function.__globals__[n]) for n in function.__code__.co_names if n in function.__globals__]
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=False)
    for name, cell in cells:
        try:
            names.append((name, cell.cell_contents))
        except ValueError:  # not filled yet
            continue
    for name, value in names:
        if isinstance(value, types.FunctionType):
            if depth and not (value.__module__ or "").startswith(("torch", "transformers")):
                yield from _reached_by(value, depth - 1)
        elif not isinstance(value, types.ModuleType) and not (isinstance(value, type) and issubclass(value, nn.Module)):
            yield name, value
