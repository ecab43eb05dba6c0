"""Whether a stage fits, by the planner's arithmetic: to refuse what cannot, before a cluster is asked for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ds_minis.planner.plan.planner import Planner

GIB = 2**30
# A recipe's engine -> the planner's settings.
ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {"engine": "ddp"},
    "fsdp": {"engine": "fsdp2"},
    "zero0": {"engine": "zero0"},
    "zero1": {"engine": "zero1"},
    "zero2": {"engine": "zero2"},
    "zero2_offload": {"engine": "zero2", "offload_optimizer": True},
    "zero3": {"engine": "zero3"},
    "zero3_offload": {"engine": "zero3", "offload_optimizer": True, "offload_param": True},
}


@dataclass(frozen=True)
class Need:
    """Bytes of a stage on one GPU, part by part, and on one host."""

    parts: Mapping[str, float]
    host: float

    @property
    def device(self) -> float:
        """All that one GPU holds."""
        return sum(self.parts.values())

    def __str__(self) -> str:
        parts = ", ".join(f"{part} {nbytes / GIB:.1f}" for part, nbytes in self.parts.items() if nbytes > 0.05 * GIB)
        return f"{self.device / GIB:.1f} GiB on each GPU ({parts}), {self.host / GIB:.1f} GiB on each host"


def need_of(
    planner: Planner,
    engine: str,
    *,
    tokens: int,
    batch: int,
    gpus: int,
    gpus_per_node: int,
    settings: Mapping[str, Any] | None,
) -> Need:
    """What a stage needs, as planned.

    Args:
        engine: one of `ENGINES`.
        tokens: of a sequence.
        batch: sequences of a forward pass.
        gpus: ranks in all.
        settings: of mini-sequences, with `sequence_parallel`; None: there are none.
    """
    from ds_minis.planner.inputs.setup import Setup

    setup = Setup(gpus=gpus, batch=batch, settings=settings, **ENGINES[engine])
    estimate = planner.estimate(setup, tokens)
    return Need({part: float(nbytes) for part, nbytes in estimate.parts().items()}, estimate.host * gpus_per_node)


def bytes_of(text: Any) -> float:
    """Bytes of a size such as "80GB", "80 GiB" or "1.5TB".

    Raises:
        ValueError: it is no size.
    """
    found = re.fullmatch(r"\s*([\d.]+)\s*([KMGT])(i?)B\s*", str(text), re.IGNORECASE)
    if not found:
        raise ValueError(f"a size such as 80GB or 80GiB is allowed, got {text!r}")
    return float(found[1]) * (1024 if found[3] else 1000) ** ("KMGT".index(found[2].upper()) + 1)
