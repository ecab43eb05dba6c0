"""Runs a chunk again in backward as it ran in forward: same random numbers, same autocast, patched forwards."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn


class AutocastState:
    """Whether autocast is on, and its dtype, for one device and for the CPU."""

    def __init__(self, device: torch.device):
        self._device = device
        self._states = tuple(
            (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
            for kind in dict.fromkeys((device.type, "cpu"))
            if _has_autocast(kind)
        )
        self._cache = torch.is_autocast_cache_enabled()

    def __eq__(self, other) -> bool:
        return self._on() == other._on()

    def dtype(self) -> torch.dtype | None:
        """What autocast casts to on the device; None when it is off."""
        return next((dtype for kind, dtype in self._on() if kind == self._device.type), None)

    def _on(self) -> list[tuple[str, torch.dtype]]:
        return [(kind, dtype) for kind, enabled, dtype in self._states if enabled]

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for kind, enabled, dtype in self._states:
                if not enabled and not torch.is_autocast_enabled(kind):
                    continue
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=self._cache))
            yield


_has_autocast = functools.cache(torch.amp.is_autocast_available)


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """What autocast casts to on a kind of device; None when it is off."""
    on = _has_autocast(device_type) and torch.is_autocast_enabled(device_type)
    return torch.get_autocast_dtype(device_type) if on else None


def matmul_dtype(t: Tensor) -> torch.dtype | None:
    """The dtype that autocast runs a matmul on `t` in, which leaves float64 as it is; None when it is off."""
    dtype = autocast_dtype(t.device.type)
    return t.dtype if dtype is not None and t.dtype == torch.float64 else dtype


class Replay:
    """The random state and autocast state of a forward pass, to run its chunks again in the same way."""

    def __init__(self, device: torch.device):
        self.autocast = AutocastState(device)
        self._device, self._states = device, random_states(device)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Enters the random state and autocast state of forward, and restores the caller's random state at the end."""
        before = random_states(self._device)
        try:
            set_random_states(self._device, self._states)
            with self.autocast.entered():
                yield
        finally:
            set_random_states(self._device, before)


def has_values(tensor: Tensor) -> bool:
    """Whether the tensor holds data: False for meta and fake tensors."""
    return not tensor.is_meta and not is_fake(tensor)


def is_fake(tensor: Tensor) -> bool:
    """Whether it is one of torch's `FakeTensor`s, which wrap a meta tensor each."""
    return type(tensor).__name__ == "FakeTensor"


_ON_HOST = "cpu", "meta"


def random_states(device: torch.device | None) -> list[Tensor]:
    """The states of the generators that code on the device draws from: the CPU's, and the device's if it has one."""
    states = [torch.get_rng_state()]
    if device is not None and device.type not in _ON_HOST:
        states.append(torch.get_device_module(device).get_rng_state(device))
    return states


def set_random_states(device: torch.device, states: Sequence[Tensor]) -> None:
    """Undoes what has been drawn since `random_states(device)`."""
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.get_device_module(device).set_rng_state(state, device)


def seed_generators(device: torch.device | None, seed: int) -> None:
    """Seeds the CPU's generator, and the device's. `torch.manual_seed` would format a stack trace for each unused backend."""
    torch.default_generator.manual_seed(seed)
    if device is not None and device.type not in _ON_HOST:
        with torch.get_device_module(device).device(device):
            torch.get_device_module(device).manual_seed(seed)


def refuse_gradients_of_gradients(way_out: str = "exclude the modules") -> None:
    """Call this in a backward that cannot be differentiated. Raises RuntimeError under `create_graph=True`."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "create_graph=True (a gradient of a gradient) is not supported through mini-sequences: call "
            f"revert_mini_sequence(model), or {way_out}"
        )


def graph_is_kept() -> bool:
    """Whether the backward in progress runs with `retain_graph=True`."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


def unseen_graph() -> contextlib.AbstractContextManager:
    """Hides the tensors that a graph saves and frees inside from outer saved-tensor hooks (checkpointing, offloading)."""
    # Detached: an operation that saves its own output would otherwise form a reference cycle and never be freed.
    return torch.autograd.graph.saved_tensors_hooks(Tensor.detach, _as_it_is)


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


class patched_forwards:
    """Context: replaces the forward of each module by the given one (None: its class's). Hooks still run."""

    def __init__(self, forwards: dict[nn.Module, Callable | None]):
        self._forwards = forwards

    def __enter__(self) -> None:
        self._before = {module: module.__dict__.get("forward") for module in self._forwards}
        _set_forwards(self._forwards)

    def __exit__(self, *_: object) -> None:
        _set_forwards(self._before)


def _set_forwards(forwards: dict[nn.Module, Callable | None]) -> None:
    for module, forward in forwards.items():
        if forward is None:
            module.__dict__.pop("forward", None)
        else:
            module.__dict__["forward"] = forward
