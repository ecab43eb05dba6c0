"""Is a converted model exact? Trains a tiny random instance for one step, plain and converted, and compares everything."""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import logging
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ds_minis.check.errors import in_short
from ds_minis.check.tiny import FIRST_SPECIAL_ID, FIRST_TEXT_ID, tiny_model, without_dropout
from ds_minis.convert import (
    ConversionReport,
    NothingToTile,
    convert_to_mini_sequence,
    mini_sequence_report,
    modules_with_chunks,
)
from ds_minis.layer.tiled.tiled_layer import TiledLayer
from ds_minis.tiling.modules.swap import whole_fallback_reason

LIMIT = 1e-5  # of a parameter's largest gradient, or of FLOOR times the model's where that is more
FLOOR = 0.01
SETTINGS = {"chunk_size": 41, "loss_chunk_size": 29}  # neither divides the number of tokens
# Beyond the windows of `tiny`, and beyond blocks and capacities that show at such lengths only.
BATCH_SIZE, LENGTH = 2, 150
# An error is rounding if it is at most so many times the change of the plain model's own gradient when every weight moves by
# its last bit. Decay rates of linear attention are so ill-conditioned that no two float32 runs agree to LIMIT.
ROUNDING, _LAST_BIT = 4, 2.0**-23

Batch = dict[str, torch.Tensor]


class PlainModelFails(ValueError):
    """The tiny model cannot be built or trained as it is, without ds_minis."""


@dataclass(frozen=True)
class Exactness:
    """What the comparison of a converted model with its plain twin gave.

    Attributes:
        report: what was tiled, and what not; None if nothing was.
        loss_error: difference of the losses, relative.
        grad_error: largest error of a gradient, relative to the largest of its parameter (floor: 1% of the model's).
        grad_name: the parameter it is in.
        checkpointing_error: the same under gradient checkpointing; None if the class has none.
        router_error: largest relative error of router outputs and auxiliary loss; None if the model gives none.
        logits_held: whether logits of more than half of the tokens were in memory at once.
        idle: names of modules that are to be tiled, and whose calls had no more tokens than a chunk (or that had no call).
        notes: what could not be compared or not be tiled, and why.
    """

    report: ConversionReport | None
    loss_error: float
    grad_error: float
    grad_name: str
    checkpointing_error: float | None
    router_error: float | None
    logits_held: bool
    idle: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def exact(self) -> bool:
        if self.report is not None and self.report.tiled and len(self.idle) == len(self.report.tiled):
            return False  # nothing was tiled, so nothing was compared
        errors = [self.loss_error, self.grad_error, self.checkpointing_error, self.router_error]
        return all(error <= LIMIT for error in errors if error is not None)  # not so for NaN


@dataclass(frozen=True)
class Step:
    """One training step: its loss, its gradients, and the router's outputs by name."""

    loss: float
    grads: Mapping[str, torch.Tensor]
    routers: Mapping[str, torch.Tensor]


