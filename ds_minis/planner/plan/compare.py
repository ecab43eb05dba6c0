"""A plan: each way to train with the longest sequence that fits, what the asked length needs, and one sentence of advice."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ds_minis.memory.keep_budget import ALL, ATTENTION, MATMULS
from ds_minis.memory.learned_memory import RESERVE
from ds_minis.planner.inputs.setup import GIB, Setup
from ds_minis.planner.plan.planner import FITS, TOO_LARGE, UNCERTAIN, USABLE, Estimate, Planner
from ds_minis.planner.plan.settings import CHECKPOINTED, PLAIN, Candidate, candidates
from ds_minis.planner.plan.timing import StepTime, step_time
from ds_minis.planner.step.trace import CannotTrace

UNIT, MOST_TOKENS, MOST_ELEMENTS = 1024, 2**24, 2**31
# Of the host, for each process, where nothing is said: a node of 8 GPUs with 1 TiB. A node has at most 8.
HOST_MEMORY, GPUS_OF_NODE = 128 * GIB, 8
_MORE_GPUS = 2, 4, 8, 16, 32, 64, 128, 256


@dataclass(frozen=True)
class Row:
    """One way to train.

    Attributes:
        longest: tokens of the longest sequence that fits; 0 if none does.
        estimate: at the asked length, or at the longest (the shortest, where none fits).
        verdict: of that estimate.
        failure: why there is no estimate.
        notes: what ds_minis warned of in the traced step.
    """

    candidate: Candidate
    longest: int = 0
    estimate: Estimate | None = None
    verdict: str = TOO_LARGE
    time: StepTime | None = None
    failure: str = ""
    overflow: str = ""
    notes: tuple[str, ...] = ()


@dataclass
class Plan:
    """All that is known about a model on a card.

    Attributes:
        capacity: bytes of a device that a process may have.
        host_memory: bytes of a machine, which its processes share; None: `HOST_MEMORY` for each process.
        tokens: the asked length; None to find the longest.
        best: the row that is advised; None if nothing fits.
        gpus_needed: for a length that does not fit: the fewest GPUs with which it does, and the row then.
        kept: "all", "matmuls" or "attention" -> the longest sequence for which each layer keeps that, where free memory
            decides.
    """

    model: str
    setup: Setup
    planner: Planner
    gpu_memory: float
    capacity: float
    tokens: int | None
    rows: list[Row] = field(default_factory=list)
    best: Row | None = None
    gpus_needed: tuple[int, Row] | None = None
    host_memory: float | None = None
    kept: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def host_capacity(self, gpus: int) -> float:
        """Bytes of its host that each of so many processes may have."""
        return HOST_MEMORY if self.host_memory is None else self.host_memory / min(gpus, GPUS_OF_NODE)

    @property
    def verdict(self) -> str:
        found = {row.verdict for row in self.rows}
        return next((verdict for verdict in (FITS, UNCERTAIN) if verdict in found), TOO_LARGE)


def compare(
    config: Any,
    setup: Setup,
    *,
    model: str,
    gpu_memory: float,
    tokens: int | None = None,
    host_memory: float | None = None,
    cache: Path | None = None,
) -> Plan:
    """Plans for one configuration.

    Args:
        setup: what all ways have in common.
        gpu_memory: of a card, in GB as it is sold (80).
        tokens: the length of a sequence; None to find the longest.
        host_memory: of the machine that all processes share, in GB.

    Raises:
        CannotTrace: no way can be traced.
    """
    plan = Plan(model, setup, Planner(config, cache=cache), gpu_memory, gpu_memory * GIB * USABLE, tokens)
    if host_memory is not None:
        plan.host_memory = host_memory * GIB
    plan.rows = [_row(plan, candidate) for candidate in candidates(setup)]
    failures = [row.failure for row in plan.rows]
    if all(failures):
        raise CannotTrace(failures[0])
    plan.notes = list(dict.fromkeys(note for row in plan.rows for note in row.notes))
    plan.best = _best(plan, plan.rows)
    plan.kept = _kept(plan)
    if plan.verdict == TOO_LARGE:
        plan.gpus_needed = _with_more_gpus(plan)
    return plan


def _row(plan: Plan, candidate: Candidate) -> Row:
    setup, planner = candidate.setup, plan.planner
    try:
        host = plan.host_capacity(setup.gpus)
        longest = planner.longest(setup, plan.capacity, host_capacity=host, unit=UNIT, most=MOST_TOKENS)
        profile = planner.profile(planner.way(setup))
        at = plan.tokens or longest or min(UNIT, profile.positions or UNIT)
        estimate = planner.estimate(setup, at)
    except CannotTrace as error:
        return Row(candidate, failure=str(error))
    verdict = estimate.verdict(plan.capacity, host)
    if plan.tokens is not None and profile.positions and plan.tokens > profile.positions:
        return Row(candidate, failure=f"it has learned {profile.positions:,} positions, {plan.tokens:,} were asked for")
    if plan.tokens is not None and verdict == FITS:
        longest = max(longest, plan.tokens)  # which need be no multiple of the unit, nor at most the most that is tried
    time = step_time(setup, profile, planner.text, at)
    too_large, notes = overflow(planner, setup, at), tuple(profile.notes)
    return Row(candidate, longest, estimate, verdict, time, overflow=too_large, notes=notes)


def _kept(plan: Plan) -> dict[str, int]:
    """The longest sequences at which all layers keep so much; empty without a decision."""
    own = plan.setup.settings or {}
    decides = ("keep", "head_groups", "offload", "sequence_parallel", "memory_budget", "scope")
    if any(name in own for name in decides) or plan.setup.sequence_parallel > 1:
        return {}
    found = {}
    for level in (ALL, MATMULS, ATTENTION):
        setup = plan.setup.replace(settings={**own, "keep": level})
        with contextlib.suppress(CannotTrace):
            found[level] = plan.planner.longest(setup, plan.capacity * (1 - RESERVE), unit=UNIT, most=MOST_TOKENS)
    return found


def _best(plan: Plan, rows: list[Row]) -> Row | None:
    """The first row that fits the asked length, as rows go from cheap to dear; or the row with the longest sequence."""
    found = ([row for row in rows if row.estimate and row.verdict == verdict] for verdict in (FITS, UNCERTAIN))
    fitting = next(filter(None, found), [])
    if plan.tokens is not None:
        return next(iter(fitting), None)
    return max(fitting, key=lambda row: row.longest, default=None)


def _with_more_gpus(plan: Plan) -> tuple[int, Row] | None:
    engine = "zero3" if plan.setup.engine == "single" else plan.setup.engine
    for gpus in _MORE_GPUS:
        if gpus <= plan.setup.gpus:
            continue
        setup = plan.setup.replace(gpus=gpus, engine=engine)
        for candidate in candidates(setup):
            if candidate.name in (PLAIN, CHECKPOINTED):
                continue
            try:
                found = plan.planner.estimate(candidate.setup, plan.tokens or UNIT)
            except CannotTrace:
                continue
            if found.verdict(plan.capacity, plan.host_capacity(gpus)) == FITS:
                return gpus, _row(plan, candidate)
    return None


def overflow(planner: Planner, setup: Setup, tokens: int) -> str:
    """Names the tensor of more than 2^31 elements that a step has; empty if it has none."""
    profile = planner.profile(planner.way(setup))
    lengths = planner.lengths(setup, tokens, profile)
    sizes = [(wide["elements"] * lengths[wide["symbol"]], wide["what"]) for wide in profile.widest]
    elements, what = max(sizes, default=(0, ""))
    at = f" at {tokens:,} tokens"
    if elements <= MOST_ELEMENTS < profile.largest[1]:
        (name, elements), at = profile.largest, ""
        what = f"the parameter {name}"
    if elements <= MOST_ELEMENTS:
        return ""
    return (
        f"{what} has {elements:,.0f} elements{at}, more than 2^31 (2,147,483,648): kernels with 32-bit indices read and "
        "write wrong places there, often silently"
    )
