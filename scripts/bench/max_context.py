"""The longest sequence whose full training step completes on one GPU, full fine-tuning and LoRA, by bisection.

    python scripts/bench/max_context.py                                        # on the GPU that is there, 8 minutes
    python scripts/bench/max_context.py --settings lora --variants layer-offload
    python scripts/bench/max_context.py --simulate --json benchmarks/max_context_simulated.json     # no GPU

The setting is that of the mini-s benchmark: Llama-3-8B's shape, random weights, bfloat16, one sequence of random tokens, from
8,192 tokens up, AdamW in backward for full fine-tuning (see full_step.py for the details, and for LoRA).
Each trial runs in a fresh process, so that one that ran out of memory cannot spoil the next: the model is made, a step of 512
tokens brings the optimizer's states and the kernels into being, and then one step of the length must complete with a finite
loss. The search starts at the length that the simulation predicts. It ends when the longest that completed and the shortest
that did not are one unit apart, or when the time is over; what ran out of time counts as neither.

With --simulate nothing is measured on a device: the same step runs on meta tensors, with a few layers, and its bytes are
carried on to full depth (simulate.py); the largest length whose bytes are within the card's, less a reserve for the CUDA
context, libraries and fragments, is reported as simulated, and with it the host memory that offloaded checkpoints need.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from typing import Any

import torch
from common import GIB, SHAPES, Shape, build, envelope, write
from full_step import SETTINGS, FullStep, adamw, with_lora
from search import Search, largest
from simulate import at_full_depth, longest, predicted
from variants import ALL, PLAIN, Unavailable, Variant

DEFAULT = [PLAIN, "alst-loss", "mlp", "tokens", "layer", "layer-groups"]
DEFAULT += ["layer-offload", "layer-groups-offload"]
WARM_UP_TOKENS = 512
OUT_OF_MEMORY, OUT_OF_TIME = "out of memory", "the time is over"


def run_trial(shape: Shape, setting: str, variant: Variant, tokens: int, attention: str, device: str) -> dict[str, Any]:
    """One full step of `tokens` tokens in this process, after a short one. Raises what the step raises."""
    torch.manual_seed(0)
    model = build(shape.config(), attention=attention, dtype=torch.bfloat16, device=device)
    step = FullStep(with_lora(model) if setting == "lora" else model, setting, variant, adamw)
    for length in (WARM_UP_TOKENS, tokens):
        input_ids = torch.randint(0, model.config.vocab_size, (1, length), device=device)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        begin = time.perf_counter()
        loss = step(input_ids).item()
        seconds = time.perf_counter() - begin
    result = {"completed": loss == loss and abs(loss) != float("inf"), "loss": loss, "seconds": seconds}
    # A peer that runs backward chunk by chunk steps the optimizer once per chunk: it completes, and trains something else.
    result["most_optimizer_steps"] = max(step.optimizer_steps.values(), default=1)
    if device == "cuda":
        result["peak_bytes"] = torch.cuda.max_memory_allocated()
        result["reserved_bytes"] = torch.cuda.max_memory_reserved()
    return result


def child(case: dict[str, Any]) -> None:
    """Prints a trial's result as the last line."""
    try:
        result = run_trial(
            SHAPES[case["shape"]],
            case["setting"],
            ALL[case["variant"]],
            case["tokens"],
            case["attention"],
            case["device"],
        )
    except torch.OutOfMemoryError as error:
        result = {"completed": False, "reason": OUT_OF_MEMORY, "error": str(error).splitlines()[0]}
    except Unavailable as reason:
        result = {"completed": False, "unavailable": str(reason)}
    print(json.dumps(result), flush=True)


def in_fresh_process(case: dict[str, Any], seconds: float) -> dict[str, Any]:
    """A trial's result. A process that ended in another way than by its result tells how."""
    command = [sys.executable, __file__, "--trial", json.dumps(case)]
    environment = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"} | os.environ
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=environment)
    except subprocess.TimeoutExpired:
        return {"completed": False, "reason": OUT_OF_TIME}
    lines = done.stdout.strip().splitlines()
    try:
        return json.loads(lines[-1])
    except (IndexError, json.JSONDecodeError):
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        killed = " (killed: the host's memory?)" if done.returncode == -9 else ""
        return {"completed": False, "reason": f"exit status {done.returncode}{killed}: {last[:200]}"}


