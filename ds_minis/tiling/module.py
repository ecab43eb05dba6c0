"""Token-wise modules (feed-forward, norms) over chunks of tokens, by a class swap in place.

`module.__class__ = tiled_class(type(module))` keeps parameter names, hooks, `isinstance`, copies and adapter injection
as they were, and one assignment undoes it.
"""

from __future__ import annotations

import functools
import logging
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ds_minis.ranks import is_main_process
from ds_minis.tiling.calls import RowCall
from ds_minis.tiling.chunking import Chunking
from ds_minis.tiling.compiling import outside_of_graphs
from ds_minis.tiling.hooks import foreign_hook
from ds_minis.tiling.rows import runs_whole, tile_rows
from ds_minis.tiling.verify import can_be_verified, why_not_token_wise

logger = logging.getLogger("ds_minis")
_FSDP = {"FSDPModule": "fully_shard", "FullyShardedDataParallel": "FullyShardedDataParallel"}


class TiledModule(nn.Module):
    """Mixed into a token-wise module's class by `tiled_class`; runs that class's own forward over chunks.

    Attributes:
        mini_sequence_chunking: the chunk sizes; None (as on a module built from this class directly) means untiled.
        mini_sequence_name: its qualified name in the model that was converted.
        mini_sequence_verdicts: what was found out about this module, for each way of calling it: empty for token-wise,
            else the reason why it is run as a whole.
    """

    mini_sequence_chunking: Chunking | None = None
    mini_sequence_name: str
    mini_sequence_verdicts: dict[tuple, str]

    def forward(self, *args, **kwargs):
        forward, chunking = super().forward, self.mini_sequence_chunking
        if chunking is None or chunking.suspended:
            return forward(*args, **kwargs)
        call = RowCall(args, kwargs)
        if call.num_rows == 0:
            return forward(*args, **kwargs)
        chunk_rows = chunking.module_rows(call.num_rows, call.width, _experts_per_choice(self, call))
        if runs_whole(call.num_rows, chunk_rows):
            return forward(*args, **kwargs)
        return _forward_by_rows(self, forward, call, chunk_rows)

    def __reduce_ex__(self, protocol):
        # The class is made at run time, so copies and pickles name the class it was made from.
        _, _, *state = super().__reduce_ex__(protocol)
        return _new_tiled, (untiled_class(type(self)),), *state


@outside_of_graphs
def _forward_by_rows(module: nn.Module, forward: Callable[..., Any], call: RowCall, chunk_rows: int) -> Any:
    """By chunks, if the module is token-wise; else as it is, with one line that says why."""
    if not _is_token_wise(module, forward, call):
        return call.run(forward)
    require_weights(module)

    def run(*rows: Tensor) -> Tensor:
        args, kwargs = call.with_rows(rows)
        return forward(*args, **kwargs).flatten(0, -2)

    guard = functools.partial(module.mini_sequence_chunking.guarded, "chunk_size", chunk_rows, call.num_rows)
    y = tile_rows(run, module, call.rows(), chunk_rows, guard)
    return y.view(*call.input.shape[:-1], y.shape[-1])


def _is_token_wise(module: nn.Module, forward: Callable[..., Any], call: RowCall) -> bool:
    """Verified once for each mode (training or not) and way of calling; a hook on a part may come and go."""
    passing, with_grads = _passing_state(module), torch.is_grad_enabled() or module.training
    key = module.training, with_grads, call.keys, call.flags, call.reason, passing
    verdicts = module.mini_sequence_verdicts
    if key in verdicts:
        return not verdicts[key]
    reason = call.reason or passing
    if not reason:
        if not can_be_verified(call):
            return True
        require_weights(module)
        with module.mini_sequence_chunking.guarded("chunk_size", call.num_rows, call.num_rows):
            reason = why_not_token_wise(module, forward, call, with_grads=with_grads)
        if reason is None:
            return False
    verdicts[key] = reason
    if reason:
        _tell_whole(untiled_class(type(module)).__name__, reason)
    return not reason


def _passing_state(module: nn.Module) -> str:
    """What may be there for one call alone, and gone when a chunk is run again; empty if there is nothing of the kind."""
    hook = foreign_hook(part for part in module.modules() if part is not module)
    if hook:  # PEFT hands layers what they need for each sample in one
        return f"a part of it has the hook {hook}, which may look at all tokens"
    if any("parametrizations" in part._modules for part in module.modules()):  # PEFT's LoRA on parameters
        return "its weights are parametrized, perhaps for one call alone"
    return ""


def why_whole(module: TiledModule) -> str:
    """The reason why some call of the module was run as a whole; empty if none was."""
    return next(filter(None, module.mini_sequence_verdicts.values()), "")


def _tell_whole(name: str, reason: str) -> None:
    if (name, reason) not in _told and is_main_process():
        _told.add((name, reason))
        logger.warning("%s is run as a whole: %s", name, reason)


