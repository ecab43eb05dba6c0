"""Finds, by rule, what can be tiled in a model: roles by name and structure, never by a list of models."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from ds_minis.layer.attention.attention import interface_fallback_reason, num_attentions
from ds_minis.loss.forward.forward_hooks import takes_labels
from ds_minis.tiling.core.params import whole_shape
from ds_minis.tiling.modules.arguments import takes_any_keyword
from ds_minis.tiling.modules.swap import replaced_forward, untiled_class

_FEED_FORWARD = re.compile(r"mlp|feed_?forward|ffn", re.IGNORECASE)
_MIXER = re.compile(r"attention|attn|mixer|mamba|ssm|retention|recurrent|rnn|conv|delta_?net|lstm", re.IGNORECASE)
_EXPERTS = re.compile(r"experts$", re.IGNORECASE)
_TOWER = re.compile(
    r"(^|[._])(vision|visual|vit|image|images|video|audio|speech|sam|tower|qformer|resampler)([._]|$)", re.I
)
_MIXING_NORMS = (nn.GroupNorm, nn.modules.batchnorm._NormBase)
_LAYER = re.compile(r"(layer|block)$", re.IGNORECASE)
_MOE = re.compile(r"(moe|moe_?block|experts)$", re.IGNORECASE)
_NO_INTERFACE = "no attention in it goes through transformers' attention interface"
REPLACED = "its forward was replaced on the instance"


def require_model(model: Any, source: str) -> None:
    """Raises ValueError for what is no module: a name, a class, a trainer."""
    if isinstance(model, nn.Module):
        return
    way_out, got = "", " ".join(repr(model).split())
    if isinstance(model, str):
        way_out = f"; did you mean AutoModelForCausalLM.from_pretrained({model!r})?"
    elif isinstance(getattr(model, "model", None), nn.Module):
        way_out = f"; did you mean the {type(model).__name__}'s .model?"
    elif isinstance(model, type):
        way_out = f"; did you mean an instance, such as {model.__name__}.from_pretrained(...)?"
    raise ValueError(f"{source}: model: a torch.nn.Module is allowed, got {got} ({type(model).__name__}){way_out}")


@dataclass(frozen=True)
class Candidate:
    """A module of a stack of layers.

    Attributes:
        fqn: its qualified name.
        role: "layer", or what it is in its layer: "feed-forward", "experts", "norm", "mixer" or "other".
        reason: why it cannot be tiled; empty if it can.
    """

    fqn: str
    module: nn.Module
    role: str
    reason: str = ""

    @property
    def in_tower(self) -> bool:
        """Whether it encodes images or sound for a language model, by its name: inputs there are short."""
        return bool(_TOWER.search(self.fqn))


def find_candidates(model: nn.Module) -> Iterator[Candidate]:
    """The layers of every decoder stack and their parts: feed-forward modules and norms by role, the rest with a reason.

    A decoder layer is an item of a `ModuleList`, see `_is_layer`; norms that stand beside that list (the final norm) belong
    to the stack. Whether a module is token-wise is not decided here but by its behaviour (`tiling/verify/token_wise.py`). A
    module that several layers share is given once.
    """
    seen: set[nn.Module] = set()
    for candidate in _all_candidates(model):
        if candidate.module not in seen:
            seen.add(candidate.module)
            yield candidate


def _all_candidates(model: nn.Module) -> Iterator[Candidate]:
    for owner_fqn, owner in model.named_modules():
        stacks = [(name, child) for name, child in owner.named_children() if _is_layer_list(child)]
        for stack_name, stack in stacks:
            for i, layer in enumerate(stack):
                yield Candidate(_join(owner_fqn, stack_name, str(i)), layer, "layer", _layer_fallback_reason(layer))
                for name, child in layer.named_children():
                    yield from _part_candidates(_join(owner_fqn, stack_name, str(i), name), name, child)
        columns = _columns(owner)
        for column_name, column in columns:
            for i, part in enumerate(column):
                yield from _part_candidates(_join(owner_fqn, column_name, str(i)), column_name, part)
        for name, child in owner.named_children() if stacks or columns else ():
            if not _has_matrix(child):
                yield from _norm_candidates(_join(owner_fqn, name), child)


def _part_candidates(fqn: str, name: str, module: nn.Module) -> Iterator[Candidate]:
    """What a part of a decoder layer is, and the norms inside of it (a query norm, a norm that PEFT has wrapped)."""
    if _LAYER.search(_own_class(module).__name__) and _has_mixer(module):  # a layer inside of a layer
        for child_name, child in module.named_children():
            yield from _part_candidates(_join(fqn, child_name), child_name, child)
        return
    if isinstance(module, nn.ModuleList):  # several of a kind in one layer
        for i, item in enumerate(module):
            yield from _part_candidates(_join(fqn, str(i)), name, item)
        return
    tiled: list[str] = []
    for candidate in _matrix_candidates(fqn, name, module) if _has_matrix(module) and not _is_norm(module) else ():
        tiled += [] if candidate.reason else [candidate.fqn]
        yield candidate
    for candidate in _norm_candidates(fqn, module):
        if not any(candidate.fqn == outer or candidate.fqn.startswith(f"{outer}.") for outer in tiled):
            yield candidate


def _matrix_candidates(fqn: str, name: str, module: nn.Module) -> Iterator[Candidate]:
    if _is_mixer(name, module):
        yield Candidate(fqn, module, "mixer", "mixes tokens")
    elif _has_feed_forward_shape(module):
        yield Candidate(fqn, module, "feed-forward", _replaced_fallback_reason(module))
    elif _has_experts(name, module):
        yield from _expert_candidates(fqn, name, module)
    elif _is_named(_FEED_FORWARD, name, module):
        yield Candidate(fqn, module, "feed-forward", _replaced_fallback_reason(module))
    elif isinstance(module, nn.Linear):
        yield Candidate(fqn, module, "other", "a projection in the layer's own forward, in no module of its own")
    else:
        yield Candidate(fqn, module, "other", "no whole feed-forward module and no norm, by name and by shape")


def _expert_candidates(fqn: str, name: str, module: nn.Module) -> Iterator[Candidate]:
    """The parts of a mixture of experts that can be tiled. Its router is not among them.

    A router's outputs for all tokens are what a load-balancing loss is made of, and it may look at all tokens at once.
    """
    if _is_fused(module) or _is_named(_EXPERTS, name, module):
        yield Candidate(fqn, module, "experts", _replaced_fallback_reason(module))
        return
    parts: list[Candidate] = []
    for child_name, child in module.named_children():
        items = child.named_children() if isinstance(child, nn.ModuleList) else [("", child)]
        for item_name, item in items:
            if _has_matrix(item) and (_has_feed_forward_shape(item) or _has_experts(child_name, item)):
                parts += _matrix_candidates(_join(fqn, child_name, item_name), child_name, item)
    what = "they are tiled each for itself, and its router is not" if parts else "of an unknown form"
    yield Candidate(fqn, module, "feed-forward", f"a mixture of experts: {what}")
    yield from parts


def _is_layer_list(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList) and any(map(_is_layer, module))


def _layer_fallback_reason(layer: nn.Module) -> str:
    count = num_attentions(layer)
    if count and interface_fallback_reason():
        return f"as a whole: {interface_fallback_reason()}"
    if count == 1:
        return _replaced_fallback_reason(layer)
    if not count:
        return f"as a whole: {_NO_INTERFACE}"
    return f"as a whole: it has {count} attentions"


def _columns(owner: nn.Module) -> list[tuple[str, nn.ModuleList]]:
    """Lists with one part of all layers each, where a model has those (XLM's `attentions` and `ffns`)."""
    lists = [(name, m) for name, m in owner.named_children() if isinstance(m, nn.ModuleList) and len(m)]
    mixes = any(_is_mixer(name, m[0]) for name, m in lists)
    return lists if mixes and any(_has_feed_forward_shape(m[0]) for _, m in lists) else []


def _is_layer(module: nn.Module) -> bool:
    """A layer has a part that mixes tokens, by its name, or a feed-forward part beside another one, by their shapes."""
    parts = [(name, child) for name, child in module.named_children() if _has_matrix(child)]
    feed_forward = (_has_feed_forward_shape(child) or _has_experts(name, child) for name, child in parts)
    return _has_mixer(module) or (len(parts) > 1 and any(feed_forward))


def _has_mixer(module: nn.Module) -> bool:
    return any(_is_mixer(name, child) for name, child in module.named_children())


def _is_mixer(name: str, module: nn.Module) -> bool:
    """By the name in its layer, if that tells; else by the class's, which may have the model's name in it (GptOssMLP).

    A layer may have one part only, called "mixer" whatever it is: then the class tells.
    """
    if not _has_matrix(module) or _FEED_FORWARD.search(name) or _MOE.search(name):
        return False
    if name == "mixer" and re.search(r"(mlp|moe|ffn|feed_?forward)$", _own_class(module).__name__, re.IGNORECASE):
        return False
    return bool(_MIXER.search(name) or _MIXER.search(_own_class(module).__name__))


def _is_named(pattern: re.Pattern, name: str, module: nn.Module) -> bool:
    return bool(pattern.search(name) or pattern.search(_own_class(module).__name__))


def _has_feed_forward_shape(module: nn.Module) -> bool:
    """Projections to one other width (or two of it in one), and back: nothing that an attention module has."""
    linears = [m for name, m in module.named_modules() if isinstance(m, nn.Linear) and "lora_" not in name]
    if len(linears) < 2 or any(_has_matrix_of_its_own(m) for m in module.modules() if not isinstance(m, nn.Linear)):
        return False
    hidden, inner = linears[0].in_features, linears[-1].in_features
    ways = {(hidden, inner), (hidden, 2 * inner), (inner, hidden)}
    return hidden != inner and all((m.in_features, m.out_features) in ways for m in linears)


def _has_experts(name: str, module: nn.Module) -> bool:
    return any(_is_named(_MOE, child_name or name, m) or _is_fused(m) for child_name, m in module.named_modules())


def _is_fused(module: nn.Module) -> bool:
    """Whether the module holds the weights of several experts in one parameter."""
    own = [param for param in module._parameters.values() if param is not None]
    return not isinstance(module, nn.Conv1d) and any(len(_shape(param)) == 3 for param in own)


def _own_class(module: nn.Module) -> type[nn.Module]:
    return untiled_class(type(module))


def _is_norm(module: nn.Module) -> bool:
    named = type(module).__name__.endswith("Norm") and not isinstance(module, _MIXING_NORMS)
    return named and not any(True for _ in module.children())


def _has_norm_shape(module: nn.Module) -> bool:
    """One or two vectors of one width, in a module without parts."""
    shapes = [_shape(p) for p in module.parameters()]
    alike = len(shapes) in (1, 2) and len(set(shapes)) == 1 and len(shapes[0]) == 1
    return alike and not isinstance(module, _MIXING_NORMS) and not any(True for _ in module.children())


def _norm_candidates(fqn: str, module: nn.Module) -> Iterator[Candidate]:
    """The norms inside of a part of a stack, by name; the part itself also by its shape, the weight of a norm."""
    for inner_fqn, norm in module.named_modules(prefix=fqn):
        if _is_norm(norm) or (norm is module and _has_norm_shape(norm)):
            reason = _replaced_fallback_reason(norm)
            if any(len(_shape(p)) != 1 for p in norm.parameters()):
                reason = "its weight has more than one dimension"
            yield Candidate(inner_fqn, norm, "norm", reason)


def _has_matrix(module: nn.Module) -> bool:
    return any(len(_shape(p)) >= 2 for p in module.parameters())


def _has_matrix_of_its_own(module: nn.Module) -> bool:
    return any(param is not None and len(_shape(param)) >= 2 for param in module._parameters.values())


def _shape(param: nn.Parameter) -> tuple[int, ...]:
    """The whole parameter's shape, also where ZeRO-3 has partitioned it."""
    return tuple(whole_shape(param))


def _replaced_fallback_reason(module: nn.Module) -> str:
    replaced = replaced_forward(module)
    return f"{REPLACED}, by {replaced}" if replaced else ""


def find_models_with_loss(model: nn.Module) -> list[nn.Module]:
    """The modules that have one LM head and take labels: the language model, and wrappers that may compute the loss."""
    return [
        module
        for module in model.modules()
        if hasattr(type(module), "get_output_embeddings")
        and takes_labels(module)
        and not isinstance(module.get_output_embeddings(), nn.ModuleList | None)
    ]


def find_wrappers(model: nn.Module, models_with_loss: list[nn.Module]) -> list[tuple[nn.Module, nn.Module]]:
    """What is built around a model with a loss and hands labels on to it, with that model.

    It may call the model's `forward` and no hook of the model (PEFT's AdaLoRA; of PEFT before 0.20 all tuners).
    """
    found = []
    for module in model.modules():
        if module in models_with_loss or not (takes_labels(module) or takes_any_keyword(type(module).forward)):
            continue
        inside = [m for m in module.modules() if m in models_with_loss]
        if len({id(m.get_output_embeddings()) for m in inside}) == 1:
            found.append((module, inside[-1]))
    return found


def has_several_heads(model: nn.Module) -> bool:
    """Whether a part of the model has a list of LM heads (one per codebook, in models of sound)."""
    parts = (m for m in model.modules() if hasattr(type(m), "get_output_embeddings"))
    return any(isinstance(m.get_output_embeddings(), nn.ModuleList) for m in parts)


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
