"""LM head and cross entropy over chunks, with the model's own forward and loss function untouched.

While a model runs forward with labels, its output-embedding module gives deferred logits instead of logits; whatever
the model does with them up to `cross_entropy` is then run chunk by chunk. Outside of such a forward nothing is
different: the module's class, its hooks and its results are the model's own.
"""

from __future__ import annotations

import contextlib
import contextvars
import copy
import dataclasses
import functools
import inspect
import logging
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ds_minis.config import MiniSequenceConfig
from ds_minis.ranks import is_main_process
from ds_minis.tiling.chunking import Chunking
from ds_minis.tiling.compiling import outside_of_graphs
from ds_minis.tiling.deferred import DeferredLogits, defer, materialized
from ds_minis.tiling.hooks import ALL, foreign_global_hook, foreign_hook
from ds_minis.tiling.module import require_weights
from ds_minis.tiling.recompute import AutocastState, forwards_set
from ds_minis.tiling.rows import tile_rows
from ds_minis.tiling.sums import sum_rows

logger = logging.getLogger("ds_minis")

_ARMED, _HEAD = "_mini_sequence_armed", "_mini_sequence_head"
BYPASSED = (
    "forward was given labels and did not call the LM head. A trainer with a fused LM head of its own, such as TRL's "
    "SFTTrainer, computes the loss itself; ds_minis steps aside"
)


WITHOUT_LABELS = (
    "forward was given no labels, so it gives all logits. Whoever trains on them (label smoothing, `compute_loss_func`, a "
    "trainer's own loss) computes the loss itself; give the model its labels where you can"
)


class WantedLogits:
    """What an evaluation wants of the logits of forward passes with labels.

    Attributes:
        transform: makes something smaller of them, such as the predicted tokens; called with deferred logits while the
            engines still hold the weights. None: the logits themselves are wanted.
        ignored: keys of the output that the evaluation does not look at.
        transformed: whether the last output had the result of `transform` in the place of its logits.
    """

    def __init__(self, transform: Callable[[Tensor], Any] | None, ignored: Collection[str]):
        self.transform, self.ignored, self.transformed = transform, ignored, False

    def applied_to(self, output: Any, wrapped: bool) -> Any:
        """A model's output with what is wanted in the place of its deferred logits.

        Engines cast what a model gives in mixed precision to float32 before an evaluation sees it: where autocast is on,
        or where the model's forward was `wrapped` in it.
        """
        logits = output.get("logits") if isinstance(output, dict) else None
        if not isinstance(logits, DeferredLogits):
            return materialized(output)
        looked_at = {key for key, value in output.items() if value is not None} - {"loss", *self.ignored}
        autocast = AutocastState(logits.device).dtype() is not None
        if self.transform is None or looked_at != {"logits"}:
            output["logits"] = logits.materialize()
        else:
            with logits.mode():  # or what the transform does would need all logits
                output["logits"] = materialized(self.transform(logits.float() if wrapped or autocast else logits))
            self.transformed = True
        return output


_WANTED: contextvars.ContextVar[WantedLogits | None] = contextvars.ContextVar("ds_minis_wanted_logits", default=None)


@contextlib.contextmanager
def returning_logits(
    transform: Callable[[Tensor], Any] | None = None, ignored: Collection[str] = ()
) -> Iterator[WantedLogits]:
    """Inside, forward passes with labels give what is wanted of their logits (see `WantedLogits`), by default all."""
    wanted = WantedLogits(transform, ignored)
    token = _WANTED.set(wanted)
    try:
        yield wanted
    finally:
        _WANTED.reset(token)


class _DeferringHead(nn.Module):
    """Mixed into the class of a model's output-embedding module while the model runs forward with labels.

    `__call__` and not `forward` is overridden: FSDP2 and ZeRO-3 gather the weights in hooks around `forward`, and must do
    so when the logits are computed, once for all chunks, and not here where they are deferred.
    """

    @outside_of_graphs
    def __call__(self, *args, **kwargs):
        if len(args) != 1 or kwargs or not isinstance(args[0], Tensor):
            return super().__call__(*args, **kwargs)
        (hidden,) = args
        head = self.__dict__[_HEAD]
        return defer(head, hidden, head.sample(hidden))


