"""No cache of all keys and values in training, or in an evaluation with labels, where nobody asked for one.

transformers makes none under activation checkpointing, in whose place tiled layers are; a layer that is given one cannot be
tiled as a whole.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ds_minis.tiling.modules.arguments import argument, takes, with_argument
from ds_minis.tiling.modules.compiling import outside_of_graphs
from ds_minis.tiling.modules.state import Chunking

_BESIDE_THE_MODEL = (
    "the decoder ran without a call of the model that holds the LM head, so ds_minis had no part in the loss: a wrapper "
    "called that model's `forward`, or a trainer uses the decoder alone and computes the loss itself"
)


class NoCacheUnasked:
    """Forward pre-hook of a decoder, and of what is built around one, that may make a cache.

    Where the cache would change the result it is made, and the layers run as a whole: positions that tell packed sequences
    apart are looked at by transformers where there is neither a mask nor a cache.
    """

    def __init__(self, chunking: Chunking, has_loss: bool):
        self._chunking, self._has_loss = chunking, has_loss

    def __call__(self, model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        # Without a break in a compiled graph where a model around this one has decided, or nothing is trained.
        if kwargs.get("use_cache") is not None or not (model.training or self._evaluates()):
            return None
        if torch.compiler.is_compiling() and not torch.is_grad_enabled():
            return None
        return self._decided(model, args, kwargs)

    def _evaluates(self) -> bool:
        """Whether a loss is computed of this pass: it is no step of a generation, whose keys and values are read again."""
        return not torch.compiler.is_compiling() and any(begun.with_labels for begun in self._chunking.passes)

    @outside_of_graphs
    def _decided(self, model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        chunking = self._chunking
        if self._has_loss and torch.is_grad_enabled() and chunking.config.loss and not chunking.passes:
            chunking.bypassed = _BESIDE_THE_MODEL
        if any(argument(model, name, args, kwargs) is not None for name in ("use_cache", "past_key_values")):
            return None
        if _are_packed(model, args, kwargs):
            return None
        return with_argument(model, "use_cache", False, args, kwargs)


def _are_packed(model: nn.Module, args: tuple, kwargs: dict) -> bool:
    """Whether positions alone tell several sequences in one row apart, and the model's attention would look at a mask.

    Flash attention has none: it reads the positions itself, cache or not.
    """
    positions = argument(model, "position_ids", args, kwargs)
    if not isinstance(positions, Tensor) or argument(model, "attention_mask", args, kwargs) is not None:
        return False
    if "flash" in str(getattr(getattr(model, "config", None), "_attn_implementation", "")) or positions.is_meta:
        return False
    return bool((positions.diff(dim=-1) != 1).any())


def attach_cache_rule(model: nn.Module, layers: list[nn.Module], chunking: Chunking, has_loss: bool) -> None:
    """Has whatever makes a cache for some of the tiled layers make none that nobody asked for."""
    held = set(layers)
    for module in model.modules():
        makes = takes(module, "use_cache") and takes(module, "past_key_values")
        if module not in held and makes and any(part in held for part in module.modules()):
            module.register_forward_pre_hook(NoCacheUnasked(chunking, has_loss), with_kwargs=True)


def detach_cache_rule(module: nn.Module) -> None:
    """Undoes `attach_cache_rule` for one module."""
    for key in [key for key, hook in module._forward_pre_hooks.items() if isinstance(hook, NoCacheUnasked)]:
        module._forward_pre_hooks.pop(key)
        module._forward_pre_hooks_with_kwargs.pop(key, None)
