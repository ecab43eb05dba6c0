"""Tiled classes: a module is tiled by a swap of its class, in place.

`module.__class__ = tiled_class(mixin, type(module))` keeps parameter names, hooks, `isinstance`, copies and adapter
injection as they were, and one assignment undoes it.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

from torch import nn

from ds_minis.tiling.modules.state import Chunking
from ds_minis.tiling.verify.signature import AnalysisCache

_BOUND = "mini_sequence_bound_forward"  # of the instance, from before it was tiled


class Tiled(nn.Module):
    """Mixed into a module's class, by way of a subclass that has a forward of its own.

    Attributes:
        mini_sequence_chunking: the chunk sizes; None (as on a module built from such a class directly) means untiled.
        mini_sequence_name: its qualified name in the model that was converted.
        mini_sequence_analyses: what was found out about this module, for each way of calling it: the reason why it is run as
            a whole (empty if it is tiled), or something that has it as its `reason`.
    """

    mini_sequence_chunking: Chunking | None = None
    mini_sequence_name: str
    mini_sequence_analyses: AnalysisCache

    def extra_repr(self) -> str:
        """What `print(model)` shows: that it is tiled, into what, and what was found out at its calls."""
        own, chunking = super().extra_repr(), self.mini_sequence_chunking
        if chunking is None:
            return own
        reason = whole_fallback_reason(self)
        state = f"run as a whole: {reason}" if reason else chunking.described()
        return ", ".join(filter(None, (own, f"mini_sequence=({state})")))

    def __reduce_ex__(self, protocol):
        # The class is made at run time, so copies and pickles name the classes it was made from.
        _, _, *state = super().__reduce_ex__(protocol)
        return _new_tiled, (mixin_of(type(self)), untiled_class(type(self))), *state


@functools.cache
def tiled_class(mixin: type[Tiled], base: type[nn.Module]) -> type[nn.Module]:
    """The tiled subclass of a module class; the same one each time.

    It has its base's name: FSDP's wrapping policies and others look for modules by the names of their classes.
    """
    own = {"__module__": base.__module__, "__qualname__": f"MiniSequence[{base.__qualname__}]"}
    return type(base.__name__, (mixin, base), own)


def untiled_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The class that a tiled class was made from; any other class as it is."""
    return cls.__mro__[cls.__mro__.index(Tiled) + 1] if issubclass(cls, Tiled) else cls


def mixin_of(cls: type[nn.Module]) -> type[Tiled]:
    """What makes a tiled class tiled: the first of its classes that stands on `Tiled` alone."""
    return next(c for c in cls.__mro__ if Tiled in c.__bases__)


def tile(module: nn.Module, mixin: type[Tiled], chunking: Chunking, name: str = "") -> None:
    """Makes a module run over chunks from now on, where its behaviour allows it; `name` is for reports."""
    _swap_class(module, tiled_class(mixin, type(module)))
    module.mini_sequence_chunking, module.mini_sequence_name, module.mini_sequence_analyses = (
        chunking,
        name,
        AnalysisCache(),
    )


def untile(module: nn.Module) -> None:
    """Undoes `tile`.

    Raises:
        RuntimeError: an engine has put a class of its own on top since.
    """
    cls = type(module)
    if not any(Tiled in base.__bases__ for base in cls.__bases__):
        raise RuntimeError(
            f"cannot revert a {cls.__name__}: an engine (FSDP2 wraps by class too) was applied after the conversion. "
            "Revert before the engine wraps the model"
        )
    _swap_class(module, untiled_class(cls))
    for name in ("mini_sequence_chunking", "mini_sequence_name", "mini_sequence_analyses"):
        module.__dict__.pop(name, None)  # a module that was built from a tiled class has none of them


def whole_fallback_reason(module: Tiled) -> str:
    """The reason why the module runs as a whole in training, as its last call did; empty if it does not.

    Calls without gradients count where there were no others.
    """
    return module.mini_sequence_analyses.whole_fallback_reason()


def warn_once(module: Tiled, what: str, reason: str) -> None:
    """Says, once for each class in a model, what a module does otherwise than it was asked to, and why."""
    module.mini_sequence_chunking.warnings.once(f"{untiled_class(type(module)).__name__} {what}: {reason}")


def own_forward(module: nn.Module, of_class: Callable[..., Any]) -> Callable[..., Any]:
    """What a tiled module runs: the forward that was bound to the instance before it was tiled, else that of its class."""
    return module.__dict__.get(_BOUND, of_class)


def replaced_forward(module: nn.Module) -> str:
    """What stands on the instance in front of its class's forward, and would go on running after a class swap.

    Empty where nothing does, and where a class swap can take it over: a method that was bound to the instance (Liger's
    kernels, axolotl's), which is then the module's own forward; accelerate's hooks (`device_map`), which call what they
    stand before, and the bound method that they leave behind when they are removed.
    """
    value = module.__dict__.get(_forward_attribute(module))
    if value is None or _is_bound_to(module, value):
        return ""
    return getattr(value, "__qualname__", None) or repr(value)


def replaced_by(module: nn.Module) -> str:
    """The Python module of a function that an instance has in the place of its class's forward; empty where there is none.

    Nor where it is torch's or accelerate's, which call the forward that was there.
    """
    value = module.__dict__.get(_forward_attribute(module))
    function = getattr(value, "__func__", value)
    name = getattr(function, "__globals__", {}).get("__name__", "")
    own = function is None or function is untiled_class(type(module)).forward
    return "" if own or name.partition(".")[0] in ("torch", "accelerate") else name


def _is_bound_to(module: nn.Module, value: Any) -> bool:
    return isinstance(value, types.MethodType) and value.__self__ is module


def _forward_attribute(module: nn.Module) -> str:
    """Where an instance holds its class's forward, if it holds it: accelerate's hooks keep it aside, and call it."""
    hooked = getattr(getattr(module.__dict__.get("forward"), "func", None), "__module__", "")
    return "_old_forward" if hooked == "accelerate.hooks" else "forward"


def _swap_class(module: nn.Module, cls: type[nn.Module]) -> None:
    """Gives the module another class, and that class's forward wherever the instance holds the one it had.

    A forward of the instance's own is kept aside by a tiled class, and is back with the class that it was bound in front of.
    """
    name, before = _forward_attribute(module), type(module)
    value, aside = module.__dict__.get(name), module.__dict__.pop(_BOUND, None)
    module.__class__ = cls
    if not _is_bound_to(module, value):
        return
    if value.__func__ is before.forward:
        module.__dict__[name] = types.MethodType(cls.forward, module) if aside is None else aside
    elif issubclass(cls, Tiled):
        module.__dict__[_BOUND], module.__dict__[name] = value, types.MethodType(cls.forward, module)


def _new_tiled(mixin: type[Tiled], base: type[nn.Module]) -> nn.Module:
    cls = tiled_class(mixin, base)
    return cls.__new__(cls)
