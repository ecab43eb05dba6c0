"""DeepSpeed: `"mini_sequence"` in its JSON converts the model before the engine is built, and an op in `ds_report`."""

from __future__ import annotations

import difflib
import functools
import inspect
import os
from typing import Any

from torch import nn

from ds_minis.config import MiniSequenceConfig
from ds_minis.convert import convert, convert_to_mini_sequence, revert_mini_sequence, tiled_modules
from ds_minis.tiling.rows import tile_rows

SECTION = "mini_sequence"


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
        config, door = _ds_config(arguments)
        mini_sequence = read_section(config, door)
        model = arguments.get("model")
        if isinstance(model, nn.Module):  # DeepSpeed has its own words for what is no model
            if mini_sequence is not None:
                convert(model, mini_sequence, door=door)
            mark_leaf_modules(model)
        return initialize(*args, **kwargs)

    deepspeed.initialize = initialize_with_mini_sequence


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
        mini_sequence = read_section(self.config, _door(config_file_or_dict))
        if mini_sequence is not None:
            # Without defaults, as accelerate takes every "auto" in the JSON for a blank that it must fill in.
            self.config[SECTION] = mini_sequence.to_dict(defaults=False)

    config_class.__init__ = read_and_check


def read_section(config: dict[str, Any], door: str) -> MiniSequenceConfig | None:
    """The mini-sequence settings of a DeepSpeed configuration; None if it has none.

    Raises:
        ValueError: the section is wrong, or a key beside it looks like a misspelling of its name.
    """
    for key in config:
        if key != SECTION and difflib.get_close_matches(str(key).lower(), [SECTION], cutoff=0.7):
            raise ValueError(
                f'{door}: unknown key {key!r} (value {config[key]!r}); did you mean "{SECTION}"? Allowed there: true, false '
                f"or a mapping of {', '.join(MiniSequenceConfig().to_dict())}"
            )
    if SECTION not in config:
        return None
    return MiniSequenceConfig.from_value(config[SECTION], door=f'{door}, "{SECTION}"')


def mark_leaf_modules(model: nn.Module) -> None:
    """Has ZeRO-3 gather the weights of a tiled module as a whole, once per call.

    Otherwise it would gather each linear layer inside once per chunk, and hang where ranks differ in their number of
    chunks.
    """
    modules = tiled_modules(model)
    if modules:
        from deepspeed.utils import set_z3_leaf_module

        for module in modules:
            set_z3_leaf_module(module, True)


def _ds_config(arguments: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """The configuration that `deepspeed.initialize` will use, read as DeepSpeed reads it, and where it comes from."""
    from deepspeed import load_ds_config

    args = arguments.get("args")
    sources = [arguments.get("config"), arguments.get("config_params"), getattr(args, "deepspeed_config", None)]
    source = next((s for s in sources if s is not None), {})
    return source if isinstance(source, dict) else load_ds_config(source), _door(source)


def _door(source: Any) -> str:
    if isinstance(source, str | os.PathLike) and os.path.exists(source):
        return f"DeepSpeed config {os.fspath(source)}"
    return "DeepSpeed config"
