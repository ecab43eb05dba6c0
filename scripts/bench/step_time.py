"""Time of a training step beside plain checkpointing: ds_minis in each scope and every peer, in one process.

    python scripts/bench/step_time.py                              # CPU: 8,192 tokens, hidden size 512, float32, one thread
    python scripts/bench/step_time.py --tokens 16384 65536 131072  # CUDA: layers of Llama-3-8B's shape, bfloat16

All variants share one set of weights. Each is first checked against plain checkpointing: its loss and its gradients; one
that differs is refused, with the difference, and not timed. Then rounds: every variant once, in another random order each
round; the first round is thrown away. Ratios are of one round, their median and quartiles are reported. Gradients are None
before each step; no optimizer runs.

`--loss decoder` ends at the last hidden states (their product with one random vector, squared, averaged), so that each
variant does the same around the layers; `--loss model` is the model's own loss: whole logits for plain checkpointing and the
peers (the LM heads of the peers are compared in loss_head.py), by chunks for ds_minis.
"""

from __future__ import annotations

import argparse
import copy
import functools
import time
from collections.abc import Callable

import torch
from common import GIB, SHAPES, build, envelope, write
from paired import compared, interleaved
from torch import Tensor
from transformers import PreTrainedModel
from variants import ALL, KEPT, PLAIN, VARIANTS, Unavailable, Variant

# Of the loss, relative; of the gradients, relative to the norm of all.
TOLERANCES = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (2e-3, 5e-2)}
ON_CUDA = torch.cuda.is_available()


def sharing_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the modules that holds the very same parameters."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def loss_of(model: PreTrainedModel, input_ids: Tensor, kind: str) -> Tensor:
    if kind == "model":
        return model(input_ids=input_ids, labels=input_ids, use_cache=False).loss
    hidden_states = model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(hidden_states.shape[-1], generator=generator).to(hidden_states)
    return (hidden_states @ direction).float().square().mean()


def step(model: PreTrainedModel, variant: Variant, input_ids: Tensor, kind: str) -> Tensor:
    model.zero_grad(set_to_none=True)
    with variant.around():
        loss = loss_of(model, input_ids, kind)
        loss.backward()
    if ON_CUDA:
        torch.cuda.synchronize()
    return loss.detach()


def difference(
    loss: Tensor, grads: dict[str, Tensor], reference: tuple[Tensor, dict[str, Tensor]]
) -> tuple[float, float]:
    """Relative differences: of the loss; of the gradients, as a norm of the difference of all to the norm of all."""
    expected_loss, expected = reference
    if grads.keys() != expected.keys():
        return float("inf"), float("inf")
    squares = sum((grads[name].float() - grad.float()).square().sum() for name, grad in expected.items())
    norm = sum(grad.float().square().sum() for grad in expected.values())
    return float((loss - expected_loss).abs() / expected_loss.abs()), float((squares / norm).sqrt())