_told: set[tuple[str, str]] = set()


def _experts_per_choice(module: nn.Module, call: RowCall) -> float:
    """How many experts there are for each that a token is sent to; 1 for a module without experts."""
    experts = max(
        (param.shape[0] for param in module._parameters.values() if param is not None and param.dim() == 3), default=0
    )
    return max(1.0, experts / call.choices) if experts and call.choices else 1.0


@functools.cache
def tiled_class(base: type[nn.Module]) -> type[nn.Module]:
    """The tiled subclass of a module class; the same one each time.

    It has its base's name: FSDP's wrapping policies and others look for modules by the names of their classes.
    """
    own = {"__module__": base.__module__, "__qualname__": f"MiniSequence[{base.__qualname__}]"}
    return type(base.__name__, (TiledModule, base), own)


def untiled_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The class that a tiled class was made from."""
    return cls.__mro__[cls.__mro__.index(TiledModule) + 1]


def tile_module(module: nn.Module, chunking: Chunking, name: str = "") -> None:
    """Makes a module run over chunks from now on, unless it turns out not to be token-wise; `name` is for reports."""
    _swap_class(module, tiled_class(type(module)))
    module.mini_sequence_chunking, module.mini_sequence_name, module.mini_sequence_verdicts = chunking, name, {}


def untile_module(module: nn.Module) -> None:
    """Undoes `tile_module`.

    Raises:
        RuntimeError: an engine has put a class of its own on top since.
    """
    cls = type(module)
    if TiledModule not in cls.__bases__:
        raise RuntimeError(
            f"cannot revert a {cls.__name__}: an engine (FSDP2 wraps by class too) was applied after the conversion. "
            "Revert before the engine wraps the model"
        )
    _swap_class(module, untiled_class(cls))
    del module.mini_sequence_chunking, module.mini_sequence_name, module.mini_sequence_verdicts


def replaced_forward(module: nn.Module) -> str:
    """What stands on the instance in front of its class's forward, and would go on running after a class swap.

    Empty where nothing does, and where it is known to call the class's forward: accelerate's hooks (`device_map`), and
    the bound method that they leave behind when they are removed.
    """
    name = _forward_attribute(module)
    value = module.__dict__.get(name)
    if value is None or (getattr(value, "__self__", None) is module and value.__func__ is type(module).forward):
        return ""
    return getattr(value, "__qualname__", None) or repr(value)


def _forward_attribute(module: nn.Module) -> str:
    """Where an instance holds its class's forward, if it holds it: accelerate's hooks keep it aside, and call it."""
    hooked = getattr(getattr(module.__dict__.get("forward"), "func", None), "__module__", "")
    return "_old_forward" if hooked == "accelerate.hooks" else "forward"


def _swap_class(module: nn.Module, cls: type[nn.Module]) -> None:
    """Gives the module another class, and that class's forward wherever the instance holds the one it had."""
    name = _forward_attribute(module)
    holds_forward = name in module.__dict__ and not replaced_forward(module)
    module.__class__ = cls
    if holds_forward:
        module.__dict__[name] = types.MethodType(cls.forward, module)


def _new_tiled(base: type[nn.Module]) -> nn.Module:
    cls = tiled_class(base)
    return cls.__new__(cls)


def require_weights(module: nn.Module) -> None:
    """Refuses weights that an engine would gather inside, once per chunk: ranks that differ in length would hang.

    FSDP2 gathers when a module is called, which happens once; FSDP1 when its wrapper's forward runs, which a chunk does.
    """
    for name, child in module.named_modules():
        wrapper = next((_FSDP[cls.__name__] for cls in type(child).__mro__ if cls.__name__ in _FSDP), None)
        if wrapper and (child is not module or wrapper == "FullyShardedDataParallel"):
            place = f"{name} inside of a tiled {type(module).__name__}" if name else "an LM head whose loss is tiled"
            raise RuntimeError(
                f"{wrapper} was applied to {place}, so every chunk would gather its weights on its own (and hang where ranks "
                "differ in length). Apply it to the decoder layer, or to the whole module (FSDP1 takes a layer with frozen "
                'and trainable weights with use_orig_params=True), or leave the module out with "exclude" (the LM head: '
                '"loss": false) in the mini-sequence configuration'
            )
    for name, param in module.named_parameters():
        if param.numel() == 0 and hasattr(param, "ds_shape"):
            raise RuntimeError(
                f"{type(module).__name__}.{name} is partitioned by ZeRO-3 inside of a tiled module, so every chunk would "
                "gather it on its own (and hang where ranks differ in length). Convert the model before "
                "deepspeed.initialize, with ds_minis attached to DeepSpeed: do not set DS_MINIS_AUTOLOAD=0, or call "
                "ds_minis.register() first"
            )
