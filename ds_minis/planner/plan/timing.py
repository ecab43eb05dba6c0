"""About how long a step takes (modelled, from counted products): a roofline, which tells ways apart and dates no run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ds_minis.planner.devices.sequence import received_bytes
from ds_minis.planner.inputs.setup import Setup
from ds_minis.planner.step.profile import Profile


@dataclass(frozen=True)
class Card:
    """What a GPU does in a second; the defaults are an H100 SXM's.

    Attributes:
        flops: dense products in 16 bits.
        matmul_efficiency, attention_efficiency: parts of that which large matmuls, and flash attention both ways, reach.
        host_bytes: to or from the host (PCIe 5, of 64 GB/s).
        link_bytes: between GPUs in collectives (NVLink 4, of 450 GB/s each way).
    """

    name: str = "H100 SXM"
    flops: float = 989e12
    matmul_efficiency: float = 0.6
    attention_efficiency: float = 0.45
    host_bytes: float = 40e9
    link_bytes: float = 200e9


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step, and of its parts; transfers are hidden behind computation as far as they fit."""

    seconds: float
    matmuls: float
    attention: float
    host: float
    collectives: float


def step_time(setup: Setup, profile: Profile, text: Any, tokens: int, *, card: Card | None = None) -> StepTime:
    """The time of one step of one sequence a replica (times the batch)."""
    card = card or Card()
    slower = 2 if setup.dtype == "float32" else 1
    size = setup.sequence_parallel
    rows = math.ceil(setup.batch * tokens / size)
    per_token, per_square = profile.flops
    matmuls = per_token * rows * slower / (card.flops * card.matmul_efficiency)
    attention = setup.batch * per_square * tokens**2 / size * slower / (card.flops * card.attention_efficiency)
    host = 0.0
    if (setup.settings or {}).get("offload"):
        host = 2 * text.num_hidden_layers * rows * text.hidden_size * setup.itemsize / card.host_bytes
    if setup.offload_optimizer:
        host += 4 * profile.parameters["trained"] / setup.gpus * setup.itemsize / card.host_bytes
    weights, trained = profile.parameters["all"] * setup.itemsize, profile.parameters["trained"] * setup.itemsize
    moved = 0.0
    if setup.gpus > 1:
        share = (setup.gpus - 1) / setup.gpus
        moved += 2 * trained * share if setup.engine in ("ddp", "zero0", "zero1", "zero2") else trained * share
        moved += 2 * weights * share if setup.engine in ("zero3", "fsdp2") else 0
    exchanged = 0.0
    if size > 1:
        exchanged = text.num_hidden_layers * received_bytes(setup, text, rows) / card.link_bytes
    compute = matmuls + attention
    engine = moved / card.link_bytes
    seconds = max(compute, host, engine) + exchanged
    return StepTime(seconds, matmuls, attention, host, engine + exchanged)
