"""DeepSpeed: `"mini_sequence"` in its JSON converts the model before the engine is built, and an op in `ds_report`."""

from __future__ import annotations

import functools
import inspect
import os
import sys
from typing import Any

import torch
from torch import nn

from ds_minis.config_sources import SECTION, read_section, reconcile, requested_by_environment
from ds_minis.convert import convert, convert_to_mini_sequence, revert_mini_sequence, tiled_modules
from ds_minis.integrations.loading import look_before_loading
from ds_minis.integrations.loop_advice import attach_loop_advice, of_deepspeed
from ds_minis.loss.logits.deferred import DeferredLogits
from ds_minis.replicas import group_size, sampler_arguments
from ds_minis.tiling.core.tiled_op import tile_rows
from ds_minis.tiling.modules.swap import Tiled


class MiniSequenceOp:
    """The op that DeepSpeed's `MiniSequenceBuilder().load()` gives."""

    convert = staticmethod(convert_to_mini_sequence)
    revert = staticmethod(revert_mini_sequence)
    tile_rows = staticmethod(tile_rows)


def attach_initialize(deepspeed) -> None:
    """Has `deepspeed.initialize` convert the model first, when its configuration asks for it."""
    initialize = deepspeed.initialize
    signature = inspect.signature(initialize)

    @functools.wraps(initialize)
    def initialize_with_mini_sequence(*args, **kwargs):
        arguments = signature.bind_partial(*args, **kwargs).arguments
        settings, source = _ds_config(arguments)
        section = read_section(settings, source)
        request = reconcile(section, requested_by_environment(section))
        model = arguments.get("model")
        if isinstance(model, nn.Module) and request is not None:  # DeepSpeed has its own words for what is no model
            convert(model, request.config, source=request.source)
        if isinstance(model, nn.Module) and group_size(model) > 1:
            _require_no_groups_of_deepspeed(settings, source, arguments.get("mpu"))
        return initialize(*args, **kwargs)

    deepspeed.initialize = initialize_with_mini_sequence
    _attach_training_data(deepspeed.DeepSpeedEngine)
    attach_loop_advice(deepspeed.DeepSpeedEngine, of_deepspeed)


def _attach_training_data(engine_class) -> None:
    """Has the engine's own data loaders, `training_data` too, give all ranks of a group the same batches."""
    deepspeed_io = engine_class.deepspeed_io
    signature = inspect.signature(deepspeed_io)

    @functools.wraps(deepspeed_io)
    def deepspeed_io_for_replicas(self, *args, **kwargs):
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        if group_size(self.module) == 1 or given["data_sampler"] is not None:
            return deepspeed_io(self, *args, **kwargs)
        if self.curriculum_learning_enabled():
            raise ValueError(
                "sequence_parallel: DeepSpeed's curriculum_learning makes its own sampler, which gives each rank other data: "
                "leave curriculum_learning out, or leave sequence_parallel out"
            )
        given["data_sampler"] = torch.utils.data.DistributedSampler(
            given["dataset"], **sampler_arguments(self.module), shuffle=given["route"] == "train"
        )
        return deepspeed_io(*bound.args, **bound.kwargs)

    engine_class.deepspeed_io = deepspeed_io_for_replicas


def _require_no_groups_of_deepspeed(settings: dict[str, Any], source: str, mpu: Any) -> None:
    """Refuses DeepSpeed's own sequence or model parallelism beside that of ds_minis."""
    size = settings.get("sequence_parallel_size", 1)
    tensor = (settings.get("tensor_parallel") or {}).get("autotp_size", 1)
    if size == 1 and tensor in (0, 1) and mpu is None:
        return
    key = "mpu" if mpu is not None else f"sequence_parallel_size={size}" if size != 1 else f"autotp_size={tensor}"
    raise ValueError(
        f"{source}: sequence_parallel of ds_minis beside DeepSpeed's {key}: both would give several ranks one batch, and "
        "gradients would be those of neither. Leave one of them out (ds_minis needs no engine's groups)"
    )


def attach_op_builder(all_ops) -> None:
    """Registers the op: `ds_report` lists it, and `deepspeed.ops.op_builder.MiniSequenceBuilder` builds it."""
    from deepspeed.ops import op_builder
    from deepspeed.ops.op_builder.builder import OpBuilder

    class MiniSequenceBuilder(OpBuilder):
        """Has no sources: the op is Python on top of torch, so there is nothing to compile and any device will do."""

        BUILD_VAR = "DS_BUILD_MINI_SEQUENCE"
        NAME = "mini_sequence"

        def __init__(self):
            super().__init__(name=self.NAME)

        def absolute_name(self):
            return "ds_minis.integrations.deepspeed.MiniSequenceOp"

        def sources(self):
            return []

        def is_compatible(self, verbose=False):
            return True

        def load(self, verbose=False):
            return MiniSequenceOp

    op_builder.MiniSequenceBuilder = MiniSequenceBuilder
    all_ops.ALL_OPS[MiniSequenceBuilder.NAME] = MiniSequenceBuilder()


