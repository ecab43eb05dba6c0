"""Runs LM head and cross entropy over chunks, without changing the model's forward or loss function.

While a model runs forward with labels, its output-embedding module returns deferred logits. The model's operations on them,
up to `cross_entropy`, then run chunk by chunk. In training without labels the model's output has deferred logits, for a loss
that somebody else computes (`deferral.py` says in which passes). Outside of such a forward nothing changes: the module's
class, its hooks and its results are the model's own.
"""

from __future__ import annotations

import contextlib
import threading
from typing import Any

import torch
from torch import nn

from ds_minis.loss.forward.deferral import fallback_reason_without_labels, gather_of, is_deferred_without_labels
from ds_minis.loss.forward.fused_outputs import FusedCall, recognized
from ds_minis.loss.forward.output_logits import wanted_logits, without_deferred
from ds_minis.loss.heads.chunked_head import HEAD, ChunkedHead
from ds_minis.loss.logits.deferred import defer
from ds_minis.tiling.core.exclusive import is_called_in, several_threads
from ds_minis.tiling.core.out_of_memory import note_outside
from ds_minis.tiling.core.params import is_partitioned, weights_of
from ds_minis.tiling.modules.arguments import argument, takes
from ds_minis.tiling.modules.compiling import outside_of_graphs
from ds_minis.tiling.modules.hooks import (
    ALL,
    engine_forward_hook,
    engine_of,
    global_user_hook,
    remove_hooks,
    user_hook,
)
from ds_minis.tiling.modules.state import Chunking

_BEGUN = "_mini_sequence_passes"
BYPASSED = (
    "forward was given labels and did not call the LM head. A fused LM head of somebody's own (Liger's) computes the loss "
    "itself; ds_minis steps aside"
)


class _Pass(contextlib.ExitStack):
    """A forward pass in progress; closing it undoes what its begin has changed.

    Attributes:
        head: the LM head whose logits are deferred; None if none are.
        is_own: whether this pass created `head`; False if an outer pass did.
        reason: why logits are not deferred, if the settings allow it.
        tiled: whether an inner pass has deferred logits.
        with_labels: whether it got labels.
        only_logits: whether it has neither labels nor gradients.
        call: a call of TRL's, which is answered here.
    """

    head: ChunkedHead | None = None
    is_own = tiled = with_labels = only_logits = False
    reason = ""
    call: FusedCall | None = None


