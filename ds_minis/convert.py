"""Swaps the classes of what can be tiled in a model, in place, undoes it, and reports."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ds_minis.config import MiniSequenceConfig
from ds_minis.detect import (
    REPLACED,
    Candidate,
    find_candidates,
    find_hidden_size,
    find_models_with_loss,
    find_wrappers,
    has_several_heads,
)
from ds_minis.doors import BY_RUN, Request, agreed
from ds_minis.ranks import is_main_process
from ds_minis.tiling.layer.tiled_layer import TiledLayer, why_one_call
from ds_minis.tiling.loss.forward_hooks import (
    attach_loss_tiling,
    attached_chunking,
    detach_loss_tiling,
    loss_is_attached,
    why_loss_is_bypassed,
)
from ds_minis.tiling.modules.cache_rule import attach_cache_rule, detach_cache_rule
from ds_minis.tiling.modules.state import Chunking
from ds_minis.tiling.modules.swap import Tiled, tile, untile, untiled_class, why_whole
from ds_minis.tiling.modules.tiled_module import TiledModule
from ds_minis.versions import warn_of_old_versions

_STATE = "_mini_sequence"


class NothingToTile(ValueError):
    """Nothing in a model can be tiled with the settings given."""


@dataclass(frozen=True)
class ConversionReport:
    """What became of a model's modules.

    Attributes:
        config: the settings.
        door: where they came from.
        layers: qualified name -> class name, of every decoder layer that is tiled as a whole.
        tiled: qualified name -> class name, of every tiled module; those of a layer are used where that is not tiled.
        untiled: qualified name -> (class name, reason), of every other part of the decoder stack.
        one_call: qualified name -> reason, of every such layer that attends to all heads at once in spite of `head_groups`.
        unkept: (class name, reason) of every kind of tiled layer that computes its attention again in backward in spite of
            `keep_attention`, as the first step found out.
        loss: what became of the LM head and the loss, in words.
    """

    config: MiniSequenceConfig
    door: str
    tiled: Mapping[str, str]
    untiled: Mapping[str, tuple[str, str]]
    loss: str
    layers: Mapping[str, str] = field(default_factory=dict)
    one_call: Mapping[str, str] = field(default_factory=dict)
    unkept: Sequence[tuple[str, str]] = ()

    def __str__(self) -> str:
        inside = {fqn for fqn in self.tiled if any(fqn.startswith(f"{layer}.") for layer in self.layers)}
        outside = Counter(name for fqn, name in self.tiled.items() if fqn not in inside)
        spare = Counter(name for fqn, name in self.tiled.items() if fqn in inside)
        lines = [f"ds_minis ({self.door}): {self.config.to_dict(defaults=False) or 'all defaults'}"]
        lines += [f"  tiled as a whole: {count} x {name}" for name, count in Counter(self.layers.values()).items()]
        lines += [f"  tiled: {count} x {name}" for name, count in outside.items()]
        lines += [f"  tiled where their layer is not: {count} x {name}" for name, count in spare.items()]
        one_call = Counter((self.layers[fqn], reason) for fqn, reason in self.one_call.items() if fqn in self.layers)
        lines += [f"  attention in one call: {count} x {name} ({reason})" for (name, reason), count in one_call.items()]
        lines += [f"  attention not kept: {name} ({reason})" for name, reason in self.unkept]
        for (name, reason), count in Counter(self.untiled.values()).items():
            lines.append(f"  not tiled: {count} x {name} ({reason})")
        return "\n".join([*lines, f"  loss: {self.loss}"])


def convert_to_mini_sequence(
    model: nn.Module,
    config: MiniSequenceConfig | Mapping[str, Any] | bool | None = None,
    *,
    module_filter: Callable[[nn.Module, str], bool] | None = None,
) -> nn.Module:
    """Makes a decoder run its token-wise modules and its loss over mini-sequences, in place.

    The loss and every gradient stay those of the unconverted model. Call it before an engine (DDP, FSDP, DeepSpeed)
    wraps the model; before or after PEFT adapters are added, gradient checkpointing is enabled or weights are loaded.
    Parameter names, `state_dict` and `save_pretrained` do not change. Source: MST, arXiv 2407.15892.

    Args:
        model: a causal language model (or a PEFT model, or a bare decoder, which has no loss to tile).
        config: the settings, see `MiniSequenceConfig`; default: all defaults.
        module_filter: called with a module and its qualified name; False leaves the module alone.

    Returns:
        `model` itself. `mini_sequence_report(model)` tells what was tiled and what not; it is printed once, on rank 0.

    Raises:
        ValueError: the settings are wrong, nothing in the model can be tiled, or the model was already converted with
            other settings.
    """
    return convert(model, config, door="convert_to_mini_sequence", module_filter=module_filter)


def convert(
    model: nn.Module,
    config: Any,
    *,
    door: str,
    module_filter: Callable[[nn.Module, str], bool] | None = None,
) -> nn.Module:
    """`convert_to_mini_sequence` for every door: `door` names where the settings came from."""
    config = MiniSequenceConfig.from_value(config, door=door)
    earlier = mini_sequence_report(model)
    if earlier is not None and door == BY_RUN:
        return model  # which asks for defaults only where nobody asked for anything
    if earlier is not None:
        agreed(Request(earlier.config, earlier.door), Request(config, door))
        loss_models = find_models_with_loss(model)
        if config.enabled and not all(loss_is_attached(m) for m in loss_models):
            raise ValueError(
                f"{door}: a part of this {type(model).__name__} was converted before ({earlier.door}), without its LM head "
                "and loss: call revert_mini_sequence on it first, and convert the whole model"
            )
        _attach_to_wrappers(model, loss_models)
        return model
    if not config.enabled:  # remembered, so that another door cannot turn on what was turned off here
        model.__dict__[_STATE] = ConversionReport(config, door, {}, {}, "not tiled (mini-sequences are off)")
        return model

    warn_of_old_versions()
    chunking = Chunking(config, find_hidden_size(model))
    candidates = [c for c in find_candidates(model) if config.scope == "layer" or c.role != "layer"]
    loss_models = find_models_with_loss(model)
    if candidates or loss_models:  # else there is nothing for a pattern to match
        _require_matches(candidates, config, door)
    candidates = _all_decided(candidates, config, module_filter)
    tiled = [c for c in candidates if not c.reason]
    if not tiled and not (config.loss and loss_models):
        raise NothingToTile(_nothing_to_tile(model, candidates, config, door))
    chunking.checkpoints.num_layers = sum(candidate.role == "layer" for candidate in tiled)
    for candidate in tiled:
        tile(candidate.module, TiledLayer if candidate.role == "layer" else TiledModule, chunking, candidate.fqn)
    for loss_model in loss_models:
        attach_loss_tiling(loss_model, chunking)
    _attach_to_wrappers(model, loss_models)
    layers = [c.module for c in tiled if c.role == "layer"]
    attach_cache_rule(model, layers, chunking, has_loss=bool(loss_models))

    report = ConversionReport(
        config=config,
        door=door,
        layers={c.fqn: untiled_class(type(c.module)).__name__ for c in tiled if c.role == "layer"},
        tiled={c.fqn: untiled_class(type(c.module)).__name__ for c in tiled if c.role != "layer"},
        untiled={c.fqn: (type(c.module).__name__, c.reason) for c in candidates if c.reason},
        loss=_loss_in_words(model, config, loss_models),
    )
    model.__dict__[_STATE] = report
    if is_main_process():
        print(report, flush=True)
    return model


def _attach_to_wrappers(model: nn.Module, loss_models: list[nn.Module]) -> None:
    """Has forward passes of what is built around a model with a loss be passes of that model; some may have come since."""
    for wrapper, owner in find_wrappers(model, loss_models):
        chunking = attached_chunking(owner)
        if chunking is not None and not loss_is_attached(wrapper):
            attach_loss_tiling(wrapper, chunking, owner)


def revert_mini_sequence(model: nn.Module) -> nn.Module:
    """Undoes `convert_to_mini_sequence`, in place; a model that was never converted is returned as it is.

    Raises:
        RuntimeError: an engine has wrapped the tiled modules since (FSDP2).
    """
    for module in model.modules():
        if isinstance(module, Tiled):
            untile(module)
        detach_loss_tiling(module)
        detach_cache_rule(module)
        module.__dict__.pop(_STATE, None)
    return model


def mini_sequence_report(model: nn.Module) -> ConversionReport | None:
    """The report of a model's conversion, also where the model has been wrapped since; None if it was never converted."""
    report = next((module.__dict__[_STATE] for module in model.modules() if _STATE in module.__dict__), None)
    if report is None:
        return None
    bypassed = next(filter(None, map(why_loss_is_bypassed, model.modules())), "")
    if bypassed:
        report = dataclasses.replace(report, loss=f"not tiled ({bypassed})")
    return _with_verdicts(report, model)


