"""Swaps the classes of what can be tiled in a model, in place, undoes it, and reports."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from ds_minis.config import MiniSequenceConfig
from ds_minis.config_sources import BY_RUN, Request, reconcile
from ds_minis.conversion.detect import (
    REPLACED,
    Candidate,
    find_candidates,
    find_hidden_size,
    find_models_with_loss,
    find_wrappers,
    has_several_heads,
    require_model,
)
from ds_minis.conversion.report import ConversionReport
from ds_minis.conversion.sizes import find_sizes
from ds_minis.layer.attention.head_groups import WrongGroups, count_groups, num_kv_heads
from ds_minis.layer.tiled.tiled_layer import TiledLayer, one_call_fallback_reason
from ds_minis.loss.forward.forward_hooks import (
    attach_loss_tiling,
    attached_chunking,
    detach_loss_tiling,
    loss_fallback_reason,
    loss_is_attached,
)
from ds_minis.loss.forward.fused_outputs import is_answered
from ds_minis.memory.layer_inputs import LayerInputStore
from ds_minis.parallel.model.attach import attach_sequence_parallel, detach_sequence_parallel
from ds_minis.ranks import is_main_process
from ds_minis.tiling.core.warn import Warnings
from ds_minis.tiling.modules.cache_rule import attach_cache_rule, detach_cache_rule
from ds_minis.tiling.modules.state import Chunking
from ds_minis.tiling.modules.swap import Tiled, replaced_by, tile, untile, untiled_class, whole_fallback_reason
from ds_minis.tiling.modules.tiled_module import TiledModule
from ds_minis.versions import warn_of_old_versions

_STATE = "_mini_sequence"


class NothingToTile(ValueError):
    """Nothing in a model can be tiled with the settings given."""


def convert_to_mini_sequence(
    model: nn.Module,
    config: MiniSequenceConfig | Mapping[str, Any] | bool | None = None,
    *,
    module_filter: Callable[[nn.Module, str], bool] | None = None,
    **settings: Any,
) -> nn.Module:
    """Makes a decoder run its token-wise modules and its loss over mini-sequences, in place.

    The loss and every gradient stay those of the unconverted model. Call it before an engine (DDP, FSDP, DeepSpeed)
    wraps the model; before or after PEFT adapters are added, gradient checkpointing is enabled or weights are loaded.
    Parameter names, `state_dict` and `save_pretrained` do not change. Source: MST, arXiv 2407.15892.

    Args:
        model: a causal language model (or a PEFT model, or a bare decoder, which has no loss to tile).
        config: the settings, see `MiniSequenceConfig`; default: all defaults.
        module_filter: called with a module and its qualified name; False leaves the module alone.
        settings: the fields of `MiniSequenceConfig` as keywords (`chunk_size=4096`), in place of `config`.

    Returns:
        `model` itself. `mini_sequence_report(model)` tells what was tiled and what not; it is printed once, on rank 0.

    Raises:
        ValueError: the settings are wrong, nothing in the model can be tiled, `model` is no module, or it was already
            converted with other settings.
    """
    source = "convert_to_mini_sequence"
    config = MiniSequenceConfig.from_arguments(config, settings, source=source)
    if module_filter is not None and not callable(module_filter):
        raise ValueError(
            f"{source}: module_filter: a function of a module and its name is allowed, got {module_filter!r}"
        )
    return convert(model, config, source=source, module_filter=module_filter)


def convert(
    model: nn.Module,
    config: Any,
    *,
    source: str,
    module_filter: Callable[[nn.Module, str], bool] | None = None,
) -> nn.Module:
    """`convert_to_mini_sequence` for every source: `source` names where the settings came from."""
    config = MiniSequenceConfig.from_value(config, source=source)
    require_model(model, source)
    earlier = mini_sequence_report(model)
    if earlier is not None and source == BY_RUN:
        return model  # which asks for defaults only where nobody asked for anything
    if earlier is not None:
        reconcile(Request(earlier.config, earlier.source), Request(config, source))
        loss_models = find_models_with_loss(model)
        if config.enabled and not all(loss_is_attached(m) for m in loss_models):
            raise ValueError(
                f"{source}: a part of this {type(model).__name__} was converted before ({earlier.source}), without its LM "
                "head and loss: call revert_mini_sequence on it first, and convert the whole model"
            )
        _attach_to_wrappers(model, loss_models)
        return model
    if not config.enabled:  # remembered, so that another source cannot turn on what was turned off here
        model.__dict__[_STATE] = ConversionReport(config, source, {}, {}, "not tiled (mini-sequences are off)")
        return model

    warn_of_old_versions()
    warnings = Warnings()
    store = LayerInputStore(config, warnings)
    chunking = Chunking(config, find_hidden_size(model), layer_inputs=store, warnings=warnings)
    found = list(find_candidates(model))
    candidates = [c for c in found if config.scope == "layer" or c.role != "layer"]
    loss_models = find_models_with_loss(model)
    if candidates or loss_models:  # else there is nothing for a pattern to match
        _require_matches(candidates, config, source)
    candidates = _all_decided(candidates, config, module_filter)
    tiled = [c for c in candidates if not c.reason]
    if not tiled and not (config.loss and loss_models):
        raise NothingToTile(_nothing_to_tile(model, candidates, config, source))
    layers = [c.module for c in tiled if c.role == "layer"]
    _require_groups(layers, config, source)
    stack = [(c.fqn, c.module, c.reason) for c in found if c.role == "layer" and not c.in_tower]
    attach_sequence_parallel(model, chunking, stack, loss_models, source)
    chunking.layer_inputs.num_layers = sum(candidate.role == "layer" for candidate in tiled)
    for candidate in tiled:
        tile(candidate.module, TiledLayer if candidate.role == "layer" else TiledModule, chunking, candidate.fqn)
    for loss_model in loss_models:
        attach_loss_tiling(loss_model, chunking)
    _attach_to_wrappers(model, loss_models)
    attach_cache_rule(model, layers, chunking, has_loss=bool(loss_models))

    loss = _loss_in_words(model, config, loss_models)
    feed_forwards = [c.module for c in tiled if c.role == "feed-forward"]
    report = ConversionReport(
        config=config,
        source=source,
        layers={c.fqn: untiled_class(type(c.module)).__name__ for c in tiled if c.role == "layer"},
        tiled={c.fqn: untiled_class(type(c.module)).__name__ for c in tiled if c.role != "layer"},
        untiled={c.fqn: (type(c.module).__name__, c.reason) for c in candidates if c.reason},
        loss=loss,
        sizes=find_sizes(model, chunking, layers, feed_forwards, has_loss=loss.startswith("tiled, ")),
        parallel="" if chunking.parallel is None else chunking.parallel.in_words(),
    )
    model.__dict__[_STATE] = report
    if is_main_process():
        print(report, flush=True)
    return model


def _require_groups(layers: list[nn.Module], config: MiniSequenceConfig, source: str) -> None:
    """Refuses groups of heads that layers cannot have, as far as their attention tells; else their first call does."""
    for heads in {num_kv_heads(layer) for layer in layers} - {None} if config.head_groups != 1 else ():
        try:
            count_groups(config.head_groups, heads)
        except WrongGroups as error:
            raise WrongGroups(f"{source}: {error}") from None


def _attach_to_wrappers(model: nn.Module, loss_models: list[nn.Module]) -> None:
    """Has forward passes of what is built around a model with a loss be passes of that model; some may have come since."""
    for wrapper, owner in find_wrappers(model, loss_models):
        chunking = attached_chunking(owner)
        if chunking is not None and not loss_is_attached(wrapper):
            attach_loss_tiling(wrapper, chunking, owner)


def revert_mini_sequence(model: nn.Module) -> nn.Module:
    """Undoes `convert_to_mini_sequence`, in place; a model that was never converted is returned as it is.

    Raises:
        ValueError: `model` is no module.
        RuntimeError: an engine has wrapped the tiled modules since (FSDP2).
    """
    require_model(model, "revert_mini_sequence")
    for module in model.modules():
        if isinstance(module, Tiled):
            untile(module)
        detach_loss_tiling(module)
        detach_cache_rule(module)
        detach_sequence_parallel(module)
        module.__dict__.pop(_STATE, None)
    return model


def mini_sequence_report(model: nn.Module) -> ConversionReport | None:
    """The report of a model's conversion, also where the model has been wrapped since; None if it was never converted."""
    require_model(model, "mini_sequence_report")
    report = next((module.__dict__[_STATE] for module in model.modules() if _STATE in module.__dict__), None)
    if report is None:
        return None
    chunking = next(filter(None, map(attached_chunking, model.modules())), None)
    if chunking is not None:
        report = dataclasses.replace(report, last_loss=chunking.last_loss())
    bypassed = next(filter(None, map(loss_fallback_reason, model.modules())), "")
    if bypassed:
        sizes = report.sizes and report.sizes.without_loss()
        report = dataclasses.replace(report, loss=f"not tiled ({bypassed})", sizes=sizes)
    return _with_analyses(report, model)


