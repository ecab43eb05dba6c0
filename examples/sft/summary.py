"""What a run prints and saves when it ends."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from progress import Progress
from transformers import Trainer

from ds_minis import ConversionReport, mini_sequence_report
from ds_minis.integrations import trainer_metrics


def peak_memory_bytes() -> tuple[int, str]:
    """Peak memory of this process, and what was measured: the accelerator's allocations, or else resident memory."""
    kind = "allocated on the GPU" if torch.cuda.is_available() else "resident, this process"
    return trainer_metrics.peak_memory_bytes(), kind


def summarize(trainer: Trainer, metrics: dict[str, Any], progress: Progress) -> None:
    """Saves `summary.json` and prints it in words, on rank 0. The throughput is that of this run, if it resumed another."""
    if not trainer.is_world_process_zero():
        return
    report, (peak, kind) = mini_sequence_report(trainer.model), peak_memory_bytes()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    tokens = trainer.state.num_input_tokens_seen - progress.first_tokens
    output_dir = Path(trainer.args.output_dir).resolve()
    summary = {
        "engine": f"{trainer.accelerator.distributed_type.value}, {type(trainer.model_wrapped).__name__}",
        "num_processes": trainer.accelerator.num_processes,
        "mini_sequence": report.config.to_dict() if report else None,
        "tiled_modules": len(report.tiled) if report else 0,
        "modules_in_4_bits": sum(getattr(m, "quant_state", None) is not None for m in trainer.model.modules()),
        "steps": trainer.state.global_step,
        "resumed_from_step": progress.first_step or None,
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
        "tokens_per_second": round(tokens / metrics["train_runtime"], 1),
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
                *_tiled_in_words(report),
                f"loss         {summary['first_loss']:.4f} -> {summary['last_loss']:.4f} in {summary['steps']} steps"
                if losses
                else "loss         none was logged (--logging_steps)",
                f"throughput   {summary['tokens_per_second']:,.1f} tokens/s (all processes)"
                + (f", from step {progress.first_step} on" if progress.first_step else ""),
                f"peak memory  {peak / 2**20:,.0f} MiB ({kind})",
                f"results      {output_dir}",
            ]
        ),
        flush=True,
    )


def _tiled_in_words(report: ConversionReport | None) -> list[str]:
    if report is None:
        return ["ds_minis     off"]
    loss = report.loss
    if loss.startswith("not tiled"):
        loss = f"TRL's fused LM head, in chunks of its own; {loss}"
    lines = str(dataclasses.replace(report, loss=loss, sizes=None, last_loss="")).splitlines()
    return ["what was tiled", *lines[1:]]
