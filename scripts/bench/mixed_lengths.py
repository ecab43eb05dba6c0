"""Steps of a mix of lengths, as in supervised fine-tuning: memory budgets beside checkpointing and no checkpointing.

python scripts/bench/mixed_lengths.py --json benchmarks/mixed_lengths_cpu.json

Lengths are lognormal: most short, few at the maximum. Products are counted in all steps. Seconds are of one thread's CPU
time, in rounds with the variants in another order each, so that other programs hardly matter. "no checkpointing" has no
budget: it shows what keeping everything always takes.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import time

import torch
from common import checkpointed, envelope, small_llama, train_step, write
from flops import Flops
from paired import compared, interleaved

from ds_minis import convert_to_mini_sequence, mini_sequence_report


def mix(count: int, longest: int, seed: int = 0) -> list[int]:
    """Lengths in tokens, at most `longest`, of which one has all."""
    generator = torch.Generator().manual_seed(seed)
    drawn = (torch.randn(count - 1, generator=generator) * 0.8).exp() * longest / 10
    return [longest, *drawn.clamp(16, longest).int().tolist()]


def variants(args, lora: bool) -> dict[str, torch.nn.Module]:
    plain = small_llama(args, lora=lora)
    models = {"no checkpointing": plain}
    settings = {"ds_minis, input": {"keep": "input"}}
    settings |= {f"ds_minis, {mib:g} MiB": {"memory_budget": mib / 1024} for mib in args.budgets_mib}
    for name in ("checkpointing", *settings):
        models[name] = checkpointed(copy.deepcopy(plain))
    for name, own in settings.items():
        with contextlib.redirect_stdout(io.StringIO()):
            convert_to_mini_sequence(models[name], own)
    return models


def measured(args, lora: bool) -> list[dict]:
    models, lengths = variants(args, lora), mix(args.count, args.longest)
    products, kept = {}, {}
    for name, model in models.items():
        train_step(model, min(lengths), args.vocab)
        train_step(model, sorted(lengths)[len(lengths) // 2], args.vocab)
        with Flops() as counter:
            kept[name] = []
            for length in lengths:
                train_step(model, length, args.vocab)
                report = mini_sequence_report(model)
                kept[name].append("" if report is None else report.last_kept)
        products[name] = counter.total
    ways = {
        name: (lambda model=model: [train_step(model, length, args.vocab) for length in lengths])
        for name, model in models.items()
    }
    times = compared(interleaved(ways, args.rounds, clock=time.process_time), "checkpointing")
    rows = []
    for name in models:
        rows.append(
            {
                "train": "lora" if lora else "full",
                "variant": name,
                "products": products[name] / products["checkpointing"],
                **times[name],
                "kept, longest": kept[name][0],
                "kept, median": kept[name][sorted(range(len(lengths)), key=lengths.__getitem__)[len(lengths) // 2]],
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (
        ("hidden", 512),
        ("layers", 4),
        ("vocab", 1024),
        ("count", 8),
        ("longest", 1024),
        ("rounds", 3),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--budgets_mib", type=float, nargs="+", default=[30.0, 100.0])
    parser.add_argument("--json", help="write the results to this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = [row for lora in (True, False) for row in measured(args, lora)]
    results = {"lengths": mix(args.count, args.longest), "rows": rows}
    write(args.json, envelope("mixed_lengths", args, simulated=False, results=results))


if __name__ == "__main__":
    main()
