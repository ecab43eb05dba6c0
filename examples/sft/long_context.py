"""What a stage of a long-context extension needs: RoPE changed on load and checked once the engine has cast the model, a
first loss that is looked at, and an end that can be asked for from outside (a job's time limit).
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import torch.distributed
from arguments import ModelArguments
from transformers import PreTrainedConfig, PreTrainedModel, TrainerCallback
from transformers.utils import logging

from ds_minis.context import rope_theta_for
from ds_minis.context.rope import check_rope, exact_rope, rope_theta_of, rope_type_of, with_rope

logger = logging.get_logger("train")
STOPPED = 75  # exit status of a run that saved a checkpoint and stopped, as it was asked to; sysexits' "try again"


def stage_config(args: ModelArguments, config: PreTrainedConfig, length: int | None) -> PreTrainedConfig | None:
    """The configuration to load the model with; None if RoPE stays as it is.

    Raises:
        ValueError: `--rope_theta` is no number and not `auto`; `--max_length` is missing; the RoPE cannot be changed so.
    """
    if args.rope_theta is None:
        if args.rope_base_length is not None:
            raise ValueError("--rope_base_length is for --rope_theta auto: add that, or leave it out")
        return None
    if not length:
        raise ValueError("--rope_theta: give --max_length, the length that positions are made for")
    theta = _auto_theta(args, config, length) if args.rope_theta == "auto" else _number(args.rope_theta)
    return with_rope(config, theta=theta, length=length)


def prepare_model(model: PreTrainedModel, changed: PreTrainedConfig | None) -> PreTrainedModel:
    """Has a model that was loaded with `stage_config` compute its angles exactly."""
    return model if changed is None else exact_rope(model)


def callbacks(args: ModelArguments, length: int | None, *, pretrained: bool) -> list[TrainerCallback]:
    """What watches a stage's training. `pretrained`: whether the model began with trained weights."""
    before = _last_loss(Path(args.model_name_or_path) / "trainer_state.json")
    changed = [] if args.rope_theta is None else [CheckRope(length), FirstLoss(pretrained, before)]
    return changed + ([] if args.stop_file is None else [StopFile(Path(args.stop_file))])


def _auto_theta(args: ModelArguments, config: PreTrainedConfig, length: int) -> float:
    if rope_type_of(config) != "default":
        raise ValueError(
            f"--rope_theta auto: this model's RoPE is scaled ({rope_type_of(config)}), and the formula is of plain RoPE. "
            f"Give a number (now {rope_theta_of(config):g})"
        )
    base_length = args.rope_base_length or config.get_text_config().max_position_embeddings
    return rope_theta_for(max(length, base_length), base_length, rope_theta_of(config))


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"--rope_theta: a number or auto is allowed, got {text!r}") from None


def _last_loss(file: Path) -> float | None:
    """The last loss of the run that saved a model in this file's folder, if one did."""
    return _last_logged(json.loads(file.read_text(encoding="utf-8"))["log_history"]) if file.is_file() else None


def _last_logged(history: list[dict[str, Any]]) -> float | None:
    return next((entry["loss"] for entry in reversed(history) if "loss" in entry), None)


class CheckRope(TrainerCallback):
    """Stops before the first step if a cast of the engine's has reached the angles."""

    def __init__(self, length: int):
        self.length = length

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        check_rope(model, self.length)


class FirstLoss(TrainerCallback):
    """One line, if the first loss is far above that of short sequences.

    That is the last one of the stage before, where this run continues one, or took its weights. Else ln(V) stands for a loss
    that nothing was learned for, as only trained weights are expected to be below it.
    """

    def __init__(self, pretrained: bool, before: float | None):
        self.pretrained, self.before = pretrained, before
        self.looked = False

    def on_train_begin(self, args, state, control, **kwargs):
        continued = _last_logged(state.log_history)
        self.before = self.before if continued is None else continued

    def on_log(self, args, state, control, logs: dict[str, Any] | None = None, model=None, **kwargs):
        if self.looked or "loss" not in (logs or {}):
            return
        self.looked = True
        line = far_above(logs["loss"], self.before, model.config, self.pretrained)
        if line and state.is_world_process_zero:
            logger.warning(line)


def far_above(loss: float, before: float | None, config: PreTrainedConfig, pretrained: bool) -> str:
    """What is said of a first loss; empty if it is nothing special."""
    text = config.get_text_config()
    untrained = math.log(text.vocab_size)
    if before is not None:
        if loss <= before + max(0.5, 0.25 * before):
            return ""
        than = f"{before:.2f}, the loss before this stage"
    elif not pretrained or loss < 0.7 * untrained:
        return ""
    else:
        than = "that of a trained model"
    near = f" ({untrained:.2f}, ln {text.vocab_size}, is that of an untrained model)"
    return (
        f"the first loss, {loss:.2f}, is far above {than}{near}: was a RoPE override ignored, or its base (now "
        f"{rope_theta_of(config):g}) raised by more than a stage at once, or do the weights not belong to this "
        "configuration? See docs/long_context.md"
    )


class StopFile(TrainerCallback):
    """Saves a checkpoint and stops at the end of the step in which a file appears.

    Rank 0 looks for it; the others ask rank 0 by the store of the process group, so that all stop at the same step. No
    collective runs for it, and no device is waited for.
    """

    def __init__(self, path: Path):
        self.path = path
        self.stopped = False

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step < state.max_steps and self._is_asked(state.global_step):
            control.should_save = control.should_training_stop = self.stopped = True

    def _is_asked(self, step: int) -> bool:
        if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
            return self._take()
        store = torch.distributed.distributed_c10d._get_default_store()
        if torch.distributed.get_rank() == 0:
            store.set(f"stop_file/{step}", "1" if self._take() else "0")
        return store.get(f"stop_file/{step}") == b"1"

    def _take(self) -> bool:
        found = self.path.exists()
        if found:
            os.remove(self.path)
        return found
