"""Is a module token-wise? Asked of its behaviour, at its first call: names lie (a token shift inside of a feed-forward).

A few rows are run at once, and again by chunks in reversed order: run in order, a module that keeps what it saw from one
call to the next would look token-wise. The rows are random, and the other arguments those of the real call.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from ds_minis.tiling.calls import RowCall

_BATCH, _TOKENS, _CHUNKS = 2, 8, 3
# Relative to the largest element. Rounding differs between matmuls of different sizes; a mixed token shows at once.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
_COARSE = 5e-2  # bfloat16, float16


def can_be_verified(call: RowCall) -> bool:
    """Whether there are values to look at (there are none on the meta device, or when shapes alone are traced)."""
    x = call.input
    return not x.is_meta and type(x).__name__ != "FakeTensor"


def why_not_token_wise(module: nn.Module, forward: Callable[..., Any], call: RowCall) -> str | None:
    """Runs a few rows of a call, without gradients.

    Args:
        module: whose state must not change.
        forward: the module's own forward.
        call: a real call of it, whose arguments have rows (`call.reason` is empty).

    Returns:
        An empty string if the module is token-wise; else the reason why it is not. None where it cannot be told: the
        output is the same for all tokens.
    """
    with _quietly(module, call.input.device):
        few = call.narrowed(_BATCH, _TOKENS, torch.randn_like)
        first_state = _State(module)
        try:
            expected = few.run(forward)
            reason = _why_not_one_tensor(expected, few)
            if reason:
                return reason
            state = _State(module)
            output = _in_reversed_chunks(forward, few, expected)
            changed = state.changed(module)
        except Exception as error:
            return f"it fails on a part of the tokens ({type(error).__name__}: {str(error)[:100]})"
        finally:
            first_state.restore(module)
        if changed:
            return f"it keeps state from one call to the next ({changed})"
        rows = expected.flatten(0, -2).float()
        if torch.equal(rows, rows[:1].expand_as(rows)):
            return None
        scale, error = rows.abs().max(), (output.float() - rows).abs().max()
        return (
            ""
            if error <= _TOLERANCE.get(expected.dtype, _COARSE) * scale
            else "its result for a token depends on others"
        )


def _why_not_one_tensor(output: Any, call: RowCall) -> str:
    if not isinstance(output, Tensor):
        return f"it gives a {type(output).__name__}, not one tensor"
    if output.shape[:-1] != call.input.shape[:-1]:
        return f"its output has the shape {tuple(output.shape)} for an input of {tuple(call.input.shape)}"
    return ""


def _in_reversed_chunks(forward: Callable[..., Any], call: RowCall, expected: Tensor) -> Tensor:
    output = torch.empty_like(expected).flatten(0, -2)
    size = -(-call.num_rows // _CHUNKS)
    for start in reversed(range(0, call.num_rows, size)):
        args, kwargs = call.with_rows([row[start : start + size] for row in call.rows()])
        output[start : start + size] = forward(*args, **kwargs).flatten(0, -2)
    return output


class _WithoutDropout(TorchFunctionMode):
    """Random zeros would differ from run to run and hide what is asked."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if "dropout" in getattr(func, "__name__", ""):
            return args[0] if args else kwargs["input"]
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _quietly(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Inside, nobody notices that the module runs: no gradients, no hooks of its parts, no random numbers drawn.

    Nor do dispatch modes: selective activation checkpointing would take these results for the real call's.
    """
    hooks = [
        (m, name) for m in module.modules() if m is not module for name in ("_forward_hooks", "_forward_pre_hooks")
    ]
    kept = [(m, name, m.__dict__[name]) for m, name in hooks if m.__dict__.get(name)]
    devices = [] if device.type == "cpu" else [device]
    with (
        _disable_current_modes(),
        torch.no_grad(),
        _WithoutDropout(),
        torch.random.fork_rng(devices, device_type=device.type),
    ):
        torch.manual_seed(0)
        try:
            for m, name, value in kept:
                m.__dict__[name] = type(value)()
            yield
        finally:
            for m, name, value in kept:
                m.__dict__[name] = value


class _State:
    """What a module and its parts hold: buffers by value, everything else by identity."""

    def __init__(self, module: nn.Module):
        self._attributes = {m: dict(m.__dict__) for m in module.modules()}
        self._buffers = {m: dict(m._buffers) for m in module.modules()}
        self._values = [(b, _version(b), b.clone()) for b in module.buffers()]
        self._versions = [(p, _version(p)) for p in module.parameters()]

    def changed(self, module: nn.Module) -> str:
        """The name of something that is not what it was; empty if everything is."""
        for m, attributes in self._attributes.items():
            for holder, before in ((m.__dict__, attributes), (m._buffers, self._buffers[m])):
                for name in holder.keys() | before.keys():
                    if holder.get(name) is not before.get(name) and not _same(holder.get(name), before.get(name)):
                        return name
        changed = any(_version(t) != version for t, version, *_ in (*self._values, *self._versions))
        return "a tensor in place" if changed else ""

    def restore(self, module: nn.Module) -> None:
        """Puts everything back, but for parameters that were written to."""
        for m, attributes in self._attributes.items():
            m.__dict__.clear()
            m.__dict__.update(attributes)
            m._buffers.clear()
            m._buffers.update(self._buffers[m])
        for buffer, version, value in self._values:
            if _version(buffer) != version:
                buffer.copy_(value)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _same(a: Any, b: Any) -> bool:
    return type(a) is type(b) and isinstance(a, bool | int | float | str) and a == b
