"""Runs a module without side effects, and detects graphs that outlive a run."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from ds_minis.tiling.core.replay import seed_generators, unseen_graph


class _Guarded(torch.autograd.Function):
    """A copy of a tensor whose graph node holds an object; the object is freed with the graph."""

    @staticmethod
    def forward(ctx, x: Tensor, sentinel: Any):
        ctx.sentinel = sentinel
        return x.clone()

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, None


class _Sentinel:
    pass


def guarded(x: Tensor, sentinels: list[weakref.ref]) -> Tensor:
    """A copy of a tensor. Its graph holds the sentinel whose weak reference is appended."""
    sentinel = _Sentinel()
    sentinels.append(weakref.ref(sentinel))
    return _Guarded.apply(x, sentinel)


def is_held(sentinels: Sequence[weakref.ref]) -> bool:
    for generation in range(3):  # the module may have made a reference cycle, most likely just now
        if all(ref() is None for ref in sentinels):
            return False
        gc.collect(generation)
    return any(ref() is not None for ref in sentinels)


class WithoutDropout(TorchFunctionMode):
    """Disables dropout, whose random zeros would differ between the compared runs."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if "dropout" in getattr(func, "__name__", ""):
            return args[0] if args else kwargs["input"]
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def quietly(module: nn.Module, device: torch.device, *, with_dropout: bool = False) -> Iterator[None]:
    """Inside, running the module has no side effects: hooks of its submodules are off, random states are restored.

    Dispatch modes are off, too: selective activation checkpointing would store these results as those of the real call.
    """
    hooks = [
        (m, name) for m in module.modules() if m is not module for name in ("_forward_hooks", "_forward_pre_hooks")
    ]
    kept = [(m, name, m.__dict__[name]) for m, name in hooks if m.__dict__.get(name)]
    devices = [] if device.type == "cpu" else [device]
    with (
        _disable_current_modes(),
        torch.inference_mode(False),
        unseen_graph(),
        contextlib.nullcontext() if with_dropout else WithoutDropout(),
        torch.random.fork_rng(devices, device_type=device.type),
    ):
        seed_generators(device, 0)
        try:
            for m, name, value in kept:
                m.__dict__[name] = type(value)()
            yield
        finally:
            for m, name, value in kept:
                m.__dict__[name] = value
            torch.clear_autocast_cache()  # it holds casts of detached weights
