"""What a rank would hold at the size of real models with its sequences on 8 and 64 ranks, by the planner.

python scripts/bench/sequence_parallel_planned.py                       # a minute on one CPU core; no memory is used
python scripts/bench/sequence_parallel_planned.py --json benchmarks/sequence_parallel_simulated.json

Llama-3-8B and Llama-3.1-70B in bfloat16, full fine-tuning with AdamW under ZeRO-3, 16,384 tokens on each rank (131,072 on 8,
1,048,576 on 64), scope "layer". Beside them a rank that has the whole sequence by itself, as ds_minis without sequence
parallelism gives it. The transient bytes are layer inputs and what the computation needs beside weights, gradients, optimizer
states and the engine's buffers.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from common import GIB, envelope, write

from ds_minis.planner.inputs.models import shipped_config
from ds_minis.planner.inputs.setup import Setup
from ds_minis.planner.plan.planner import Planner

MODELS = {"Llama-3-8B": "meta-llama/Meta-Llama-3-8B", "Llama-3-70B": "meta-llama/Llama-3.1-70B"}
STATES = ("parameters", "gradients", "optimizer", "engine", "fixed")


def planned(planner: Planner, ranks: int, tokens: int, mode: str | None) -> dict[str, float]:
    """Bytes of a rank, by part."""
    settings = {} if mode is None else {"sequence_parallel": {"size": ranks, "mode": mode}}
    return planner.estimate(Setup(engine="zero3", gpus=ranks, settings=settings), tokens).parts()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16384, help="of each rank")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--json", type=Path, help="e.g. benchmarks/sequence_parallel_simulated.json")
    args = parser.parse_args()
    rows = []
    for name, hub_id in MODELS.items():
        config = shipped_config(hub_id)
        planner, heads = Planner(config), config.num_attention_heads
        for ranks in args.ranks:
            for mode in (None, "gather", "ulysses", "ring"):
                if mode == "ulysses" and heads % ranks:
                    continue
                parts = planned(planner, ranks, args.tokens * ranks, mode)
                transient = sum(nbytes for part, nbytes in parts.items() if part not in STATES)
                rows.append({"model": name, "ranks": ranks, "mode": mode, "parts": parts, "transient": transient})
                print(
                    f"{name:<12}{ranks:>4} ranks  {mode or 'whole sequence':<15}{transient / GIB:>9.1f} GiB transient, "
                    f"{sum(parts.values()) / GIB:>8.1f} in all"
                )
    write(args.json, envelope("sequence_parallel_planned", args, simulated=True, results=rows))


if __name__ == "__main__":
    main()
