"""The ways to train that a plan compares, and which it advises."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from ds_minis.config import MiniSequenceConfig
from ds_minis.planner.inputs.setup import Setup

PLAIN, CHECKPOINTED = "plain", "plain + checkpointing"


@dataclass(frozen=True)
class Candidate:
    """One way to train.

    Attributes:
        name: for tables.
        costs: what it costs beside ds_minis's defaults, in a few words.
    """

    name: str
    setup: Setup
    costs: str = ""


def candidates(base: Setup) -> Iterator[Candidate]:
    """Plain training, checkpointing, and ds_minis in each setting worth having; cheaper ones first.

    Args:
        base: with the user's settings of mini-sequences, which all of ds_minis's rows have.
    """
    own = dict(base.settings or {})
    shared = own.pop("sequence_parallel", None)
    yield Candidate(PLAIN, base.replace(settings=None, checkpointing=False))
    yield Candidate(CHECKPOINTED, base.replace(settings=None))
    if own.get("scope", "layer") != "layer":
        yield Candidate(f"ds_minis, scope {own['scope']}", base)
        return
    groups, offload = {"head_groups": "auto"}, {"offload": "cpu"}
    rows: list[tuple[str, dict, str]] = [
        ("ds_minis", {}, ""),
        ("ds_minis, head_groups: auto", groups, "one more run of the attention"),
        ("ds_minis, offload: cpu", offload, "host memory"),
        ("ds_minis, head_groups: auto, offload: cpu", groups | offload, "one more run of the attention, host memory"),
    ]
    if shared is not None:
        widths = [shared]
    else:
        widths = [1, *([base.gpus] if base.gpus > 1 else [])]
    for width in widths:
        for name, settings, costs in rows:
            parallel = {} if width == 1 else {"sequence_parallel": width}
            if (settings or parallel) and not _go_together({**own, **settings, **parallel}):
                continue
            named = name if width == 1 else f"{name}, sequence_parallel: {_words(width)}"
            costs_too = "all GPUs train one sequence" if width != 1 else ""
            both = ", ".join(filter(None, (costs, costs_too)))
            yield Candidate(named, base.replace(settings={**own, **settings, **parallel}), both)


def _go_together(settings: dict) -> bool:
    """Whether a row's settings go with the user's, which the first row tells of if they are wrong by themselves."""
    with contextlib.suppress(ValueError):
        MiniSequenceConfig.from_value(settings, source="plan")
        return True
    return False


def _words(width) -> str:
    return str(width["size"] if isinstance(width, dict) else width)
