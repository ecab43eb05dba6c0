"""Answers TRL's `model(..., labels=..., fused_lm_head=True)` from the model's own forward and its own head.

TRL's trainers replace a model's forward by one that computes per-token log-probabilities from `lm_head.weight`. Where such a
call is recognized, it is made without labels, and so is the model's own forward; what the call asks for is computed from its
deferred logits, with whatever the model does to them, adapters on the head included.

Shapes: B batch, S tokens, T tokens with a next one (S - 1, or S where labels come shifted), V vocabulary.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ds_minis.loss.heads.one_factor import Labelled
from ds_minis.loss.kernels.token_statistics import LOG_PROB, NAMES, token_statistics
from ds_minis.loss.logits.deferred import DeferredLogits

FUSED = "fused_lm_head"
ROUTERS = "output_router_logits"
_FUNCTION = "_fused_forward"
_SETTINGS = ("temperature", "cast_lm_head_to_fp32", "outputs")
_FIELDS = frozenset(("loss", "label_mask", "aux_loss", *NAMES))
NOT_RECOGNIZED = (
    "a call with fused_lm_head=True is answered by {name}, whose settings ds_minis does not know (another version of TRL?), "
    "with the LM head's weight; ds_minis steps aside for the loss"
)
NO_AUX_LOSS = (
    "a call with fused_lm_head=True asks for the auxiliary loss of routers (output_router_logits), which {name}'s own "
    'forward does not give. Set the trainer\'s router_aux_loss_coef to 0.0; or set "loss": false in the mini-sequence '
    "configuration, with which TRL computes one"
)


class FusedCall:
    """One such call.

    Attributes:
        in_float32: whether the head is to run in float32, without autocast.
        parallel: under sequence parallelism, which rank has which tokens; else None.
    """

    parallel: Any = None

    def __init__(
        self, kwargs: dict, output_class: type, temperature: float, in_float32: bool, outputs: tuple[str, ...]
    ):
        self._labels, self._shifted = kwargs.get("labels"), kwargs.get("shift_labels")
        self._count, self._wants_aux = kwargs.get("num_items_in_batch"), kwargs.get(ROUTERS)
        self._class, self._temperature, self._outputs = output_class, temperature, outputs
        self.in_float32 = in_float32

    def arguments_without(self, kwargs: dict) -> dict:
        """The keyword arguments of the model's own forward, which is to give logits."""
        own = {k: v for k, v in kwargs.items() if k not in (FUSED, "labels", "shift_labels", "num_items_in_batch")}
        routers = {ROUTERS: True} if self._wants_aux else {}
        return own | routers | {"use_cache": False, "return_dict": True}

    def answered(self, model: nn.Module, output: Any) -> Any:
        """What TRL's function returns, from the output of the model's own forward.

        Raises:
            RuntimeError: an auxiliary loss is asked for, and the model's own forward gives none.
        """
        logits = output["logits"]
        labels_BT = (self._labels[:, 1:] if self._shifted is None else self._shifted).to(logits.device)
        mask_BT = labels_BT != -100
        names = [name for name in NAMES if name == LOG_PROB or name in self._outputs]
        statistics = self._of_all_ranks(logits, labels_BT, names)
        found = {name: value.masked_fill(~mask_BT, 0) for name, value in zip(names, statistics, strict=True)}
        if "is_top1" in found:
            found["is_top1"] = found["is_top1"].detach().bool()
        for name in ("log_sum_sq_probs", "mean_logits"):
            if name in found:
                found[name] = found[name].detach()
        count = mask_BT.sum().clamp(min=1) if self._count is None else self._count
        loss, aux_loss = -found[LOG_PROB].sum() / count, None
        if self._wants_aux:
            aux_loss = output.get("aux_loss")
            if aux_loss is None:
                raise RuntimeError(NO_AUX_LOSS.format(name=type(model).__name__))
            coefficient = getattr(model.config.get_text_config(), "router_aux_loss_coef", 0.0)
            loss = loss + coefficient * aux_loss.to(loss.device)
        return self._class(loss=loss, label_mask=mask_BT, aux_loss=aux_loss, **found)

    def _of_all_ranks(self, logits: Tensor, labels_BT: Tensor, names: list[str]) -> list[Tensor]:
        """The statistics, each `(B, T)`; under sequence parallelism each rank computes those of its own tokens."""
        last = int(self._shifted is None)  # tokens at the end without a target
        if self.parallel is None:
            return self._statistics(logits[:, :-last] if last else logits, labels_BT, names)
        padded_BS = F.pad(labels_BT + 100, (0, last))  # cut as the tokens were, with 0 where there is none
        mine_BTN = torch.stack(self._statistics(logits, self.parallel.mine(padded_BS) - 100, names), -1)
        whole_BSN = self.parallel.whole(mine_BTN, padded_BS.shape[1])
        return list(whole_BSN[:, : labels_BT.shape[1]].unbind(-1))

    def _statistics(self, logits: Tensor, labels_BT: Tensor, names: list[str]) -> list[Tensor]:
        labelled_R = labels_BT.reshape(-1) != -100
        targets_R = labels_BT.reshape(-1).masked_fill(~labelled_R, 0)

        def of_rows(logits_CV: Tensor, target_C: Tensor, expected: Tensor | None = None) -> Tensor:
            return token_statistics(logits_CV, target_C, self._temperature, names, expected)

        if isinstance(logits, DeferredLogits) and logits.is_open():
            rows = logits.derived(logits.expression().before_upcast())
            columns = rows.columns_by_chunks(of_rows, targets_R, labelled=Labelled(FUSED, labelled_R))
        else:
            logits = logits.materialize() if isinstance(logits, DeferredLogits) else logits
            columns = of_rows(logits.reshape(-1, logits.shape[-1]), targets_R).unbind(-1)
        return [column.view(labels_BT.shape) for column in columns]


