"""Traces a call on the meta device, without values: at its own length, and at the length of a chunk.

This costs no memory and little time at any length. Where a module cannot be traced (its control flow depends on values, or an
operation has no meta kernel), the steps up to there are compared, and runs with values check the rest.

B batch, S tokens, H hidden size, R rows, E width of a value's head.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ds_minis.tiling.core.out_of_memory import is_out_of_memory
from ds_minis.tiling.core.replay import seed_generators
from ds_minis.tiling.core.row_args import RowArgs
from ds_minis.tiling.verify.op_trace import SHARED_DRAW, Step, Watch, difference, versions_matter


@dataclass
class Reach:
    """The lengths for which an analysis holds.

    Attributes:
        longest: tokens or rows of the longest call.
        shortest_part, longest_part: tokens or rows of the smallest and the largest chunk.
        complete: whether the module was traced to its end.
        versions: whether values of frozen tensors may decide what it does.
        draws: whether it may draw random numbers.
    """

    longest: float = float("inf")
    shortest_part: float = 0
    longest_part: float = float("inf")
    complete: bool = False
    versions: bool = True
    draws: bool = True

    def holds(self, length: int, part: int) -> bool:
        return length <= self.longest and self.shortest_part <= part <= self.longest_part

    def set(self, length: int, chunk: int, parts: Sequence[int]) -> None:
        self.longest, self.shortest_part, self.longest_part = length, min(chunk, *parts), max(chunk, *parts)

    def without_end(self) -> None:
        """Removes the limits: a longer call would be analyzed with the same runs."""
        self.longest, self.shortest_part, self.longest_part = float("inf"), 0, float("inf")

    def extended(self, earlier: Reach) -> Reach:
        """The union with the lengths of an earlier analysis."""
        return Reach(
            max(self.longest, earlier.longest),
            min(self.shortest_part, earlier.shortest_part),
            max(self.longest_part, earlier.longest_part),
            self.complete,
            self.versions or earlier.versions,
            self.draws or earlier.draws,
        )


def follow_module(module: nn.Module, forward: Callable[..., Any], call: RowArgs, chunk_rows: int, reach: Reach) -> str:
    """The reason why a module's operations are not token-wise; empty if none shows. Sets the lengths of `reach`."""
    num_rows = call.num_rows
    parts = chunk_lengths(num_rows, chunk_rows)
    reach.set(num_rows, chunk_rows, parts)
    if call.input.is_meta or num_rows < 4:
        return ""
    try:
        bare = call.mapped(to_meta)
        rows = bare.rows()
    except Exception:
        return ""

    def run(arguments: tuple[list, dict[str, Any]]) -> None:
        forward(*arguments[0], **arguments[1])

    with on_meta(module):
        own = record_run(run, bare.whole(rows))
        whole = record_run(run, bare.with_rows(rows))
        runs = [(record_run(run, bare.with_rows([row[:size] for row in rows])), size) for size in parts]
    reason = "" if own.python == whole.python else SHARED_DRAW
    reason = reason or _other_numbers(own, whole)
    return compare_runs(whole, runs, num_rows, reach, reason)


@dataclass
class _Followed:
    steps: Sequence[Step]
    ended: bool
    python: bool


def record_run(run: Callable[[Any], None], argument: Any) -> _Followed:
    seed_generators(None, 0)
    watch, ended = Watch(), True
    try:
        with torch.no_grad(), watch:
            run(argument)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        ended = False
    finally:
        watch.undo_writes()
    return _Followed(watch.steps, ended, watch.drew_in_python)


def compare_runs(
    whole: _Followed, runs: Sequence[tuple[_Followed, int]], length: int, reach: Reach, reason: str
) -> str:
    if whole.python:
        reason = reason or SHARED_DRAW
    ended = whole.ended and all(part.ended for part, _ in runs)
    for part, size in runs:
        both_ended = whole.ended and part.ended
        cut = (whole.steps, part.steps) if both_ended else _until_the_end(whole, part)
        reason = reason or difference(*cut, length, size, ended=both_ended)
    reach.complete = ended
    reach.versions = not ended or any(versions_matter(whole.steps, part.steps) for part, _ in runs)
    reach.draws = not ended or any(step.draws for run in (whole, *(part for part, _ in runs)) for step in run.steps)
    return reason


def _until_the_end(whole: _Followed, part: _Followed) -> tuple[Sequence[Step], Sequence[Step]]:
    count = min(len(whole.steps), len(part.steps))
    return whole.steps[:count], part.steps[:count]


def _other_numbers(own: _Followed, whole: _Followed) -> str:
    """The reason if a module treats flattened rows differently from the same rows in sequences, else empty."""
    if not (own.ended and whole.ended):
        return ""
    mine = [(s.func, [v for v in s.args if isinstance(v, float | bool | str)]) for s in own.steps if _computes(s)]
    theirs = [(s.func, [v for v in s.args if isinstance(v, float | bool | str)]) for s in whole.steps if _computes(s)]
    return "" if mine == theirs else "its operations depend on the length of the sequences"


_LAYOUT = frozenset("view _unsafe_view reshape expand clone unsqueeze squeeze permute transpose t as_strided".split())


def _computes(step: Step) -> bool:
    name = getattr(step.packet, "__name__", "")
    return name not in _LAYOUT and name not in ("mm", "bmm", "addmm", "baddbmm", "matmul", "linear", "mul", "add")


def chunk_lengths(length: int, chunk: int) -> list[int]:
    """The chunk sizes to trace: a full chunk and the last one."""
    chunk = chunk if chunk < length else max(2, length // 2)
    last = length % chunk
    return [chunk, last] if last > 1 else [chunk]


def to_meta(t: Tensor) -> Tensor:
    return torch.empty_like(t, device="meta")


def map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, tuple | list):
        return type(value)(map_tensors(v, function) for v in value)
    return function(value) if isinstance(value, Tensor) else value


@contextlib.contextmanager
def on_meta(module: nn.Module) -> Iterator[None]:
    """Inside, the module's tensors are on the meta device."""
    before, made = [], {}
    try:
        for part in module.modules():
            for holder in (part._parameters, part._buffers, part.__dict__):
                for name, value in list(holder.items()):
                    if isinstance(value, Tensor):
                        try:
                            substitute = made[id(value)] if id(value) in made else to_meta(value.detach())
                        except Exception:  # a packed tensor: a module that uses it cannot be traced
                            continue
                        made[id(value)] = substitute
                        before.append((holder, name, value))
                        holder[name] = substitute
        yield
    finally:
        for holder, name, value in before:
            holder[name] = value