class BeginForward:
    """Forward pre-hook of a model with an LM head: begins to defer logits, or suspends tiling, for this forward pass.

    Args:
        owner: the inner model that has the LM head; None if the model with the hook has it.
    """

    def __init__(self, chunking: Chunking, owner: nn.Module | None):
        self.chunking = chunking
        self._owner = owner
        self._head_name = ""

    @outside_of_graphs
    def __call__(self, model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        with_labels = any(argument(model, name, args, kwargs) is not None for name in ("labels", "shift_labels"))
        config, begun = self.chunking.config, _Pass()
        begun.with_labels, begun.only_logits = with_labels, not with_labels and not torch.is_grad_enabled()
        _require_one_thread(model, begun)
        thread = threading.get_ident()
        begun.callback(_forget, model, thread)
        begun.callback(self.chunking.passes.remove, begun)
        if begun.only_logits and not config.tile_inference and not _draws_in_training(model):
            self.chunking.suspend(1)
            begun.callback(self.chunking.suspend, -1)
        self._begin(model, begun, args, kwargs)
        self.chunking.passes.append(begun)
        model.__dict__.setdefault(_BEGUN, {})[thread] = begun
        return self._asked_for_logits(model, begun, args, kwargs)

    def _asked_for_logits(self, model: nn.Module, begun: _Pass, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """The arguments with which TRL's forward runs the model's own, where this pass answers its call."""
        call = recognized(model, kwargs) if begun.head is not None else None
        if isinstance(call, str):
            begun.head.reason = call
        if not isinstance(call, FusedCall) or not begun.head.runs_in(call.in_float32):
            return None
        begun.call, call.parallel = call, self.chunking.parallel
        if call.parallel is not None:
            begun.enter_context(call.parallel.with_local_loss())
        return args, call.arguments_without(kwargs)

    def _begin(self, model: nn.Module, begun: _Pass, args: tuple, kwargs: dict) -> None:
        module, config, wanted = (self._owner or model).get_output_embeddings(), self.chunking.config, wanted_logits()
        if (
            module is None
            or not config.loss
            or config.return_logits
            or (wanted is not None and wanted.transform is None)
        ):
            return
        begun.head = module.__dict__.get(HEAD)  # set already if an outer model got labels too
        if begun.head is not None:
            begun.head.without_labels &= not begun.with_labels
            return
        if not begun.with_labels and not is_deferred_without_labels(model, module, self.chunking, args, kwargs):
            return
        around = self._around(model, module)
        begun.reason = _deferral_fallback_reason(module, around[1:])
        if not begun.with_labels:
            begun.reason = begun.reason or fallback_reason_without_labels(module, around)
        if not begun.reason:
            unreadable = self._parallel_part() or _sharded(module, around)
            begun.head, begun.is_own = ChunkedHead(module, self.chunking, unreadable, defer), True
            begun.head.without_labels, begun.head.gather = not begun.with_labels, gather_of(module, around)
            if torch.is_grad_enabled():
                self.chunking.readers.clear()
            begun.enter_context(begun.head.deferring())
            begun.head.scope = begun
            begun.callback(setattr, begun.head, "scope", None)

    def _parallel_part(self) -> str:
        """Says that the logits will be those of this rank's tokens; empty if they are all."""
        parallel = self.chunking.parallel
        return "" if parallel is None or not parallel.loss_is_local else parallel.UNREADABLE

    def _around(self, model: nn.Module, module: nn.Module) -> list[nn.Module]:
        """The modules that contain the LM head, from the model to the head's parent."""
        if _path(model, self._head_name)[-1] is not module:
            self._head_name = next((name for name, part in model.named_modules() if part is module), "")
        return _path(model, self._head_name)[:-1] or [model]


def _draws_in_training(model: nn.Module) -> bool:
    """Whether dropout is active: it must draw the same numbers as a pass with gradients from the same state (GradCache)."""
    if not model.training:
        return False
    rates = (
        value
        for part in model.modules()
        for name, value in part.__dict__.items()
        if name == "p" or "drop" in name.lower()
    )
    return any(isinstance(rate, float) and rate > 0 for rate in rates)


def _path(model: nn.Module, name: str) -> list[nn.Module]:
    path = [model]
    for part in name.split(".") if name else ():
        path.append(path[-1]._modules.get(part))
        if path[-1] is None:
            break
    return path


def _deferral_fallback_reason(head: nn.Module, around: list[nn.Module]) -> str:
    """The reason why logits cannot be deferred, a hook that must see them; empty if there is none.

    An engine's hooks on the head itself run around all chunks. On a module around the head, they would add autograd nodes to
    the logits. Of the head's submodules, only forward hooks are checked.
    """
    parts = (part for part in head.modules() if part is not head)
    hook = user_hook([head], ALL) or user_hook(parts) or global_user_hook()
    if hook:
        return f"the LM head has a hook that must see the logits: {hook}"
    for module in around:
        engine = engine_of(module) or engine_forward_hook(module)
        if engine:
            return f"the LM head is inside of a {type(module).__name__}, on whose output {engine} has a hook"
    return ""


def _sharded(head: nn.Module, around: list[nn.Module]) -> str:
    """Says which engine shards the head's weights after the forward pass; empty if none does."""
    if any(map(is_partitioned, head.parameters())):
        return "ZeRO-3 holds the LM head's weights in parts"
    engine = next(filter(None, map(engine_of, (*around, *head.modules()))), "")
    if not engine and not all(isinstance(weight, nn.Parameter) for weight in weights_of(head)):
        engine = "FullyShardedDataParallel"  # its weights are views
    return f"{engine} holds the LM head's weights in parts" if engine else ""


def _end(model: nn.Module) -> _Pass:
    begun = model.__dict__.get(_BEGUN, {}).get(threading.get_ident(), _Pass())
    begun.close()
    return begun


def _forget(model: nn.Module, thread: int) -> None:
    """Removes a pass that has ended, normally or by an interrupt, for which torch calls no hook."""
    passes = model.__dict__.get(_BEGUN, {})
    passes.pop(thread, None)
    if not passes:
        model.__dict__.pop(_BEGUN, None)


def _require_one_thread(model: nn.Module, begun: _Pass) -> None:
    """Raises RuntimeError if another thread is in a pass, unless both only compute logits: others modify the model."""
    for thread, other in list(model.__dict__.get(_BEGUN, {}).items()):
        if thread == threading.get_ident() or not is_called_in(thread, model):
            other.close()  # Ctrl-C outside of a chunk ended it without its forward hook
        elif not (begun.only_logits and other.only_logits):
            raise RuntimeError(several_threads(model))


class EndForward:
    """Forward hook, also called when forward fails: ends the pass and removes deferred logits from the output."""

    def __init__(self, chunking: Chunking):
        self._chunking = chunking

    @outside_of_graphs
    def __call__(self, model: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        begun = _end(model)
        if output is None:
            note_outside(self._chunking.config)
            return output
        head = begun.head
        if head is None:
            if begun.reason and not begun.tiled:
                self._tell(model, begun.reason)
            return output
        if begun.call is not None:
            output = begun.call.answered(model, output)
            head.note_reader("fused_lm_head")
        if not head.deferred:
            if begun.with_labels or head.reason:
                self._tell(model, head.reason or BYPASSED)
            return output
        for around in self._chunking.passes:
            around.tiled = True
        if model.training:
            self._chunking.bypassed = ""
        wanted = wanted_logits()
        if wanted is not None:
            # accelerate's autocast ends before these hooks run. It stores the model's own forward under this name.
            output = wanted.applied_to(output, wrapped="_original_forward" in model.__dict__)
        if begun.with_labels:
            output = without_deferred(output, head)
        if begun.is_own:
            head.finish()
        return output

    def _tell(self, model: nn.Module, reason: str) -> None:
        """Warns once per reason, also if a wrapper of the model has the same; sets it for the report in training."""
        self._chunking.warnings.once(f"the loss is not tiled: {reason}")
        if model.training:
            self._chunking.bypassed = reason


def attach_loss_tiling(model: nn.Module, chunking: Chunking, owner: nn.Module | None = None) -> None:
    """Makes forward passes of `model` with labels run its LM head and loss over chunks.

    Args:
        model: a module with `get_output_embeddings()` whose forward takes `labels`. That method is called at each forward
            pass, because adapters and `resize_token_embeddings` replace its result.
        chunking: the model's shared state. With `config.loss` off, the hooks only choose between tiled and untiled forward.
        owner: the module that has `get_output_embeddings()`, if `model` is a wrapper around it.
    """
    model.register_forward_pre_hook(BeginForward(chunking, owner), with_kwargs=True)
    # Before all other hooks, so that no engine's hook sees deferred logits.
    model.register_forward_hook(EndForward(chunking), with_kwargs=True, always_call=True, prepend=True)


def detach_loss_tiling(model: nn.Module) -> None:
    """Undoes `attach_loss_tiling`."""
    remove_hooks(model, (BeginForward, EndForward))
    _end(model)


def attached_chunking(model: nn.Module) -> Chunking | None:
    """The `chunking` given to `attach_loss_tiling` for the model; None if it was not called."""
    return next((hook.chunking for hook in model._forward_pre_hooks.values() if isinstance(hook, BeginForward)), None)


def loss_is_attached(model: nn.Module) -> bool:
    """Whether `attach_loss_tiling` was called for the model."""
    return attached_chunking(model) is not None


def loss_fallback_reason(model: nn.Module) -> str:
    """The reason why the loss of the last forward pass in training was not tiled; empty if it was, or there was none."""
    chunking = attached_chunking(model)
    return "" if chunking is None else chunking.bypassed


def takes_labels(model: nn.Module) -> bool:
    """Whether the module's forward has a `labels` argument."""
    return takes(model, "labels")