def measured(args: argparse.Namespace, setting: str, name: str, seconds: float) -> dict[str, Any]:
    """The longest that completes on the GPU, within so many seconds."""
    end, runs = time.monotonic() + seconds, []
    budget = torch.cuda.get_device_properties(0).total_memory - args.reserve_gib * GIB
    start = args.start or predicted(SHAPES[args.shape], setting, ALL[name], budget)

    def trial(tokens: int) -> bool | str:
        left = end - time.monotonic()
        if left <= 0:
            return OUT_OF_TIME
        case = {"shape": args.shape, "setting": setting, "variant": name, "tokens": tokens}
        case |= {"attention": args.attention, "device": "cuda"}
        result = in_fresh_process(case, left)
        if "unavailable" in result:
            raise Unavailable(result["unavailable"])
        runs.append({"tokens": tokens} | result)
        print(f"    {tokens:>9,} tokens: {json.dumps(result)}", flush=True)
        if result["completed"] or result.get("reason") == OUT_OF_MEMORY:
            return result["completed"]
        return result.get("reason", "the loss is not finite")

    search = largest(trial, start, args.unit, args.most)
    best = next((run for run in runs if run["tokens"] == search.best and run["completed"]), {})
    return found(search) | {"predicted": start, "runs": runs} | {k: v for k, v in best.items() if k != "completed"}


def simulated(args: argparse.Namespace, setting: str, name: str) -> dict[str, Any]:
    """The longest whose bytes fit, on meta tensors."""
    shape, variant, budget = SHAPES[args.shape], ALL[name], (args.card_gib - args.reserve_gib) * GIB
    bytes_of: dict[int, Any] = {}

    def device_bytes(tokens: int) -> float:
        bytes_of[tokens] = at_full_depth(shape, setting, variant, tokens)
        return bytes_of[tokens].device

    search = longest(device_bytes, budget, args.unit, args.most)
    result = found(search)
    if search.best:
        best = bytes_of[search.best]
        result |= {"device_bytes": best.device, "host_bytes": best.host}
    return result


def found(search: Search) -> dict[str, Any]:
    result: dict[str, Any] = {"tokens": search.best, "failed_at": search.failed, "ended": search.ended}
    if search.best and search.failed is None and not search.ended:
        result["ended"] = "the largest length allowed (--most)"
    return result


def shown(result: dict[str, Any], simulate: bool) -> str:
    text = f"{result['tokens']:>9,} tokens" + (" (simulated)" if simulate else "")
    if result.get("host_bytes"):
        text += f", {result['host_bytes'] / GIB:.0f} GiB of host memory"
    if result["ended"]:
        text += f"; {result['ended']}"
    if result.get("most_optimizer_steps", 1) > 1:
        text += f"; its optimizer runs up to {result['most_optimizer_steps']} times per step: not the same training"
    return text


def parsed(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="llama-3-8b")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--variants", nargs="+", choices=list(ALL), default=DEFAULT)
    parser.add_argument("--simulate", action="store_true", help="no GPU: bytes of meta tensors against a card's")
    parser.add_argument("--card_gib", type=float, default=79.1, help="memory of the simulated card (an 80 GB H100)")
    parser.add_argument("--reserve_gib", type=float, default=3.0, help="for the CUDA context, libraries and fragments")
    parser.add_argument("--unit", type=int, default=4096, help="lengths are multiples of this")
    parser.add_argument("--start", type=int, help="first length; default: what the simulation predicts")
    parser.add_argument("--most", type=int, default=4 * 2**20)
    parser.add_argument("--attention", default="sdpa")
    parser.add_argument("--seconds", type=float, default=450.0, help="for all cases together; not with --simulate")
    parser.add_argument("--json", help="write the results to this file, e.g. benchmarks/max_context_h100.json")
    parser.add_argument("--trial", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if not (args.simulate or args.trial or torch.cuda.is_available()):
        parser.error("there is no CUDA device to measure on; --simulate computes the lengths on meta tensors")
    return args


def main() -> None:
    args = parsed()
    if args.trial:
        child(json.loads(args.trial))
        return
    begin, results = time.monotonic(), []
    cases = [(setting, name) for setting in args.settings for name in args.variants]
    for number, (setting, name) in enumerate(cases):
        entry: dict[str, Any] = {"setting": setting, "variant": name, "title": ALL[name].title}
        left = (args.seconds - (time.monotonic() - begin)) / (len(cases) - number)
        try:
            entry |= simulated(args, setting, name) if args.simulate else measured(args, setting, name, left)
            print(f"{setting:5} {entry['title']:66}{shown(entry, args.simulate)}", flush=True)
        except Unavailable as reason:
            entry["unavailable"] = str(reason)
            print(f"{setting:5} {entry['title']:66}unavailable: {reason}", flush=True)
        results.append(entry)
    write(args.json, envelope("max_context", args, simulated=args.simulate, results=results))


if __name__ == "__main__":
    main()
