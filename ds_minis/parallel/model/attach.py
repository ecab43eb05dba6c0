"""Makes a converted model run its sequences on the ranks of a group, and undoes it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ds_minis.layer.attention.attention import wrap_attention
from ds_minis.parallel.attention.attention import parallel_attention
from ds_minis.parallel.attention.state import Parallel
from ds_minis.parallel.communication.groups import require_divisible
from ds_minis.parallel.model import decoder as decoders
from ds_minis.parallel.model import layers, loss, rotary
from ds_minis.ranks import num_ranks
from ds_minis.tiling.modules.arguments import takes
from ds_minis.tiling.modules.hooks import remove_hooks
from ds_minis.tiling.modules.state import Chunking

_HOOKS = (
    decoders.CutInputs, decoders.GatherOutputs, rotary.AddLastPosition, rotary.DropLastPosition, layers.CheckLayer,
    loss.BeginLoss, loss.EndLoss,
)  # fmt: skip


def sequence_parallel_fallback_reason(model: nn.Module, stack: Sequence[tuple[str, nn.Module, str]]) -> str:
    """The reason why a model's sequences cannot be divided, as far as its structure tells; empty if they can.

    Args:
        stack: name, module and reason of each decoder layer, see `ds_minis.conversion.detect.Candidate`.
    """
    if not stack:
        return "no list of decoder layers was found in it"
    unfit = [(name, type(layer).__name__, reason) for name, layer, reason in stack if reason]
    if unfit:
        name, kind, reason = unfit[0]
        return f"{len(unfit)} of {len(stack)} layers ({name}, a {kind}) mix tokens otherwise than by one attention: {reason}"
    found = find_decoder(model, [layer for _, layer, _ in stack])
    if found is None:
        return "no module around its decoder layers takes input_ids or inputs_embeds"
    if not takes(found, "position_ids"):
        return (
            f"{type(found).__name__} takes no position_ids, so it cannot be told where its tokens are in the sequence"
        )
    if getattr(found, "layerdrop", 0) or getattr(getattr(found, "config", None), "layerdrop", 0):
        return f"{type(found).__name__} drops layers at random (layerdrop), each rank others: set layerdrop to 0"
    return ""


def find_decoder(model: nn.Module, stack: Sequence[nn.Module]) -> nn.Module | None:
    """The innermost module that holds all layers and is given tokens."""
    held, found = set(stack), None
    for module in model.modules():
        takes_tokens = takes(module, "input_ids") or takes(module, "inputs_embeds")
        if module not in held and takes_tokens and held <= set(module.modules()):
            found = module
    return found


def attach_sequence_parallel(
    model: nn.Module,
    chunking: Chunking,
    stack: Sequence[tuple[str, nn.Module, str]],
    loss_models: Sequence[nn.Module],
    source: str,
) -> None:
    """Registers the hooks that divide the model's sequences among ranks.

    Raises:
        ValueError: the model's sequences cannot be divided, or the processes cannot.
    """
    settings = chunking.config.sequence_parallel
    if settings.size == 1:
        return
    reason = sequence_parallel_fallback_reason(model, stack)
    if reason:
        raise ValueError(
            f"{source}: sequence_parallel={settings.to_value()!r}: {type(model).__name__} cannot be run on a part of each "
            f"sequence: {reason}. Leave sequence_parallel out for this model"
        )
    world_size = num_ranks()
    if world_size is not None:
        require_divisible(world_size, settings.size, source)
    parallel = chunking.parallel = Parallel(settings, chunking, layers.require_token_wise)
    wrap_attention(parallel_attention)
    modules = [layer for _, layer, _ in stack]
    decoder = find_decoder(model, modules)
    decoders.attach(decoder, parallel)
    rotary.attach(decoder, parallel)
    for layer in modules:
        layers.attach(layer, parallel)
    for loss_model in loss_models:
        loss.attach(loss_model, parallel)


def detach_sequence_parallel(module: nn.Module) -> None:
    """Removes the hooks from one module."""
    remove_hooks(module, _HOOKS)
