"""A model that DeepSpeed's JSON asks to convert is looked at before it is built: what cannot be done is said in a second.

Without this it would be said by `deepspeed.initialize`, when all weights are loaded.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import io
import sys
from typing import Any

import torch

from ds_minis.config_sources import Request, read_section
from ds_minis.convert import convert

_LOOKS = "_ds_minis_looks_first"


def look_before_loading() -> None:
    """Has `PreTrainedModel.from_pretrained` look first, for as long as a DeepSpeed configuration asks for mini-sequences."""
    from transformers.modeling_utils import PreTrainedModel

    own = PreTrainedModel.__dict__["from_pretrained"].__func__
    if hasattr(own, _LOOKS):
        return

    @functools.wraps(own)
    def from_pretrained(cls, *args, **kwargs):
        look(cls, kwargs.get("config"))
        return own(cls, *args, **kwargs)

    setattr(from_pretrained, _LOOKS, True)
    PreTrainedModel.from_pretrained = classmethod(from_pretrained)


def look(model_class: type, config: Any) -> None:
    """Converts an instance on the meta device, which has shapes and no memory, with what the JSON asks for.

    Patterns of names are left out: adapters, which may come later, change them.

    Raises:
        ValueError: nothing of it can be tiled, or not in so many groups of heads.
    """
    from transformers import PreTrainedConfig

    request = _request()
    if request is None or not request.config.enabled or not isinstance(config, PreTrainedConfig):
        return
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            model = model_class(copy.deepcopy(config))
    except Exception:  # which comes again, or was that of a model that computes with values while it is built
        return
    settings = dataclasses.replace(request.config, include=(), exclude=())
    with contextlib.redirect_stdout(io.StringIO()):
        convert(model, settings, source=request.source)


def _request() -> Request | None:
    """What the DeepSpeed configuration that transformers knows of asks for; None inside of `deepspeed.zero.Init`."""
    from transformers.integrations import deepspeed

    reference = deepspeed._hf_deepspeed_config_weak_ref
    known = reference() if reference is not None else None
    zero = sys.modules.get("deepspeed.runtime.zero.partition_parameters")
    if known is None or getattr(zero, "zero_init_context", None):
        return None
    return read_section(known.config, getattr(known, "_mini_sequence_source", "DeepSpeed config"))