def compare_with_plain(
    model_class: Callable[[Any], nn.Module],
    config: Any,
    *,
    make_batch: Callable[[nn.Module], Batch] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Exactness:
    """Builds a tiny model twice, converts one, and compares loss, all gradients and router outputs in float32.

    Args:
        model_class: a model's class, or whatever else makes a model of a configuration.
        config: a tiny configuration without dropout: `tiny_config(config, dropout=0.0)`.
        make_batch: called with the model; gives its inputs. Default: token ids and labels.
        settings: for `convert_to_mini_sequence`; by default small chunks of sizes that do not divide the length.

    Raises:
        PlainModelFails: the plain model cannot be built at this size, does not run, or its loss is no finite number.
    """
    try:
        plain, converted = (without_dropout(tiny_model(model_class, config)) for _ in range(2))
        batch = (make_batch or text_batch)(plain)
        expected = _step(plain, batch)
    except Exception as error:
        raise PlainModelFails(in_short(error)) from error
    if not math.isfinite(expected.loss):
        raise PlainModelFails(f"the loss is {expected.loss}")
    notes = []
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            convert_to_mini_sequence(converted, _with_small_chunks(settings or {}))
    except NothingToTile as error:
        notes.append(str(error))
    with LargestLogits(plain) as largest, _warnings_of_ds_minis() as warned:
        got = _step(converted, batch)
    notes += dict.fromkeys(warned)
    loss_error, grad_error, grad_name = step_errors(got, expected)
    rounding = _rounding(plain, batch, expected) if LIMIT < grad_error <= 100 * LIMIT else {}
    if rounding:
        notes.append(
            f"{grad_name} differs by {grad_error:.1e}, and by {rounding[grad_name]:.1e} for the last bit of weights"
        )
        loss_error, grad_error, grad_name = step_errors(got, expected, rounding)
    router_error = None
    if gives_router_outputs(plain):
        expected_routers, got_routers = (_step(m, batch, output_router_logits=True) for m in (plain, converted))
        router_error = _router_error(got_routers, expected_routers)
        if LIMIT < router_error <= 100 * LIMIT:
            moved = _rounding(plain, batch, expected_routers, output_router_logits=True)
            router_error = _router_error(got_routers, expected_routers, moved)
    checkpointing_error = None
    if getattr(plain, "supports_gradient_checkpointing", False):
        checkpointing_error = _checkpointing_error(plain, converted, batch, expected, rounding, notes)
    return Exactness(
        report=mini_sequence_report(converted),
        loss_error=loss_error,
        grad_error=grad_error,
        grad_name=grad_name,
        checkpointing_error=checkpointing_error,
        router_error=router_error,
        logits_held=largest.rows > BATCH_SIZE * LENGTH // 2,
        idle=_idle(converted),
        notes=tuple(notes),
    )


def _with_small_chunks(settings: Mapping[str, Any]) -> dict[str, Any]:
    chunks = dict(SETTINGS)
    if settings.get("num_mini_sequences") is not None:
        del chunks["chunk_size"]
    return {**chunks, **settings}


def text_batch(model: nn.Module, *, batch_size: int = BATCH_SIZE, length: int = LENGTH, seed: int = 1) -> Batch:
    """Random token ids, none of them special, and labels of which some are masked."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(FIRST_TEXT_ID, FIRST_SPECIAL_ID, (batch_size, length), generator=generator)
    labels = input_ids.clone()
    labels[0, :11], labels[-1, -2:] = -100, -100  # the first chunk is masked as a whole
    return {"input_ids": input_ids, "labels": labels}


def _idle(model: nn.Module) -> tuple[str, ...]:
    """Modules without an analysis: they were never called with more rows than a chunk has."""
    tiled = modules_with_chunks(model)
    layers = [
        m for m in tiled if isinstance(m, TiledLayer) and m.mini_sequence_analyses and not whole_fallback_reason(m)
    ]
    inside = {part for layer in layers for part in layer.modules()}
    return tuple(m.mini_sequence_name for m in tiled if not m.mini_sequence_analyses and m not in inside)


def gives_router_outputs(model: nn.Module) -> bool:
    """Whether `output_router_logits=True` makes the model record what its routers said."""
    recorded = (getattr(module, "_can_record_outputs", None) or {} for module in model.modules())
    return any("router_logits" in names for names in recorded)


class LargestLogits(TorchDispatchMode):
    """Sees the largest number of rows of any tensor as wide as the vocabulary, in forward and backward."""

    def __init__(self, model: nn.Module):
        super().__init__()
        head = model.get_output_embeddings()
        self.weights = (
            {tuple(param.shape) for param in head.parameters() if param.dim() == 2} if head is not None else set()
        )
        self.widths = {vocab_size for vocab_size, _ in self.weights}
        self.rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if not isinstance(tensor, torch.Tensor) or tensor.dim() < 2 or tensor.shape[-1] not in self.widths:
                continue
            if tuple(tensor.shape[::-1]) not in self.weights:  # the head's own weight, transposed
                self.rows = max(self.rows, tensor.numel() // tensor.shape[-1])
        return out


def _step(model: nn.Module, batch: Batch, **kwargs) -> Step:
    """Forward and backward of a copy of the batch, from a random state that is always the same."""
    model.zero_grad(set_to_none=True)
    parameters = inspect.signature(model.forward).parameters
    if "use_cache" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        kwargs["use_cache"] = False
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        out = model(**{name: value.clone() for name, value in batch.items()}, **kwargs)
        if getattr(out, "loss", None) is None:
            raise ValueError(f"{type(model).__name__} gives no loss for labels")
        out.loss.sum().backward()
    grads = {name: param.grad for name, param in model.named_parameters() if param.grad is not None}
    routers = {}
    for name in ("router_logits", "aux_loss"):
        tensors = [
            t for t in tree_leaves(out.get(name) if hasattr(out, "get") else None) if isinstance(t, torch.Tensor)
        ]
        routers |= {f"{name}.{i}": tensor.detach() for i, tensor in enumerate(tensors)}
    return Step(float(out.loss.detach().sum()), grads, routers)


def step_errors(got: Step, expected: Step, rounding: Mapping[str, float] | None = None) -> tuple[float, float, str]:
    """Error of the loss, the largest error of a gradient, and whose it is; without errors that are `rounding`."""
    loss_error = abs(got.loss - expected.loss) / max(abs(expected.loss), 1e-6)
    error, name = 0.0, ""
    for candidate, this in _grad_errors(got, expected).items():
        if LIMIT < this <= ROUNDING * (rounding or {}).get(candidate, 0.0):
            continue
        if not this <= error:  # so that NaN is kept
            error, name = this, candidate
    return loss_error, error, name


def _grad_errors(got: Step, expected: Step) -> dict[str, float]:
    largest = max((_largest(grad) for grad in expected.grads.values()), default=0.0)
    errors = {}
    for name in {**expected.grads, **got.grads}:
        a, b = got.grads.get(name), expected.grads.get(name)
        a, b = (torch.zeros_like(b) if a is None else a, torch.zeros_like(a) if b is None else b)
        errors[name] = _largest(a - b) / max(_largest(b), FLOOR * largest, 1e-30)
    return errors


def _rounding(plain: nn.Module, batch: Batch, expected: Step, **kwargs) -> dict[str, float]:
    """Errors of the plain model's own gradients when its weights move by their last bit."""
    return _grad_errors(_step(nudged(plain), batch, **kwargs), expected)


def nudged(plain: nn.Module) -> nn.Module:
    """A copy in which each weight is moved by its last bit, up or down; it has no gradients."""
    generator, copied = torch.Generator().manual_seed(4), copy.deepcopy(plain)
    copied.zero_grad()
    with torch.no_grad():
        for param in copied.parameters():
            signs = torch.randint(0, 2, param.shape, generator=generator).mul_(2).sub_(1)
            param.mul_(1 + _LAST_BIT * signs)
    return copied


def _router_error(got: Step, expected: Step, rounding: Mapping[str, float] | None = None) -> float:
    """Of everything with router outputs on: what the routers said, the auxiliary loss, and the gradients with it."""
    if got.routers.keys() != expected.routers.keys():
        return float("inf")
    errors = [*step_errors(got, expected, rounding)[:2]]
    for name, tensor in expected.routers.items():
        if got.routers[name].shape != tensor.shape:
            return float("inf")
        errors.append(_largest(got.routers[name].float() - tensor.float()) / max(_largest(tensor), 1e-6))
    return _worst(errors)


def _checkpointing_error(
    plain, converted, batch: Batch, expected: Step, rounding: Mapping[str, float], notes: list[str]
) -> float | None:
    """The largest error under checkpointing; None, with a note, where the plain model's own checkpointing is wrong."""
    try:
        error = _worst(step_errors(_checkpointed_step(converted, batch), expected, rounding)[:2])
    except Exception as failure:
        error, converted_failure = math.inf, failure
    else:
        converted_failure = None
    if error <= LIMIT:
        return error
    try:
        plain_error = _worst(step_errors(_checkpointed_step(plain, batch), expected)[:2])
    except Exception as failure:
        notes.append(f"gradient checkpointing fails in the plain model too: {in_short(failure)}")
        return None
    if not plain_error <= LIMIT:
        notes.append(f"gradient checkpointing changes the plain model's own gradients, by {plain_error:.1e}")
        return None
    if converted_failure is not None:
        raise converted_failure
    return error


def _checkpointed_step(model: nn.Module, batch: Batch) -> Step:
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # renamed after our oldest transformers
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return _step(model, batch)


def _worst(errors) -> float:
    return max(errors, key=lambda error: (error != error, error))  # NaN is the worst


@contextlib.contextmanager
def _warnings_of_ds_minis():
    """The list of what ds_minis itself warns of: mostly, why logits are computed in full."""
    messages, handler, logger = [], logging.Handler(logging.WARNING), logging.getLogger("ds_minis")
    handler.emit = lambda record: messages.append(record.getMessage().removeprefix("ds_minis: "))
    propagate, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate


def _largest(tensor: torch.Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0
