"""The tensors and settings of a module: finds those that a call uses, replaces them, restores them as in forward."""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ds_minis.tiling.core.replay import has_values

# Largest buffer, in bytes, that is copied so that it may change between forward and backward.
_SMALL = 2**16
_NOTHING = object()

# Attributes that `nn.Module` gives to every module: none is a setting but `training`.
OF_EVERY_MODULE = frozenset(nn.Module().__dict__) - {"training"}

Constants = list[tuple[nn.Module, dict[str, object]]]


def version_of(tensor: Tensor) -> int:
    """How often the tensor was written to; 0 for inference tensors, which do not count writes."""
    return 0 if tensor.is_inference() else tensor._version


def submodules(module: nn.Module) -> list[nn.Module]:
    """`list(module.modules())`, in a fraction of the time."""
    found: dict[int, nn.Module] = {}
    stack = [module]
    while stack:
        part = stack.pop()
        if id(part) not in found:
            found[id(part)] = part
            if part._modules:
                stack += [child for child in reversed(part._modules.values()) if child is not None]
    return list(found.values())


def weights_of(module: nn.Module) -> Iterator[Tensor]:
    """The weights of a module and its submodules, wherever an engine holds them: FSDP1's views are in `__dict__`."""
    for part in submodules(module):
        for holder in (part._parameters, part.__dict__):
            yield from (value for value in holder.values() if isinstance(value, Tensor))


def holders_of(module: nn.Module, name: str) -> list[dict[str, Any]]:
    """Where a module holds a weight: FSDP1 holds it in both places in forward, and in `_parameters` alone in backward."""
    return [holder for holder in (module._parameters, module.__dict__) if name in holder]


def is_partitioned(param: Tensor) -> bool:
    """Whether ZeRO-3 has divided the parameter among the ranks."""
    return hasattr(param, "ds_shape")


def whole_shape(param: Tensor) -> torch.Size:
    """The shape of a parameter that ZeRO-3 may have divided."""
    return getattr(param, "ds_shape", param.shape)


class ParameterSlots:
    """Where a module holds its trainable tensors, and how to replace them.

    These are the parameters of its submodules, and the leaves in their `__dict__`. FSDP1 and the replicas of
    `nn.DataParallel` hold trainable views there too. Other non-leaves in `__dict__` are not weights: a weight that
    `torch.nn.utils` computed for an earlier call, or a loss that a submodule stored. A tensor held twice (tied inside the
    module) is listed once.

    Attributes:
        tensors: the trainable tensors; after `leave_out`, only those that the call uses.
        others: all other tensors, as (submodule, kind of holder, name, tensor).
    """

    def __init__(self, module: nn.Module):
        self.tensors: list[Tensor] = []
        self.others: list[tuple[nn.Module, str, str, Tensor]] = []
        self._slots: list[tuple[nn.Module, str, int]] = []
        index_of: dict[int, int] = {}
        for submodule in submodules(module):
            for kind, name, value in _tensors_of(submodule):
                if not value.requires_grad:
                    self.others.append((submodule, kind, name, value))
                elif kind == "_parameters" or _is_weight(submodule, name, value, outermost=submodule is module):
                    index = index_of.setdefault(id(value), len(self.tensors))
                    if index == len(self.tensors):
                        self.tensors.append(value)
                    self._slots.append((submodule, name, index))

    @property
    def names(self) -> tuple[tuple[str, int], ...]:
        """Equal for modules of the same structure that train the same parameters."""
        return tuple((name, index) for _, name, index in self._slots)

    @property
    def places(self) -> dict[int, tuple[nn.Module, str]]:
        """For each index, a submodule that holds the tensor, and its name there."""
        return {index: (part, name) for part, name, index in self._slots}

    def leave_out(self, idle: Iterable[int]) -> None:
        """Removes the tensors at these indices, which the call does not use."""
        idle = set(idle)
        kept = [index for index in range(len(self.tensors)) if index not in idle]
        new_index = {index: new for new, index in enumerate(kept)}
        self.tensors = [self.tensors[index] for index in kept]
        self._slots = [(part, name, new_index[index]) for part, name, index in self._slots if index in new_index]

    @contextlib.contextmanager
    def reparametrized(self, tensors: Sequence[Tensor]) -> Iterator[None]:
        """Replaces each of `self.tensors` by one of `tensors`, and restores them at the end."""
        before = []
        try:
            for submodule, name, index in self._slots:
                for holder in holders_of(submodule, name) or [submodule.__dict__]:  # looked up anew in each run
                    before.append((holder, name, dict.get(holder, name, _NOTHING)))
                    holder[name] = tensors[index]
            yield
        finally:
            _put_back(before)


def _tensors_of(part: nn.Module) -> list[tuple[str, str, Tensor]]:
    """The tensors that a module holds itself, as (kind of holder, name, tensor)."""
    own = part.__dict__
    found = [
        (kind, n, t) for kind in ("_parameters", "_buffers") for n, t in own[kind].items() if isinstance(t, Tensor)
    ]
    return found + [("__dict__", n, t) for n, t in own.items() if n not in OF_EVERY_MODULE and isinstance(t, Tensor)]


