"""Adds a note to torch's out-of-memory errors: where memory ran out, and which settings need less there.

The error's type and message do not change. The innermost place that an error passes through writes the note.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import nn

from ds_minis.config import AUTO, MiniSequenceConfig

_NOTE = "ds_minis: out of memory "
_SHORTER = "shorter sequences (sequence parallelism gives each device a part of them)"


class OutOfMemoryNote:
    """Adds a note to an out-of-memory error raised inside, unless the error already has one; context or decorator.

    Args:
        note: the note, or a function that writes it when there is an error.
    """

    def __init__(self, note: str | Callable[[], str]):
        self._note = note

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, _: TracebackType | None) -> None:
        if is_out_of_memory(error):
            _add(error, self._note if isinstance(self._note, str) else self._note())

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Without entering a context: `add_product` runs once for each matmul."""

        @functools.wraps(function)
        def noted(*args, **kwargs):
            try:
                return function(*args, **kwargs)
            except Exception as error:
                self.__exit__(type(error), error, None)
                raise

        return noted


def is_out_of_memory(error: BaseException | None) -> bool:
    """A device's error, or a CPU allocator's: torch raises that one as a plain RuntimeError."""
    on_cpu = isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    return on_cpu or isinstance(error, torch.OutOfMemoryError)


def _add(error: BaseException, note: str) -> None:
    if not any(known.startswith(_NOTE) for known in getattr(error, "__notes__", ())):
        error.add_note(_NOTE + note)


def in_a_chunk(config: MiniSequenceConfig, setting: str, chunk_rows: int, num_rows: int) -> OutOfMemoryNote:
    """The note for the chunks of one operation.

    Args:
        setting: "chunk_size", or "loss_chunk_size" for the LM head and the loss.
    """
    place, change = "a chunk" if setting == "chunk_size" else "a chunk of the loss", "smaller"
    if setting == "chunk_size" and config.num_mini_sequences is not None:
        setting, change = "num_mini_sequences", "larger"
    rows = f"{chunk_rows} of {num_rows} rows" if chunk_rows < num_rows else f"{num_rows} rows, all that there are"
    return OutOfMemoryNote(
        f'in {place}, of {rows}. A {change} "{setting}" in the mini-sequence configuration needs less here'
    )


def in_attention(config: MiniSequenceConfig, layer: str, num_tokens: int) -> str:
    """The note for a tiled layer's attention: its queries, keys and values exist for all tokens at once."""
    ways = []
    if config.keep == "attention":
        ways.append('"keep": "input" (it is computed twice, and not kept)')
    elif config.head_groups != AUTO:
        now = "all heads at once" if config.head_groups == 1 else f"{config.head_groups} groups"
        ways.append(f'"head_groups": "auto" (one KV head at a time; now {now})')
    return (
        f"in the attention of a {layer}, which is run for all {num_tokens} tokens at once: no chunk size changes that. "
        f"What needs less: {_in_words([*ways, *_fewer_inputs(config), _SHORTER])}"
    )


def for_layer_inputs(config: MiniSequenceConfig, layer: str, num_tokens: int) -> str:
    """The note for allocating hidden states of all tokens; one per layer is kept until backward."""
    return (
        f"for the input or the result of a {layer} ({num_tokens} tokens), of which one per layer is kept until backward: no "
        f"chunk size changes that. What needs less: {_in_words([*_fewer_inputs(config), _SHORTER])}"
    )


in_a_first_call = OutOfMemoryNote(
    "while a few tokens were asking whether a module can be tiled: memory was nearly used up by what was there before. What "
    f"needs less: {_SHORTER}, or a smaller model or batch on each device"
)
for_weight_gradients = OutOfMemoryNote(
    "for the gradients of weights, which no chunk size changes. What needs less: weights in parts (FSDP, ZeRO-3) or fewer "
    "that are trained (LoRA)"
)


def note_outside(config: MiniSequenceConfig) -> None:
    """Call this when a forward pass ends: adds a note to an error raised outside of tiled modules."""
    error = sys.exception()
    if not is_out_of_memory(error):
        return
    ways = [f'"scope": "layer" (now "{config.scope}")'] if config.scope != "layer" else []
    ways += ["activation checkpointing of layers that are not tiled as a whole", _SHORTER]
    _add(
        error,
        f"in {_innermost_module(error)}, outside of what is tiled: no chunk size changes that, and "
        f"mini_sequence_report(model) says what is not tiled, and why. What needs less: {_in_words(ways)}",
    )


def _innermost_module(error: BaseException) -> str:
    """The class of the module whose forward raised the error."""
    name, traceback = "the model", error.__traceback__
    while traceback is not None:
        owner = traceback.tb_frame.f_locals.get("self")
        if isinstance(owner, nn.Module):
            name = f"a {type(owner).__name__}"
        traceback = traceback.tb_next
    return name


def _fewer_inputs(config: MiniSequenceConfig) -> list[str]:
    return [] if config.offload or config.scope != "layer" else ['"offload": "cpu" (layer inputs leave the device)']


def _in_words(ways: list[str]) -> str:
    return ways[0] if len(ways) == 1 else f"{', '.join(ways[:-1])}, or {ways[-1]}"
