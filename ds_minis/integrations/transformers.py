"""transformers: a callback that converts a Trainer's model, and evaluations that get the logits they need."""

from __future__ import annotations

import contextvars
import functools
from typing import Any

from transformers.trainer_callback import TrainerCallback

from ds_minis.config import MiniSequenceConfig
from ds_minis.config_sources import Request, reconcile, requested_by_environment
from ds_minis.convert import convert, mini_sequence_report
from ds_minis.integrations.trainer_advice import attach_advice
from ds_minis.integrations.trainer_metrics import StepMetrics, attach_metrics
from ds_minis.loss.forward.output_logits import returning_logits
from ds_minis.tiling.modules.cache_rule import CACHE_NAMES

_SOURCE = "MiniSequenceCallback"


class MiniSequenceCallback(TrainerCallback):
    """Turns mini-sequences on in a `Trainer` (TRL's included): `Trainer(..., callbacks=[MiniSequenceCallback()])`.

    The model is converted at the end of the trainer's construction, before an engine wraps it. Logs get the peak of memory,
    tokens per second and, on known GPUs, MFU (`ds_minis.integrations.trainer_metrics`).

    Attributes:
        mini_sequence_metrics: of the run in progress.

    Args:
        config: a `MiniSequenceConfig`, a mapping of its fields, True or None (all defaults), or False (off).
        settings: the fields themselves, as keywords, in place of `config`.

    Raises:
        ValueError: the settings are wrong, or disagree with the configuration file's; nothing in the model can be tiled;
            or training begins with a model that this callback has not seen.
    """

    def __init__(self, config: Any = None, **settings: Any):
        self.config = MiniSequenceConfig.from_arguments(config, settings, source=_SOURCE)
        request = Request(self.config, _SOURCE)
        reconcile(requested_by_environment(request), request)
        self.mini_sequence_metrics: StepMetrics | None = None
        from transformers import Trainer  # not above: this file is imported by the attaching of transformers.trainer

        attach_metrics(Trainer)
        attach_advice(Trainer)

    def on_init_end(self, args, state, control, model=None, **kwargs):
        convert(model, self.config, source=_SOURCE)

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if mini_sequence_report(model) is None:
            raise ValueError(
                f"{_SOURCE}: the model that is trained, a {type(model).__name__}, was not converted: it was made after the "
                "trainer (`model_init`), or the callback was added after the trainer was made. Pass the callback in the "
                "trainer's `callbacks`, and with `model_init` call convert_to_mini_sequence in it"
            )
        self.mini_sequence_metrics = StepMetrics(model, state)

    def on_train_end(self, args, state, control, **kwargs):
        self.mini_sequence_metrics = None  # or it would hold the model


def attach_trainer(trainer_module) -> None:
    """Has the `Trainer` evaluate with less memory, count replicas where ranks share their sequences, and say what fits."""
    attach_evaluation(trainer_module)
    attach_advice(trainer_module.Trainer)
    if hasattr(trainer_module, "Accelerator"):  # it is not, where accelerate is not installed
        from ds_minis.integrations.trainer_counts import attach_counts

        attach_counts(trainer_module)


def attach_evaluation(trainer_module) -> None:
    """Has `Trainer` evaluations get what they need of the logits, and hold no more of them than that.

    For the loss alone: none. With `preprocess_logits_for_metrics`: its result, made from chunks of logits where it takes
    the predicted tokens, say. With `compute_metrics` alone, or in `predict`: all, as these are given all.
    """
    trainer_class = trainer_module.Trainer
    evaluation_loop, prediction_step = trainer_class.evaluation_loop, trainer_class.prediction_step

    @functools.wraps(evaluation_loop)
    def evaluation_loop_by_chunks(self, *args, **kwargs):
        preprocess = self.preprocess_logits_for_metrics
        if preprocess is None:
            return evaluation_loop(self, *args, **kwargs)
        evaluation = _Evaluation(preprocess)
        token = _EVALUATION.set(evaluation)
        self.preprocess_logits_for_metrics = evaluation.preprocess_once
        try:
            return evaluation_loop(self, *args, **kwargs)
        finally:
            self.preprocess_logits_for_metrics = preprocess
            _EVALUATION.reset(token)

    @functools.wraps(prediction_step)
    def prediction_step_with_logits(self, model, inputs, prediction_loss_only, ignore_keys=None):
        if prediction_loss_only:
            return prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=ignore_keys)
        evaluation, transform, ignored = _EVALUATION.get(), None, ignore_keys
        # A step of the user's own may look at the logits that this one gives, before the loop transforms them.
        if type(self).prediction_step.__module__.partition(".")[0] not in ("transformers", "trl"):
            evaluation = None
        if evaluation is not None:
            labels = tuple(self._prepare_input(inputs.get(name)) for name in self.label_names)
            transform = functools.partial(evaluation.preprocess, labels=labels[0] if len(labels) == 1 else labels)
        if ignored is None:
            ignored = getattr(getattr(self.model, "config", None), "keys_to_ignore_at_inference", [*CACHE_NAMES])
        with returning_logits(transform, ignored) as wanted:
            result = prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=ignore_keys)
        if evaluation is not None:
            evaluation.done = wanted.transformed
        return result

    trainer_class.evaluation_loop, trainer_class.prediction_step = (
        evaluation_loop_by_chunks,
        prediction_step_with_logits,
    )


class _Evaluation:
    """One evaluation loop whose logits are made smaller by the user's function."""

    def __init__(self, preprocess):
        self._preprocess = preprocess
        self.done = False  # whether the logits of the last prediction step are the result already

    def preprocess(self, logits, labels):
        return self._preprocess(logits, labels)

    def preprocess_once(self, logits, labels):
        """What the loop calls, with the logits of each prediction step."""
        done, self.done = self.done, False
        return logits if done else self._preprocess(logits, labels)


_EVALUATION: contextvars.ContextVar[_Evaluation | None] = contextvars.ContextVar("ds_minis_evaluation", default=None)
