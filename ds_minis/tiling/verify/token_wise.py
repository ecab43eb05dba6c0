"""Checks whether a module is token-wise, from its behavior at its first call: a feed-forward module may shift tokens.

First the module is traced without values, at the length of the call and of a chunk (`follow`). Then some rows run at once,
and again by chunks. The chunks run in reversed order: in order, a module with state from earlier calls would look token-wise.
Gradients are compared too, since a mixing weight that starts at zero may show only there. Finally some rows are set to NaN,
or made large, and no other row may change. Half of the rows are real, half are random.
"""

from __future__ import annotations

import enum
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ds_minis.tiling.core.grad_accum import GradientSums, drain
from ds_minis.tiling.core.out_of_memory import is_out_of_memory
from ds_minis.tiling.core.params import ParameterSlots
from ds_minis.tiling.core.replay import AutocastState
from ds_minis.tiling.core.row_args import RowArgs
from ds_minis.tiling.verify.fingerprints import fingerprints
from ds_minis.tiling.verify.follow import Reach, follow_module
from ds_minis.tiling.verify.op_trace import SHARED_DRAW, Watch, shares_draws
from ds_minis.tiling.verify.side_effects import guarded, is_held, quietly
from ds_minis.tiling.verify.signature import Signature, read_by
from ds_minis.tiling.verify.snapshot import State

_BATCH, _TOKENS, _CHUNKS = 2, 37, 3  # 37 is prime: few widths are multiples of it
# Most rows, and usual bytes, of a probe of a module that cannot be traced without values.
LONGEST_PROBE, _PROBE_BYTES = 2048, 2**25
# Relative to the largest element. Rounding differs between matmuls of different sizes; mixed tokens differ by far more.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5}
_COARSE = 2e-2  # bfloat16, float16
# Elements. Larger weights get no gradient here, to save memory. Weights that mix tokens are small, or found by the trace.
LARGEST_WEIGHT = 2**24


class _Answer(enum.Enum):
    YES = ""
    NO = "its result for a token depends on others"
    NOT_IN_BACKWARD = "its gradients for a token depend on others"


