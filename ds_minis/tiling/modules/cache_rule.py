"""Sets `use_cache=False` in training and in evaluations with labels, unless the caller sets it.

transformers makes no cache under activation checkpointing, which tiled layers replace. A layer that gets a cache cannot be
tiled as a whole.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ds_minis.tiling.modules.arguments import argument, takes, with_argument
from ds_minis.tiling.modules.compiling import outside_of_graphs
from ds_minis.tiling.modules.hooks import remove_hooks
from ds_minis.tiling.modules.state import Chunking

CACHE_NAMES = "past_key_values", "cache"  # an argument of decoders, which transformers 5.24 renamed
_BESIDE_THE_MODEL = (
    "the decoder ran without a call of the model that holds the LM head, so ds_minis had no part in the loss: a wrapper "
    "called that model's `forward`, or a trainer uses the decoder alone and computes the loss itself"
)


class NoUnrequestedCache:
    """Forward pre-hook of a decoder, and of modules around one, that may make a cache.

    It does nothing where a missing cache would change the result; the layers then run as a whole. That is so for packed
    sequences: transformers reads their positions only if there is neither a mask nor a cache.
    """

    def __init__(self, chunking: Chunking, has_loss: bool):
        self._chunking, self._has_loss = chunking, has_loss

    def __call__(self, model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        # No graph break if a model around this one has set use_cache, or if nothing is trained.
        if kwargs.get("use_cache") is not None or not (model.training or self._evaluates()):
            return None
        if torch.compiler.is_compiling() and not torch.is_grad_enabled():
            return None
        return self._decided(model, args, kwargs)

    def _evaluates(self) -> bool:
        """Whether this pass has labels, so that it is no generation step, which would need the cache."""
        return not torch.compiler.is_compiling() and any(begun.with_labels for begun in self._chunking.passes)

    @outside_of_graphs
    def _decided(self, model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        chunking = self._chunking
        if self._has_loss and torch.is_grad_enabled() and chunking.config.loss and not chunking.passes:
            chunking.bypassed = _BESIDE_THE_MODEL
        if any(argument(model, name, args, kwargs) is not None for name in ("use_cache", *CACHE_NAMES)):
            return None
        if _are_packed(model, args, kwargs):
            return None
        return with_argument(model, "use_cache", False, args, kwargs)


def _are_packed(model: nn.Module, args: tuple, kwargs: dict) -> bool:
    """Whether a row holds several sequences, marked by positions alone, and the attention uses a mask.

    Flash attention uses none: it reads the positions itself, with or without a cache.
    """
    positions = argument(model, "position_ids", args, kwargs)
    if not isinstance(positions, Tensor) or argument(model, "attention_mask", args, kwargs) is not None:
        return False
    if "flash" in str(getattr(getattr(model, "config", None), "_attn_implementation", "")) or positions.is_meta:
        return False
    return bool((positions.diff(dim=-1) != 1).any())


def attach_cache_rule(model: nn.Module, layers: list[nn.Module], chunking: Chunking, has_loss: bool) -> None:
    """Registers the hook on every module that may make a cache for some of the tiled layers."""
    held = set(layers)
    for module in model.modules():
        makes = takes(module, "use_cache") and any(takes(module, name) for name in CACHE_NAMES)
        if module not in held and makes and any(part in held for part in module.modules()):
            module.register_forward_pre_hook(NoUnrequestedCache(chunking, has_loss), with_kwargs=True)


def detach_cache_rule(module: nn.Module) -> None:
    """Removes the hook from one module."""
    remove_hooks(module, (NoUnrequestedCache,))
