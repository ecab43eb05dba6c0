"""What the planner would change where a loop of the user's own runs out of memory, as for a Trainer's step.

Of such a loop its engine is known: accelerate's `Accelerator` in backward, DeepSpeed's in forward too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import nn

from ds_minis.convert import mini_sequence_report
from ds_minis.integrations import trainer_advice
from ds_minis.integrations.trainer_metrics import tokens_of_last_call
from ds_minis.tiling.core.out_of_memory import is_out_of_memory


def attach_loop_advice(
    engine_class: Any, describe: Callable[[Any], tuple[nn.Module, dict[str, Any], str | None, str]]
) -> None:
    """Has an engine's `backward`, and its `forward` if it runs the model, add a note to out-of-memory errors.

    A second call changes nothing.

    Args:
        describe: engine -> what `trainer_advice.setup_from` is given, for its converted model.
    """
    for name in ("forward", "backward"):
        method = getattr(engine_class, name, None)
        if method is not None and not getattr(method, "_ds_minis_advice", False):
            setattr(engine_class, name, _with_advice(method, describe))


def _with_advice(method: Callable, describe: Callable[[Any], tuple]) -> Callable:
    @functools.wraps(method)
    def with_advice(self, *args, **kwargs):
        try:
            return method(self, *args, **kwargs)
        except Exception as error:
            if is_out_of_memory(error) and not trainer_advice.IN_TRAINER.get():
                _add(error, self, describe)
            raise

    with_advice._ds_minis_advice = True
    return with_advice


def _add(error: Exception, engine: Any, describe: Callable[[Any], tuple]) -> None:
    """A plan that fails adds nothing: the step's own error is what has to be seen."""
    if any(note.startswith(trainer_advice.PLANS) for note in getattr(error, "__notes__", ())):
        return  # accelerate's backward calls DeepSpeed's
    try:
        capacity = trainer_advice.device_bytes()
        model, fields, half, optimizer = describe(engine)
        report, tokens = mini_sequence_report(model), tokens_of_last_call(model)
        if capacity is None or report is None or not tokens:
            return
        setup = trainer_advice.setup_from(
            model, fields | {"settings": report.config.to_dict(defaults=False), "batch": 1}, half, optimizer
        )
        # Of a batch it is all tokens that count, as if they were one sequence; those of a group's other ranks too.
        error.add_note(trainer_advice.what_fits(model.config, setup, tokens * setup.sequence_parallel, capacity))
    except Exception:
        return


def of_accelerator(accelerator: Any) -> tuple[nn.Module, dict[str, Any], str | None, str]:
    """What is known of a loop that accelerate runs."""
    models = [accelerator.unwrap_model(model) for model in accelerator._models]
    model = next(model for model in models if mini_sequence_report(model) is not None)
    fields = trainer_advice.fields_of_state(accelerator.state)
    fields["accumulation"] = accelerator.gradient_accumulation_steps
    half = {"bf16": "bfloat16", "fp16": "float16"}.get(accelerator.mixed_precision)
    return model, fields, half, " ".join(type(one.optimizer).__name__ for one in accelerator._optimizers)


def of_deepspeed(engine: Any) -> tuple[nn.Module, dict[str, Any], str | None, str]:
    """What is known of a loop of DeepSpeed's engine."""
    from ds_minis.planner.inputs.files import read_deepspeed

    fields = {"gpus": dist.get_world_size(), **read_deepspeed(engine._config._param_dict, "the engine's configuration")}
    half = "bfloat16" if engine.bfloat16_enabled() else "float16" if engine.fp16_enabled() else None
    return engine.module, fields, half, type(engine.basic_optimizer).__name__
