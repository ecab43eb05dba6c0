"""W: transient working set of a training step in KiB per token, at real model sizes, on meta tensors (no GPU, minutes).

    python scripts/bench/transient_memory.py --seq 262144
    python scripts/bench/transient_memory.py --models llama-3-8b --variants tokens --snapshot   # what is alive at the peak

A step of a few layers (default 2; W does not depend on it, or a variant keeps more than its checkpoints) in bfloat16, one
sequence, runs on meta tensors: shapes without values. A dispatch mode sees each storage that is made and freed. (Fake tensors
would take four times as long, and hold each other more often than real ones do, which hides what is written over.)

    W = (peak - parameters - gradients - checkpoints) / tokens

Counted: every storage from the operation that makes it until nothing holds it, on the device. Parameters and one full set
of gradients of their dtype exist before the step and are taken off, as are the per-layer checkpoints: layers x tokens x
hidden size x 2 bytes, the input of each decoder layer. So W holds all else: recomputed activations, gradients of activations,
rotary tables, token ids, chunk buffers, and gradients of parameters before they are added to the set.
The attention kernel and the loss are stand-ins with FlashAttention-2's and a fused loss's memory (see stubs.py); what an
allocator adds (rounding, fragments) is not counted. `layers` of 2 and `--layers_again` (default 4) are compared, so that
memory that grows with depth cannot hide: it is `W_growth_per_layer`, and has to be 0; at `--seq_again` tokens, to save time.

Matrix products are counted on a real step, of a model of 2 layers with all widths divided by 16: what ds_minis need not
compute is found by values, of which meta tensors have none. Their proportions are the full size's; the attention's, which
grow with the square of the length, are carried on to `--flops_seq` tokens.

The loss stage is the model's own LM head and cross entropy, converted, on given hidden states: bytes at the peak above
parameters, gradients and those hidden states, per token; `weight_buffers` of it are buffers as large as the head's weight.

With offloaded checkpoints nothing is taken off: bytes on the device and on the host beside parameters and gradients.
"""

from __future__ import annotations

import argparse

import stubs
import torch
from common import GIB, KIB, SHAPES, Shape, build, envelope, write
from live_bytes import LiveBytes
from transformers.modeling_outputs import BaseModelOutputWithPast
from variants import ALL, OFFLOADED, PLAIN, VARIANTS, Unavailable, Variant


class Step:
    """A model on the meta device, changed by a variant, with parameters and gradients in place."""

    def __init__(self, config, variant: Variant):
        self.model = build(config, attention=stubs.register(), dtype=torch.bfloat16, device="meta")
        self.variant, self.note = variant, variant.apply(self.model)

    def live(self, *, trace: bool = False) -> LiveBytes:
        live = LiveBytes("meta", trace=trace)
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
            live.hold(parameter, "parameter")
            live.hold(parameter.grad, "gradient")
        for buffer in self.model.buffers():
            live.hold(buffer, "buffer")
        return live

    def decoder(self, input_ids: torch.Tensor) -> None:
        with self.variant.around():
            output = self.model.base_model(input_ids=input_ids, attention_mask=stubs.no_mask(), use_cache=False)
            hidden_states = output.last_hidden_state
            del output
            loss = stubs.LossStandIn.apply(hidden_states)
            del hidden_states
            loss.backward()


def decoder_memory(shape: Shape, variant: Variant, seq: int, layers: int, *, trace: bool = False) -> dict:
    """Bytes of one step of the decoder, and its FLOPs."""
    offloaded = variant in OFFLOADED.values()
    config = shape.config(num_hidden_layers=layers)
    step = Step(config, variant)
    input_ids = torch.zeros(1, seq, dtype=torch.int64, device="meta")
    with stubs.HostCopies(), step.live(trace=trace) as live:
        before = live.now
        step.decoder(input_ids)
    checkpoints = 0 if offloaded else layers * seq * config.hidden_size * 2
    return {
        "layers": layers,
        "peak_bytes": live.peak - before,
        "checkpoint_bytes": checkpoints,
        "W_KiB_per_token": (live.peak - before - checkpoints) / seq / KIB,
        "host_bytes": live.host_peak if offloaded else 0,
        "note": step.note,
        "snapshot": live.summary(),
    }


DIVISOR, FLOPS_TOKENS = 16, 2048  # of the widths, and of the step that is run


def decoder_flops(shape: Shape, variant: Variant, seq: int) -> dict[str, float]:
    """FLOPs of one real step of two layers of the decoder, carried on to the full widths and to `seq` tokens."""
    model = build(shape.divided(DIVISOR, num_hidden_layers=2), attention=stubs.register(), dtype=torch.float32)
    variant.apply(model)
    with LiveBytes(flops_of=stubs.FLOPS) as live, variant.around():
        hidden_states = model.base_model(input_ids=torch.arange(FLOPS_TOKENS)[None], use_cache=False).last_hidden_state
        stubs.LossStandIn.apply(hidden_states).backward()
    longer = seq / FLOPS_TOKENS
    return {
        "matmul_flops": live.matmul_flops * DIVISOR**2 * longer,
        "attention_flops": live.other_flops * DIVISOR * longer**2,
    }


