"""Finds, by rule, what can be tiled in a model: roles by name and structure, never by a list of models."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from ds_minis.tiling.loss import takes_labels
from ds_minis.tiling.module import TiledModule, replaced_forward, untiled_class

_FEED_FORWARD = re.compile(r"mlp|feed_?forward|ffn", re.IGNORECASE)
_MIXER = re.compile(r"attention|attn", re.IGNORECASE)
_EXPERTS = re.compile(r"(moe|moeblock|experts)$", re.IGNORECASE)


@dataclass(frozen=True)
class Candidate:
    """A module of the decoder stack: its name, its role in it, and why it cannot be tiled (empty if it can)."""

    fqn: str
    module: nn.Module
    role: str
    reason: str = ""


def find_candidates(model: nn.Module) -> Iterator[Candidate]:
    """The parts of every decoder stack: feed-forward modules and norms by role, the rest with a reason.

    A decoder layer is an item of a `ModuleList` that has an attention module among its children; norms that stand beside
    that list (the final norm) belong to the stack.
    """
    for owner_fqn, owner in model.named_modules():
        stacks = [(name, child) for name, child in owner.named_children() if _is_layer_list(child)]
        for stack_name, stack in stacks:
            for i, layer in enumerate(stack):
                for name, child in layer.named_children():
                    yield from _part_candidates(_join(owner_fqn, stack_name, str(i), name), name, child)
        for name, child in owner.named_children() if stacks else ():
            if not _has_matrix(child):
                yield from _norm_candidates(_join(owner_fqn, name), child)


def _part_candidates(fqn: str, name: str, module: nn.Module) -> Iterator[Candidate]:
    """What a part of a decoder layer is, and the norms inside of it (a query norm, a norm that PEFT has wrapped)."""
    if _has_matrix(module):
        if _is_mixer(name, module):
            yield Candidate(fqn, module, "mixer", "mixes tokens")
        elif _FEED_FORWARD.search(name) or _FEED_FORWARD.search(type(module).__name__):
            reason = _why_not_feed_forward(module)
            yield Candidate(fqn, module, "feed-forward", reason)
            if not reason:
                return
        else:
            yield Candidate(fqn, module, "other", "neither a feed-forward module nor a norm by its name")
    yield from _norm_candidates(fqn, module)


def _is_layer_list(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList) and any(
        _is_mixer(name, child) for layer in module for name, child in layer.named_children()
    )


def _is_mixer(name: str, module: nn.Module) -> bool:
    return _has_matrix(module) and bool(_MIXER.search(name) or _MIXER.search(type(module).__name__))


def _norm_candidates(fqn: str, module: nn.Module) -> Iterator[Candidate]:
    for inner_fqn, norm in module.named_modules(prefix=fqn):
        named = type(norm).__name__.endswith("Norm") and not isinstance(norm, nn.GroupNorm)  # which mixes tokens
        if named and not any(True for _ in norm.children()):
            reason = _why_not_one_tensor(norm)
            if any(len(_shape(p)) != 1 for p in norm.parameters()):
                reason = "its weight has more than one dimension"
            yield Candidate(inner_fqn, norm, "norm", reason)


def _has_matrix(module: nn.Module) -> bool:
    return any(len(_shape(p)) >= 2 for p in module.parameters())


def _shape(param: nn.Parameter) -> tuple[int, ...]:
    """The whole parameter's shape, also where ZeRO-3 has partitioned it."""
    return tuple(getattr(param, "ds_shape", param.shape))


def _why_not_feed_forward(module: nn.Module) -> str:
    """Why a feed-forward module must not be tiled, judged by its signature and its parts; empty if it can be."""
    own_class = untiled_class(type(module)) if isinstance(module, TiledModule) else type(module)
    names = [own_class.__name__, *(name for name, _ in module.named_modules())]
    if any(_EXPERTS.search(name) for name in names):
        return "a mixture of experts; not supported yet"
    return _why_not_one_tensor(module)


def _why_not_one_tensor(module: nn.Module) -> str:
    replaced = replaced_forward(module)
    if replaced:
        return f"its forward was replaced on the instance, by {replaced}"
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    if len(parameters) == 1 or isinstance(module, TiledModule):
        return ""
    return f"its forward takes {', '.join(p.name for p in parameters)}, not one tensor"


def find_models_with_loss(model: nn.Module) -> list[nn.Module]:
    """The modules that have an LM head and take labels: the language model, and wrappers that may compute the loss."""
    return [
        module
        for module in model.modules()
        if hasattr(type(module), "get_output_embeddings")
        and takes_labels(module)
        and module.get_output_embeddings() is not None
    ]


def find_hidden_size(model: nn.Module) -> int:
    """Width of the hidden states: the config's, or that of the first norm of a stack."""
    config = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    size = getattr(config, "hidden_size", None)
    if isinstance(size, int):
        return size
    norms = (c.module for c in find_candidates(model) if c.role == "norm")
    widths = [_shape(p)[0] for norm in norms for p in norm.parameters()]
    return max(widths, default=1024)


def _join(*names: str) -> str:
    return ".".join(name for name in names if name)
