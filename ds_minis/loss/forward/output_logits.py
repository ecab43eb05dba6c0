"""Deferred logits in a model's output: replaced for evaluations, or kept as an attribute until backward."""

from __future__ import annotations

import contextlib
import contextvars
import copy
import dataclasses
import functools
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch.distributed
import torch.utils._pytree as pytree
from torch import Tensor

from ds_minis.loss.heads.chunked_head import ChunkedHead
from ds_minis.loss.logits.deferred import DeferredLogits, materialized
from ds_minis.tiling.core.replay import AutocastState


class WantedLogits:
    """What an evaluation needs from the logits of forward passes with labels.

    Attributes:
        transform: reduces them, for example to the predicted tokens. It is called with deferred logits while the weights are
            still gathered. None: the logits themselves are needed.
        ignored: keys of the output that the evaluation does not read.
        transformed: whether the result of `transform` replaced the logits of the last output.
    """

    def __init__(self, transform: Callable[[Tensor], Any] | None, ignored: Collection[str]):
        self.transform, self.ignored, self.transformed = transform, ignored, False

    def applied_to(self, output: Any, wrapped: bool) -> Any:
        """Replaces the deferred logits of a model's output by what the evaluation needs.

        In mixed precision, engines cast a model's outputs to float32 before an evaluation sees them. So this casts too, if
        autocast is on or was `wrapped` around the model's forward.
        """
        logits = output.get("logits") if isinstance(output, dict) else None
        if not isinstance(logits, DeferredLogits):
            return materialized(output)
        looked_at = {key for key, value in output.items() if value is not None} - {"loss", *self.ignored}
        autocast = AutocastState(logits.device).dtype() is not None
        if self.transform is None or looked_at != {"logits"}:
            output["logits"] = logits.materialize()
        else:
            output["logits"] = materialized(self.transform(logits.float() if wrapped or autocast else logits))
            self.transformed = True
        return output


_WANTED: contextvars.ContextVar[WantedLogits | None] = contextvars.ContextVar("ds_minis_wanted_logits", default=None)


def wanted_logits() -> WantedLogits | None:
    """What an evaluation needs from the forward pass in progress; None outside of `returning_logits`."""
    return _WANTED.get()


@contextlib.contextmanager
def returning_logits(
    transform: Callable[[Tensor], Any] | None = None, ignored: Collection[str] = ()
) -> Iterator[WantedLogits]:
    """Inside, forward passes with labels return transformed logits (see `WantedLogits`), by default all logits."""
    wanted = WantedLogits(transform, ignored)
    token = _WANTED.set(wanted)
    try:
        yield wanted
    finally:
        _WANTED.reset(token)


def without_deferred(output: Any, head: ChunkedHead) -> Any:
    """The output without deferred logits. Nested ones, and those in outputs of a fixed form, are computed in full.

    In transformers' outputs they remain an attribute, for code that reads `outputs.logits` before backward.
    """
    if isinstance(output, DeferredLogits) or hasattr(output, "_fields"):
        return materialized(output)
    if isinstance(output, tuple | list):
        return type(output)(materialized(value) for value in output if not isinstance(value, DeferredLogits))
    if isinstance(output, dict):
        return _dict_without_deferred(output, head)
    if dataclasses.is_dataclass(output):
        values = {field.name: getattr(output, field.name) for field in dataclasses.fields(output)}
        dropped = {name: None for name, value in values.items() if isinstance(value, DeferredLogits)}
        return dataclasses.replace(output, **dropped)
    return output


def _dict_without_deferred(output: dict, head: ChunkedHead) -> dict:
    kept = {key: _value(value, head) for key, value in output.items() if not isinstance(value, DeferredLogits)}
    if all(kept.get(key) is value for key, value in output.items()):
        return output
    if dataclasses.is_dataclass(output):  # transformers' ModelOutput, which does not allow deleting a field
        # DDP flattens an output and rebuilds it from its items, to find unused parameters.
        rebuilt = torch.distributed.is_available() and torch.distributed.is_initialized()
        same_kind = (_with_logits if rebuilt else _as_it_is)(type(output))(**kept)
        for name in output.keys() - kept.keys():
            head.give(output[name], same_kind, name)
        return same_kind
    same_kind = copy.copy(output)
    same_kind.clear()
    same_kind.update(kept)
    return same_kind


def _as_it_is(cls: type) -> type:
    return cls


class _KeepsLogits:
    """Mixin for the class of an output with deferred logits as an attribute: a rebuilt output has them, too."""

    def __init_subclass__(cls):  # replaces ModelOutput's, which registers the items alone
        pytree.register_pytree_node(cls, _flattened, functools.partial(_rebuilt, cls))

    def __post_init__(self):  # as the base class: ModelOutput would register this class with its items alone
        cls = type(self)
        self.__class__ = _base(cls)
        self.__post_init__()
        self.__class__ = cls

    def __reduce__(self):
        return _base(type(self))(**self).__reduce__()  # the class is created at run time


def _base(cls: type) -> type:
    return cls.__mro__[cls.__mro__.index(_KeepsLogits) + 1]


@functools.cache
def _with_logits(cls: type) -> type:
    """A subclass whose instances `pytree` rebuilds with their logits; the same subclass each time."""
    if issubclass(cls, _KeepsLogits):
        return cls
    return type(cls.__name__, (_KeepsLogits, cls), {"__module__": cls.__module__, "__qualname__": cls.__qualname__})


def _flattened(output: dict) -> tuple[list[Any], tuple[list[str], dict[str, DeferredLogits]]]:
    deferred = {name: value for name, value in vars(output).items() if isinstance(value, DeferredLogits)}
    return list(output.values()), (list(output), deferred)


def _rebuilt(cls: type, values: list[Any], context: tuple[list[str], dict[str, DeferredLogits]]) -> Any:
    names, deferred = context
    output = cls(**dict(zip(names, values, strict=True)))
    for name, logits in deferred.items():
        if logits.is_readable():
            logits.give_to_be_read(output, name)
    return output


def _value(value: Any, head: ChunkedHead) -> Any:
    """A value of an output: handles an inner model's output (image-text models); computes any other in full."""
    is_output = isinstance(value, dict) and dataclasses.is_dataclass(value)
    return _dict_without_deferred(value, head) if is_output else materialized(value)
