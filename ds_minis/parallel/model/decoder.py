"""Runs a decoder on this rank's tokens: cuts what it is given, and puts its hidden states together again.

To what is around the decoder (the LM head, the loss, an engine, a trainer) the group of ranks is one process with the whole
sequence. What is computed there from whole hidden states is computed on every rank, so the gradient of the decoder's output,
summed over the group's `size` ranks, is `size` times the true one; so is that of every weight around it, as every rank has
it. An engine averages over all ranks and not over replicas: it divides by `size` times too much, and the gradient is right.

Shapes: B batch, S tokens of the whole sequence, T of a rank, H hidden size.
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from ds_minis.parallel.attention.documents import OF_DOCUMENTS, names_in, positions_and_documents
from ds_minis.parallel.attention.masks import Refused, Sequence, masks_of
from ds_minis.parallel.attention.state import Parallel
from ds_minis.parallel.communication.collectives import gather, gather_sequence
from ds_minis.parallel.communication.cut import Cut
from ds_minis.parallel.model.rotary import noise_of_whole
from ds_minis.parallel.model.rows import gather_rows
from ds_minis.tiling.modules.arguments import argument_names
from ds_minis.tiling.modules.cache_rule import CACHE_NAMES
from ds_minis.tiling.modules.compiling import outside_of_graphs

_KNOWN = frozenset(("input_ids", "inputs_embeds", "attention_mask", "position_ids", "cache_position"))
# Which models hand on with all other keywords.
_OF_THE_LOSS = frozenset(("labels", "shift_labels", "num_items_in_batch"))
_ATTRIBUTE = "_mini_sequence_pass"


class CutInputs:
    """Forward pre-hook of a decoder: this rank's tokens take the place of all."""

    def __init__(self, parallel: Parallel):
        self._parallel = parallel

    @outside_of_graphs
    def __call__(self, decoder: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        parallel = self._parallel
        _close(decoder)
        given = dict(zip(argument_names(decoder), args, strict=False)) | kwargs
        if not parallel.applies():
            parallel.tell_whole_pass()
            return None
        tokens = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
        _require_known(decoder, given, tokens)
        group = parallel.group()
        batch, num_tokens = tokens.shape[:2]
        _require_same_batch(
            tokens, [given.get("attention_mask"), given.get("position_ids"), *parallel.labels], parallel
        )
        cut = Cut(num_tokens, group.size, group.rank)
        positions, documents = positions_and_documents(decoder, given, batch, num_tokens, tokens.device)
        padding = _padding(decoder, given, num_tokens)
        changed = {
            name: cut.mine(given[name]) for name in ("input_ids", "inputs_embeds") if given.get(name) is not None
        }
        changed["position_ids"] = cut.mine(positions)
        changed["attention_mask"] = torch.ones(batch, 2 * cut.part, dtype=torch.long, device=tokens.device)
        changed["use_cache"] = False
        left_out = {"cache_position", *OF_DOCUMENTS, *_OF_THE_LOSS}
        given = {n: v for n, v in given.items() if n not in left_out} | changed
        under = contextlib.ExitStack()
        under.enter_context(masks_of(Sequence(cut, padding, documents, parallel)))
        under.enter_context(parallel.in_pass(positions.max()))
        under.enter_context(noise_of_whole(decoder, cut))
        if decoder.training:
            under.enter_context(parallel.own_random_numbers(tokens.device))
        decoder.__dict__[_ATTRIBUTE] = under, cut
        for begun in parallel.chunking.passes[-1:]:  # which Ctrl-C in a chunk closes, for which torch calls no hook
            begun.callback(_close, decoder)
        return (), given


class GatherOutputs:
    """Forward hook of a decoder, also called when forward fails: whole hidden states, unless the loss takes this rank's."""

    def __init__(self, parallel: Parallel):
        self._parallel = parallel

    @outside_of_graphs
    def __call__(self, decoder: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        if _ATTRIBUTE not in decoder.__dict__:
            return output
        cut = _close(decoder)
        if output is None:
            return output
        if self._parallel.loss_is_local:
            return _gathered_beside_the_last(output, cut, self._parallel)
        return _gathered(output, cut, self._parallel)


def _close(decoder: nn.Module) -> Cut | None:
    """Ends the decoder's pass, if one is in progress."""
    under, cut = decoder.__dict__.pop(_ATTRIBUTE, (None, None))
    if under is not None:
        under.close()
    return cut


def _gathered(value: Any, cut: Cut, parallel: Parallel) -> Any:
    """An output with each tensor of this rank's tokens replaced by that of all."""
    if isinstance(value, Tensor):
        if value.dim() >= 2 and value.shape[1] == 2 * cut.part:
            if parallel.rows is not None:
                return gather_rows(value, parallel.rows, cut, parallel.group())
            return gather_sequence(value, cut, parallel.group())
        raise Refused(
            f"sequence_parallel: the decoder gives a tensor of shape {tuple(value.shape)} beside its hidden states, whose "
            "tokens ds_minis cannot tell. Ask for the hidden states alone (no output_router_logits, no output_attentions)"
        )
    if isinstance(value, dict) and dataclasses.is_dataclass(value):
        return type(value)(**{k: _gathered(v, cut, parallel) for k, v in value.items()})
    if isinstance(value, tuple | list):
        return type(value)(_gathered(v, cut, parallel) for v in value)
    return value


def _gathered_beside_the_last(output: Any, cut: Cut, parallel: Parallel) -> Any:
    """The last hidden states are the loss's, which takes this rank's; what else was asked for is of all tokens."""
    if isinstance(output, dict) and dataclasses.is_dataclass(output):
        names = list(output)
        return type(output)(**{n: output[n] if n == names[0] else _gathered(output[n], cut, parallel) for n in names})
    if isinstance(output, tuple | list) and output:
        return type(output)([output[0], *(_gathered(v, cut, parallel) for v in output[1:])])
    return output


def _require_known(decoder: nn.Module, given: dict[str, Any], tokens: Any) -> None:
    """Refuses arguments that a part of the sequence cannot be given."""
    if not isinstance(tokens, Tensor):
        raise Refused(
            f"sequence_parallel: {type(decoder).__name__} was called without input_ids and without inputs_embeds"
        )
    for name, value in given.items():
        if name in _KNOWN | OF_DOCUMENTS | _OF_THE_LOSS or value is None:
            continue
        if isinstance(value, Tensor) and value.dim() > 0:
            raise Refused(
                f"sequence_parallel: {type(decoder).__name__} was given {name!r}, of shape {tuple(value.shape)}; ds_minis "
                f"cuts {', '.join(sorted(_KNOWN))} alone. Leave it out, or leave sequence_parallel out for this input"
            )
        if name in CACHE_NAMES:
            raise Refused(f"sequence_parallel: a pass that trains was given {name}: leave the cache out")
        if name in ("output_router_logits", "output_attentions") and value:
            raise Refused(
                f"sequence_parallel: {name}=True asks for what a rank does not have for all tokens: leave it out"
            )
    for name in ("output_router_logits", "output_attentions"):
        if getattr(getattr(decoder, "config", None), name, False):
            raise Refused(f"sequence_parallel: the model's config has {name}=True: set it to False")


def _padding(decoder: nn.Module, given: dict[str, Any], num_tokens: int) -> Tensor | None:
    """The user's padding; None if no token is masked."""
    mask = given.get("attention_mask")
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[1] != num_tokens:
        shape = f" of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else ""
        raise Refused(
            f"sequence_parallel: attention_mask is a {type(mask).__name__}{shape}; allowed: (batch, tokens) with 0 for "
            "padding. Masks of one's own of other shapes cannot be cut"
        )
    if bool(mask.all()):
        return None
    if not bool(mask[:, 0].all()):
        _require_no_positions_of_padding(decoder, given)
    return mask.bool()


def _require_no_positions_of_padding(decoder: nn.Module, given: dict[str, Any]) -> None:
    """Refuses padding on the left where the model would compute positions or chunks from the mask."""
    config = getattr(decoder, "config", None)
    if "chunked_attention" in (getattr(config, "layer_types", None) or ()):
        raise Refused(
            "sequence_parallel: padding on the left, and chunked attention counts from its end: pad on the right"
        )
    names = names_in(type(decoder).forward)
    if given.get("position_ids") is None and ("cumsum" in names or _embeds_by_mask(decoder)):
        raise Refused(
            f"sequence_parallel: {type(decoder).__name__} makes positions from the padding on the left: give position_ids, "
            "or pad on the right"
        )


def _embeds_by_mask(decoder: nn.Module) -> bool:
    return any("attention_mask" in argument_names(m) for m in decoder.children() if "osition" in type(m).__name__)


def _require_same_batch(tokens: Tensor, others: list[Any], parallel: Parallel) -> None:
    """Refuses different batches in a group: checksums of what the ranks were given, in one small collective."""
    group = parallel.group()
    shape = tokens.new_tensor(tokens.shape[:2], dtype=torch.int64)
    mine = torch.cat([shape, *(_checksum(v, tokens.device) for v in (tokens, *others))])
    of_ranks = torch.stack(gather(mine, group)).tolist()
    for rank, other in enumerate(of_ranks):
        if other != of_ranks[group.rank]:
            raise Refused(
                f"sequence_parallel: ranks {group.members[group.rank]} and {group.members[rank]} of one group were given "
                f"different batches (shapes {tuple(tokens.shape[:2])} and {tuple(other[:2])}): the "
                f"{group.size} ranks of a group must be given the same one. Loaders that go through Accelerator.prepare, the "
                "Trainer or deepspeed.initialize(training_data=...) do so; for one of your own: "
                "DistributedSampler(data, **ds_minis.sampler_arguments(model))"
            )


def _checksum(value: Any, device: torch.device) -> Tensor:
    """One number of 64 bits that tells what is at which place; of hidden states by their sum over H."""
    if not isinstance(value, Tensor):
        return torch.full((1,), -1, device=device)
    value = value.detach().to(device)
    numbers = value.flatten(2).sum(2, dtype=torch.float64).view(torch.int64) if value.dim() > 2 else value.long()
    places = torch.arange(1, numbers.numel() + 1, device=device).view_as(numbers)
    return (numbers * places).sum()[None]


def attach(decoder: nn.Module, parallel: Parallel) -> None:
    """Registers the hooks of a decoder that runs on a part of the sequence."""
    decoder.register_forward_pre_hook(CutInputs(parallel), with_kwargs=True, prepend=True)
    decoder.register_forward_hook(GatherOutputs(parallel), with_kwargs=True, always_call=True)
