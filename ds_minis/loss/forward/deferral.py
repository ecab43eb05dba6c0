"""Which forward passes without labels give deferred logits.

- In training, with gradients: somebody computes a loss from the logits.
- Without gradients where the head's weights are frozen: a teacher or a reference model. They stay what they are, so the
  logits can be computed when they are needed.

Never with a cache (generation), in `torch.inference_mode`, or in an evaluation of the Trainer, which is asked for logits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from ds_minis.loss.forward.output_logits import wanted_logits
from ds_minis.tiling.core.params import weights_of
from ds_minis.tiling.modules.arguments import argument
from ds_minis.tiling.modules.cache_rule import CACHE_NAMES
from ds_minis.tiling.modules.hooks import engine_of
from ds_minis.tiling.modules.state import Chunking


def is_deferred_without_labels(
    model: nn.Module, head: nn.Module, chunking: Chunking, args: tuple, kwargs: dict
) -> bool:
    """Whether a pass that was given no labels has deferred logits, as far as its arguments and the model tell."""
    if wanted_logits() is not None or torch.is_inference_mode_enabled():
        return False
    if any(argument(model, name, args, kwargs) is not None for name in CACHE_NAMES):
        return False
    if torch.is_grad_enabled():
        return model.training
    frozen = not any(param.requires_grad for param in head.parameters())
    return frozen and not argument(model, "use_cache", args, kwargs) and chunking.is_in_one_thread()


def fallback_reason_without_labels(head: nn.Module, around: list[nn.Module]) -> str:
    """The reason why logits cannot leave the forward pass deferred; empty if they can.

    Args:
        around: the modules that contain the LM head, from the model to the head's parent.
    """
    ddp = torch.nn.parallel.DistributedDataParallel._get_active_ddp_module()
    if ddp is not None and (ddp.find_unused_parameters or ddp.static_graph):
        return (
            "DistributedDataParallel with find_unused_parameters=True or static_graph=True must see the logits. Leave these "
            "arguments out (HF Trainer: ddp_find_unused_parameters=False), or give the model its labels where you can"
        )
    if any(engine_of(module) == "FullyShardedDataParallel" for module in (*around, head)) or not all(
        isinstance(weight, nn.Parameter) for weight in weights_of(head)
    ):
        return "FSDP1 holds the LM head's weights in parts, and cannot gather them once more: use FSDP2"
    return ""


def gather_of(head: nn.Module, around: list[nn.Module]) -> Callable[[], None] | None:
    """Gathers the head's weights after the forward pass, under FSDP2; they stay until backward frees them.

    None where calling the head does so (ZeRO-3, a head that is sharded by itself), and where they are whole.
    """
    if engine_of(head):
        return None
    owner = next((module for module in reversed(around) if engine_of(module) == "fully_shard"), None)
    return None if owner is None else owner.unshard