def _with_analyses(report: ConversionReport, model: nn.Module) -> ConversionReport:
    """The report, with what was found out about modules at their first calls."""
    modules = [m for m in model.modules() if isinstance(m, Tiled) and m.mini_sequence_chunking is not None]
    wrong = {m.mini_sequence_name: whole_fallback_reason(m) for m in modules if whole_fallback_reason(m)}
    one_call = {m.mini_sequence_name: one_call_fallback_reason(m) for m in modules if one_call_fallback_reason(m)}
    unkept = [pair for m in modules for pair in m.mini_sequence_chunking.unkept.values()]
    last_step = next(filter(None, (m.mini_sequence_chunking.last_step() for m in modules)), "")
    budgets = (m.mini_sequence_chunking.layer_inputs.budget for m in modules if m.mini_sequence_chunking.layer_inputs)
    last_kept = next(filter(None, (budget.in_words() for budget in budgets)), "")
    parallel = next((m.mini_sequence_chunking.parallel for m in modules), None)
    if parallel is not None:
        report = dataclasses.replace(report, parallel=parallel.in_words())
    if last_step or last_kept:
        report = dataclasses.replace(report, last_step=last_step, last_kept=last_kept)
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


def _require_matches(candidates: list[Candidate], config: MiniSequenceConfig, source: str) -> None:
    """Refuses a pattern that matches nothing: a misspelling would go unseen otherwise."""
    for key in ("include", "exclude"):
        for pattern in getattr(config, key):
            if not any(_matches(c.fqn, (pattern,)) for c in candidates):
                example = candidates[0].fqn if candidates else "none"
                raise ValueError(
                    f"{source}: {key}: the pattern {pattern!r} matches no part of a decoder layer; allowed: qualified names "
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
    replaced = next(filter(None, map(replaced_by, loss_models)), "")
    if any(map(is_answered, loss_models)):
        return f"tiled, LM head {head}; calls with fused_lm_head=True (TRL's trainers) are answered from it"
    if replaced:
        return (
            f"tiled where the model's own forward computes it, LM head {head}; {replaced} replaced that forward, and may "
            "compute the loss itself, with the LM head's weight"
        )
    return (
        f"tiled, LM head {head}; with labels, the output has no `logits` (return_logits brings them back); without, they are "
        "computed as far as a loss reads them"
    )


def _nothing_to_tile(model: nn.Module, candidates: list[Candidate], config: MiniSequenceConfig, source: str) -> str:
    seen = Counter((type(c.module).__name__, c.reason) for c in candidates)
    found = "; ".join(f"{count} x {name}: {reason}" for (name, reason), count in seen.items())
    return (
        f"{source}: nothing in {type(model).__name__} can be tiled with {config.to_dict(defaults=False) or 'the defaults'}. "
        + (f"Found: {found}. " if found else "No list of layers with an attention module in each was found. ")
        + "Allowed: a decoder whose layers have feed-forward modules or norms that take one tensor; check include, "
        "exclude and scope, or leave mini-sequences off for this model"
    )
