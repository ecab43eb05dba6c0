"""transformers: Trainer evaluations that compute metrics from predictions get the logits they need."""

from __future__ import annotations

import contextlib
import functools

from ds_minis.tiling.loss import returning_logits


def attach_prediction_step(trainer_module) -> None:
    """Has `Trainer.prediction_step` ask for logits, unless it evaluates for the loss alone."""
    trainer_class = trainer_module.Trainer
    prediction_step = trainer_class.prediction_step

    @functools.wraps(prediction_step)
    def prediction_step_with_logits(self, model, inputs, prediction_loss_only, ignore_keys=None):
        with contextlib.nullcontext() if prediction_loss_only else returning_logits():
            return prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=ignore_keys)

    trainer_class.prediction_step = prediction_step_with_logits