@functools.cache
def _deferring_class(base: type[nn.Module]) -> type[nn.Module]:
    return type(
        base.__name__, (_DeferringHead, base), {"__module__": base.__module__, "__qualname__": base.__qualname__}
    )


class _Head:
    """The output-embedding module of one forward pass: what deferred logits are computed with (`deferred.Head`)."""

    def __init__(self, module: nn.Module, chunking: Chunking):
        self.deferred = False
        self._module = module
        self._own_call = type(module).__call__
        self._chunking = chunking

    @contextlib.contextmanager
    def deferring(self) -> Iterator[None]:
        module, own_class = self._module, type(self._module)
        module.__dict__[_HEAD] = self
        module.__class__ = _deferring_class(own_class)
        try:
            yield
        finally:
            module.__class__ = own_class
            del module.__dict__[_HEAD]

    def sample(self, hidden_LH: Tensor) -> Tensor:
        """Logits of zero rows, `(0, V)`: of the dtype and width that the head gives."""
        self.deferred = True
        width = getattr(self._module, "out_features", None)
        # A linear layer, quantized or adapted ones included: no need to gather its weight. But accelerate's hooks
        # (`device_map`), on the instance, may move the hidden states to another device.
        if isinstance(width, int) and "forward" not in self._module.__dict__:
            dtype = AutocastState(hidden_LH.device).dtype_of(hidden_LH)
            return hidden_LH.new_empty((0, width), dtype=dtype)
        with torch.no_grad():
            return self.logits(hidden_LH.reshape(-1, hidden_LH.shape[-1])[:0])

    def logits(self, hidden_LH: Tensor) -> Tensor:
        return self._call(self._module.forward, hidden_LH)

    def tile(self, function: Callable[..., Tensor], hidden_LH: Tensor, sample_0V: Tensor, *aligned_R: Tensor) -> Tensor:
        return self._by_chunks(tile_rows, function, hidden_LH, sample_0V, aligned_R)

    def sum(
        self,
        function: Callable[..., Tensor],
        hidden_LH: Tensor,
        sample_0V: Tensor,
        expected: Tensor,
        *aligned_R: Tensor,
    ) -> Tensor:
        # float16 gradients need the loss scaler's factor, which comes in backward, or they are rounded to zero.
        if torch.float16 in (hidden_LH.dtype, AutocastState(hidden_LH.device).dtype()):
            return self.tile(function, hidden_LH, sample_0V, *aligned_R).sum(0)
        run, function = (functools.partial(f, expected=expected) for f in (sum_rows, function))
        return self._by_chunks(run, function, hidden_LH, sample_0V, aligned_R)

    def _by_chunks(self, run, function, hidden_LH: Tensor, sample_0V: Tensor, aligned_R: Sequence[Tensor]) -> Tensor:
        module, own_forward = self._module, self._module.__dict__.get("forward")
        # Only a plain linear layer is known to keep nothing of its result. The loss may write over logits, not over views.
        keeps_nothing = type(module).forward is nn.Linear.forward and own_forward is None

        def losses(hidden_CH: Tensor, *aligned_C: Tensor) -> Tensor:
            logits_CV = module.forward(hidden_CH)
            return function(logits_CV if keeps_nothing else logits_CV.view_as(logits_CV), *aligned_C)

        def all_losses(hidden_RH: Tensor) -> Tensor:
            require_weights(module)
            num_rows = hidden_RH.shape[0]
            chunk_rows = self._chunking.loss_rows(
                hidden_RH.numel() * hidden_RH.element_size(), sample_0V.shape[-1] * sample_0V.element_size()
            )
            guard = functools.partial(self._chunking.guarded, "loss_chunk_size", chunk_rows, num_rows)
            with forwards_set({module: own_forward}):
                return run(losses, module, [hidden_RH, *aligned_R], chunk_rows, guard=guard)

        return self._call(all_losses, hidden_LH.reshape(-1, hidden_LH.shape[-1]))

    def _call(self, forward: Callable[..., Tensor], hidden: Tensor) -> Tensor:
        """Calls the module with `forward` in the place of its own, so that its hooks run once around all chunks."""
        with forwards_set({self._module: forward}):
            return self._own_call(self._module, hidden)


