"""Classifies hooks: an engine's hook gathers weights and may run around all chunks; a user hook must see all tokens."""

from __future__ import annotations

import functools
import inspect
import sys
import types
from collections.abc import Callable, Iterable

from torch import nn

_FSDP = {"FSDPModule": "fully_shard", "FullyShardedDataParallel": "FullyShardedDataParallel"}
_ENGINES = "torch.distributed.", "torch.utils.", "deepspeed.", "accelerate."
_NO_ENGINES = "torch.distributed.tensor"  # tensor parallelism's hooks redistribute the output
_SHARDING = "torch.distributed.fsdp", "deepspeed."
FORWARD = ("forward_hooks", "forward_pre_hooks")
ALL = (*FORWARD, "backward_hooks", "backward_pre_hooks")


def user_hook(modules: Iterable[nn.Module], kinds: tuple[str, ...] = FORWARD) -> str:
    """The name of a hook on one of the modules that does not belong to an engine; empty if there is none."""
    for module in modules:
        for kind in kinds:
            hooks = module.__dict__[f"_{kind}"]
            name = _user_hook_name(hooks.values()) if hooks else ""
            if name:
                return name
        if _is_captured(module):
            return f"of transformers, which captures the outputs of a {type(module).__name__}"
    return ""


def _is_captured(module: nn.Module) -> bool:
    """Whether transformers collects the module's outputs in this pass, by a patched forward (5.1): router outputs, say."""
    forward = module.__dict__.get("forward")
    return isinstance(forward, types.FunctionType) and "collected_outputs" in forward.__code__.co_freevars


def global_user_hook() -> str:
    """The same for torch's global module hooks."""
    return next(
        filter(None, (_user_hook_name(getattr(nn.modules.module, f"_global_{kind}").values()) for kind in ALL)), ""
    )


def engine_forward_hook(module: nn.Module) -> str:
    """The name of a hook of a sharding engine (FSDP, ZeRO) on a module's output; empty if there is none."""
    places = (getattr(hook, "__module__", None) or "" for hook in module._forward_hooks.values())
    return next((place.partition(".")[0] for place in places if place.startswith(_SHARDING)), "")


def is_engines(hook: Callable) -> bool:
    """Whether a hook belongs to an engine."""
    return not _user_hook_name([hook])


def _captures_nothing(hook: Callable) -> bool:
    """Whether it is one of transformers' hooks that capture router outputs or attentions, and none are requested now."""
    if getattr(hook, "__module__", None) != "transformers.utils.output_capturing":
        return False
    collector = sys.modules[hook.__module__]._active_collector.get()
    return collector is None or inspect.getclosurevars(hook).nonlocals["key"] not in collector


def _user_hook_name(hooks: Iterable[Callable]) -> str:
    for hook in hooks:
        if _captures_nothing(hook):
            continue
        while isinstance(hook, functools.partial):
            hook = hook.func
        place = getattr(hook, "__module__", None) or type(hook).__module__
        if not place.startswith(_ENGINES) or place.startswith(_NO_ENGINES):
            return getattr(hook, "__qualname__", None) or type(hook).__qualname__
    return ""


def engine_of(module: nn.Module) -> str:
    """The name of the FSDP function or class that was applied to the module itself; empty if none was."""
    return _engine_of_class(type(module))


@functools.lru_cache(maxsize=4096)
def _engine_of_class(cls: type[nn.Module]) -> str:
    return next((_FSDP[base.__name__] for base in cls.__mro__ if base.__name__ in _FSDP), "")


def remove_hooks(module: nn.Module, kinds: tuple[type, ...]) -> None:
    """Removes the forward hooks and pre-hooks of these classes from one module."""
    for hooks, companions in (
        (module._forward_pre_hooks, [module._forward_pre_hooks_with_kwargs]),
        (module._forward_hooks, [module._forward_hooks_with_kwargs, module._forward_hooks_always_called]),
    ):
        for key in [key for key, hook in hooks.items() if isinstance(hook, kinds)]:
            for holder in (hooks, *companions):
                holder.pop(key, None)
