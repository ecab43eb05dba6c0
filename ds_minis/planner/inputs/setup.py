"""What is to be planned: everything about a training run that memory depends on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ds_minis.config_values import nearest

ENGINES = "single", "ddp", "fsdp2", "zero0", "zero1", "zero2", "zero3"
DTYPES = "bfloat16", "float16", "float32"
ADAPTERS = "full", "lora", "qlora"
# Optimizer -> (bytes of its states for each parameter beside the parameter's own number of bytes, states of that size).
# A float32 state takes 4 bytes; torch's optimizers make states of the parameter's dtype, engines train float32 copies.
OPTIMIZERS = {"adamw": 2.0, "adamw_8bit": 2.0, "paged_adamw_8bit": 2.0, "adafactor": 0.0, "sgd": 0.0}
# What may be in host memory -> the engines that have it there.
OFFLOADING = {"offload_optimizer": ("zero1", "zero2", "zero3"), "offload_param": ("zero3", "fsdp2")}
GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Setup:
    """One way to train.

    Attributes:
        engine: one of `ENGINES`.
        gpus: processes, one GPU each.
        train: "full", "lora" or "qlora" (4-bit weights, adapters in `dtype`).
        dtype: of weights and activations.
        master_weights: weights are float32 and computation is in `dtype`; engines of `fsdp2` and ZeRO have them anyway.
        batch: sequences on each device at once.
        accumulation: steps of gradients that are added up.
        settings: of mini-sequences, as `MiniSequenceConfig` takes them; None: plain.
        checkpointing: transformers' gradient checkpointing.
        optimizer_in_backward: each parameter is stepped as soon as it has its gradient, which is freed then.
        offload_optimizer, offload_param: ZeRO's and FSDP's, to host memory.
        bucket: parameters in a bucket of gradients to be reduced; None: the engine's default under the HF Trainer.
        reuse_distance, live_parameters: `stage3_max_reuse_distance` and `stage3_max_live_parameters` of ZeRO-3; None: their
            default, 1e9.
    """

    engine: str = "single"
    gpus: int = 1
    train: str = "full"
    dtype: str = "bfloat16"
    master_weights: bool = False
    optimizer: str = "adamw"
    lora_rank: int = 16
    lora_dropout: float = 0.0
    batch: int = 1
    accumulation: int = 1
    settings: Mapping[str, Any] | None = field(default_factory=dict)
    checkpointing: bool = True
    optimizer_in_backward: bool = False
    offload_optimizer: bool = False
    offload_param: bool = False
    bucket: int | None = None
    reuse_distance: int | None = None
    live_parameters: int | None = None

    def __post_init__(self):
        for name, allowed in (("engine", ENGINES), ("train", ADAPTERS), ("dtype", DTYPES), ("optimizer", OPTIMIZERS)):
            value = getattr(self, name)
            if value not in allowed:
                near = nearest(value, allowed)
                raise ValueError(f"{name}: one of {', '.join(allowed)} is allowed, got {value!r}{near}")
        for name in ("gpus", "batch", "accumulation", "lora_rank"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name}: a whole number from 1 is allowed, got {getattr(self, name)!r}")
        if self.engine == "single" and self.gpus > 1:
            raise ValueError(
                f'engine: "single" is one process, got gpus={self.gpus}; set engine to "ddp", "fsdp2" or "zero3"'
            )
        if self.gpus % self.sequence_parallel:
            raise ValueError(
                f"sequence_parallel: {self.sequence_parallel} ranks share a sequence, which must divide gpus={self.gpus}"
            )

    @property
    def sequence_parallel(self) -> int:
        value = (self.settings or {}).get("sequence_parallel", 1)
        return value["size"] if isinstance(value, Mapping) else value

    @property
    def sequence_parallel_mode(self) -> str:
        value = (self.settings or {}).get("sequence_parallel", 1)
        return value.get("mode", "auto") if isinstance(value, Mapping) else "auto"

    @property
    def itemsize(self) -> int:
        return 4 if self.dtype == "float32" else 2

    def replace(self, **changes: Any) -> Setup:
        return dataclasses.replace(self, **changes)
