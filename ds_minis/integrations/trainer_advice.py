"""What the planner would change where a Trainer's step runs out of memory: a setting, and the length that fits.

The plan is made after the error, on the main thread, on tensors without memory; it takes seconds, and the planner's cache
keeps it.
"""

from __future__ import annotations

import contextvars
import functools
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ds_minis.convert import mini_sequence_report
from ds_minis.tiling.core.out_of_memory import is_out_of_memory
from ds_minis.tiling.core.params import whole_shape

# Whether a Trainer's step is running, which knows more of itself than an engine's backward does.
IN_TRAINER: contextvars.ContextVar[bool] = contextvars.ContextVar("ds_minis_in_trainer", default=False)
PLANS = "ds_minis plans"  # how a note begins
_OPTIMIZERS = {"paged": "paged_adamw_8bit", "8bit": "adamw_8bit", "adafactor": "adafactor", "sgd": "sgd"}


def attach_advice(trainer_class: Any) -> None:
    """Has `Trainer.training_step` add a note to out-of-memory errors; a second call changes nothing."""
    step = trainer_class.training_step
    if getattr(step, "_ds_minis_advice", False):
        return

    @functools.wraps(step)
    def training_step_with_advice(self, model, inputs, *args, **kwargs):
        token = IN_TRAINER.set(True)
        try:
            return step(self, model, inputs, *args, **kwargs)
        except Exception as error:
            note = advice(self, inputs) if is_out_of_memory(error) else ""
            if note:
                error.add_note(note)
            raise
        finally:
            IN_TRAINER.reset(token)

    training_step_with_advice._ds_minis_advice = True
    trainer_class.training_step = training_step_with_advice


def device_bytes() -> int | None:
    """All memory of this process's device; None where there is no GPU."""
    return (
        torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        if torch.cuda.is_available()
        else None
    )


def advice(trainer: Any, inputs: Any) -> str:
    """The note; empty where nothing can be planned, as the step's own error is what has to be seen."""
    try:
        ids, capacity = inputs["input_ids"], device_bytes()
        report = mini_sequence_report(trainer.model)
        if capacity is None or report is None:
            return ""
        setup = setup_of(trainer, ids.shape[0], report.config.to_dict(defaults=False))
        return what_fits(trainer.model.config, setup, ids.shape[1], capacity)
    except Exception:
        return ""


def setup_of(trainer: Any, batch: int, settings: Mapping[str, Any]) -> Any:
    """The planner's `Setup` of a Trainer's run."""
    args = trainer.args
    fields = fields_of_state(trainer.accelerator.state)
    fields |= {"settings": dict(settings), "accumulation": args.gradient_accumulation_steps, "batch": batch}
    half = "bfloat16" if args.bf16 else "float16" if args.fp16 else None
    return setup_from(trainer.model, fields, half, str(getattr(args.optim, "value", args.optim)))


def fields_of_state(state: Any) -> dict[str, Any]:
    """Engine, processes and ZeRO's settings, of accelerate's state."""
    from ds_minis.planner.inputs.files import ENGINES, read_deepspeed

    kind = state.distributed_type.name
    fields: dict[str, Any] = {"engine": ENGINES[kind], "gpus": state.num_processes}
    if kind == "DEEPSPEED":
        fields |= read_deepspeed(state.deepspeed_plugin.deepspeed_config, "the engine's configuration")
    return fields


def setup_from(model: nn.Module, fields: dict[str, Any], half: str | None, optimizer: str) -> Any:
    """The planner's `Setup` of a model in training.

    Args:
        fields: of the setup, that the model does not tell.
        half: the dtype of computation under mixed precision; None without.
        optimizer: its name.
    """
    from ds_minis.planner.inputs.setup import Setup

    weights = [(whole_shape(p).numel(), p.requires_grad, p.dtype) for p in model.parameters()]
    trained = sum(number for number, requires_grad, _ in weights if requires_grad)
    adapters = getattr(model, "peft_config", None) or {}
    if trained < sum(number for number, _, _ in weights):
        fields["train"] = "qlora" if getattr(model, "is_loaded_in_4bit", False) else "lora"
        fields["lora_rank"] = max((getattr(adapter, "r", 0) for adapter in adapters.values()), default=0) or 16
    dtype = max(weights, key=lambda weight: weight[0])[2]
    optimizer = optimizer.lower()
    fields["optimizer"] = next((name for word, name in _OPTIMIZERS.items() if word in optimizer), "adamw")
    return Setup(
        **fields,
        dtype=half or str(dtype).removeprefix("torch."),
        master_weights=bool(half) and dtype == torch.float32 and fields["engine"] in ("single", "ddp"),
    )


def what_fits(config: Any, setup: Any, tokens: int, capacity: float) -> str:
    """In words: what the step needs, the first setting with which it fits, and the longest sequences that do.

    Args:
        tokens: of each of the step's sequences.
        capacity: bytes of the device.

    Raises:
        CannotTrace: a step of this configuration cannot be planned.
    """
    from ds_minis.planner.plan.planner import FITS, Planner
    from ds_minis.planner.plan.settings import candidates
    from ds_minis.planner.step.profile import cache_folder

    planner = Planner(config, cache=cache_folder())
    unit = max(1, min(1024, tokens // 64))

    def longest(one):
        return planner.longest(one, capacity, unit=unit)

    needs, own = planner.estimate(setup, tokens), longest(setup)
    said = f"{PLANS} {needs.device / 2**30:.1f} GiB on each device for this step of {tokens:,} tokens"
    said += f" ({setup.batch} sequences at once)" if setup.batch > 1 else ""
    said += f", which has {capacity / 2**30:.1f}"
    if needs.verdict(capacity) == FITS:
        return f"{said}: it would fit, so something else has memory there, or it is in fragments"
    others = [(c.setup, longest(c.setup)) for c in candidates(setup) if c.setup.settings is not None]
    fitting = [(one, most) for one, most in others if planner.estimate(one, tokens).verdict(capacity) == FITS]
    best, most = fitting[0] if fitting else max(others, key=lambda pair: pair[1])
    present = f"with the present settings, {own:,} tokens fit" if own else "with the present settings, no length fits"
    if most <= own:
        return f"{said}: {present}, and no other setting takes more"
    change = _in_words({key: value for key, value in best.settings.items() if setup.settings.get(key) != value})
    if fitting:
        return (
            f"{said}: it fits with {change} in the mini-sequence configuration, as do up to {most:,} tokens; {present}"
        )
    return f"{said}: no setting makes it fit; up to {most:,} tokens do with {change}; {present}"


def _in_words(settings: Mapping[str, Any]) -> str:
    return ", ".join(f'"{key}": {json.dumps(value)}' for key, value in settings.items())
