"""The HF Trainer under sequence parallelism: what it counts is that of `world size / group size` processes.

Steps, epochs and the schedule come from the length of its data loaders (`ds_minis.integrations.data`). The number of labels
in a batch, `num_items_in_batch`, it sums over all ranks, and multiplies the loss by their number: both count a group `size`
times, and stay as they are.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import math
import weakref
from typing import Any

from accelerate import Accelerator

from ds_minis.integrations.accelerate import models_of
from ds_minis.integrations.data import attach_skipping, each_replica_once

_STEPS: contextvars.ContextVar[int] = contextvars.ContextVar("ds_minis_samples_per_step", default=0)


def attach_counts(trainer_module: Any) -> None:
    """Has `Trainer` count each replica once."""
    cls = trainer_module.Trainer
    make_accelerator = cls.create_accelerator_and_postprocess

    @functools.wraps(make_accelerator)
    def make_accelerator_that_knows(self, *args, **kwargs):
        result = make_accelerator(self, *args, **kwargs)
        _replicas(self.accelerator).trainer = weakref.ref(self)  # whose model may be converted later
        return result

    cls.create_accelerator_and_postprocess = make_accelerator_that_knows
    for name, attach in {
        "get_total_train_batch_size": _divided(int.__floordiv__),
        "floating_point_ops": _divided(lambda count, size: count / size),
        "_track_num_input_tokens": _counting_once,
        "_get_train_sampler": _for_replicas,
        "evaluate": _timed,
        "predict": _timed,
    }.items():
        if hasattr(cls, name):  # all are in transformers 5.23
            setattr(cls, name, attach(getattr(cls, name)))
    _attach_speed(trainer_module)
    attach_skipping(trainer_module)


def _replicas(accelerator: Accelerator) -> Any:
    return models_of(accelerator).replicas


def _size(trainer: Any) -> int:
    """Ranks of a group; asked of the model, before the trainer's data loaders are prepared."""
    return _replicas(trainer.accelerator).size(trainer.accelerator)


def _divided(divide):
    """Wraps a method whose result counts what all ranks do."""

    def attach(method):
        @functools.wraps(method)
        def divided(self, *args, **kwargs):
            result, size = method(self, *args, **kwargs), _replicas(self.accelerator).decided()
            return result if size == 1 else divide(result, size)

        return divided

    return attach


def _counting_once(method):
    """Wraps a method that gathers counts from all ranks."""

    @functools.wraps(method)
    def counting_once(self, *args, **kwargs):
        with each_replica_once(_replicas(self.accelerator).decided()):
            return method(self, *args, **kwargs)

    return counting_once


def _for_replicas(method):
    """Wraps the method that makes the sampler: one of the Trainer's divides data among ranks by itself."""

    @functools.wraps(method)
    def sampler_for_replicas(self, *args, **kwargs):
        sampler, size = method(self, *args, **kwargs), _size(self)
        if size == 1 or not all(hasattr(sampler, name) for name in ("dp_size", "rank", "effective_batch_size")):
            return sampler
        return type(sampler)(
            lengths=sampler.lengths,
            effective_batch_size=sampler.effective_batch_size // size,
            dp_size=sampler.dp_size // size,
            grad_accum=sampler.grad_accum,
            shuffle=sampler.shuffle,
            seed=sampler.seed,
            rank=sampler.rank // size,
            drop_last=sampler.drop_last,
        )

    return sampler_for_replicas


def _timed(method):
    """Wraps an evaluation, whose steps per second are computed from the number of ranks."""

    @functools.wraps(method)
    def timed(self, *args, **kwargs):
        size = _size(self)
        samples_per_step = 0 if size == 1 else self.args.eval_batch_size * (self.args.world_size // size)
        token = _STEPS.set(samples_per_step)
        try:
            return method(self, *args, **kwargs)
        finally:
            _STEPS.reset(token)

    return timed


def _attach_speed(trainer_module: Any) -> None:
    speed_metrics = trainer_module.speed_metrics

    @functools.wraps(speed_metrics)
    def speed_metrics_of_replicas(*args, **kwargs):
        samples_per_step = _STEPS.get()
        with contextlib.suppress(KeyError, TypeError):
            if samples_per_step:
                kwargs |= {"num_steps": math.ceil(kwargs["num_samples"] / samples_per_step)}
        return speed_metrics(*args, **kwargs)

    trainer_module.speed_metrics = speed_metrics_of_replicas
