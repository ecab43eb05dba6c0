"""Bytes of a full training step at full depth, from the planner (`ds_minis.planner`); and the length that fits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import stubs
import torch
from common import GIB, Shape, build
from full_step import LORA_RANK, AdamWBytes, FullStep, with_lora
from live_bytes import LiveBytes
from search import Search
from variants import OFFLOADED, PLAIN, VARIANTS, Variant

from ds_minis.planner.inputs.setup import Setup
from ds_minis.planner.plan.planner import Planner

# Of the peers, which the planner does not know: steps of few layers, carried on by a line.
LAYERS = 2, 3
FIRST_TOKENS = 32768, 131072


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


@lru_cache(maxsize=8)
def _planner(model_type: str, fields: tuple) -> Planner:
    return Planner(Shape(model_type, dict(fields), "").config())


def at_full_depth(shape: Shape, setting: str, variant: Variant, seq: int) -> Bytes:
    """A step's peak at full depth: the planner's, or for a peer's variant a line through two depths."""
    if variant.settings is not None or variant is VARIANTS[PLAIN]:
        setup = Setup(
            train=setting,
            lora_rank=LORA_RANK,
            settings=variant.settings,
            optimizer_in_backward=setting == "full",
        )
        found = _planner(shape.model_type, tuple(shape.kwargs.items())).estimate(setup, seq)
        return Bytes(found.allocated, found.host)
    few, more = (step_bytes(shape, setting, variant, seq, layers) for layers in LAYERS)
    times = (shape.kwargs["num_hidden_layers"] - LAYERS[0]) / (LAYERS[1] - LAYERS[0])
    return Bytes(few.device + times * (more.device - few.device), few.host + times * (more.host - few.host))


def predicted(shape: Shape, setting: str, variant: Variant, budget: float) -> int:
    """About how many tokens fit into a budget of bytes: peaks are a line in the number of tokens, but for chunk sizes."""
    few, more = (at_full_depth(shape, setting, variant, seq).device for seq in FIRST_TOKENS)
    slope = (more - few) / (FIRST_TOKENS[1] - FIRST_TOKENS[0])
    return max(1, int(FIRST_TOKENS[0] + (budget - few) / slope))


def longest(bytes_of: Callable[[int], float], budget: float, unit: int, most: int) -> Search:
    """The largest multiple of `unit` whose bytes are within the budget; bytes are nearly a line in the number of tokens.

    Each trial is where the line through the nearest two lengths known crosses the budget.
    """
    search, known = Search(), {}

    def fits(units: int) -> bool:
        known[units] = bytes_of(units * unit)
        search.trials[units * unit] = known[units] <= budget
        return known[units] <= budget

    low, high, limit = 0, most // unit + 1, most // unit
    for tokens in FIRST_TOKENS:
        here = min(max(1, tokens // unit), limit)
        if low < here < high:
            low, high = (here, high) if fits(here) else (low, here)
    while low + 1 < high:
        near = sorted(known, key=lambda units: abs(known[units] - budget))[:2]
        (a, b) = near if len(near) == 2 else (0, near[0])
        slope = (known[b] - known.get(a, 0)) / (b - a)
        here = int(b + (budget - known[b]) / slope) if slope > 0 else (low + high) // 2
        here = min(max(here, low + 1), high - 1)
        low, high = (here, high) if fits(here) else (low, here)
    search.best, search.failed = low * unit, high * unit if high <= limit else None
    return search