def loss_memory(shape: Shape, variant: Variant, seq: int, vocab_size: int, *, trace: bool = False) -> dict:
    """Bytes of LM head and loss above the hidden states."""
    config = shape.config(num_hidden_layers=1, vocab_size=vocab_size)
    step, width = Step(config, variant), config.hidden_size
    hidden_states = torch.zeros(1, seq, width, dtype=torch.bfloat16, device="meta", requires_grad=True)
    step.model.base_model.forward = lambda *args, **kwargs: BaseModelOutputWithPast(last_hidden_state=hidden_states)
    labels = torch.zeros(1, seq, dtype=torch.int64, device="meta")
    with step.live(trace=trace) as live:
        live.hold(hidden_states, "hidden states")
        live.hold(labels, "labels")
        before = live.now
        loss = step.model(input_ids=labels, labels=labels, use_cache=False).loss
        loss.backward()
    large = [entry for entry in live.at_peak if entry.made_by not in ("parameter", "gradient", "hidden states")]
    weights = sum(e.nbytes for e in large if sorted(e.shape) == sorted((vocab_size, width)))
    return {
        "bytes_per_token": (live.peak - before) / seq,
        "weight_buffers": weights,
        "bytes_per_token_beside_weight_buffers": (live.peak - before - weights) / seq,
        "per_hidden_element": (live.peak - before - weights) / seq / width,
        "snapshot": live.summary(),
    }


def measure_model(name: str, args: argparse.Namespace) -> dict:
    shape, results = SHAPES[name], {"source": SHAPES[name].source, "variants": {}, "loss": {}, "unavailable": {}}
    plain_flops = None
    for key in args.variants:
        variant = ALL[key]
        try:
            result = decoder_memory(shape, variant, args.seq, args.layers, trace=args.snapshot)
            depths = [args.layers, args.layers_again] if args.layers_again else []
            few_and_more = [decoder_memory(shape, variant, args.seq_again, layers) for layers in depths]
            flops = decoder_flops(shape, variant, args.flops_seq)
        except Unavailable as reason:
            results["unavailable"][key] = str(reason)
            print(f"{name:12} {variant.title:66} {reason}", flush=True)
            continue
        snapshot = result.pop("snapshot")
        if few_and_more:
            few, more = few_and_more
            added = more["peak_bytes"] - few["peak_bytes"] - more["checkpoint_bytes"] + few["checkpoint_bytes"]
            per_layer = (args.layers_again - args.layers) * args.seq_again * KIB
            result["W_growth_per_layer"] = added / per_layer
            result["host_KiB_per_token_and_layer"] = (more["host_bytes"] - few["host_bytes"]) / per_layer
        result |= flops
        totals = [flops["matmul_flops"], flops["matmul_flops"] + flops["attention_flops"]]
        plain_flops = totals if key == PLAIN else plain_flops
        if plain_flops:
            result["matmul_flops_of_plain"], result["all_flops_of_plain"] = (
                ours / plain for ours, plain in zip(totals, plain_flops, strict=True)
            )
        results["variants"][key] = {"title": variant.title} | result
        print(f"{name:12} {variant.title:66} {line(result)}", flush=True)
        if args.snapshot:
            print(snapshot)
    for key in args.loss_variants:
        try:
            result = loss_memory(shape, ALL[key], args.seq, args.loss_vocab, trace=args.snapshot)
        except Unavailable as reason:
            results["unavailable"].setdefault(key, str(reason))
            continue
        snapshot = result.pop("snapshot")
        results["loss"][key] = {"title": ALL[key].title} | result
        print(
            f"{name:12} loss: {ALL[key].title:60} {result['bytes_per_token'] / KIB:7.1f} KiB/token, "
            f"{result['per_hidden_element']:.2f} bytes x hidden size beside weight buffers",
            flush=True,
        )
        if args.snapshot:
            print(snapshot)
    return results


def line(result: dict) -> str:
    text = f"{result['W_KiB_per_token']:7.1f} KiB/token"
    if "W_growth_per_layer" in result:
        text += f" {result['W_growth_per_layer']:+6.1f} per layer"
    if "matmul_flops_of_plain" in result:
        text += f", matmul FLOPs {result['matmul_flops_of_plain']:.3f}x of plain, with attention "
        text += f"{result['all_flops_of_plain']:.3f}x"
    if result["host_bytes"]:
        text += f", host {result['host_bytes'] / GIB:.2f} GiB for {result['layers']} layers"
        if "host_KiB_per_token_and_layer" in result:
            text += f", {result['host_KiB_per_token_and_layer']:.1f} KiB/token more for each"
    return text


def parsed(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--variants", nargs="+", choices=list(ALL), default=[*VARIANTS, *OFFLOADED])
    parser.add_argument("--seq", type=int, default=262144)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--layers_again", type=int, default=4, help="a second depth, to see growth; 0: none")
    parser.add_argument("--seq_again", type=int, default=65536, help="tokens for that")
    parser.add_argument("--flops_seq", type=int, default=8192, help="length at which FLOPs are compared")
    parser.add_argument("--loss_variants", nargs="*", choices=list(ALL), default=[PLAIN, "tokens", "alst-loss"])
    parser.add_argument("--loss_vocab", type=int, default=128256)
    parser.add_argument(
        "--snapshot", action="store_true", help="print what is alive at the peak, and where it was made"
    )
    parser.add_argument("--json", help="write the results to this file, e.g. benchmarks/transient_memory.json")
    return parser.parse_args(argv)


def main() -> None:
    args = parsed()
    results = {name: measure_model(name, args) for name in args.models}
    write(args.json, envelope("transient_memory", args, simulated=True, results=results))


if __name__ == "__main__":
    main()