def _with_verdicts(report: ConversionReport, model: nn.Module) -> ConversionReport:
    """The report, with what was found out about modules at their first calls."""
    modules = [m for m in model.modules() if isinstance(m, Tiled) and m.mini_sequence_chunking is not None]
    wrong = {m.mini_sequence_name: why_whole(m) for m in modules if why_whole(m)}
    one_call = {m.mini_sequence_name: why_one_call(m) for m in modules if why_one_call(m)}
    unkept = [pair for m in modules for pair in m.mini_sequence_chunking.unkept.values()]
    if one_call or unkept:
        report = dataclasses.replace(report, one_call=one_call, unkept=tuple(dict.fromkeys(unkept)))
    if not wrong:
        return report
    names = {**report.layers, **report.tiled}
    untiled = {fqn: (names[fqn], reason) for fqn, reason in wrong.items()}
    tiled = {fqn: name for fqn, name in report.tiled.items() if fqn not in wrong}
    layers = {fqn: name for fqn, name in report.layers.items() if fqn not in wrong}
    return dataclasses.replace(report, tiled=tiled, layers=layers, untiled={**report.untiled, **untiled})


def modules_with_chunks(model: nn.Module) -> list[nn.Module]:
    """Every module that runs over chunks."""
    return [m for m in model.modules() if isinstance(m, Tiled)]


