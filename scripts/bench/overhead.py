"""What ds_minis adds to a step where there is little to compute: Python, autograd nodes, verification.

python scripts/bench/overhead.py                 # three minutes on 2 CPU cores
python scripts/bench/overhead.py --json overhead.json

A small Llama in float32 with plain checkpointing, beside the same model converted, interleaved: full fine-tuning with hidden
size 256, 24 layers and 1,024 tokens in one chunk and in four, and LoRA on all linear layers with hidden size 64, 24 layers
and 64 tokens. Then layers that keep everything, beside the same model without checkpointing: hidden size 512, 4 layers.
Ratios are of one round, their median and quartiles are printed. Last, the first step of a converted model, in which its
layers are verified, in steps of the plain one.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import time
import warnings
from pathlib import Path

import torch
from paired import compared, interleaved
from transformers import AutoModelForCausalLM, LlamaConfig

from ds_minis import convert_to_mini_sequence

VOCAB = 512
CASES = {
    "full, hidden 256, 1,024 tokens": {"hidden": 256, "tokens": 1024, "lora": False, "chunks": (1024, 256)},
    "LoRA, hidden 64, 64 tokens": {"hidden": 64, "tokens": 64, "lora": True, "chunks": (64,)},
    **{
        f"{name}, hidden 512, 1,024 tokens, everything kept": {
            "hidden": 512, "tokens": 1024, "lora": name == "LoRA", "chunks": (256,), "layers": 4, "keep": "all",
        }
        for name in ("full", "LoRA")
    },
}  # fmt: skip


def make_model(hidden: int, layers: int, lora: bool):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, attn_implementation="sdpa",
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).train()
    if lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"))
        model.enable_input_require_grads()
    return model


def step(model, input_ids: torch.Tensor) -> None:
    model.zero_grad(set_to_none=True)
    model(input_ids=input_ids, labels=input_ids, use_cache=False).loss.backward()


def measure(
    hidden: int, tokens: int, lora: bool, chunks: tuple[int, ...], *, layers: int, rounds: int, keep: str = "input"
) -> dict:
    plain, usual = make_model(hidden, layers, lora), "plain checkpointing" if keep == "input" else "no checkpointing"
    models = {usual: plain}
    for chunk in chunks:
        name = f"ds_minis, {-(-tokens // chunk)} chunk{'s' if chunk < tokens else ''}"
        models[name] = copy.deepcopy(plain)
        with contextlib.redirect_stdout(io.StringIO()):
            # One process alone runs what fits into one chunk as it is: without recomputation, below plain's time.
            convert_to_mini_sequence(models[name], {"chunk_size": chunk, "loss": False, "keep": keep})
    if keep == "input":
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # renamed after our oldest transformers
            plain.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    input_ids = torch.randint(0, VOCAB, (1, tokens), generator=torch.Generator().manual_seed(0))
    first = {}
    for name, model in models.items():
        start = time.perf_counter()
        step(model, input_ids)
        first[name] = time.perf_counter() - start
    times = interleaved({name: lambda m=model: step(m, input_ids) for name, model in models.items()}, rounds)
    result = compared(times, usual)
    return {name: row | {"first_step": first[name] / result[usual]["seconds"]} for name, row in result.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = {}
    for title, settings in CASES.items():
        print(title)
        results[title] = measure(**{"layers": args.layers, **settings}, rounds=args.rounds)
        for name, row in results[title].items():
            low, high = row["ratio_quartiles"]
            print(
                f"  {name:24} {1e3 * row['seconds']:8.1f} ms  {row['ratio']:.3f}x ({low:.3f} to {high:.3f})"
                f"  first step {row['first_step']:.1f} steps of plain"
            )
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
