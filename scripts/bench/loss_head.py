"""LM head and cross entropy, forward and backward: ours beside torch's, TRL's, Liger's, Apple's and DeepSpeed's.

    python scripts/bench/loss_head.py                              # Llama-3-8B's head on a GPU; a small one on a CPU
    python scripts/bench/loss_head.py --tokens 65536 --repeats 9

Ways with a frozen head have the gradient of the hidden states alone, as beside LoRA adapters. Ways for TRL's DPO are of one
pair: two sequences of half the tokens.

Time is the median of interleaved runs; with one thread on a CPU it is the processor's, whatever else runs there. Peak is
what is allocated above hidden states, weight and labels, the gradients included: by CUDA's own count, or tensor by tensor on
a CPU. Errors are relative (norm of the difference), against float64.
Only torch, transformers and ds_minis are needed; of the others, whoever is missing is named with the reason.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time

import torch
import torch.nn.functional as F
from common import MIB, envelope, write
from live_bytes import LiveBytes
from loss_ways import DPO, WAYS, Loss, Problem, Skip, signs_of
from torch import Tensor, nn

from ds_minis.config import MiniSequenceConfig
from ds_minis.tiling.modules.state import Chunking

SIZES = {"cuda": (16384, 4096, 128256, "bfloat16"), "cpu": (4096, 512, 8192, "float32")}


def inputs(args: argparse.Namespace, device: torch.device) -> tuple[Tensor, nn.Parameter, Tensor]:
    """Hidden states and a weight that make logits of a trained model's size, a tenth of the labels masked."""
    generator = torch.Generator(device).manual_seed(0)
    dtype = getattr(torch, args.dtype)
    hidden = torch.randn(args.tokens, args.hidden_size, device=device, generator=generator).to(dtype)
    weight = torch.randn(args.vocab_size, args.hidden_size, device=device, generator=generator)
    weight = nn.Parameter((weight * 2 / args.hidden_size**0.5).to(dtype))
    labels = torch.randint(args.vocab_size, (args.tokens,), device=device, generator=generator)
    labels[torch.rand(args.tokens, device=device, generator=generator) < 0.1] = -100
    return hidden.requires_grad_(), weight, labels


