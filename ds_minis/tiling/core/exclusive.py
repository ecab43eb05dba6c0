"""Keeps two things out of a run over chunks: another thread's run of the module, and global hooks that track modules."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator

from torch import nn

_RUNNING = "ds_minis_running_in"  # a thread id; settings and signatures leave attributes out that begin with ds_


@contextlib.contextmanager
def alone(module: nn.Module) -> Iterator[None]:
    """Guards a run that replaces a module's tensors and forwards.

    Raises:
        RuntimeError: another thread is inside of such a run.
    """
    here = threading.get_ident()
    entered = _RUNNING not in module.__dict__
    if module.__dict__.setdefault(_RUNNING, here) != here:
        raise RuntimeError(several_threads(module))
    try:
        yield
    finally:
        if entered:
            module.__dict__.pop(_RUNNING, None)


def several_threads(module: nn.Module) -> str:
    return (
        f"two threads run one {type(module).__name__} at once. Mini-sequences put other tensors into a module while it "
        "runs, so results would be mixed up: give each thread a copy of the model, let them run one after "
        "the other (threading.Lock), or call revert_mini_sequence(model)"
    )


def is_called_in(thread: int, module: nn.Module) -> bool:
    """Whether the thread is inside of a call of the module."""
    frame = sys._current_frames().get(thread)
    while frame is not None:
        if frame.f_code.co_name == "_call_impl" and frame.f_locals.get("self") is module:
            return True
        frame = frame.f_back
    return False


@contextlib.contextmanager
def trackers_aside() -> Iterator[None]:
    """Removes the hooks of torch's ModuleTracker, which FlopCounterMode uses.

    A run that stops at the attention never calls its forward hook, and it would register hooks on our own leaves.
    """
    kinds = (nn.modules.module._global_forward_pre_hooks, nn.modules.module._global_forward_hooks)
    aside = [(hooks, {k: h for k, h in hooks.items() if _is_tracker(h)}) for hooks in kinds if hooks]
    for hooks, own in aside:
        for key in own:
            del hooks[key]
    try:
        yield
    finally:
        for hooks, own in aside:
            hooks.update(own)


def _is_tracker(hook: object) -> bool:
    return getattr(hook, "__module__", None) == "torch.utils.module_tracker"
