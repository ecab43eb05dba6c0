"""What `MiniSequenceCallback` adds to a Trainer's logs, and so to what `report_to` names: peak memory, tokens/s, MFU.

Nothing is exchanged between ranks and no device is waited for: the peak is this process's, and tokens are the Trainer's own
count where it keeps one (`include_num_input_tokens_seen`), else the length of the last batch times the steps.
"""

from __future__ import annotations

import functools
import resource
import time
from typing import Any

import torch
from torch import nn

from ds_minis.tiling.core.params import whole_shape

# Dense products in 16 bits, FLOP/s. A device that is not here gets no MFU.
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}


def attach_metrics(trainer_class: Any) -> None:
    """Has `Trainer.log` add what its `MiniSequenceCallback` measured; a second call changes nothing."""
    log = trainer_class.log
    if getattr(log, "_ds_minis_metrics", False):
        return

    @functools.wraps(log)
    def log_with_metrics(self, logs, *args, **kwargs):
        if "loss" in logs:
            for callback in self.callback_handler.callbacks:
                metrics = getattr(callback, "mini_sequence_metrics", None)
                if isinstance(metrics, StepMetrics):
                    logs = {**metrics.since_last_log(self.state, self.args), **logs}
        return log(self, logs, *args, **kwargs)

    log_with_metrics._ds_minis_metrics = True
    trainer_class.log = log_with_metrics


class StepMetrics:
    """Measures one training run, from log to log."""

    def __init__(self, model: nn.Module, state: Any):
        self._model, self._step, self._time = model, state.global_step, time.perf_counter()
        self._seen = state.num_input_tokens_seen
        self._flops: tuple[int, float] | None = None
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def since_last_log(self, state: Any, args: Any) -> dict[str, float]:
        """The figures since the last call; empty if no step was made."""
        steps, now = state.global_step - self._step, time.perf_counter()
        if steps <= 0:
            return {}
        per_call = tokens_of_last_call(self._model)
        tokens = state.num_input_tokens_seen - self._seen
        if tokens <= 0:
            tokens = steps * per_call * args.gradient_accumulation_steps * args.world_size
        speed = tokens / (now - self._time)
        self._step, self._time, self._seen = state.global_step, now, state.num_input_tokens_seen
        found = {"peak_memory_gib": round(peak_memory_bytes() / 2**30, 3)}
        if tokens > 0:
            found["tokens_per_second"] = round(speed, 1)
            peak = peak_flops()
            if peak:
                found["mfu"] = round(self.flops_per_token(per_call) * speed / (peak * args.world_size), 4)
        return found

    def flops_per_token(self, length: int) -> float:
        """6 for each trained weight (4 for a frozen one), without embeddings; and causal attention at this length.

        Recomputation does not count, as is usual for MFU (PaLM, arXiv 2204.02311, appendix B).
        """
        if self._flops is None or self._flops[0] != length:
            embedding = self._model.get_input_embeddings()
            tied = embedding is getattr(self._model.get_output_embeddings(), "weight", None)
            skipped = set() if tied or embedding is None else {id(p) for p in embedding.parameters()}
            weights = sum(
                whole_shape(p).numel() * (6 if p.requires_grad else 4)
                for p in self._model.parameters()
                if id(p) not in skipped
            )
            config = self._model.config.get_text_config(decoder=True)
            width = getattr(config, "num_attention_heads", 0) * (getattr(config, "head_dim", None) or 0)
            width = width or getattr(config, "hidden_size", 0)
            self._flops = length, weights + 6 * getattr(config, "num_hidden_layers", 0) * width * length
        return self._flops[1]


def tokens_of_last_call(model: nn.Module) -> int:
    """Tokens of the last batch on this rank, as a tiled layer or module saw them; 0 where none was run."""
    for module in model.modules():
        chunking = getattr(module, "mini_sequence_chunking", None)
        if chunking is not None:
            call = chunking.last_calls.get("layer") or chunking.last_calls.get("module")
            return call[0] if call else 0
    return 0


def peak_memory_bytes() -> int:
    """Of tensors on this process's GPU; without one, of the process (Linux counts in KiB)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak_flops() -> float:
    """FLOP/s of the device in 16 bits; 0 where it is not known."""
    if not torch.cuda.is_available():
        return 0.0
    name = torch.cuda.get_device_name()
    return next((flops for known, flops in PEAK_FLOPS.items() if known in name), 0.0)
