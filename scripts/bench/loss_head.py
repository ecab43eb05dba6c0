"""LM head and cross entropy, forward and backward: ours beside torch's, TRL's, Liger's, Apple's and DeepSpeed's.

    python scripts/bench/loss_head.py                              # Llama-3-8B's head on a GPU; a small one on a CPU
    python scripts/bench/loss_head.py --tokens 65536 --repeats 9

Time is the median of interleaved runs. Peak is what is allocated above hidden states, weight and labels, the two gradients
included: by CUDA's own count, or tensor by tensor on a CPU. Errors are relative (norm of the difference), against float64.
Only torch, transformers and ds_minis are needed; of the others, whoever is missing is named with the reason.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from loss_ways import WAYS, Loss, Problem, Skip
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from peak_memory import LiveBytes  # noqa: E402

from ds_minis.config import MiniSequenceConfig  # noqa: E402
from ds_minis.tiling.chunking import Chunking  # noqa: E402

PACKAGES = "torch", "transformers", "ds_minis", "triton", "trl", "liger_kernel", "cut_cross_entropy", "deepspeed"
SIZES = {"cuda": (16384, 4096, 128256, "bfloat16"), "cpu": (4096, 512, 8192, "float32")}
MIB = 2**20


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


def exact(hidden: Tensor, weight: Tensor, labels: Tensor, rows: int = 1024) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and gradients in float64, over chunks for the sake of memory."""
    wide, total = weight.detach().double(), 0.0
    weight_grad, hidden_grads, count = torch.zeros_like(wide), [], (labels != -100).sum()
    for x, y in zip(hidden.detach().split(rows), labels.split(rows), strict=True):
        x = x.double()
        logits = (x @ wide.t()).requires_grad_()
        loss = F.cross_entropy(logits, y, reduction="sum") / count
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
    synchronize()
    start = time.perf_counter()
    step(loss, tensors)
    synchronize()
    return time.perf_counter() - start


class BytesAbove(LiveBytes):
    """Without the memory of the inputs, which the counter would see in their views."""

    def __init__(self, tensors: tuple[Tensor, ...]):
        super().__init__()
        self._live.update((tensor.untyped_storage()._cdata, 0) for tensor in tensors)


def peak_bytes(loss: Loss, tensors: tuple[Tensor, nn.Parameter, Tensor]) -> int:
    for tensor in tensors:
        tensor.grad = None
    gc.collect()
    if not tensors[0].is_cuda:
        with BytesAbove(tensors) as live:
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
    oracle = exact(*tensors)
    results: dict[str, dict] = {}
    for name, loss in ways.items():
        print(f"  {name}", file=sys.stderr, flush=True)
        try:
            value = step(loss, tensors)  # compiles and loads what it needs
            errors = [relative(*pair) for pair in zip((value, *(t.grad for t in tensors[:2])), oracle, strict=True)]
            results[name] = dict(zip(("loss_error", "hidden_grad_error", "weight_grad_error"), errors, strict=True))
            results[name]["peak_bytes"] = peak_bytes(loss, tensors)
        except Exception as error:  # somebody else's code: whatever it raises is its result
            results[name] = {"failed": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
            if tensors[0].is_cuda:
                torch.cuda.empty_cache()
    del oracle
    running = {name: [] for name, result in results.items() if "failed" not in result}
    for _ in range(repeats):
        for name, seconds in running.items():
            seconds.append(timed(ways[name], tensors))
    for name, seconds in running.items():
        results[name] |= {"seconds": statistics.median(seconds), "all_seconds": seconds}
    return results


def envelope(args: argparse.Namespace, device: torch.device, results: dict) -> dict:
    """Results with all that is needed to repeat them."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return {
        "benchmark": "loss_head",
        "simulated": False,
        "device": name
        if device.type == "cuda"
        else f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "versions": versions,
        "date": datetime.date.today().isoformat(),
        "commit": commit or "unknown",
        "command": shlex.join(["python", "scripts/bench/loss_head.py", *sys.argv[1:]]),
        "arguments": {key: value for key, value in vars(args).items() if key != "json"},
        "results": results,
    }


def table(results: dict[str, dict]) -> str:
    lines = [f"{'':38}{'ms':>9}{'of plain':>10}{'peak MiB':>10}   error of loss, hidden gradient, weight gradient"]
    plain = results["plain"].get("seconds")
    for name, r in results.items():
        if "seconds" not in r:
            lines.append(f"{name:38}{r.get('skipped') or r['failed']}")
            continue
        ratio = f"{r['seconds'] / plain:9.2f}x" if plain else f"{'-':>10}"
        errors = "".join(f"{r[key]:12.1e}" for key in ("loss_error", "hidden_grad_error", "weight_grad_error"))
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
    parser.add_argument("--json", default=str(ROOT / "benchmarks" / "loss_head.json"), help="where the results go")
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
    content = envelope(args, device, results)
    content["chunks"] = problem.num_chunks
    print(f"\n{args.tokens} tokens x {args.hidden_size} x {args.vocab_size}, {args.dtype}, {content['device']}")
    print(table(results))
    path = Path(args.json)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
