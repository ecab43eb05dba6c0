"""Is a module token-wise? Asked of its behaviour, at its first call: names lie (a token shift inside of a feed-forward).

A few rows are run at once, and again by chunks in reversed order: run in order, a module that keeps what it saw from one
call to the next would look token-wise. Gradients are compared too, as a mixing weight that starts at zero shows only there.
The rows are random, and the other arguments those of the real call.
"""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from ds_minis.tiling.calls import RowCall
from ds_minis.tiling.gradient_sums import GradientSums
from ds_minis.tiling.recompute import AutocastState, unseen_graph
from ds_minis.tiling.rows import ParameterSlots

_BATCH, _TOKENS, _CHUNKS = 2, 32, 3
# Relative to the largest element. Rounding differs between matmuls of different sizes; a mixed token shows at once.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
_COARSE = 2e-2  # bfloat16, float16
# Elements. Larger weights get no gradient here: theirs would cost memory, and what mixes tokens is small, or seen already.
LARGEST_WEIGHT = 2**24


class _Answer(enum.Enum):
    YES = ""
    NO = "its result for a token depends on others"
    NOT_IN_BACKWARD = "its gradients for a token depend on others"


def why_not_token_wise(
    module: nn.Module, forward: Callable[..., Any], call: RowCall, *, with_grads: bool = True
) -> str | None:
    """Runs a few rows of a call on detached weights.

    Args:
        module: whose state must not change.
        forward: the module's own forward.
        call: a real call of it, whose arguments have rows (`call.reason` is empty).
        with_grads: run backward too.

    Returns:
        An empty string if the module is token-wise; else the reason why it is not. None where it cannot be told: neither
        its output nor a gradient differs from token to token.
    """
    with quietly(module, call.input.device):
        answer = _ask(module, forward, call, with_grads)
        if answer == _Answer.NOT_IN_BACKWARD.value:
            # Once more, with other random numbers: the gradient of a single number may happen to be next to nothing, and all
            # rounding in bfloat16.
            answer = _ask(module, forward, call, with_grads)
        return answer


def _ask(module: nn.Module, forward: Callable[..., Any], call: RowCall, with_grads: bool) -> str | None:
    few = call.narrowed(_BATCH, _TOKENS, torch.randn_like)
    first_state = State(module)
    try:
        run = _Run(module, forward, few, with_grads)
        expected = run.whole()
        if run.reason:
            return run.reason
        state = State(module)
        actual = run.in_reversed_chunks()
        changed = state.changed(module)
    except torch.OutOfMemoryError:
        raise  # says nothing about the module
    except Exception as error:
        return f"it fails on a part of the tokens ({type(error).__name__}: {str(error)[:100]})"
    finally:
        first_state.restore(module)
    if changed:
        return f"it keeps state from one call to the next ({changed})"
    return _compared(actual, expected, tolerance([few.input, *module.parameters(), *actual]))


def tolerance(tensors: Sequence[Tensor | None]) -> float:
    """For what is computed of these: as coarse as the coarsest of them, or as autocast."""
    dtypes = {t.dtype for t in tensors if t is not None and t.is_floating_point()}
    if AutocastState(tensors[0].device).dtype() is not None:
        return _COARSE
    return max(_TOLERANCE.get(dtype, _COARSE) for dtype in dtypes)


