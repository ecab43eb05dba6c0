"""Compares the planner with published peaks, and writes the table into docs/planner.md.

    python scripts/planner_backtest.py            # writes the table
    python scripts/planner_backtest.py --check    # exit status 1 if the table is another

The published runs are other libraries': checkpointing with a chunked loss, partly with checkpoints offloaded to the host and
with torch's context parallelism. Of ds_minis they have nothing, so they are planned as checkpointing with a tiled loss (one
norm of a layer is tiled too, as a conversion must have something to tile).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from made_blocks import make_block

from ds_minis.planner.devices import engines
from ds_minis.planner.devices.sequence import heads_of
from ds_minis.planner.inputs.models import shipped_config
from ds_minis.planner.inputs.setup import GIB, Setup
from ds_minis.planner.plan.planner import USABLE, Planner
from ds_minis.planner.step.lengths import SYMBOLS

PAGE = Path(__file__).parents[1] / "docs" / "planner.md"
TILED_LOSS = {"scope": "tokens", "include": ["*.input_layernorm"]}
ON_8 = {**TILED_LOSS, "sequence_parallel": {"size": 8, "mode": "gather"}}
M = 2**20


@dataclass(frozen=True)
class Case:
    """A published peak (GB of tensors), or a published longest length."""

    what: str
    model: str
    setup: Setup
    tokens: int
    published: float
    offloaded: bool = False
    note: str = ""


_TRL = Setup(engine="fsdp2", gpus=8, settings=ON_8)
_AXOLOTL = Setup(settings=TILED_LOSS, optimizer="adamw_8bit", accumulation=2)
_GATHERED = "torch's context parallelism, which gathers keys and values by accelerate's default"
_8_BIT = "the optimizer is not stated; 8-bit states, and gradients there from the start, as offloading saves all inputs"
PEAKS = (
    Case("TRL long-context example (trl#6846)", "Qwen/Qwen3-8B", _TRL, M, 56.2, True, _GATHERED),
    Case("accelerate#4175, checkpointing", "Qwen/Qwen3-0.6B", _TRL, M, 27.9, False, _GATHERED),
    Case("accelerate#4175, offloaded", "Qwen/Qwen3-0.6B", _TRL, M, 20.8, True, _GATHERED),
    Case("axolotl#3733, checkpointing", "Qwen/Qwen3-8B", _AXOLOTL, 16384, 63.3, False, _8_BIT),
    Case("axolotl#3733, offloaded", "Qwen/Qwen3-8B", _AXOLOTL, 16384, 58.9, True, _8_BIT),
    Case("axolotl#3733, checkpointing", "Qwen/Qwen3-8B", _AXOLOTL, 32768, 73.1, False, _8_BIT),
    Case("axolotl#3733, offloaded", "Qwen/Qwen3-8B", _AXOLOTL, 32768, 64.3, True, _8_BIT),
)
_MINI_S = Setup(settings=TILED_LOSS, optimizer_in_backward=True)
_BETWEEN = "optimizer in backward; its loop over the MLP is left out"
LENGTHS = (
    Case("MST, one A100 80 GB", "meta-llama/Meta-Llama-3-8B", _MINI_S, 60 * 1024, 80, note=_BETWEEN),
    Case("MST, one A100 80 GB", "meta-llama/Llama-2-7b-hf", _MINI_S, 84 * 1024, 80, note=_BETWEEN),
)


def context_parallel_bytes(text: Any, rows: float, setup: Setup) -> float:
    """What torch's context parallelism holds in the backward of one attention beside q, k, v and their gradients in 16 bits.

    By `_templated_ring_attention_backward` of torch 2.13 with gathered keys and values: those of all ranks, a contiguous
    copy of the rank's own and what it sends of them; float32 sums of the gradients of its queries, keys and values, the
    last two as they are sent, as they are received, and as they are updated.
    """
    heads, kv_heads, width = heads_of(text)
    own, queries = 2 * rows * kv_heads * width, rows * heads * width
    return (setup.sequence_parallel + 2) * own * setup.itemsize + 4 * (queries + 3 * own)


def planned_bytes(case: Case) -> float:
    """Bytes of tensors at the peak."""
    planner = Planner(shipped_config(case.model))
    profile = planner.profile(planner.way(case.setup))
    held = engines.held_by(case.setup, planner.counts(profile))
    lengths = planner.lengths(case.setup, case.tokens, profile)
    if case.setup.sequence_parallel > 1:
        lengths[SYMBOLS.index("attention")] = context_parallel_bytes(planner.text, lengths[1], case.setup)
    peak = profile.peak(lengths, held.varying_bytes, offloaded=case.offloaded)
    always = sum(term.nbytes for term in [*held.terms, *held.during] if not term.on_host)
    return always + peak.activations + peak.held


def table() -> str:
    lines = [
        "| run | model | tokens | published | planned | difference | taken for it |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in PEAKS:
        found = planned_bytes(case) / 1e9
        lines.append(
            f"| {case.what} | {case.model} | {case.tokens:,} | {case.published} GB | {found:.1f} GB | "
            f"{found / case.published - 1:+.0%} | {case.note} |"
        )
    for case in LENGTHS:
        planner = Planner(shipped_config(case.model))
        found = planner.longest(case.setup, case.published * GIB * USABLE)
        lines.append(
            f"| {case.what} | {case.model} | the longest | {case.tokens:,} tokens | {found:,} tokens | "
            f"{found / case.tokens - 1:+.0%} | {case.note} |"
        )
    return "\n" + "\n".join(lines) + "\n\n"


if __name__ == "__main__":
    make_block(PAGE, "back-test", table, __doc__)