def _is_weight(part: nn.Module, name: str, value: Tensor, outermost: bool) -> bool:
    """Whether a trainable tensor outside of `_parameters` is used as a weight in this call."""
    if value.is_leaf or (value._base is not None and value._base.is_leaf):
        return True
    if name in part.__dict__.get("_former_parameters", ()):  # of a replica
        return True
    # Computed for this call by a forward pre-hook (weight_norm), once for all chunks.
    return outermost and any(type(h).__module__.startswith("torch.nn.utils.") for h in part._forward_pre_hooks.values())


def _put_back(before: list[tuple[dict, str, object]]) -> None:
    for holder, name, value in reversed(before):
        if value is _NOTHING:
            holder.pop(name, None)
        else:
            holder[name] = value


class Copies:
    """Copies of small buffers; each is reused until its buffer is written to. A copied model starts with none."""

    def __init__(self):
        self._of: dict[int, tuple[weakref.ref[Tensor], int, Tensor]] = {}

    def __reduce__(self):
        return Copies, ()

    def of(self, buffer: Tensor) -> Tensor | None:
        """A copy of the buffer's present values; None if it is too large to copy."""
        if buffer.nbytes > _SMALL or not has_values(buffer):
            return None
        key, known = id(buffer), self._of.get(id(buffer))
        if known is None or known[0]() is not buffer or known[1] != buffer._version:
            reference = weakref.ref(buffer, lambda _: self._of.pop(key, None))
            self._of[key] = known = reference, buffer._version, buffer.detach().clone()
        return known[2]


class Untrained:
    """Buffers and frozen weights: backward reads them again, and autograd does not check their versions.

    Args:
        slots: the module's tensors in forward.
        copies: copies of the model's small buffers.
    """

    def __init__(self, module: nn.Module, slots: ParameterSlots, copies: Copies):
        self._module = module
        self._then = [
            (part, kind, name, t, t._version, copies.of(t) if kind == "_buffers" else None)
            for part, kind, name, t in slots.others
            # Views belong to an engine that recreates them (FSDP1).
            if t._base is None and not t.is_inference() and not is_traceable_wrapper_subclass(t)
        ]

    @contextlib.contextmanager
    def as_in_forward(self) -> Iterator[None]:
        """Restores the tensors of forward for a run in backward, where a tensor was replaced since.

        Raises:
            RuntimeError: a tensor was changed in place, so recomputation would not repeat the forward.
        """
        before = []
        try:
            for part, kind, name, then, version, copied in self._then:
                holder = part.__dict__ if kind == "__dict__" else part.__dict__[kind]
                now, wanted = holder.get(name, _NOTHING), then
                if then._version != version:
                    if copied is None:
                        raise RuntimeError(self._changed(part, name))
                    wanted = copied
                if now is not wanted and (kind != "_parameters" or isinstance(now, nn.Parameter)):
                    before.append((holder, name, now))
                    holder[name] = wanted
            yield
        finally:
            _put_back(before)

    def _changed(self, part: nn.Module, name: str) -> str:
        fqn = next(fqn for fqn, module in self._module.named_modules() if module is part)
        name = f"{fqn}.{name}" if fqn else name
        return (
            f"{name} of a {type(self._module).__name__} was changed in place between forward and backward, which runs "
            "chunks of it once more. Change it after backward"
        )


def untouched(tensor: Tensor) -> Tensor:
    """A copy-on-write clone, which keeps its values when the given tensor is written to; else the tensor itself."""
    if type(tensor) is not Tensor or tensor.is_meta or tensor.is_inference():
        return tensor
    try:
        return torch._lazy_clone(tensor)
    except RuntimeError:  # memory that is not torch's own
        return tensor


def constants_of(module: nn.Module) -> Constants:
    """The settings of all submodules (training, a scale, whether an adapter is on), without DeepSpeed's counters."""
    return [(part, _settings(part.__dict__)) for part in submodules(module)]


def _settings(attributes: dict[str, object]) -> dict[str, object]:
    return {
        name: value if type(value) in _CONSTANTS else copy.copy(value)
        for name, value in attributes.items()
        if name not in OF_EVERY_MODULE and _is_constant(value) and not name.startswith("ds_")
    }


_CONSTANTS = frozenset((bool, int, float, str, type(None)))


def _is_constant(value: object) -> bool:
    """A constant, or a list or dict of them, such as PEFT's active adapters and their scales."""
    if type(value) in (list, dict):
        values = value.values() if isinstance(value, dict) else value
        return len(value) > 0 and all(v is not None and type(v) in _CONSTANTS for v in values)
    return type(value) in _CONSTANTS


@contextlib.contextmanager
def restored_flags(constants: Constants) -> Iterator[None]:
    """Restores the settings of forward: an evaluation or another call may have changed them since."""
    now = [
        (part, k, part.__dict__[k], v) for part, values in constants for k, v in values.items() if k in part.__dict__
    ]
    changed = [(part.__dict__, name, value, then) for part, name, value, then in now if value != then]
    try:
        for holder, name, _, then in changed:
            holder[name] = then
        yield
    finally:
        for holder, name, value, _ in changed:
            holder[name] = value
