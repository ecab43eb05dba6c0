"""What a rank holds and what it sends, with its sequences on 1, 2 or 4 processes, for each mode.

python scripts/bench/sequence_parallel.py                                # ten minutes on 2 CPU cores
python scripts/bench/sequence_parallel.py --tokens 4096 --modes ring --json found.json
python scripts/bench/sequence_parallel.py --json benchmarks/sequence_parallel_cpu.json

A small Llama in float32, scope "layer", one sequence, forward and backward in gloo processes. Counted:

- live bytes: the peak of all tensors above the weights and their gradients, on the busiest rank (what a kernel allocates
  inside is not seen). With few layers these are mostly those of the one layer that is in its backward; with more, the layers'
  inputs, of which a rank holds its share alone;
- received bytes per layer and step, on one rank: exchanges of keys, values, queries, outputs and their gradients; a layer's
  attention runs forward, once more in backward, and backward.

Then the same bytes by their formulas, which are compared with what was counted, for the sizes of Llama-3-8B and 70B in
bfloat16 with 16,384 tokens on each of 8 and 64 ranks.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from common import envelope, write
from live_bytes import LiveBytes
from transformers import AutoModelForCausalLM, LlamaConfig

from ds_minis import convert_to_mini_sequence

HIDDEN, HEADS, KV_HEADS, VOCAB = 64, 8, 2, 512  # four query heads for a KV head, as in Llama 3
MODES = {"gather": "gather", "ulysses": "ulysses", "ring": "ring"}
MODELS = {"Llama-3-8B": (32, 8, 128, 32), "Llama-3-70B": (64, 8, 128, 80)}  # heads, KV heads, width, layers


def make_model(layers: int) -> torch.nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=3 * HIDDEN, num_hidden_layers=layers,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, max_position_embeddings=2**20,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").train()


class Received:
    """Counts the bytes that this rank receives from others in collectives and in sends from rank to rank."""

    def __init__(self):
        self.nbytes = 0
        self._own = {}

    def __enter__(self) -> Received:
        for name in ("all_gather", "reduce_scatter", "all_to_all"):
            self._own[name] = getattr(dist, name)
            setattr(dist, name, self._counting(name, self._own[name]))
        self._own["P2POp"] = dist.P2POp
        dist.P2POp = self._counting_sends(dist.P2POp)
        return self

    def __exit__(self, *_) -> None:
        for name, own in self._own.items():
            setattr(dist, name, own)

    def _counting(self, name: str, function: Callable) -> Callable:
        def counted(output, given, group=None):
            tensors = output if name != "reduce_scatter" else given
            size = dist.get_world_size(group)
            self.nbytes += sum(t.nbytes for t in tensors) * (size - 1) // size
            return function(output, given, group=group)

        return counted

    def _counting_sends(self, operation: type) -> Callable:
        def counted(op, tensor, *args):
            self.nbytes += tensor.nbytes if op is dist.irecv else 0
            return operation(op, tensor, *args)

        return counted


def measure(mode: str, size: int, tokens: int, layers: int, chunk: int) -> dict:
    """Peak of live bytes and received bytes of a step, after one that verifies."""
    model = make_model(layers)
    settings = {"chunk_size": chunk, "loss_chunk_size": chunk}
    convert_to_mini_sequence(
        model, settings | ({"sequence_parallel": {"size": size, "mode": mode}} if size > 1 else {})
    )
    ids = torch.randint(VOCAB, (1, 256), generator=torch.Generator().manual_seed(0))
    model(input_ids=ids, labels=ids).loss.backward()
    ids = torch.randint(VOCAB, (1, tokens), generator=torch.Generator().manual_seed(1))
    with Received() as received, LiveBytes(apart=[*model.parameters(), *(p.grad for p in model.parameters())]) as live:
        model(input_ids=ids, labels=ids).loss.backward()
    return {
        "mode": mode if size > 1 else "none",
        "ranks": size,
        "layers": layers,
        "peak": live.peak,
        "received": received.nbytes / layers,
    }


def formula(
    mode: str, size: int, tokens: float, heads: int, kv_heads: int, width: int, element: int, grad: int
) -> float:
    """Bytes that a rank receives for one layer in a step: attention forward, again in backward, and backward.

    Args:
        tokens: of one rank.
        element, grad: bytes of an element, and of one of the gradients that travel in a ring.
    """
    others = size - 1
    keys = 2 * kv_heads * width * tokens
    match mode:
        case "gather":
            return 3 * others * keys * element
        case "ulysses":
            repeated = 2 * max(kv_heads, size) * width * tokens
            return 3 * (2 * heads * width * tokens + repeated) * others / size * element
        case "ring":
            return others * keys * (3 * element + grad)
    raise KeyError(mode)


def run(rank: int, size: int, jobs: list[tuple], folder: Path) -> None:
    store = dist.FileStore(str(folder / f"store-{size}"), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(minutes=20))
    found = [measure(mode, size, *sizes) for mode, *sizes in jobs]
    (folder / f"{size}-{rank}.json").write_text(json.dumps(found))
    dist.barrier()


def in_processes(size: int, jobs: list[tuple]) -> list[dict]:
    """The jobs in `size` forked processes; of each the largest peak, and the mean of what was received."""
    with tempfile.TemporaryDirectory() as name:
        folder, children = Path(name), []
        for rank in range(size):
            child = os.fork()
            if child == 0:
                status = 1
                try:
                    torch.set_num_threads(1)
                    run(rank, size, jobs, folder)
                    status = 0
                except BaseException:
                    traceback.print_exc()
                finally:
                    sys.stdout.flush()
                    os._exit(status)
            children.append(child)
        statuses = [os.waitpid(child, 0)[1] for child in children]
        if any(statuses):
            raise SystemExit("a rank failed")
        ranks = [json.loads((folder / f"{size}-{rank}.json").read_text()) for rank in range(size)]
    return [
        results[0] | {"peak": max(r["peak"] for r in results), "received": sum(r["received"] for r in results) / size}
        for results in zip(*ranks, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--ranks", type=int, nargs="+", choices=(2, 4), default=[2, 4])
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 16])
    parser.add_argument("--chunk", type=int, default=256, help="tokens of a chunk, of layers and of the loss")
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES))
    parser.add_argument("--json", type=Path, help="e.g. benchmarks/sequence_parallel_cpu.json")
    args = parser.parse_args()
    sizes = [(args.tokens, layers, args.chunk) for layers in args.layers]
    alone = in_processes(1, [("gather", *more) for more in sizes])
    found = list(alone)
    for size in args.ranks:
        found += in_processes(size, [(mode, *more) for mode in args.modes for more in sizes])
    peaks = {row["layers"]: row["peak"] for row in alone}
    print(f"Llama, hidden {HIDDEN}, {args.tokens:,} tokens, float32; torch {torch.__version__}, CPU, gloo")
    print(
        f"{'mode':<9}{'ranks':>6}{'layers':>8}{'live bytes of a rank':>22}{'of one process':>16}{'received a layer':>18}"
    )
    for row in found:
        row["of_one"] = row["peak"] / peaks[row["layers"]]
        print(
            f"{row['mode']:<9}{row['ranks']:>6}{row['layers']:>8}{row['peak']:>22,}{row['of_one']:>15.3f}x"
            f"{int(row['received']):>18,}"
        )
        if row["ranks"] > 1:
            tokens = args.tokens / row["ranks"]
            expected = formula(row["mode"], row["ranks"], tokens, HEADS, KV_HEADS, HIDDEN // HEADS, 4, 4)
            if abs(row["received"] - expected) > 0.02 * expected:
                print(f"  the formula says {expected:,.0f}")
    simulated = []
    print("\nBy the formulas, bfloat16, 16,384 tokens on each rank: GiB that a rank receives in a step, all layers")
    for name, (heads, kv_heads, width, layers) in MODELS.items():
        for size in (8, 64):
            for mode in args.modes:
                if mode == "ulysses" and (heads % size or (kv_heads % size and size % kv_heads)):
                    continue
                total = layers * formula(mode, size, 16384, heads, kv_heads, width, 2, 4)
                simulated.append({"model": name, "ranks": size, "mode": mode, "received": total})
                print(f"  {name:<12}{size:>4} ranks  {mode:<9}{total / 2**30:>10.1f}")
    results = {"counted": found, "by_formula": simulated}
    write(args.json, envelope("sequence_parallel", args, simulated=False, results=results))


if __name__ == "__main__":
    main()
