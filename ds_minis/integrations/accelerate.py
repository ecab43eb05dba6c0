"""accelerate: a `mini_sequence:` section in its configuration files, a plugin, and conversion in `Accelerator.prepare`.

`accelerate launch` reads the file and hands the section to its ranks in the environment; there `Accelerator.prepare`
converts the model before it wraps it.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import inspect
import logging
import weakref
from collections.abc import Iterator
from typing import Any

from accelerate.utils import KwargsHandler
from torch import nn

from ds_minis.config import MiniSequenceConfig
from ds_minis.config_sources import SECTION, Request, hand_to_ranks, read_section, reconcile, requested_by_environment
from ds_minis.convert import NothingToTile, convert, tiled_modules
from ds_minis.integrations.accelerate_replicas import Replicas
from ds_minis.integrations.autoload import register
from ds_minis.layer.tiled.tiled_layer import TiledLayer
from ds_minis.loss.logits.deferred import materialized
from ds_minis.ranks import is_main_process
from ds_minis.tiling.modules.swap import Tiled
from ds_minis.tiling.modules.tiled_module import require_weights

logger = logging.getLogger("ds_minis")

_REQUEST = "_mini_sequence_request"
_reading: contextvars.ContextVar[dict[str, Any] | None] = contextvars.ContextVar("ds_minis_reading", default=None)


@contextlib.contextmanager
def _errors_of_the_plugin() -> Iterator[None]:
    """Puts the source in front of errors, as every other source of settings does."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"MiniSequencePlugin: {error}") from None


class MiniSequencePlugin(MiniSequenceConfig, KwargsHandler):
    """Mini-sequences for a script with an `Accelerator`: `Accelerator(kwargs_handlers=[MiniSequencePlugin()])`.

    `Accelerator(mini_sequence_plugin=MiniSequencePlugin())` is the same. Takes the settings of `MiniSequenceConfig`, with
    the same errors. Models are converted in `prepare`, before DDP, FSDP or DeepSpeed wrap them. A plugin that disagrees
    with the configuration file is a ValueError.
    """

    def __new__(cls, *args, **settings):
        with _errors_of_the_plugin():
            return super().__new__(cls, *args, **settings)

    def __post_init__(self):
        with _errors_of_the_plugin():
            super().__post_init__()
        register()  # who makes one wants it to work, whatever DS_MINIS_AUTOLOAD says


def attach_config_file(config_args) -> None:
    """Has accelerate's configuration files, YAML and JSON, take a `mini_sequence` section."""
    base = config_args.BaseConfig
    process_config, to_dict = base.process_config, base.to_dict

    @functools.wraps(process_config)
    def process_config_and_section(config_dict):
        reading = _reading.get()
        request = read_section(config_dict, f"accelerate config {reading['file']}" if reading else "accelerate config")
        config_dict.pop(SECTION, None)
        hand_to_ranks(request)
        if reading is not None:
            reading["request"] = request
        return process_config(config_dict)

    @functools.wraps(to_dict)
    def to_dict_with_section(self):
        result = to_dict(self)
        request = result.pop(_REQUEST, None)
        if request is not None:  # or `accelerate config update` would lose it
            result[SECTION] = request.config.to_dict(defaults=False) or True
        return result

    base.process_config, base.to_dict = staticmethod(process_config_and_section), to_dict_with_section
    for name in ("from_json_file", "from_yaml_file"):
        setattr(base, name, classmethod(_remembering(getattr(base, name).__func__)))


def _remembering(read):
    """Wraps one of accelerate's functions that read a file: errors can name the file, and the result keeps the section."""

    @functools.wraps(read)
    def read_and_remember(cls, *args, **kwargs):
        reading = {"file": next(iter((*args, *kwargs.values())), None) or "(default)", "request": None}
        token = _reading.set(reading)
        try:
            config = read(cls, *args, **kwargs)
        finally:
            _reading.reset(token)
        if reading["request"] is not None:
            config.__dict__[_REQUEST] = reading["request"]
        return config

    return read_and_remember


