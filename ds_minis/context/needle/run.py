"""Runs a needle test over lengths and depths, on one process or several, and keeps its results in a JSON file.

The file is written after each cell (of each group of processes), so a run that was stopped goes on where it was. A file of
another model, or of other settings, is refused. A cell's result does not depend on the number
of processes.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ds_minis import __version__
from ds_minis.context.needle.model import predict
from ds_minis.context.needle.task import NeedleMaker, WrongTask

FORMAT = 1
_EDGE = 1 << 16


class OtherRun(ValueError):
    """A results file is of another model or of other settings."""


@dataclass(frozen=True)
class Ranks:
    """How the processes are divided: `size` of them share each sequence, and the groups are given cells in turn.

    Attributes:
        size: processes that share a sequence.
        group: this process's group.
        num_groups: groups.
        is_main: whether this process writes the results.
    """

    size: int = 1
    group: int = 0
    num_groups: int = 1
    is_main: bool = True

    @classmethod
    def current(cls, size: int) -> Ranks:
        """Of the process group that torch.distributed runs.

        Raises:
            WrongTask: the size does not divide the number of processes.
        """
        several = dist.is_available() and dist.is_initialized()
        world, rank = (dist.get_world_size(), dist.get_rank()) if several else (1, 0)
        if size < 1 or world % size:
            divisors = ", ".join(str(n) for n in range(1, world + 1) if world % n == 0)
            raise WrongTask(f"sequence_parallel: {divisors} is allowed with {world} processes, got {size}")
        return cls(size, rank // size, world // size, rank == 0)


def run_needle(
    model: nn.Module,
    maker: NeedleMaker,
    cells: Sequence[tuple[int, float]],
    *,
    about: dict[str, Any],
    output: Path | None = None,
    ranks: Ranks | None = None,
    batch_size: int = 1,
    decode: Callable[[list[int]], str] | None = None,
    progress: Callable[[dict[str, Any], int, int], None] | None = None,
) -> dict[str, Any]:
    """Tests all cells of length and depth; gives the results, the same on every rank.

    Args:
        about: what the results are of, which a file that is gone on with must agree with.
        output: the results' file. Cells that it has are not run again.
        batch_size: tests in one forward pass.
        decode: token ids -> text, for what a model wrote in the place of an answer.
        progress: is called on rank 0 after each cell with its result, its number and the number of all cells.

    Raises:
        OtherRun: `output` has results of something else.
    """
    ranks = ranks or Ranks()
    about = {"format": FORMAT, "task": maker.task.to_value(), **about}
    done = _agreed(load_done(output, about) if output and ranks.is_main else {}, ranks)
    pending = [cell for cell in dict.fromkeys(cells) if _key(*cell) not in done]
    total, start = len(pending), time.monotonic()
    for first in range(0, total, ranks.num_groups):
        batch = pending[first : first + ranks.num_groups]
        # A group without a cell of its own in the last turn repeats the first one: all ranks run the same passes.
        length, depth = batch[ranks.group] if ranks.group < len(batch) else batch[0]
        mine = _cell(model, maker, length, depth, batch_size, ranks, decode)
        for (length, depth), result in zip(batch, of_all_groups(mine, ranks), strict=False):
            done[_key(length, depth)] = result
            if progress and ranks.is_main:
                progress(result, first + batch.index((length, depth)) + 1, total)
        if output and ranks.is_main:
            write(output, as_results(about, done))
    results = as_results(about, done)
    results["seconds"] = round(time.monotonic() - start, 1)
    return results


def _cell(model, maker, length, depth, batch_size, ranks, decode) -> dict[str, Any]:
    tests = [maker.make(length, depth, sample) for sample in range(maker.task.num_samples)]
    outcomes, start = [], time.monotonic()
    for first in range(0, len(tests), batch_size):
        outcomes += predict(model, tests[first : first + batch_size], divided=ranks.size > 1)
    samples = []
    for test, outcome in zip(tests, outcomes, strict=True):
        sample = {"answer": test.answer, "right": outcome.is_right}
        if not outcome.is_right:
            sample["written"] = decode(outcome.predicted_ids) if decode else outcome.predicted_ids
        samples.append(sample)
    return {
        "length": length,
        "depth": depth,
        "right": sum(outcome.is_right for outcome in outcomes),
        "total": len(tests),
        "seconds": round(time.monotonic() - start, 2),
        "samples": samples,
    }


def as_results(about: dict[str, Any], done: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The results as their file holds them."""
    cells = sorted(done.values(), key=lambda cell: (cell["length"], cell["depth"]))
    right, total = sum(cell["right"] for cell in cells), sum(cell["total"] for cell in cells)
    return {
        **about,
        "accuracy": round(right / total, 4) if total else None,
        "versions": {"ds_minis": __version__, "torch": torch.__version__},
        "cells": cells,
    }


def load_done(output: Path, about: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The cells that a results file has; empty if there is no file.

    Raises:
        OtherRun: the file is of something else; with what differs, and what to do.
    """
    if not output.exists():
        return {}
    results = read(output)
    differing = [name for name in about if results.get(name) != json.loads(json.dumps(about[name]))]
    if differing:
        name = differing[0]
        was, now = results.get(name), about[name]
        if isinstance(was, dict) and isinstance(now, dict):
            name, was, now = next(
                ((f"{name}.{key}", was.get(key), now.get(key)) for key in now if was.get(key) != now[key]),
                (name, was, now),
            )
        raise OtherRun(
            f"{output} has results of another run: {name} was {was!r} and is {now!r}. Give another --output, or --overwrite"
        )
    return {_key(cell["length"], cell["depth"]): cell for cell in results["cells"]}


def read(path: Path) -> dict[str, Any]:
    """A results file.

    Raises:
        OtherRun: it is none.
    """
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        if results["format"] == FORMAT and isinstance(results["cells"], list):
            return results
    except (ValueError, KeyError, TypeError):
        pass
    raise OtherRun(f"{path} is no results file of ds-minis needle (format {FORMAT})")


def write(path: Path, results: dict[str, Any]) -> None:
    """Writes a results file as a whole: a run that is stopped meanwhile leaves the one before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    beside.replace(path)


def fingerprint(folder: str) -> str:
    """Tells weights in a folder from others: sizes, and the first and last 64 KiB of each file. Empty for a hub id."""
    digest, found = hashlib.blake2b(digest_size=8), False
    for file in sorted(Path(folder).glob("*.safetensors")):
        found = True
        with file.open("rb") as weights:
            digest.update(f"{file.name} {file.stat().st_size}".encode() + weights.read(_EDGE))
            weights.seek(max(0, file.stat().st_size - _EDGE))
            digest.update(weights.read(_EDGE))
    return digest.hexdigest() if found else ""


def _key(length: int, depth: float) -> str:
    return f"{length} {depth:.6f}"


def _agreed(value: Any, ranks: Ranks) -> Any:
    """Rank 0's value, on every rank."""
    if ranks.size * ranks.num_groups == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def of_all_groups(value: Any, ranks: Ranks) -> list[Any]:
    """The value of each group, by its first rank."""
    if ranks.size * ranks.num_groups == 1:
        return [value]
    values = [None] * (ranks.size * ranks.num_groups)
    dist.all_gather_object(values, value)
    return values[:: ranks.size]