def token_wise_fallback_reason(
    module: nn.Module,
    forward: Callable[..., Any],
    call: RowArgs,
    *,
    with_grads: bool = True,
    chunk_rows: int = 0,
    reach: Reach | None = None,
) -> str | None:
    """Traces a call without values, and runs some rows of it on detached weights.

    Args:
        module: the module; its state is restored.
        forward: the module's own forward.
        call: a real call of it, whose arguments have rows (`call.reason` is empty).
        with_grads: run backward too.
        chunk_rows: rows of a chunk of this call; 0 for a third of all.
        reach: gets the numbers of rows for which the result holds.

    Returns:
        An empty string if the module is token-wise; else the reason why it is not. None if the runs cannot tell: all rows of
        the output are equal and all gradients are zero.
    """
    reach = Reach() if reach is None else reach
    state = State(module)
    with quietly(module, call.input.device, with_dropout=True):  # dropout of weights would be the same for all tokens
        try:
            reason = follow_module(module, forward, call, chunk_rows or -(-call.num_rows // _CHUNKS), reach)
        finally:
            state.restore()
    with quietly(module, call.input.device, with_dropout=not reach.draws):
        answer = _compare_runs(module, forward, call, with_grads, reach)
        if answer in (_Answer.NOT_IN_BACKWARD.value, _Answer.NO.value):
            # Again, with other random numbers: a single gradient may happen to be near zero, and pure rounding error in
            # bfloat16.
            answer = _compare_runs(module, forward, call, with_grads, reach)
        return reason if answer == _Answer.YES.value else answer


def attributes_read_by_module(
    module: nn.Module, forward: Callable[..., Any], call: RowArgs, slots: list[tuple[int, str]], signature: Signature
) -> list[str]:
    """Which of the given attributes of its submodules a module reads."""
    state = State(module)
    few = call.narrowed(_BATCH, _TOKENS, torch.randn_like)
    with quietly(module, call.input.device), torch.no_grad():
        try:
            return read_by(lambda: few.run(forward), slots, signature)
        finally:
            state.restore()


def _compare_runs(
    module: nn.Module, forward: Callable[..., Any], call: RowArgs, with_grads: bool, reach: Reach
) -> str | None:
    first_state = State(module)
    tokens = _TOKENS if reach.complete else max(_TOKENS, long_probe(module, call.input) // _BATCH)
    if not reach.complete and min(call.num_rows, LONGEST_PROBE) <= _BATCH * tokens:
        reach.without_end()
    few = call.narrowed(_BATCH, tokens, real_and_random)
    watch = Watch(few.rows())
    try:
        run = _Run(module, forward, few, with_grads)
        with watch:
            expected = run.whole()
        if run.reason:
            return run.reason
        written = watch.undo_writes()
        if written:
            return f"it keeps state from one call to the next ({written})"
        if watch.drew_in_python or shares_draws(watch.steps, few.num_rows):
            return SHARED_DRAW
        state = State(module)
        actual = run.in_reversed_chunks()
        changed = state.changed()
        answer = _compared(actual, expected, tolerance([few.input, *module.parameters(), *actual]))
        if answer == _Answer.YES.value and not changed and not watch.makes_indices:
            answer = run.poison_fallback_reason(expected)
    except Exception as error:
        if is_out_of_memory(error):  # not a property of the module
            raise
        return f"it fails on a part of the tokens ({type(error).__name__}: {str(error)[:100]})"
    finally:
        watch.undo_writes()
        first_state.restore()
    if changed:
        return f"it keeps state from one call to the next ({changed})"
    if run.is_held():
        return HELD
    return answer


HELD = "it keeps what it computed beyond the call (an auxiliary loss, perhaps)"


def long_probe(module: nn.Module, x: Tensor) -> int:
    """The number of tokens in a probe that takes about as much memory as the module's weights."""
    weights = sum(p.numel() * p.element_size() for p in module.parameters())
    a_token = 32 * x.shape[-1] * max(4, x.element_size())
    return max(_BATCH * _TOKENS, min(LONGEST_PROBE, max(weights, _PROBE_BYTES) // a_token))


def real_and_random(x: Tensor) -> Tensor:
    """Real rows at odd indices, random rows at even ones."""
    values = torch.randn_like(x)
    if x.dim() > 1 and x.isfinite().all():
        values[..., 1::2, :] = x[..., 1::2, :]
    return values


def tolerance(tensors: Sequence[Tensor | None]) -> float:
    """The tolerance for results computed from these tensors: that of the coarsest dtype, or of autocast."""
    dtypes = {t.dtype for t in tensors if t is not None and t.is_floating_point()}
    if AutocastState(tensors[0].device).dtype() is not None:
        return _COARSE
    return max(_TOLERANCE.get(dtype, _COARSE) for dtype in dtypes)


class _Run:
    """Runs a call on detached weights, at once and by chunks; all backwards use the same random gradient."""

    def __init__(self, module: nn.Module, forward: Callable[..., Any], call: RowArgs, with_grads: bool):
        self.reason = ""
        self._module, self._forward, self._call, self._with_grads = module, forward, call, with_grads
        self._grad: Tensor | None = None
        self._sentinels: list[weakref.ref] = []

    def is_held(self) -> bool:
        """Whether a part of a run's graph is still held."""
        return is_held(self._sentinels)

    def whole(self) -> list[Tensor | None]:
        """Output, gradient of the first argument, fingerprints of the weights' gradients; empty if `reason` was set."""
        return self._over([slice(0, self._call.num_rows)], self._call.whole)

    def in_reversed_chunks(self) -> list[Tensor | None]:
        """The same, computed by chunks."""
        num_rows, size = self._call.num_rows, -(-self._call.num_rows // _CHUNKS)
        return self._over([slice(i, i + size) for i in reversed(range(0, num_rows, size))], self._call.with_rows)

    def _over(self, slices: Sequence[slice], arguments: Callable[[list[Tensor]], Any]) -> list[Tensor | None]:
        call = self._call
        slots = ParameterSlots(self._module)
        leaves = [p.detach().requires_grad_(p.numel() <= LARGEST_WEIGHT) for p in slots.tensors]
        sums, output, input_grad = GradientSums(leaves, single=True), None, None
        with torch.set_grad_enabled(self._with_grads), slots.reparametrized(leaves):
            for rows in slices:
                parts = [row[rows].detach().clone() for row in call.rows()]
                leaf = parts[0].requires_grad_(parts[0].is_floating_point())
                # Not a leaf: the module may write to it in place.
                parts[0] = guarded(leaf, self._sentinels) if leaf.requires_grad and self._with_grads else leaf * 1
                args, kwargs = arguments(parts)
                version = parts[0]._version
                y = self._forward(*args, **kwargs)
                if parts[0]._version != version:
                    self.reason = WRITES_INPUT
                    return []
                self.reason = _one_tensor_fallback_reason(y, RowArgs(tuple(args), kwargs)) or foreign_weight(
                    y, [leaf, *leaves]
                )
                if self.reason:
                    return []
                y = y.flatten(0, -2)
                parts = args = kwargs = None
                if output is None:
                    output, input_grad = y.new_empty(call.num_rows, *y.shape[1:]), torch.zeros_like(call.rows()[0])
                    self._grad = torch.randn_like(output) if self._grad is None else self._grad
                output[rows] = y.detach()
                inputs = [t for t in (leaf, *leaves) if t.requires_grad]
                if y.requires_grad:
                    # A copy, since a backward may overwrite its incoming gradient.
                    grads = drain(torch.autograd.grad(y, inputs, self._grad[rows].clone(), allow_unused=True))
                    if writes_gradients(leaves):
                        self.reason = WRITES_GRADIENTS
                        return []
                    grad = next(grads) if leaf.requires_grad else None
                    input_grad[rows] = 0 if grad is None else grad
                    sums.add(grads)
                y = None
        return [output, input_grad, *fingerprints(sums.result())]

    def poison_fallback_reason(self, expected: Sequence[Tensor | None]) -> str:
        """The reason if rows that are NaN or large change other rows, in forward or in backward; else empty."""
        output, input_grad = expected[0], expected[1]
        for value in (float("nan"), LARGE):
            with_grads = self._with_grads and value != value
            poisoned = torch.rand(self._call.num_rows, device=output.device) < 0.5
            try:
                y, grad = self._poisoned(value, poisoned, with_grads)
            except Exception:  # proves nothing: the module may check for NaN
                continue
            close = tolerance([self._call.input, output])
            if not is_close(y[~poisoned], output[~poisoned], close):
                return _Answer.NO.value
            if grad is not None and not is_close(grad[~poisoned], input_grad[~poisoned], close):
                return _Answer.NOT_IN_BACKWARD.value
        return ""

    def _poisoned(self, value: float, rows: Tensor, with_grads: bool) -> tuple[Tensor, Tensor | None]:
        """Output and gradient of the first argument, with `rows` of inputs and gradient multiplied by `value`."""
        parts, slots = [row.detach().clone() for row in self._call.rows()], ParameterSlots(self._module)
        for part in parts:
            if part.is_floating_point():
                part[rows] *= value
        with torch.set_grad_enabled(with_grads):
            leaf = parts[0].requires_grad_(with_grads and parts[0].is_floating_point())
            parts[0] = leaf * 1
            args, kwargs = self._call.whole(parts)
            with slots.reparametrized([p.detach() for p in slots.tensors]):
                y = self._forward(*args, **kwargs).flatten(0, -2)
            if not (leaf.requires_grad and y.requires_grad):
                return y.detach(), None
            grad_y = self._grad.clone()
            grad_y[rows] *= value
            (grad,) = torch.autograd.grad(y, leaf, grad_y, allow_unused=True)
        return y.detach(), grad


LARGE = 300.0  # a factor whose square is finite in float16


def _compared(actual: list[Tensor | None], expected: list[Tensor | None], tolerance: float) -> str | None:
    output, *grads = expected
    rows = output.float()
    alike = torch.equal(rows, rows[:1].expand_as(rows)) and not any(g is not None and g.any() for g in grads)
    if alike:
        return None
    if not are_close(actual[0], output, tolerance):
        return _Answer.NO.value
    close = [is_close(a, e, tolerance) for a, e in zip(actual[2:], grads[1:], strict=True)]
    close.append(are_close(actual[1], grads[0], tolerance))
    return _Answer.YES.value if all(close) else _Answer.NOT_IN_BACKWARD.value


def is_close(actual: Tensor | None, expected: Tensor | None, tolerance: float) -> bool:
    if actual is None or expected is None:
        return actual is expected
    if expected.numel() == 0:
        return True
    error, scale = (actual.float() - expected.float()).abs().max(), expected.float().abs().max()
    return bool(error <= tolerance * scale)


def are_close(actual: Tensor | None, expected: Tensor | None, tolerance: float) -> bool:
    """Compares random and real rows separately, since their sizes differ."""
    if actual is None or expected is None or expected.dim() < 2:
        return is_close(actual, expected, tolerance)
    return all(is_close(actual[i::2], expected[i::2], tolerance) for i in (0, 1) if i < expected.shape[0])


def _one_tensor_fallback_reason(output: Any, call: RowArgs) -> str:
    if not isinstance(output, Tensor):
        return f"it gives a {type(output).__name__}, not one tensor"
    if output.shape[:-1] != call.input.shape[:-1]:
        return f"its output has the shape {tuple(output.shape)} for an input of {tuple(call.input.shape)}"
    return ""


WRITES_INPUT = "it writes to its input, which others may read"
WRITES_GRADIENTS = (
    "its backward adds to the gradients of weights itself (an autograd.Function that runs the module again, such as "
    "DeepSpeed's TiledMLP)"
)


def writes_gradients(leaves: Sequence[Tensor]) -> bool:
    """Whether `autograd.grad` has accumulated gradients into leaves. In a chunk these would be lost."""
    return any(leaf.grad is not None for leaf in leaves)


def foreign_weight(output: Tensor, known: Sequence[Tensor]) -> str:
    """The reason if the module uses a trainable tensor that it does not hold, which would get no gradient; else empty."""
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