def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def measure(
    model: PreTrainedModel, variants: dict[str, Variant], tokens: int, kind: str, args: argparse.Namespace
) -> dict:
    """All variants at one length. Those that fail or differ are named with the reason, and not timed."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(0, model.config.vocab_size, (1, tokens), generator=generator).to(device)
    result: dict[str, dict] = {"tokens": tokens, "loss": kind, "variants": {}, "refused": {}, "unavailable": {}}
    steps: dict[str, Callable[[], object]] = {}
    facts: dict[str, dict] = {}
    reference = None
    for name, variant in sorted(variants.items(), key=lambda item: item[0] != PLAIN):  # the reference comes first
        own = sharing_copy(model)
        try:
            note = variant.apply(own)
            if ON_CUDA:
                torch.cuda.reset_peak_memory_stats()
            loss = step(own, variant, input_ids, kind)
            peak = torch.cuda.max_memory_allocated() if ON_CUDA else None
        except Unavailable as reason:
            result["unavailable"][name] = str(reason)
            continue
        except torch.OutOfMemoryError as error:
            result["refused"][name] = f"out of memory: {str(error).splitlines()[0]}"
            continue
        if reference is None and name != PLAIN:
            result["refused"][name] = "plain checkpointing did not run here, so there is nothing to compare with"
            continue
        if reference is None:
            reference = loss, {key: grad.clone() for key, grad in gradients(own).items()}
        loss_error, grad_error = difference(loss, gradients(own), reference)
        allowed_loss, allowed_grad = TOLERANCES[model.dtype]
        if not (loss_error <= allowed_loss and grad_error <= allowed_grad):  # a NaN is refused too
            result["refused"][name] = (
                f"it differs from plain checkpointing: loss by {loss_error:.1e} (allowed {allowed_loss:.0e}), gradients by "
                f"{grad_error:.1e} (allowed {allowed_grad:.0e})"
            )
            continue
        facts[name] = {"title": variant.title, "loss_error": loss_error, "grad_error": grad_error, "note": note}
        facts[name] |= {"loss": float(loss)} | ({} if peak is None else {"first_step_peak_bytes": peak})
        steps[name] = functools.partial(step, own, variant, input_ids, kind)
    del reference
    if steps:
        times = interleaved(steps, args.rounds, seconds=args.seconds)
        result["variants"] = {name: facts[name] | entry for name, entry in compared(times, PLAIN).items()}
    model.zero_grad(set_to_none=True)
    return result


def shown(result: dict) -> str:
    lines = [f"\n{result['tokens']} tokens, loss: {result['loss']}"]
    for entry in result["variants"].values():
        low, high = entry["ratio_quartiles"]
        lines.append(
            f"{entry['title']:66}{entry['seconds']:9.3f} s{entry['ratio']:7.3f}x of plain (quartiles {low:.3f}-{high:.3f}, "
            f"{entry['rounds']} rounds), gradients differ by {entry['grad_error']:.0e}"
        )
    for kind in ("refused", "unavailable"):
        lines += [f"{ALL[name].title:66}{kind}: {reason}" for name, reason in result[kind].items()]
    return "\n".join(lines)


def parsed(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[16384, 32768, 65536, 131072] if ON_CUDA else [8192])
    parser.add_argument("--variants", nargs="+", choices=list(ALL), default=[*VARIANTS, *KEPT])
    parser.add_argument("--loss", nargs="+", choices=["decoder", "model"], default=["decoder"])
    parser.add_argument(
        "--shape", choices=list(SHAPES), default="llama-3-8b" if ON_CUDA else None, help="instead of sizes"
    )
    parser.add_argument("--hidden_size", type=int, default=512)
    parser.add_argument("--vocab_size", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--attention", default="sdpa")
    parser.add_argument("--threads", type=int, default=1, help="on the CPU")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=480.0, help="in all; fewer rounds (3 at least) where they end")
    parser.add_argument("--json", help="write the results to this file, e.g. benchmarks/step_time_cpu.json")
    args = parser.parse_args(argv)
    if PLAIN not in args.variants:
        args.variants.insert(0, PLAIN)
    return args


def model_of(args: argparse.Namespace) -> PreTrainedModel:
    torch.manual_seed(0)
    if args.shape:
        config = SHAPES[args.shape].config(num_hidden_layers=args.layers)
    else:
        sizes = {
            "hidden_size": args.hidden_size,
            "intermediate_size": args.hidden_size * 11 // 4,
            "num_hidden_layers": args.layers,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "vocab_size": args.vocab_size,
        }
        config = SHAPES["llama-3-8b"].config(**sizes)
    kind = {"device": "cuda", "dtype": torch.bfloat16} if ON_CUDA else {"device": "cpu", "dtype": torch.float32}
    return build(config, attention=args.attention, **kind)


def main() -> None:
    args = parsed()
    if not ON_CUDA:
        torch.set_num_threads(args.threads)
    model, results, begin, total = model_of(args), [], time.monotonic(), args.seconds
    cases = [(tokens, kind) for tokens in args.tokens for kind in args.loss]
    variants = {name: ALL[name] for name in args.variants}
    for number, (tokens, kind) in enumerate(cases):
        left = total - (time.monotonic() - begin)
        args.seconds = left / (len(cases) - number)
        results.append(measure(model, variants, tokens, kind, args))
        print(shown(results[-1]), flush=True)
    args.seconds = total
    if ON_CUDA:
        print(f"\nmost memory: {torch.cuda.max_memory_allocated() / GIB:.1f} GiB")
    write(args.json, envelope("step_time", args, simulated=False, results=results))


if __name__ == "__main__":
    main()
