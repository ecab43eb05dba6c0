"""What is compared: plain checkpointing, ds_minis in each scope, and the peers, as functions that change a model in place."""

from __future__ import annotations

import contextlib
import functools
import io
import math
import os
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from ds_minis import MiniSequenceConfig, convert_to_mini_sequence, mini_sequence_report


class Unavailable(Exception):
    """A variant cannot be run here; its text says why."""


@dataclass(frozen=True)
class Variant:
    """One way to run a training step.

    Attributes:
        title: for tables.
        apply: changes a model in place, gives a note about what became of it.
        settings: of ds_minis; None for all others.
        around: makes a context for forward and backward.
    """

    title: str
    apply: Callable[[nn.Module], str]
    settings: dict[str, Any] | None = None
    around: Callable[[], contextlib.AbstractContextManager] = field(default=contextlib.nullcontext)


def _plain(model: nn.Module) -> str:
    return ""


def _ours(settings: dict[str, Any], model: nn.Module) -> str:
    try:
        MiniSequenceConfig.from_value(settings, source="the benchmark")
    except ValueError as error:
        reason = str(error).partition("; allowed keys")[0]
        raise Unavailable(f"not in this version of ds_minis ({reason})") from None
    with contextlib.redirect_stdout(io.StringIO()):
        convert_to_mini_sequence(model, settings)
    return str(mini_sequence_report(model))


def _feed_forwards(model: nn.Module) -> list[nn.Module]:
    """Modules of the form down(act(gate(x)) * up(x)), which is what the peers tile."""
    parts = ("gate_proj", "up_proj", "down_proj")
    found = [m for m in model.modules() if all(isinstance(getattr(m, part, None), nn.Module) for part in parts)]
    if not found:
        raise Unavailable(f"no module of this model has {', '.join(parts)}")
    return found


def _set_forwards(model: nn.Module, run: Callable[[Callable, nn.Module, torch.Tensor], torch.Tensor]) -> None:
    """Makes each feed-forward module call `run(its class's forward, itself, hidden_states)`."""
    for module in _feed_forwards(model):
        own = type(module).forward
        module.forward = types.MethodType(functools.partial(_call, run, own), module)


def _call(run, own, module, hidden_states):
    return run(own, module, hidden_states)


def _deepspeed(model: nn.Module) -> str:
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledMLP
    except ImportError as error:
        raise Unavailable(f"DeepSpeed's TiledMLP cannot be imported ({error})") from None

    def run(own, module, x):  # its documentation's number of shards
        return TiledMLP.apply(own, module, x, math.ceil(x.shape[1] / x.shape[2]), list(module.parameters()))

    _set_forwards(model, run)
    return ""


def _deepspeed_with_loss(model: nn.Module) -> str:
    """DeepSpeed's tiled MLP, and the causal language model's loss by its tiled head, with a GiB of float32 logits a shard."""
    note = _deepspeed(model)
    from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledFusedLogitsLoss

    class Loss(TiledFusedLogitsLoss):
        """Its backward asks whether the incoming gradient is 1, which meta tensors cannot tell; here it is."""

        @staticmethod
        def backward(ctx, grad):
            return TiledFusedLogitsLoss.backward(ctx, 1.0 if grad.is_meta else grad)

    causal = next(
        m for m in model.modules() if isinstance(m, PreTrainedModel) and m.get_output_embeddings() is not None
    )
    head = causal.get_output_embeddings()

    def forward(input_ids, labels, attention_mask=None, **others):  # PEFT hands on arguments that are None
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        hidden_states = causal.base_model(**inputs, use_cache=False).last_hidden_state
        shifted = F.pad(labels[:, 1:], (0, 1), value=-100)
        # The mean is taken inside: the op hands its weights' gradients on without the factor that comes in from outside.
        factor = 1 / (shifted != -100).sum()

        def loss(self, x, y):
            return F.cross_entropy(self(x).float(), y, ignore_index=-100, reduction="sum") * factor

        shards = math.ceil(shifted.numel() * causal.config.vocab_size * 4 / 2**30)
        total = Loss.apply(loss, head, hidden_states, shifted, None, shards, list(head.parameters()), "sum")
        return CausalLMOutputWithPast(loss=total)

    causal.forward = forward
    return note


