"""What a run prints and saves when it ends."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer

from ds_minis import mini_sequence_report


def peak_memory_bytes() -> tuple[int, str]:
    """Peak memory of this process, and what was measured: the accelerator's allocations, or else resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated(), "allocated on the GPU"
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "resident, this process"


def summarize(trainer: Trainer, metrics: dict[str, Any]) -> None:
    """Saves `summary.json` and prints it in words, on rank 0."""
    if not trainer.is_world_process_zero():
        return
    report, (peak, kind) = mini_sequence_report(trainer.model), peak_memory_bytes()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    output_dir = Path(trainer.args.output_dir).resolve()
    summary = {
        "engine": f"{trainer.accelerator.distributed_type.value}, {type(trainer.model_wrapped).__name__}",
        "num_processes": trainer.accelerator.num_processes,
        "mini_sequence": report.config.to_dict() if report else None,
        "tiled_modules": len(report.tiled) if report else 0,
        "modules_in_4_bits": sum(getattr(m, "quant_state", None) is not None for m in trainer.model.modules()),
        "steps": trainer.state.global_step,
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
        "tokens_per_second": round(trainer.state.num_input_tokens_seen / metrics["train_runtime"], 1),
        "peak_memory_bytes": peak,
        "peak_memory_kind": kind,
        "output_dir": str(output_dir),
    }
    (output_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    print(
        "\n".join(
            [
                "",
                "===== done =====",
                f"engine       {summary['engine']}, {summary['num_processes']} processes",
                *(str(report) if report else "ds_minis: off").splitlines(),
                f"loss         {summary['first_loss']} -> {summary['last_loss']} in {summary['steps']} steps",
                f"throughput   {summary['tokens_per_second']} tokens/s (all processes)",
                f"peak memory  {peak / 2**20:,.0f} MiB ({kind})",
                f"results      {output_dir}",
            ]
        ),
        flush=True,
    )