def tiled_modules(model: nn.Module) -> list[nn.Module]:
    """Every module whose weights are used inside a tiled operation (an engine must gather each of them as a whole)."""
    modules = modules_with_chunks(model)
    report = mini_sequence_report(model)
    if report is not None and report.config.enabled and report.config.loss:
        modules += dict.fromkeys(m.get_output_embeddings() for m in find_models_with_loss(model))
    return modules


def _all_decided(candidates: list[Candidate], config: MiniSequenceConfig, module_filter) -> list[Candidate]:
    """The candidates, each with the reason for leaving it alone; without what is said of the parts of a tiled layer."""
    included = [c.fqn for c in candidates if c.role == "layer" and _matches(c.fqn, config.include)]
    decided = [_decided(c, config, module_filter, _is_part_of(c.fqn, included)) for c in candidates]
    unwanted = [
        after.fqn
        for before, after in zip(candidates, decided, strict=True)
        if after.reason != before.reason or REPLACED in before.reason or _matches(after.fqn, config.exclude)
    ]
    layers = [c.fqn for c in decided if c.role == "layer" and not c.reason]
    left_out = {fqn for fqn in layers if any(_is_part_of(part, [fqn]) for part in unwanted)}
    result = []
    for c in decided:
        if c.fqn in left_out:
            c = dataclasses.replace(c, reason="as a whole: a part of it is left out")
        inside = _is_part_of(c.fqn, [fqn for fqn in layers if fqn not in left_out])
        if not (inside and c.reason):
            result.append(c)
    return result


def _is_part_of(fqn: str, layers: list[str]) -> bool:
    return any(fqn.startswith(f"{layer}.") for layer in layers)


def _decided(candidate: Candidate, config: MiniSequenceConfig, module_filter, in_included_layer: bool) -> Candidate:
    """The candidate, with the reason the user's settings give for leaving it alone (if they do)."""
    reason = candidate.reason
    if not reason:
        if config.scope == "mlp" and candidate.role not in ("feed-forward", "experts"):
            reason = 'outside of scope "mlp"'
        elif candidate.in_tower and not in_included_layer and not _matches(candidate.fqn, config.include):
            reason = "encodes images or sound; tiled only where include names it"
        elif config.include and not in_included_layer and not _matches(candidate.fqn, config.include):
            reason = "not in include"
        elif _matches(candidate.fqn, config.exclude):
            reason = "in exclude"
        elif module_filter is not None and not module_filter(candidate.module, candidate.fqn):
            reason = "left out by module_filter"
    return dataclasses.replace(candidate, reason=reason)


def _require_matches(candidates: list[Candidate], config: MiniSequenceConfig, door: str) -> None:
    """Refuses a pattern that matches nothing: a misspelling would go unseen otherwise."""
    for key in ("include", "exclude"):
        for pattern in getattr(config, key):
            if not any(_matches(c.fqn, (pattern,)) for c in candidates):
                example = candidates[0].fqn if candidates else "none"
                raise ValueError(
                    f"{door}: {key}: the pattern {pattern!r} matches no part of a decoder layer; allowed: qualified names "
                    f"(or their ends) with * and ?, such as {example!r}"
                )


def _matches(fqn: str, patterns: tuple[str, ...]) -> bool:
    """Whether the name, or its end behind a dot (wrappers put prefixes in front), matches one of the patterns."""
    return any(fnmatch.fnmatchcase(fqn, p) or fnmatch.fnmatchcase(fqn, f"*.{p}") for p in patterns)


def _loss_in_words(model: nn.Module, config: MiniSequenceConfig, loss_models: list[nn.Module]) -> str:
    if not config.loss:
        return "not tiled (loss is off)"
    if not loss_models:
        if has_several_heads(model):
            return "not tiled (several LM heads, whose logits the model puts together before the loss)"
        return "not tiled (no module here has an LM head and takes labels)"
    if config.return_logits:
        return "not tiled (return_logits asks for all logits)"
    head = type(loss_models[-1].get_output_embeddings()).__name__
    return f"tiled, LM head {head}; with labels, the output has no `logits` (return_logits brings them back)"


def _nothing_to_tile(model: nn.Module, candidates: list[Candidate], config: MiniSequenceConfig, door: str) -> str:
    seen = Counter((type(c.module).__name__, c.reason) for c in candidates)
    found = "; ".join(f"{count} x {name}: {reason}" for (name, reason), count in seen.items())
    return (
        f"{door}: nothing in {type(model).__name__} can be tiled with {config.to_dict(defaults=False) or 'the defaults'}. "
        + (f"Found: {found}. " if found else "No list of layers with an attention module in each was found. ")
        + "Allowed: a decoder whose layers have feed-forward modules or norms that take one tensor; check include, "
        "exclude and scope, or leave mini-sequences off for this model"
    )
