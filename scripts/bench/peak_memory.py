"""Peak of live tensor bytes, and time, of one training step: plain checkpointing beside mini-sequences.

    python scripts/bench/peak_memory.py                       # a small Llama, 4,096 tokens, on the CPU: within a minute
    python scripts/bench/peak_memory.py --tokens 65536 --vocab_size 32000

Bytes are counted by a dispatch mode that sees every tensor that is made and every storage that is freed, parameters and
their gradients apart; nothing is estimated.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import platform
import statistics
import time
import warnings

import torch
from live_bytes import LiveBytes
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from ds_minis import convert_to_mini_sequence

SETTINGS = {
    "plain checkpointing": None,
    "MLP tiled": {"scope": "mlp", "loss": False},
    "MLP and loss tiled (the paper's)": {"scope": "mlp"},
    "everything (the default)": True,
}


def make_model(args: argparse.Namespace) -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=args.hidden_size,
        intermediate_size=args.hidden_size * 11 // 4,
        num_hidden_layers=args.layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=args.vocab_size,
        max_position_embeddings=args.tokens,
    )
    model = LlamaForCausalLM(config).train()
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # renamed after our oldest transformers
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for param in model.parameters():  # so that gradients are there before, and their bytes are not counted
        param.grad = torch.zeros_like(param)
    return model


def step(model: PreTrainedModel, input_ids: torch.Tensor) -> float:
    loss = model(input_ids=input_ids, labels=input_ids, use_cache=False).loss
    loss.backward()
    return loss.item()


def measure(model: PreTrainedModel, input_ids: torch.Tensor, repeats: int) -> dict[str, float]:
    with LiveBytes() as live:
        loss = step(model, input_ids)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        step(model, input_ids)
        seconds.append(time.perf_counter() - start)
    return {"loss": loss, "peak_bytes": live.peak, "seconds": statistics.median(seconds)}


def row(name: str, result: dict[str, float], plain: dict[str, float]) -> str:
    memory, speed = result["peak_bytes"] / plain["peak_bytes"], result["seconds"] / plain["seconds"]
    peak, seconds = result["peak_bytes"] / 2**20, result["seconds"]
    return f"{name:34}{peak:10.0f}{memory:9.2f}x{seconds:8.2f}{speed:9.2f}x   {result['loss']:.6f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--hidden_size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vocab_size", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=1, help="timed steps; their median is shown")
    parser.add_argument("--json", help="also write the results to this file")
    args = parser.parse_args()
    input_ids = torch.randint(0, args.vocab_size, (1, args.tokens), generator=torch.Generator().manual_seed(0))

    print(f"{args.tokens} tokens, torch {torch.__version__}, {platform.processor() or platform.machine()}, ", end="")
    print(f"{torch.get_num_threads()} threads; one row every few seconds", flush=True)
    print(f"{'':34}{'peak MiB':>10}{'of plain':>10}{'s/step':>8}{'of plain':>10}   loss", flush=True)
    results = {}
    for name, settings in SETTINGS.items():
        model = make_model(args)
        if settings is not None:
            with contextlib.redirect_stdout(io.StringIO()):  # the report, which would stand between the rows
                convert_to_mini_sequence(model, settings)
        results[name] = measure(model, input_ids, args.repeats)
        print(row(name, results[name], next(iter(results.values()))), flush=True)
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump({"arguments": vars(args), "results": results}, file, indent=2)


if __name__ == "__main__":
    main()
