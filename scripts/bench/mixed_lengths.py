"""Steps of a mix of lengths, as in supervised fine-tuning: a memory budget beside checkpointing and no checkpointing.

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
from common import envelope, write
from flops import Flops
from paired import compared, interleaved
from transformers import AutoModelForCausalLM, LlamaConfig

from ds_minis import convert_to_mini_sequence, mini_sequence_report
from ds_minis.planner.adapters import add_lora


def mix(count: int, longest: int, seed: int = 0) -> list[int]:
    """Lengths in tokens, at most `longest`, of which one has all."""
    generator = torch.Generator().manual_seed(seed)
    drawn = (torch.randn(count - 1, generator=generator) * 0.8).exp() * longest / 10
    return [longest, *drawn.clamp(16, longest).int().tolist()]


def variants(args, lora: bool) -> dict[str, torch.nn.Module]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 11 // 4,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=max(1, args.hidden // 256),
    )
    plain = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").train()
    if lora:
        add_lora(plain, 16)
    models = {"no checkpointing": plain}
    for name in ("checkpointing", "ds_minis, input", "ds_minis, auto"):
        models[name] = copy.deepcopy(plain)
        models[name].gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    settings = {"ds_minis, input": {"keep": "input"}, "ds_minis, auto": {"memory_budget": args.budget_mib / 1024}}
    for name, own in settings.items():
        with contextlib.redirect_stdout(io.StringIO()):
            convert_to_mini_sequence(models[name], own)
    return models


def step(model: torch.nn.Module, length: int, vocab: int) -> None:
    ids = torch.randint(vocab, (1, length), generator=torch.Generator().manual_seed(length))
    model.zero_grad(set_to_none=True)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()


def measured(args, lora: bool) -> list[dict]:
    models, lengths = variants(args, lora), mix(args.count, args.longest)
    products, kept = {}, {}
    for name, model in models.items():
        step(model, min(lengths), args.vocab)
        step(model, sorted(lengths)[len(lengths) // 2], args.vocab)
        with Flops() as counter:
            kept[name] = []
            for length in lengths:
                step(model, length, args.vocab)
                report = mini_sequence_report(model)
                kept[name].append("" if report is None else report.last_kept)
        products[name] = counter.total
    ways = {
        name: (lambda model=model: [step(model, length, args.vocab) for length in lengths])
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
        ("budget_mib", 100),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", help="write the results to this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = [row for lora in (True, False) for row in measured(args, lora)]
    results = {"lengths": mix(args.count, args.longest), "rows": rows}
    write(args.json, envelope("mixed_lengths", args, simulated=False, results=results))


if __name__ == "__main__":
    main()
