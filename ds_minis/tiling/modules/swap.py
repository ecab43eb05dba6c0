"""Tiles a module by swapping its class in place.

`module.__class__ = tiled_class(mixin, type(module))` leaves parameter names, hooks, `isinstance`, copies and adapter
injection unchanged, and one assignment undoes it.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

from torch import nn

from ds_minis.tiling.modules.state import Chunking
from ds_minis.tiling.verify.signature import AnalysisCache

_BOUND = "mini_sequence_bound_forward"  # the instance's own forward, from before it was tiled


class Tiled(nn.Module):
    """Base of the mixins that tile a module's class; each subclass overrides `forward`.

    Attributes:
        mini_sequence_chunking: the model's shared state; None (on a module built directly from such a class) means untiled.
        mini_sequence_name: its qualified name in the converted model.
        mini_sequence_analyses: the analyses of this module, one for each kind of call. `reason` says why it is run as a whole
            (empty if it is tiled).
    """

    mini_sequence_chunking: Chunking | None = None
    mini_sequence_name: str
    mini_sequence_analyses: AnalysisCache

    def extra_repr(self) -> str:
        """For `print(model)`: scope and chunk size, or the reason why the module is run as a whole."""
        own, chunking = super().extra_repr(), self.mini_sequence_chunking
        if chunking is None:
            return own
        reason = whole_fallback_reason(self)
        state = f"run as a whole: {reason}" if reason else self.mini_sequence_state()
        return ", ".join(filter(None, (own, f"mini_sequence=({state})")))

    def mini_sequence_state(self) -> str:
        """How it is tiled, for `extra_repr`."""
        return self.mini_sequence_chunking.described()

    def __reduce_ex__(self, protocol):
        # The class is created at run time, so copies and pickles refer to the two classes that it was made from.
        _, _, *state = super().__reduce_ex__(protocol)
        return _new_tiled, (mixin_of(type(self)), untiled_class(type(self))), *state


@functools.cache
def tiled_class(mixin: type[Tiled], base: type[nn.Module]) -> type[nn.Module]:
    """The tiled subclass of a module class; the same class each time.

    It has its base's name: FSDP's wrapping policies and others find modules by class name.
    """
    own = {"__module__": base.__module__, "__qualname__": f"MiniSequence[{base.__qualname__}]"}
    return type(base.__name__, (mixin, base), own)


def untiled_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The class that a tiled class was made from; returns any other class unchanged."""
    return cls.__mro__[cls.__mro__.index(Tiled) + 1] if issubclass(cls, Tiled) else cls


def mixin_of(cls: type[nn.Module]) -> type[Tiled]:
    """The mixin of a tiled class: the first class in its MRO with `Tiled` among its bases."""
    return next(c for c in cls.__mro__ if Tiled in c.__bases__)


def tile(module: nn.Module, mixin: type[Tiled], chunking: Chunking, name: str = "") -> None:
    """Makes a module run over chunks from now on, if its behavior allows it; `name` is for reports."""
    _swap_class(module, tiled_class(mixin, type(module)))
    module.mini_sequence_chunking, module.mini_sequence_name, module.mini_sequence_analyses = (
        chunking,
        name,
        AnalysisCache(),
    )


def untile(module: nn.Module) -> None:
    """Undoes `tile`.

    Raises:
        RuntimeError: an engine has since put its own class on top.
    """
    cls = type(module)
    if not any(Tiled in base.__bases__ for base in cls.__bases__):
        raise RuntimeError(
            f"cannot revert a {cls.__name__}: an engine (FSDP2 wraps by class too) was applied after the conversion. "
            "Revert before the engine wraps the model"
        )
    _swap_class(module, untiled_class(cls))
    for name in ("mini_sequence_chunking", "mini_sequence_name", "mini_sequence_analyses"):
        module.__dict__.pop(name, None)  # a module built directly from a tiled class has none of these


def whole_fallback_reason(module: Tiled) -> str:
    """The reason why the module's last call in training ran as a whole; empty if it was tiled.

    Calls without gradients count if there were no others.
    """
    return module.mini_sequence_analyses.whole_fallback_reason()


def warn_once(module: Tiled, what: str, reason: str) -> None:
    """Warns, once per class in a model, that a module deviates from the configuration, and why."""
    module.mini_sequence_chunking.warnings.once(f"{untiled_class(type(module)).__name__} {what}: {reason}")


def own_forward(module: nn.Module, of_class: Callable[..., Any]) -> Callable[..., Any]:
    """The forward that a tiled module runs: one bound to the instance before it was tiled, else that of its class."""
    return module.__dict__.get(_BOUND, of_class)


def replaced_forward(module: nn.Module) -> str:
    """The name of a forward on the instance that would keep overriding the class's after a class swap.

    Empty if there is none, or if a class swap can take it over. That is so for a method bound to the instance (Liger's
    kernels, axolotl's), which becomes the module's own forward; for accelerate's hooks (`device_map`), which call the forward
    that they wrap; and for the bound method that these hooks leave behind when they are removed.
    """
    value = module.__dict__.get(_forward_attribute(module))
    if value is None or _is_bound_to(module, value):
        return ""
    return getattr(value, "__qualname__", None) or repr(value)


def replaced_by(module: nn.Module) -> str:
    """The Python module of a function that replaces the class's forward on an instance; empty if there is none.

    Also empty for torch's and accelerate's functions, which call the forward that they replaced.
    """
    value = module.__dict__.get(_forward_attribute(module))
    function = getattr(value, "__func__", value)
    name = getattr(function, "__globals__", {}).get("__name__", "")
    own = function is None or function is untiled_class(type(module)).forward
    return "" if own or name.partition(".")[0] in ("torch", "accelerate") else name


def _is_bound_to(module: nn.Module, value: Any) -> bool:
    return isinstance(value, types.MethodType) and value.__self__ is module


def _forward_attribute(module: nn.Module) -> str:
    """The attribute that may hold an instance's own forward; accelerate's hooks move it to `_old_forward` and call it."""
    hooked = getattr(getattr(module.__dict__.get("forward"), "func", None), "__module__", "")
    return "_old_forward" if hooked == "accelerate.hooks" else "forward"


def _swap_class(module: nn.Module, cls: type[nn.Module]) -> None:
    """Sets the module's class, and replaces a bound forward of the old class by that of the new one.

    A tiled class stores another forward of the instance aside; the swap back restores it.
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