def attach_config_check(accelerate_deepspeed) -> None:
    """Has accelerate and the HF Trainer check `"mini_sequence"` when they read the JSON: before any model is built."""
    config_class = accelerate_deepspeed.HfDeepSpeedConfig
    read = config_class.__init__

    @functools.wraps(read)
    def read_and_check(self, config_file_or_dict):
        read(self, config_file_or_dict)
        self._mini_sequence_source = _source_of(config_file_or_dict)  # accelerate keeps the content alone
        section = read_section(self.config, self._mini_sequence_source)
        reconcile(section, requested_by_environment(section))
        if section is not None:
            # Without defaults, as accelerate takes every "auto" in the JSON for a blank that it must fill in.
            self.config[SECTION] = _Section(section.config.to_dict(defaults=False))
            self.config[SECTION].source = self._mini_sequence_source
            if section.config.enabled and "transformers" in sys.modules:
                look_before_loading()

    config_class.__init__ = read_and_check


def attach_zero3(parameter_offload) -> None:
    """Has ZeRO-3 reduce the gradients inside a tiled module as it does outside: each parameter's when it is there.

    DeepSpeed gathers a leaf module as a whole, which a tiled module needs (see `mark_leaf_modules`), and reduces its
    gradients in a hook on its backward. That hook never fires where a loss reads the weight of an LM head without calling the
    head (TRL's trainers, Liger), and fires before there are gradients where no input of the module needs one (frozen
    embeddings). So the parameters of tiled modules are taken for no leaf's, before the optimizer looks at them. Those that a
    rank has no use for (experts that no token was sent to) get zeros instead, as a leaf's do: other ranks wait for them.
    """
    offload = parameter_offload.DeepSpeedZeRoOffload
    setup = offload.setup_zero_stage3_hooks

    @functools.wraps(setup)
    def setup_around_tiled_modules(self):
        mark_leaf_modules(self.module)
        modules = tiled_modules(self.module)
        inside = {part for module in modules for part in module.modules() if part is not module}
        for module in modules:
            if isinstance(module, Tiled) and module not in inside:  # no LM head, whose loss would miss its logits
                self.forward_hooks.append(module.register_forward_hook(_reach_every_parameter))
        setup(self)
        for param in dict.fromkeys(param for module in modules for param in module.parameters()):
            param.__dict__.pop("ds_z3_leaf_module", None)
            if param.requires_grad:
                self.backward_hooks.append(param.register_post_accumulate_grad_hook(_zeros_for_none))
        for module in self.module.modules():
            # A loss that is a submodule: a tensor that passes the end of its backward is a tensor in full.
            if "post_bwd_fn" in module.__dict__ and next(module.parameters(), None) is None:
                module.post_bwd_fn = _PassesDeferred(module.post_bwd_fn)
            if (
                "pre_bwd_fn" in module.__dict__
            ):  # the head, which has the weights that their backward needs, is called later
                module.pre_bwd_fn = _PassesDeferred(module.pre_bwd_fn)

    offload.setup_zero_stage3_hooks = setup_around_tiled_modules


class _PassesDeferred:
    """DeepSpeed's Function at the borders of a module whose backward, at deferred logits, has nothing to gather or free."""

    def __init__(self, function: type[torch.autograd.Function]):
        self._function = function

    def apply(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if isinstance(tensor, DeferredLogits) else self._function.apply(tensor)


def _reach_every_parameter(module: nn.Module, args: tuple, output: Any) -> Any:
    """Has backward come by every trainable parameter of a module, on each rank, whichever the module used."""
    first = output[0] if isinstance(output, tuple) else output
    if not (isinstance(first, torch.Tensor) and first.requires_grad):
        return output
    first = _Reached.apply(first, *(p for p in module.parameters() if p.requires_grad))
    return (first, *output[1:]) if isinstance(output, tuple) else first


class _Reached(torch.autograd.Function):
    """Its first input, with an edge of the graph to each of the others."""

    @staticmethod
    def forward(ctx, output, *params):
        ctx.count = len(params)
        return output.view_as(output)

    @staticmethod
    def backward(ctx, grad):
        return grad, *[None] * ctx.count


def _zeros_for_none(param: nn.Parameter) -> None:
    if param.grad is None:
        param.grad = torch.zeros_like(param)


def mark_leaf_modules(model: nn.Module) -> None:
    """Has ZeRO-3 gather the weights of a tiled module as a whole, once per call.

    Otherwise it would gather each linear layer inside once per chunk, and hang where ranks differ in their number of
    chunks.
    """
    from deepspeed.utils import set_z3_leaf_module

    for module in tiled_modules(model):
        set_z3_leaf_module(module, True)


def _ds_config(arguments: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """The configuration that `deepspeed.initialize` will use, read as DeepSpeed reads it, and where it comes from."""
    from deepspeed import load_ds_config

    args = arguments.get("args")
    sources = [arguments.get("config"), arguments.get("config_params"), getattr(args, "deepspeed_config", None)]
    source = next((s for s in sources if s is not None), {})
    return source if isinstance(source, dict) else load_ds_config(source), _source_of(source)


class _Section(dict):
    """A section of a configuration that knows the file it came from, as accelerate hands on copies of the content."""

    source: str


def _source_of(source: Any) -> str:
    if isinstance(source, dict):
        return getattr(source.get(SECTION), "source", "DeepSpeed config")
    if isinstance(source, str | os.PathLike) and os.path.exists(source):
        return f"DeepSpeed config {os.fspath(source)}"
    return "DeepSpeed config"
