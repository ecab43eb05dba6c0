"""The loss of all ranks from each rank's own tokens, so that the LM head's work is divided too.

That is done where a model computes its loss by transformers' `loss_function`, from labels that are shifted by one token: the
labels are shifted before they are cut. The result is the loss of the whole batch on each rank. Its gradient is `size` times
this rank's share, see `ds_minis.parallel.model.decoder`:

    loss = mine + (total - mine).detach(),  mine = (this rank's sum) * size / N,  total = (sum over ranks) / N

TRL's calls with `fused_lm_head=True` are divided too, where they are answered (`loss/forward/fused_outputs.py`). Every other
loss is computed from whole hidden states on every rank, which is as exact, and divides no work.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ds_minis.loss.forward.output_logits import wanted_logits
from ds_minis.parallel.attention.state import Parallel
from ds_minis.parallel.communication.collectives import summed
from ds_minis.parallel.communication.cut import Cut
from ds_minis.tiling.modules.arguments import argument
from ds_minis.tiling.modules.compiling import outside_of_graphs
from ds_minis.tiling.modules.swap import replaced_by

_LOSS, _BEFORE = "_loss_function", "_mini_sequence_loss_before"


class BeginLoss:
    """Forward pre-hook of a model with an LM head: decides who computes the loss of this pass."""

    def __init__(self, parallel: Parallel):
        self._parallel = parallel

    @outside_of_graphs
    def __call__(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        _end(model, self._parallel)  # of a pass that Ctrl-C ended, for which torch calls no hook
        self._parallel.labels = [argument(model, name, args, kwargs) for name in ("labels", "shift_labels")]
        if self._parallel.loss_is_local:
            return  # a model around this one has decided
        config = self._parallel.chunking.config
        if argument(model, "labels", args, kwargs) is None or not config.loss or config.return_logits:
            return
        if wanted_logits() is not None or not has_standard_loss(model):
            return
        own = model.loss_function
        model.__dict__[_BEFORE] = model.__dict__.get(_LOSS)
        model.__dict__[_LOSS] = _LocalLoss(own, self._parallel)
        self._parallel.loss_is_local = True


class EndLoss:
    """Forward hook, also called when forward fails: puts the model's own loss function back."""

    def __init__(self, parallel: Parallel):
        self._parallel = parallel

    @outside_of_graphs
    def __call__(self, model: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        _end(model, self._parallel)


def _end(model: nn.Module, parallel: Parallel) -> None:
    parallel.labels = []
    if _BEFORE not in model.__dict__:
        return
    before = model.__dict__.pop(_BEFORE)
    model.__dict__.pop(_LOSS, None)
    if before is not None:
        model.__dict__[_LOSS] = before
    parallel.loss_is_local = False


def has_standard_loss(model: nn.Module) -> bool:
    """Whether a model's own forward computes its loss by transformers' loss function for causal language models."""
    if _LOSS in model.__dict__ or getattr(model, "loss_type", None) != "ForCausalLM" or replaced_by(model):
        return False  # a forward that replaced it (TRL's) has a loss of its own
    code = getattr(inspect.unwrap(type(model).forward), "__code__", None)
    return "loss_function" in getattr(code, "co_names", ())


class _LocalLoss:
    """transformers' loss function, called with the logits of this rank's tokens and the labels of all."""

    def __init__(self, function: Callable[..., Tensor], parallel: Parallel):
        self._function, self._parallel = function, parallel

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor,
        vocab_size: int,
        num_items_in_batch: Any = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        group = self._parallel.group()
        if shift_labels is None:
            shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        cut = Cut(shift_labels.shape[-1], group.size, group.rank)
        count, loss_of_none = num_items_in_batch, 0.0
        if count is None:
            count = (shift_labels != ignore_index).sum()
            loss_of_none = torch.where(count == 0, torch.nan, 0.0)  # as transformers' mean; its gradients are zeros
            count = count.clamp(min=1)
        # Divided here by N / size, the gradient that is computed in forward need not be scaled in backward.
        mine = self._function(
            logits=logits, labels=labels, vocab_size=vocab_size, num_items_in_batch=count / group.size,
            ignore_index=ignore_index,
            shift_labels=cut.mine(shift_labels, -1, ignore_index).contiguous(), **kwargs,
        )  # fmt: skip
        total = summed(mine, group) / group.size + loss_of_none
        if not torch.is_grad_enabled():
            return total
        return mine + (total - mine).detach()


def attach(model: nn.Module, parallel: Parallel) -> None:
    """Registers the hooks of a model with an LM head."""
    model.register_forward_pre_hook(BeginLoss(parallel), with_kwargs=True, prepend=True)
    model.register_forward_hook(EndLoss(parallel), with_kwargs=True, always_call=True)