def _liger(model: nn.Module) -> str:
    try:
        from liger_kernel.ops.tiled_mlp import apply_tiled_mlp
    except ImportError as error:
        raise Unavailable(f"Liger's apply_tiled_mlp cannot be imported ({error})") from None
    _set_forwards(model, lambda own, module, x: apply_tiled_mlp(own, module, x))
    return "apply_tiled_mlp around transformers' own feed-forward, without Liger's Triton kernels"


_MINIS_CHUNK = 4096  # tokens, as in the authors' code


def _minis(model: nn.Module) -> str:
    def run(own, module, x):
        return torch.cat([own(module, part) for part in x.split(_MINIS_CHUNK, dim=1)], dim=1)

    _set_forwards(model, run)
    return (
        f"stand-in for github.com/wdlctc/mini-s, written from its description: a loop over chunks of {_MINIS_CHUNK} tokens "
        "that autograd records, with the results concatenated; its LM head is left out"
    )


def _require_cuda() -> None:
    if not torch.cuda.is_available():
        raise Unavailable("needs a CUDA device")


def _offloaded_by_transformers(model: nn.Module) -> str:
    _require_cuda()
    for part in model.modules():
        if isinstance(part, PreTrainedModel) and part.get_output_embeddings() is not None:
            enable = getattr(part, "activation_checkpointing_enable", None)
            if enable is None:
                raise Unavailable("this transformers cannot offload checkpoints")
            enable({"use_reentrant": False}, offload=True)
    return ""


def _offloaded_by_trl(model: nn.Module) -> str:
    _require_cuda()
    try:
        import trl.models.activation_offloading  # noqa: F401
    except ImportError as error:
        raise Unavailable(f"TRL's activation offloading cannot be imported ({error})") from None
    return "SFTConfig(activation_offloading=True): all that autograd saves, with streams of its own"


def _trls_offloading() -> contextlib.AbstractContextManager:
    from trl.models.activation_offloading import OffloadActivations

    return OffloadActivations()


def _save_on_cpu() -> contextlib.AbstractContextManager:
    return torch.autograd.graph.save_on_cpu(pin_memory=torch.cuda.is_available())


def ours(title: str, **settings: Any) -> Variant:
    return Variant(title, functools.partial(_ours, settings), settings)


PLAIN = "plain"
VARIANTS = {
    PLAIN: Variant("plain checkpointing (transformers)", _plain),
    "mlp": ours('ds_minis, scope "mlp"', scope="mlp"),
    "tokens": ours('ds_minis, scope "tokens"', scope="tokens"),
    "layer": ours('ds_minis, scope "layer"', scope="layer"),
    "layer-groups": ours('ds_minis, scope "layer", head groups', scope="layer", head_groups="auto"),
    "alst": Variant("DeepSpeed TiledMLP (ALST)", _deepspeed),
    "liger": Variant("Liger tiled MLP", _liger),
    "mini-s": Variant("mini-s MLP loop (stand-in)", _minis),
}
KEPT = {
    "layer-keep": ours('ds_minis, scope "layer", attention kept', scope="layer", keep="attention"),
}
OFFLOADED = {
    "plain-offload": Variant("plain checkpointing in torch's save_on_cpu", _plain, around=_save_on_cpu),
    "plain-offload-hf": Variant("plain checkpointing, transformers' offload", _offloaded_by_transformers),
    "plain-offload-trl": Variant("plain checkpointing, TRL's offloading", _offloaded_by_trl, around=_trls_offloading),
    "layer-offload": ours('ds_minis, scope "layer", checkpoints offloaded', scope="layer", offload="cpu"),
    "layer-keep-offload": ours(
        'ds_minis, scope "layer", attention kept, both offloaded', scope="layer", keep="attention", offload="cpu"
    ),
    "layer-groups-offload": ours(
        'ds_minis, scope "layer", head groups, checkpoints offloaded', scope="layer", head_groups="auto", offload="cpu"
    ),
}
WITH_LOSS = {"alst-loss": Variant("DeepSpeed TiledMLP and TiledFusedLogitsLoss (ALST)", _deepspeed_with_loss)}
ALL = VARIANTS | KEPT | WITH_LOSS | OFFLOADED