class _Run:
    """Runs a call on detached weights, as a whole and by chunks; backward with one random gradient."""

    def __init__(self, module: nn.Module, forward: Callable[..., Any], call: RowCall, with_grads: bool):
        self.reason = ""
        self._module, self._forward, self._call, self._with_grads = module, forward, call, with_grads
        self._grad: Tensor | None = None

    def whole(self) -> list[Tensor | None]:
        """Output, gradient of the first argument, gradients of the weights; empty if there is a reason not to go on."""
        return self._over([slice(0, self._call.num_rows)], self._call.whole)

    def in_reversed_chunks(self) -> list[Tensor | None]:
        """The same, put together from chunks."""
        num_rows, size = self._call.num_rows, -(-self._call.num_rows // _CHUNKS)
        return self._over([slice(i, i + size) for i in reversed(range(0, num_rows, size))], self._call.with_rows)

    def _over(self, slices: Sequence[slice], arguments: Callable[[list[Tensor]], Any]) -> list[Tensor | None]:
        call = self._call
        slots = ParameterSlots(self._module)
        leaves = [p.detach().requires_grad_(p.numel() <= LARGEST_WEIGHT) for p in slots.tensors]
        sums, output, input_grad = GradientSums(leaves), None, None
        with torch.set_grad_enabled(self._with_grads), slots.holding(leaves):
            for rows in slices:
                parts = [row[rows].detach().clone() for row in call.rows()]
                leaf = parts[0].requires_grad_(parts[0].is_floating_point())
                parts[0] = leaf * 1 if leaf.requires_grad else leaf  # what is no leaf may be written to
                args, kwargs = arguments(parts)
                y = self._forward(*args, **kwargs)
                self.reason = _why_not_one_tensor(y, RowCall(tuple(args), kwargs)) or foreign_weight(y, [leaf, *leaves])
                if self.reason:
                    return []
                y = y.flatten(0, -2)
                if output is None:
                    output, input_grad = y.new_empty(call.num_rows, *y.shape[1:]), torch.zeros_like(call.rows()[0])
                    self._grad = torch.randn_like(output) if self._grad is None else self._grad
                output[rows] = y.detach()
                inputs = [t for t in (leaf, *leaves) if t.requires_grad]
                if y.requires_grad:
                    # A copy, as a backward may write over the gradient that it is given.
                    grads = iter(torch.autograd.grad(y, inputs, self._grad[rows].clone(), allow_unused=True))
                    if writes_gradients(leaves):
                        self.reason = WRITES_GRADIENTS
                        return []
                    grad = next(grads) if leaf.requires_grad else None
                    input_grad[rows] = 0 if grad is None else grad
                    sums.add(grads)
        return [output, input_grad, *sums.result()]


def _compared(actual: list[Tensor | None], expected: list[Tensor | None], tolerance: float) -> str | None:
    output, *grads = expected
    rows = output.float()
    alike = torch.equal(rows, rows[:1].expand_as(rows)) and not any(g is not None and g.any() for g in grads)
    if alike:
        return None
    if not is_close(actual[0], output, tolerance):
        return _Answer.NO.value
    close = (is_close(a, e, tolerance) for a, e in zip(actual[1:], grads, strict=True))
    return _Answer.YES.value if all(close) else _Answer.NOT_IN_BACKWARD.value


def is_close(actual: Tensor | None, expected: Tensor | None, tolerance: float) -> bool:
    if actual is None or expected is None:
        return actual is expected
    error, scale = (actual.float() - expected.float()).abs().max(), expected.float().abs().max()
    return bool(error <= tolerance * scale)


def _why_not_one_tensor(output: Any, call: RowCall) -> str:
    if not isinstance(output, Tensor):
        return f"it gives a {type(output).__name__}, not one tensor"
    if output.shape[:-1] != call.input.shape[:-1]:
        return f"its output has the shape {tuple(output.shape)} for an input of {tuple(call.input.shape)}"
    return ""


WRITES_GRADIENTS = (
    "its backward adds to the gradients of weights itself (an autograd.Function that runs the module again, such as "
    "DeepSpeed's TiledMLP)"
)


def writes_gradients(leaves: Sequence[Tensor]) -> bool:
    """Whether a backward that was to return gradients has accumulated some. Inside of a chunk they would be lost."""
    return any(leaf.grad is not None for leaf in leaves)


def foreign_weight(output: Tensor, known: Sequence[Tensor]) -> str:
    """A trainable tensor that the module uses and does not hold would get no gradient."""
    ids, seen, nodes = {id(t) for t in known}, set(), [output.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if id(getattr(node, "variable", output)) not in ids and hasattr(node, "variable"):
            return "it uses a trainable tensor that it does not hold as a parameter"
        nodes += [following for following, _ in node.next_functions]
    return ""


class _WithoutDropout(TorchFunctionMode):
    """Random zeros would differ from run to run and hide what is asked."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if "dropout" in getattr(func, "__name__", ""):
            return args[0] if args else kwargs["input"]
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def quietly(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Inside, nobody notices that the module runs: no hooks of its parts, no random numbers drawn.

    Nor do dispatch modes: selective activation checkpointing would take these results for the real call's.
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
            torch.clear_autocast_cache()  # of the detached weights


class State:
    """What a module and its parts hold: buffers by value, lists and the like by their elements, all else by identity."""

    def __init__(self, module: nn.Module):
        self._attributes = {m: dict(m.__dict__) for m in module.modules()}
        self._buffers = {m: dict(m._buffers) for m in module.modules()}
        self._values = [(b, _version(b), b.clone()) for b in module.buffers()]
        self._versions = [(p, _version(p)) for p in module.parameters()]
        self._containers = [
            (name, value, value.copy())
            for m in module.modules()
            for name, value in m.__dict__.items()
            if type(value) in (list, dict, set) and not name.startswith("_") and not name.startswith("mini_sequence_")
        ]

    def changed(self, module: nn.Module) -> str:
        """The name of something that is not what it was; empty if everything is."""
        for m, attributes in self._attributes.items():
            for holder, before in ((m.__dict__, attributes), (m._buffers, self._buffers[m])):
                for name in holder.keys() | before.keys():
                    if holder.get(name) is not before.get(name) and not _same(holder.get(name), before.get(name)):
                        return name
        for name, value, before in self._containers:
            if len(value) != len(before) or any(
                a is not b for a, b in zip(_elements(value), _elements(before), strict=True)
            ):
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
        for _, value, before in self._containers:
            value.clear()
            value.extend(before) if isinstance(value, list) else value.update(before)
        for buffer, version, value in self._values:
            if _version(buffer) != version:
                buffer.copy_(value)


def _elements(container: list | dict | set) -> list:
    return list(container.values() if isinstance(container, dict) else container)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _same(a: Any, b: Any) -> bool:
    return type(a) is type(b) and isinstance(a, bool | int | float | str) and a == b