def exact(
    hidden: Tensor, weight: Tensor, labels: Tensor, of_pair: bool, rows: int = 1024
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and gradients in float64, over chunks for the sake of memory."""
    signs = signs_of(labels, of_pair)
    wide, total = weight.detach().double(), 0.0
    weight_grad, hidden_grads, count = torch.zeros_like(wide), [], (labels != -100).sum()
    for x, y, sign in zip(hidden.detach().split(rows), labels.split(rows), signs.split(rows), strict=True):
        x = x.double()
        logits = (x @ wide.t()).requires_grad_()
        loss = (F.cross_entropy(logits, y, reduction="none") * sign).sum() / count
        (grad,) = torch.autograd.grad(loss, logits)
        total += loss.detach()
        weight_grad.addmm_(grad.t(), x)
        hidden_grads.append((grad @ wide).float())
        del logits, grad, loss
    return total, torch.cat(hidden_grads), weight_grad.float()


def step(loss: Loss, tensors: tuple[Tensor, nn.Parameter, Tensor]) -> Tensor:
    for tensor in tensors:
        tensor.grad = None
    result = loss(*tensors)
    result.backward()
    return result.detach()


def timed(loss: Loss, tensors: tuple[Tensor, nn.Parameter, Tensor]) -> float:
    synchronize = torch.cuda.synchronize if tensors[0].is_cuda else lambda: None
    alone = not tensors[0].is_cuda and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter
    synchronize()
    start = clock()
    step(loss, tensors)
    synchronize()
    return clock() - start


def peak_bytes(loss: Loss, tensors: tuple[Tensor, nn.Parameter, Tensor]) -> int:
    for tensor in tensors:
        tensor.grad = None
    gc.collect()
    if not tensors[0].is_cuda:
        with LiveBytes(apart=tensors) as live:
            step(loss, tensors)
        return live.peak
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step(loss, tensors)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def relative(actual: Tensor, oracle: Tensor, rows: int = 4096) -> float:
    pairs = list(zip(actual.reshape(-1, actual.shape[-1] if actual.dim() else 1).split(rows),
                     oracle.reshape(-1, oracle.shape[-1] if oracle.dim() else 1).split(rows), strict=True))  # fmt: skip
    difference = sum((a.double() - b.double()).square().sum() for a, b in pairs)
    return float((difference / sum(b.double().square().sum() for _, b in pairs)).sqrt())


def measure(ways: dict[str, Loss], tensors: tuple[Tensor, nn.Parameter, Tensor], repeats: int) -> dict[str, dict]:
    oracles = {of_pair: exact(*tensors, of_pair) for of_pair in (False, True)}
    results: dict[str, dict] = {}
    for name, loss in ways.items():
        print(f"  {name}", file=sys.stderr, flush=True)
        try:
            value = step(loss, tensors)  # compiles and loads what it needs
            found = (value, *(t.grad for t in tensors[:2]))
            errors = [None if a is None else relative(a, b) for a, b in zip(found, oracles[DPO in name], strict=True)]
            results[name] = dict(zip(("loss_error", "hidden_grad_error", "weight_grad_error"), errors, strict=True))
            results[name]["peak_bytes"] = peak_bytes(loss, tensors)
        except Exception as error:  # somebody else's code: whatever it raises is its result
            results[name] = {"failed": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
            if tensors[0].is_cuda:
                torch.cuda.empty_cache()
    del oracles
    running = {name: [] for name, result in results.items() if "failed" not in result}
    for _ in range(repeats):
        for name, seconds in running.items():
            seconds.append(timed(ways[name], tensors))
    for name, seconds in running.items():
        results[name] |= {"seconds": statistics.median(seconds), "all_seconds": seconds}
    return results


def table(results: dict[str, dict]) -> str:
    lines = [f"{'':38}{'ms':>9}{'of plain':>10}{'peak MiB':>10}   error of loss, hidden gradient, weight gradient"]
    plain = results["plain"].get("seconds")
    for name, r in results.items():
        if "seconds" not in r:
            lines.append(f"{name:38}{r.get('skipped') or r['failed']}")
            continue
        ratio = f"{r['seconds'] / plain:9.2f}x" if plain else f"{'-':>10}"
        errors = (r[key] for key in ("loss_error", "hidden_grad_error", "weight_grad_error"))
        errors = "".join(f"{'-':>12}" if error is None else f"{error:12.1e}" for error in errors)
        lines.append(f"{name:38}{r['seconds'] * 1e3:9.1f}{ratio}{r['peak_bytes'] / MIB:10.0f}{errors}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, help="16384 on CUDA, 4096 on a CPU")
    parser.add_argument("--hidden_size", type=int, help="4096 on CUDA, 512 on a CPU")
    parser.add_argument("--vocab_size", type=int, help="128256 on CUDA, 8192 on a CPU")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], help="bfloat16 on CUDA, float32 on a CPU")
    parser.add_argument("--repeats", type=int, default=7, help="timed runs of each; their median is shown")
    parser.add_argument("--json", help="write the results to this file, e.g. benchmarks/loss_head_cpu.json")
    args = parser.parse_args()
    device = torch.device(args.device)
    for name, default in zip(("tokens", "hidden_size", "vocab_size", "dtype"), SIZES[device.type], strict=True):
        if getattr(args, name) is None:
            setattr(args, name, default)

    tensors = inputs(args, device)
    itemsize = tensors[0].element_size()
    chunking = Chunking(MiniSequenceConfig(), args.hidden_size)
    rows = chunking.loss_rows(tensors[0].numel() * itemsize, args.vocab_size * itemsize)
    problem = Problem(device, -(-args.tokens // rows))
    ways, skipped = {}, {}
    for name, make in WAYS.items():
        try:
            ways[name] = make(problem)
        except Skip as reason:
            skipped[name] = {"skipped": str(reason)}
    measured = measure(ways, tensors, args.repeats)
    results = {name: skipped.get(name) or measured[name] for name in WAYS}
    content = envelope("loss_head", args, simulated=False, results=results) | {"chunks": problem.num_chunks}
    print(f"\n{args.tokens} tokens x {args.hidden_size} x {args.vocab_size}, {args.dtype}, {content['device']}")
    print(table(results))
    write(args.json, content)


if __name__ == "__main__":
    main()
