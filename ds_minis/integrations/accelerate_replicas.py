"""How many ranks are one replica to an accelerator; what accelerate divides by itself is refused."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import nn

from ds_minis.config_sources import Request
from ds_minis.convert import mini_sequence_report
from ds_minis.parallel.communication.groups import require_divisible
from ds_minis.replicas import group_size

_PEERS = {
    "cp": "torch's context parallelism cuts every batch among cp_size ranks itself, and is exact for full causal masks only",
    "sp": "DeepSpeed's Ulysses cuts every batch among sp_size ranks itself, and drops masks, sliding windows too",
    "tp": "tensor parallelism gives its tp_size ranks one batch each, and these would be ranks of one group",
}
_SP_TIMES = (
    "; with ZeRO-{stage}, which is configured here, its gradients are {size} times too large under the Trainer (seen on "
    "deepspeed 0.19.8 with accelerate 1.15)"
)


class Replicas:
    """How many ranks are one replica to an accelerator, by its settings or by the models that it was given.

    Attributes:
        trainer: weak reference to the `Trainer` that made the accelerator, whose model may be converted later.
    """

    def __init__(self, request: Request | None):
        self._request = request if request is not None and request.config.enabled else None
        self._models: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self.trainer: Callable[[], Any] = lambda: None
        self._decided: int | None = None

    def size(self, accelerator: Any) -> int:
        """Ranks of a group, as far as is known now. Data loaders are prepared for it from now on.

        Raises:
            ValueError: accelerate divides sequences too, or its processes cannot be divided into such groups.
        """
        size, source = self._find()
        if size > 1:
            require_divisible(accelerator.num_processes, size, source)
            _require_no_peer(accelerator, source)
        self._decided = size
        return size

    def decided(self) -> int:
        """Ranks of a group for which data loaders were prepared last."""
        return self._decided or (self._request.config.sequence_parallel.size if self._request else 1)

    def _find(self) -> tuple[int, str]:
        if self._request is not None:
            return self._request.config.sequence_parallel.size, self._request.source
        trainer = self.trainer()
        models = [*self._models, *([trainer.model] if isinstance(getattr(trainer, "model", None), nn.Module) else [])]
        return max(((group_size(m), _source(m)) for m in models), default=(1, ""))

    def see(self, accelerator: Any, models: list[nn.Module]) -> None:
        """Takes note of converted models that the accelerator is given.

        Raises:
            ValueError: data loaders were prepared before, for other groups than these.
        """
        for model in models:
            if mini_sequence_report(model) is not None:
                self._models.add(model)
        size, source = self._find()
        if size != (self._decided or 1) and accelerator._dataloaders:
            raise ValueError(
                f"{source}: sequence_parallel={size}: a data loader was prepared before this model, and gives each rank "
                "batches of its own. Prepare the model first, or both in one call of `prepare`, or set sequence_parallel in "
                "the accelerate configuration, which is known from the start"
            )


def _source(model: nn.Module) -> str:
    report = mini_sequence_report(model)
    return report.source if report is not None else ""


def _require_no_peer(accelerator: Any, source: str) -> None:
    """Refuses what would divide sequences, or give ranks one batch, a second time."""
    config = getattr(accelerator, "parallelism_config", None)
    for name, what in _PEERS.items() if config is not None else ():
        size = getattr(config, f"{name}_size", None) or 1
        if size == 1:
            continue
        plugin = getattr(accelerator.state, "deepspeed_plugin", None)
        if name == "sp" and plugin is not None and plugin.zero_stage in (1, 2):
            what += _SP_TIMES.format(stage=plugin.zero_stage, size=size)
        raise ValueError(
            f"{source}: sequence_parallel beside accelerate's parallelism_config with {name}_size={size}: {what}. Leave "
            f"{name}_size at 1 (sequence_parallel of ds_minis needs no engine's groups), or leave sequence_parallel out"
        )