def attach_accelerator(accelerator_module) -> None:
    """Has `Accelerator` take the plugin, and convert models before it wraps them."""
    from ds_minis.integrations.data import (  # need accelerate's modules
        attach_data,
        schedules_for_replicas,
        step_for_replicas,
    )
    from ds_minis.integrations.loop_advice import attach_loop_advice, of_accelerator

    accelerator_class = accelerator_module.Accelerator
    attach_loop_advice(accelerator_class, of_accelerator)
    init, prepare, prepare_model = (
        accelerator_class.__init__,
        accelerator_class.prepare,
        accelerator_class.prepare_model,
    )
    signature = inspect.signature(init)

    @functools.wraps(init)
    def init_with_plugin(self, *args, mini_sequence_plugin=None, **kwargs):
        bound = signature.bind(self, *args, **kwargs)
        handlers = bound.arguments.get("kwargs_handlers") or []
        plugins = [handler for handler in handlers if isinstance(handler, MiniSequencePlugin)]
        if plugins:
            bound.arguments["kwargs_handlers"] = [handler for handler in handlers if handler not in plugins]
        if mini_sequence_plugin is not None:
            plugins.append(mini_sequence_plugin)
        by_code = [
            Request(MiniSequenceConfig.from_value(p, source="MiniSequencePlugin"), "MiniSequencePlugin")
            for p in plugins
        ]
        reconcile(*by_code, requested_by_environment(*by_code))  # before any process group is made
        init(*bound.args, **bound.kwargs)
        section = _deepspeed_section(self)
        self._mini_sequence = _Models(reconcile(*by_code, section, requested_by_environment(*by_code, section)))
        self._mini_sequence.replicas.size(self)  # what cannot be is said before any model is loaded

    @functools.wraps(prepare)
    def prepare_converted(self, *args, **kwargs):
        models_of(self).convert(self, [arg for arg in args if isinstance(arg, nn.Module)])
        replicas = models_of(self).replicas
        with schedules_for_replicas(() if self.split_batches else args, replicas.size(self)):
            result = prepare(self, *args, **kwargs)
        step_for_replicas(self._schedulers, replicas.decided())
        return result

    @functools.wraps(prepare_model)
    def prepare_converted_model(self, model, *args, **kwargs):
        models_of(self).convert(self, [model])
        with fsdp1_units_around_tiled_modules(getattr(self.state, "fsdp_plugin", None), model):
            return prepare_model(self, model, *args, **kwargs)

    init_with_plugin.__signature__ = signature.replace(parameters=[*signature.parameters.values(), _PLUGIN_PARAMETER])
    accelerator_class.__init__ = init_with_plugin
    accelerator_class.prepare, accelerator_class.prepare_model = prepare_converted, prepare_converted_model
    attach_data(accelerator_module, lambda accelerator: models_of(accelerator).replicas)
    for name in ("gather", "gather_for_metrics", "pad_across_processes", "reduce"):
        setattr(accelerator_class, name, _given_logits_in_full(getattr(accelerator_class, name)))


def models_of(accelerator: Any) -> _Models:
    """What an accelerator was asked for; nothing, if it was made before ds_minis was attached."""
    if "_mini_sequence" not in accelerator.__dict__:
        accelerator._mini_sequence = _Models(None)
    return accelerator._mini_sequence


def _given_logits_in_full(method):
    """Wraps what is given a model's outputs and hands them to collectives, which ask no tensor what it stands for."""

    @functools.wraps(method)
    def method_with_logits(self, *args, **kwargs):
        return method(self, *materialized(args), **materialized(kwargs))

    return method_with_logits


_PLUGIN_PARAMETER = inspect.Parameter("mini_sequence_plugin", inspect.Parameter.KEYWORD_ONLY, default=None)


def _deepspeed_section(accelerator) -> Request | None:
    """What the DeepSpeed JSON of an accelerator asks for, if it runs DeepSpeed."""
    plugin = accelerator.state.deepspeed_plugin
    if plugin is None:
        return None
    source = getattr(plugin.hf_ds_config, "_mini_sequence_source", "DeepSpeed config")
    return read_section(plugin.deepspeed_config, source)


@contextlib.contextmanager
def fsdp1_units_around_tiled_modules(plugin, model: nn.Module) -> Iterator[None]:
    """Inside, the policy of accelerate's plugin for FSDP (or None) makes no unit of FSDP1 of a part of a tiled module.

    Nor of an LM head whose loss is tiled: every chunk would gather the weights of such a unit. PEFT's policy, which the
    Trainer sets, makes one of each adapter; only with `use_orig_params: false` there is no other way.

    Raises:
        RuntimeError: there is such a unit all the same, which the first forward pass would refuse.
    """
    if plugin is None or plugin.fsdp_version != 1 or not plugin.use_orig_params:
        yield
        if plugin is not None and plugin.fsdp_version == 1:
            for module in tiled_modules(model):
                if not isinstance(module, TiledLayer):  # which is run whole then
                    require_weights(module)
        return
    plugin.set_auto_wrap_policy(model)
    policy, tiled = plugin.auto_wrap_policy, tiled_modules(model)
    parts = {part for module in tiled for part in module.modules() if part is not module}
    inside = parts | {module for module in tiled if not isinstance(module, Tiled)}

    def policy_outside(module, recurse, nonwrapped_numel):
        return module not in inside and policy(module=module, recurse=recurse, nonwrapped_numel=nonwrapped_numel)

    plugin.auto_wrap_policy = policy_outside if policy is not None and inside else policy
    try:
        yield
    finally:
        plugin.auto_wrap_policy = policy


class _Models:
    """What an accelerator was asked for, and what became of the models that it was given.

    Attributes:
        replicas: which of its processes are given the same data.
    """

    def __init__(self, request: Request | None):
        self._request = request
        self.replicas = Replicas(request)
        self._converted = False
        self._left: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    def convert(self, accelerator: Any, models: list[nn.Module]) -> None:
        """Converts what was given to `prepare`.

        Raises:
            ValueError: see `Replicas.see`.
            NothingToTile: none of the models can be tiled, and none before could (a script may prepare a small critic
                beside its language model; that is only reported).
        """
        self._convert(models)
        self.replicas.see(accelerator, models)

    def _convert(self, models: list[nn.Module]) -> None:
        failures = []
        for model in models if self._request is not None else ():
            try:
                convert(model, self._request.config, source=self._request.source)
                self._converted = True
            except NothingToTile as error:
                failures.append((model, error))
        for model, error in failures:
            if not self._converted:
                raise error
            if model not in self._left and is_main_process():  # `prepare` calls `prepare_model` for each
                logger.warning("ds_minis: a model is left as it is: %s", error)
            self._left.add(model)
