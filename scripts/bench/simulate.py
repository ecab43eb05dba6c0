"""Bytes of a full training step at full depth, from steps of a few layers on meta tensors."""

from __future__ import annotations

from dataclasses import dataclass

import stubs
import torch
from common import GIB, Shape, build
from full_step import AdamWBytes, FullStep, with_lora
from live_bytes import LiveBytes
from variants import OFFLOADED, Variant

# The loss of all logits, whole, has nothing to do with the number of layers; nor have embeddings.
LAYERS = 2, 4


@dataclass(frozen=True)
class Bytes:
    device: float
    host: float

    def __str__(self) -> str:
        return f"{self.device / GIB:.1f} GiB on the device" + (
            f", {self.host / GIB:.1f} on the host" if self.host else ""
        )


def step_bytes(shape: Shape, setting: str, variant: Variant, seq: int, layers: int) -> Bytes:
    """Peak of a step with all there is: weights, moments, gradients, checkpoints, activations. `layers` layers."""
    config = shape.config(num_hidden_layers=layers)
    model = build(config, attention=stubs.register(), dtype=torch.bfloat16, device="meta")
    model = with_lora(model) if setting == "lora" else model
    with stubs.HostCopies(), LiveBytes("meta") as live:
        for tensor in (*model.parameters(), *model.buffers()):
            live.hold(tensor, "parameter or buffer")
        step = FullStep(model, setting, variant, AdamWBytes)
        step(torch.zeros(1, seq, dtype=torch.int64, device="meta"), attention_mask=stubs.no_mask())
    return Bytes(live.peak, live.host_peak if variant in OFFLOADED.values() else 0)


def at_full_depth(shape: Shape, setting: str, variant: Variant, seq: int) -> Bytes:
    """A step's peak is a line in the number of layers: each adds its weights, moments and checkpoint. From two points."""
    few, more = (step_bytes(shape, setting, variant, seq, layers) for layers in LAYERS)
    times = (shape.kwargs["num_hidden_layers"] - LAYERS[0]) / (LAYERS[1] - LAYERS[0])
    return Bytes(few.device + times * (more.device - few.device), few.host + times * (more.host - few.host))


def predicted(shape: Shape, setting: str, variant: Variant, budget: float) -> int:
    """About how many tokens fit into a budget of bytes: peaks are a line in the number of tokens, but for chunk sizes."""
    points = 32768, 131072
    few, more = (at_full_depth(shape, setting, variant, seq).device for seq in points)
    slope = (more - few) / (points[1] - points[0])
    return max(1, int(points[0] + (budget - few) / slope))