def recognized(model: nn.Module, kwargs: dict) -> FusedCall | str | None:
    """The call, if it is one that is known; the reason if it is not; None for any other call."""
    if kwargs.get(FUSED) is not True:
        return None
    function = next((f for f in _unwrapped(model.__dict__.get("forward")) if f.__code__.co_name == _FUNCTION), None)
    settings = {} if function is None else inspect.getclosurevars(function).nonlocals
    output_class = getattr(function, "__globals__", {}).get("FusedCausalLMOutput")
    fields = frozenset(getattr(output_class, "__dataclass_fields__", ()))
    labels = kwargs.get("shift_labels") if kwargs.get("labels") is None else kwargs["labels"]
    if function is None or not isinstance(labels, Tensor):
        return None  # a wrapper, whose inner model is asked
    known = all(name in settings for name in _SETTINGS) and fields == _FIELDS
    if not known or not set(settings["outputs"]) <= set(NAMES):
        return NOT_RECOGNIZED.format(name=f"{function.__globals__.get('__name__')}.{_FUNCTION}")
    if getattr(model.config.get_text_config(), ROUTERS, False):
        kwargs = {ROUTERS: True} | kwargs  # what the configuration asks for, as TRL's function does
    return FusedCall(kwargs, output_class, *(settings[name] for name in _SETTINGS))


def _unwrapped(forward: Any) -> Iterator[types.FunctionType]:
    """The functions around a forward, from the outermost to the innermost; TRL's names the class's as the one it wraps."""
    seen: set[int] = set()
    while forward is not None and id(forward) not in seen:
        seen.add(id(forward))
        function: Callable = getattr(forward, "__func__", forward)
        if isinstance(function, types.FunctionType):
            yield function
            if function.__code__.co_name == _FUNCTION:
                return
        forward = getattr(function, "__wrapped__", None)


def is_answered(model: nn.Module) -> bool:
    """Whether the model has TRL's forward."""
    return any(f.__code__.co_name == _FUNCTION for f in _unwrapped(model.__dict__.get("forward")))
