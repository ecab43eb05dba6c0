"""Running a chunk a second time, in backward: in the same way as the first time, and without work that nobody reads."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn


class AutocastState:
    """Whether, and in which dtype, autocast is on; for one device and for the CPU."""

    def __init__(self, device: torch.device):
        self._device = device
        self._states = tuple(
            (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
            for kind in dict.fromkeys((device.type, "cpu"))
            if torch.amp.is_autocast_available(kind)
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
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=self._cache))
            yield


class Replay:
    """The random state and autocast state of a forward pass, to run its chunks again in the same way."""

    def __init__(self, device: torch.device):
        self.autocast = AutocastState(device)
        self._device = device
        self._cpu_rng = torch.get_rng_state()
        self._device_rng = None
        if device.type not in ("cpu", "meta"):
            self._device_rng = torch.get_device_module(device).get_rng_state(device)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Random numbers go on as they did in forward; the caller's random state is back at the end."""
        with contextlib.ExitStack() as stack:
            if self._device_rng is None:
                stack.enter_context(torch.random.fork_rng(devices=[]))
            else:
                stack.enter_context(torch.random.fork_rng([self._device], device_type=self._device.type))
                torch.get_device_module(self._device).set_rng_state(self._device_rng, self._device)
            torch.set_rng_state(self._cpu_rng)
            stack.enter_context(self.autocast.entered())
            yield


class _LinearWithoutForward(torch.autograd.Function):
    """`F.linear` for a result that nobody reads: the right gradients, and uninitialised memory for a value."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return x.new_empty((*x.shape[:-1], weight.shape[0]))

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        grad_2d = grad.flatten(0, -2)
        return (
            grad @ weight if need_x else None,
            grad_2d.t() @ x.flatten(0, -2) if need_weight else None,
            grad_2d.sum(0) if need_bias else None,
        )


class LastLinear:
    """Finds the `nn.Linear` whose output is a module's result, to leave its product out of the recomputation.

    The backward of a linear layer reads its input and its weight, never its output. Without this, tiling would cost one
    matmul more than activation checkpointing, which stops before that product.
    """

    def __init__(self, module: nn.Module):
        # Only the plain layer: a quantized or hooked forward may do something else.
        self._linears = [
            m for m in module.modules() if type(m).forward is nn.Linear.forward and "forward" not in m.__dict__
        ]
        self._found: nn.Linear | None = None

    @contextlib.contextmanager
    def watched(self) -> Iterator[Callable[[Tensor], None]]:
        """Yields a function to be given the result of the run inside."""
        outputs: list[tuple[nn.Linear, Tensor, int]] = []

        def watch(linear: nn.Linear):
            def forward(input):
                y = type(linear).forward(linear, input)
                outputs.append((linear, y, y._version))
                return y

            return forward

        def decide(result: Tensor) -> None:
            calls = [linear for linear, _, _ in outputs]
            for linear, y, version in outputs:
                # The same memory, not written since: a later in-place operation might need the value in its backward.
                is_result = _base(result) is _base(y) and result.numel() == y.numel() and y._version == version
                if is_result and calls.count(linear) == 1:
                    self._found = linear

        with forwards_set({linear: watch(linear) for linear in self._linears}):
            yield decide

    @contextlib.contextmanager
    def skipped(self, autocast_dtype: torch.dtype | None) -> Iterator[None]:
        linear = self._found
        if linear is None or any(hooks for hooks in (linear._forward_hooks, linear._forward_pre_hooks)):
            yield
            return

        def forward(input):
            inputs = input, linear.weight, linear.bias
            if autocast_dtype is not None:
                inputs = [None if t is None else t.to(autocast_dtype) for t in inputs]
            return _LinearWithoutForward.apply(*inputs)

        with forwards_set({linear: forward}):
            yield


def _base(tensor: Tensor) -> Tensor:
    return tensor if tensor._base is None else tensor._base


def unseen_graph() -> contextlib.AbstractContextManager:
    """Inside, nobody around (activation checkpointing, offloading) sees what a graph saves that is used up inside."""
    # Detached, or what an operation saves of its own output would hold that operation, and never be freed.
    return torch.autograd.graph.saved_tensors_hooks(Tensor.detach, _as_it_is)


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


@contextlib.contextmanager
def forwards_set(forwards: dict[nn.Module, Callable | None]) -> Iterator[None]:
    """Each module runs the given forward (None: its class's) in the place of its own; hooks around it run as ever."""
    before = {module: module.__dict__.get("forward") for module in forwards}
    _set_forwards(forwards)
    try:
        yield
    finally:
        _set_forwards(before)


def _set_forwards(forwards: dict[nn.Module, Callable | None]) -> None:
    for module, forward in forwards.items():
        if forward is None:
            module.__dict__.pop("forward", None)
        else:
            module.__dict__["forward"] = forward
