"""transformers: a callback that converts a Trainer's model, and evaluations that get the logits they need."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

from transformers.trainer_callback import TrainerCallback

from ds_minis.config import MiniSequenceConfig, Request, agreed, requested_by_environment
from ds_minis.convert import convert, mini_sequence_report
from ds_minis.tiling.loss import returning_logits

_DOOR = "MiniSequenceCallback"


class MiniSequenceCallback(TrainerCallback):
    """Turns mini-sequences on in a `Trainer` (TRL's included): `Trainer(..., callbacks=[MiniSequenceCallback()])`.

    The model is converted at the end of the trainer's construction, before an engine wraps it.

    Args:
        config: a `MiniSequenceConfig`, a mapping of its fields, True or None (all defaults), or False (off).
        settings: the fields themselves, as keywords, in place of `config`.

    Raises:
        ValueError: the settings are wrong, or disagree with the configuration file's; nothing in the model can be tiled;
            or training begins with a model that this callback has not seen.
    """

    def __init__(self, config: Any = None, **settings: Any):
        if settings and config is not None:
            raise ValueError(f"{_DOOR}: give a config or settings, not both; got {config!r} and {settings}")
        self.config = MiniSequenceConfig.from_value(settings or config, door=_DOOR)
        request = Request(self.config, _DOOR)
        agreed(requested_by_environment(request), request)

    def on_init_end(self, args, state, control, model=None, **kwargs):
        convert(model, self.config, door=_DOOR)

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if mini_sequence_report(model) is None:
            raise ValueError(
                f"{_DOOR}: the model that is trained, a {type(model).__name__}, was not converted: it was made after the "
                "trainer (`model_init`), or the callback was added after the trainer was made. Pass the callback in the "
                "trainer's `callbacks`, and with `model_init` call convert_to_mini_sequence in it"
            )


def attach_prediction_step(trainer_module) -> None:
    """Has `Trainer.prediction_step` ask for logits, unless it evaluates for the loss alone."""
    trainer_class = trainer_module.Trainer
    prediction_step = trainer_class.prediction_step

    @functools.wraps(prediction_step)
    def prediction_step_with_logits(self, model, inputs, prediction_loss_only, ignore_keys=None):
        with contextlib.nullcontext() if prediction_loss_only else returning_logits():
            return prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=ignore_keys)

    trainer_class.prediction_step = prediction_step_with_logits