class _Arm:
    """Forward pre-hook of a model with an LM head: decides what the forward pass that begins here may do."""

    def __init__(self, chunking: Chunking):
        self.chunking = chunking

    @outside_of_graphs
    def __call__(self, model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        _disarm(model)  # a forward pass that Ctrl-C ended outside of any chunk has run no hook
        config, scope, head = self.chunking.config, contextlib.ExitStack(), None
        scope.callback(model.__dict__.pop, _ARMED, None)
        scope.callback(self.chunking.passes.remove, scope)
        if _argument(model, "labels", args, kwargs) is not None:
            module = model.get_output_embeddings()
            wanted = _WANTED.get()
            all_logits = config.return_logits or (wanted is not None and wanted.transform is None)
            if module is not None and config.loss and not all_logits:
                head = module.__dict__.get(_HEAD)  # there already, when a model around this one was given labels too
                if head is None and _hooks_allow_deferring(module):
                    head = _Head(module, self.chunking)
                    scope.enter_context(head.deferring())
        elif not torch.is_grad_enabled() and not config.tile_inference:
            self.chunking.suspended = True
            scope.callback(setattr, self.chunking, "suspended", False)
        self.chunking.passes.append(scope)
        model.__dict__[_ARMED] = scope, head
        return (
            _with_argument(model, "use_cache", False, args, kwargs)
            if self._caches_for_nobody(model, args, kwargs)
            else None
        )

    def _caches_for_nobody(self, model: nn.Module, args: tuple, kwargs: dict) -> bool:
        """Whether a cache of all keys and values would be made in training that nobody asked for.

        transformers makes none under activation checkpointing, in whose place tiled layers are.
        """
        training = model.training and torch.is_grad_enabled() and self.chunking.config.scope == "layer"
        if not training or "use_cache" not in _argument_names(type(model).forward):
            return False
        return all(_argument(model, name, args, kwargs) is None for name in ("use_cache", "past_key_values"))


def _disarm(model: nn.Module) -> _Head | None:
    scope, head = model.__dict__.get(_ARMED, (contextlib.ExitStack(), None))
    scope.close()
    return head


def _hooks_allow_deferring(head: nn.Module) -> bool:
    """Whether all hooks that the head's call would run are an engine's. A part of the head has forward hooks at most."""
    parts = (part for part in head.modules() if part is not head)
    hook = foreign_hook([head], ALL) or foreign_hook(parts) or foreign_global_hook()
    if hook:
        _tell_hook(hook)
    return not hook


@functools.cache
def _tell_hook(hook: str) -> None:
    if is_main_process():
        logger.warning("the loss is not tiled by ds_minis: the LM head has a hook that must see the logits: %s", hook)


class _Disarm:
    """Forward hook, run also when forward failed: ends what `_Arm` began and takes deferred logits out of the output."""

    def __init__(self, config: MiniSequenceConfig):
        self._config = config
        self.bypassed = ""  # why the loss was not tiled

    @outside_of_graphs
    def __call__(self, model: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        head = _disarm(model)
        if output is None:
            return output
        if head is None:
            if self._config.loss and model.training and _argument(model, "labels", args, kwargs) is None:
                self._tell_logits(output)
            return output
        if not head.deferred:
            self._tell(BYPASSED)
            return output
        wanted = _WANTED.get()
        if wanted is None:
            return _without_deferred(output)
        # accelerate's autocast ends before these hooks run, and leaves the model's own forward under this name.
        return _without_deferred(wanted.applied_to(output, wrapped="_original_forward" in model.__dict__))

    def _tell_logits(self, output: Any) -> None:
        logits = output.get("logits") if isinstance(output, dict) else None
        if isinstance(logits, Tensor) and logits.requires_grad and math.prod(logits.shape[:-1]) > 1:
            self._tell(WITHOUT_LABELS)

    def _tell(self, reason: str) -> None:
        if not self.bypassed and is_main_process():
            logger.warning("the loss is not tiled by ds_minis: %s", reason)
        self.bypassed = reason


def attach_loss_tiling(model: nn.Module, chunking: Chunking) -> None:
    """Makes forward passes of `model` with labels run its LM head and loss over chunks.

    Args:
        model: a module with `get_output_embeddings()` whose forward takes `labels`. What that method gives is looked up
            at each forward pass, as adapters and `resize_token_embeddings` replace it.
        chunking: the chunk sizes. With `config.loss` off, only the choice between tiled and untiled forward is made.
    """
    model.register_forward_pre_hook(_Arm(chunking), with_kwargs=True)
    # First of all hooks, so that no engine's hook sees deferred logits.
    model.register_forward_hook(_Disarm(chunking.config), with_kwargs=True, always_call=True, prepend=True)


def detach_loss_tiling(model: nn.Module) -> None:
    """Undoes `attach_loss_tiling`."""
    for hooks, kind, companions in (
        (model._forward_pre_hooks, _Arm, [model._forward_pre_hooks_with_kwargs]),
        (model._forward_hooks, _Disarm, [model._forward_hooks_with_kwargs, model._forward_hooks_always_called]),
    ):
        for key in [key for key, hook in hooks.items() if isinstance(hook, kind)]:
            for holder in (hooks, *companions):
                holder.pop(key, None)
    _disarm(model)


def loss_is_attached(model: nn.Module) -> bool:
    """Whether `attach_loss_tiling` was called for the model."""
    return any(isinstance(hook, _Arm) for hook in model._forward_pre_hooks.values())


def why_loss_is_bypassed(model: nn.Module) -> str:
    """Why forward passes were seen in training whose loss could not be tiled; empty if there were none."""
    return next((hook.bypassed for hook in model._forward_hooks.values() if isinstance(hook, _Disarm)), "")


def takes_labels(model: nn.Module) -> bool:
    """Whether the module's forward has a `labels` argument."""
    return "labels" in _argument_names(type(model).forward)


@functools.cache
def _argument_names(forward: Callable) -> tuple[str, ...]:
    return tuple(inspect.signature(forward).parameters)[1:]


def _argument(model: nn.Module, name: str, args: tuple, kwargs: dict) -> Any:
    names = _argument_names(type(model).forward)
    return kwargs.get(name, dict(zip(names, args, strict=False)).get(name))


def _with_argument(model: nn.Module, name: str, value: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """The arguments with one of them set, in the place where it was given."""
    position = _argument_names(type(model).forward).index(name)
    if position < len(args):
        return (*args[:position], value, *args[position + 1 :]), kwargs
    return args, {**kwargs, name: value}


def _without_deferred(output: Any) -> Any:
    """The output without the deferred logits among its values; what is nested deeper, or has a fixed form, in full."""
    if isinstance(output, DeferredLogits) or hasattr(output, "_fields"):
        return materialized(output)
    if isinstance(output, tuple | list):
        return type(output)(materialized(value) for value in output if not isinstance(value, DeferredLogits))
    if isinstance(output, dict):
        kept = {key: materialized(value) for key, value in output.items() if not isinstance(value, DeferredLogits)}
        if dataclasses.is_dataclass(output):  # transformers' ModelOutput, which refuses to have a field deleted
            return type(output)(**kept)
        same_kind = copy.copy(output)
        same_kind.clear()
        same_kind.update(kept)
        return same_kind
    if dataclasses.is_dataclass(output):
        values = {field.name: getattr(output, field.name) for field in dataclasses.fields(output)}
        dropped = {name: None for name, value in values.items() if isinstance(value, DeferredLogits)}
        return dataclasses.replace(output, **dropped)
    return output
