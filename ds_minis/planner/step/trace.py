"""One training step of a few layers of a configuration on the meta device: what is alive when."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ds_minis.convert import NothingToTile, convert_to_mini_sequence
from ds_minis.layer.tiled.tiled_layer import layer_experts_per_choice
from ds_minis.planner.step.adapters import LoraLinear, add_lora
from ds_minis.planner.step.anatomy import Anatomy, anatomy_of
from ds_minis.planner.step.lengths import Lengths, lengths_for
from ds_minis.planner.step.recorder import MOST_OPERATIONS, Recorder, TooManyOperations, WithoutValues
from ds_minis.planner.step.stubs import ATTENTION, ON_ATTENTION, no_mask, register
from ds_minis.tiling.core.warn import logger


class CannotTrace(ValueError):
    """A step of the configuration cannot be run without values; the message says why."""


class RunsTokenByToken(CannotTrace):
    """A step has an operation for each token, as state-space layers have without their kernels."""


@dataclass(frozen=True)
class Way:
    """How the step of a model is run; what a trace depends on, beside the configuration.

    Attributes:
        settings: of mini-sequences, without sizes of chunks; None for a model that is not converted.
        checkpointing: transformers' gradient checkpointing (a converted layer has its own).
        lora_rank: of the adapters; 0: every parameter is trained.
        dtype: of weights and activations.
        four_bits: linear layers have 4-bit weights.
    """

    settings: Mapping[str, Any] | None
    checkpointing: bool = True
    lora_rank: int = 0
    lora_dropout: float = 0.0
    dtype: str = "bfloat16"
    four_bits: bool = False

    @property
    def key(self) -> list:
        """As plain JSON types."""
        settings = None if self.settings is None else sorted(self.settings.items())
        return [settings, self.checkpointing, self.lora_rank, self.lora_dropout, self.dtype, self.four_bits]


def build(config: Any, way: Way) -> nn.Module:
    """The model of a configuration on the meta device, with adapters."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    model_class = AutoModelForCausalLM
    if type(config) not in AutoModelForCausalLM._model_mapping:  # whose text is a part of it
        model_class = AutoModelForImageTextToText
    try:
        with torch.device("meta"):
            model = model_class.from_config(config, dtype=getattr(torch, way.dtype), attn_implementation=register())
    except KeyError as error:
        if ATTENTION not in error.args:
            raise
        raise CannotTrace(f"{type(config).__name__}: its attention is not called by transformers' interface") from None
    except Exception as error:
        raise CannotTrace(f"{type(config).__name__} cannot be built without weights: {_short(error)}") from error
    model = model.train()
    if way.lora_rank:
        add_lora(model, way.lora_rank, way.lora_dropout, way.four_bits)
    if way.checkpointing:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def examine(config: Any) -> Anatomy:
    """What the whole model is made of.

    Raises:
        CannotTrace: it is not a decoder, or cannot be built.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise CannotTrace(
            f"{type(config).__name__} is of an encoder and a decoder: what is planned is a decoder's step"
        )
    model = build(copy.deepcopy(config), Way(None, checkpointing=False))  # which writes a dtype into it
    return anatomy_of(model, _layers(model))


def shortened(config: Any, num_layers: int) -> Any:
    """The configuration with so many layers; lists with an entry for each layer are cut."""
    config = copy.deepcopy(config)
    text = config.get_text_config(decoder=True)
    old = text.num_hidden_layers
    for name, value in list(vars(text).items()):
        if isinstance(value, list | tuple) and len(value) == old:
            setattr(text, name, (value * num_layers)[:num_layers])
    text.num_hidden_layers = num_layers
    if hasattr(text, "max_window_layers"):
        text.max_window_layers = min(text.max_window_layers, num_layers)
    text.use_cache = False
    return config


def trace(config: Any, way: Way) -> dict[str, Any]:
    """As `trace_with_mask`, with a mask that is not looked at; or, for a model that counts positions by it, one of ones."""
    try:
        return trace_with_mask(config, way, no_mask())
    except RunsTokenByToken:
        raise
    except CannotTrace:
        with contextlib.suppress(CannotTrace):
            return trace_with_mask(config, way, None)
        raise


def trace_with_mask(config: Any, way: Way, mask: torch.Tensor | None) -> dict[str, Any]:
    """Runs one step: forward, loss, backward.

    Args:
        mask: None for one of ones, for each token.

    Returns:
        Plain data: "segments" and "loss_segment" of the recorder, "parameters", "flops" per token and per squared token,
        "widest", "notes": what ds_minis warned of.

    Raises:
        CannotTrace: the step needs values, or nothing in the model can be tiled.
    """
    model = build(config, way)
    if not getattr(config.get_text_config(decoder=True), "num_attention_heads", None):
        raise RunsTokenByToken(
            f"{type(model).__name__} has no attention heads: without its kernels a state-space layer runs token by token, "
            "which cannot be traced"
        )
    parameters = count_parameters(model)
    lengths = lengths_for(p.numel() for p in model.parameters())
    if way.settings is not None:
        sizes = {"chunk_size": lengths.chunk, "loss_chunk_size": lengths.loss_chunk}
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                convert_to_mini_sequence(model, {**way.settings, **sizes})
        except NothingToTile as error:
            raise CannotTrace(str(error)) from None
    recorder = Recorder(lengths, [*model.parameters(), *model.buffers()])
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(recorder.count_gradient)
    token = ON_ATTENTION.set(None)
    try:
        with _collected_warnings() as said:
            if way.settings is not None:
                with torch.no_grad(), WithoutValues():  # in which layers are analyzed
                    _loss(model, **_batch(lengths, mask))
            ON_ATTENTION.set(recorder.on_attention)
            with recorder:
                _step(model, recorder, lengths, mask)
        recorder.finish()
    except TooManyOperations:
        raise RunsTokenByToken(
            f"{type(model).__name__} runs token by token without its kernels (more than {MOST_OPERATIONS:,} operations in a "
            "step of a few layers), which cannot be traced"
        ) from None
    except Exception as error:
        raise CannotTrace(
            f"a step of {type(model).__name__} cannot be run on tensors without values: {_short(error)}"
        ) from error
    finally:
        ON_ATTENTION.reset(token)
    return {
        "segments": recorder.segments,
        "loss_segment": recorder.loss_segment,
        "parameters": parameters,
        "flops": [recorder.matmul_flops / lengths.tokens, recorder.attention_flops / lengths.tokens**2],
        "widest": describe_widest(recorder, model, lengths),
        "notes": said,
    }


@contextlib.contextmanager
def _collected_warnings() -> Iterator[list[str]]:
    """A list that gets ds_minis's warnings, which are not printed: a plan traces the same layers many times."""
    said: list[str] = []

    def keep(record: logging.LogRecord) -> bool:
        said.append(record.getMessage().removeprefix("ds_minis: "))
        return False

    logger.addFilter(keep)
    try:
        yield said
    finally:
        logger.removeFilter(keep)


def _step(model: nn.Module, recorder: Recorder, lengths: Lengths, mask: torch.Tensor | None) -> None:
    batch = _batch(lengths, mask)  # which its owner holds until the step is done
    loss = _loss(model, **batch)
    recorder.end_forward()
    loss.backward()


def _batch(lengths: Lengths, mask: torch.Tensor | None) -> dict[str, torch.Tensor]:
    ids = torch.zeros(1, lengths.tokens, dtype=torch.int64, device="meta")
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids) if mask is None else mask}


def _loss(model: nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    return model(input_ids=input_ids, labels=input_ids, attention_mask=attention_mask, use_cache=False).loss


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Numbers of parameters: all, trained, those of linear layers that 4-bit weights replace, the largest of these."""
    head = model.get_output_embeddings()
    linears = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
    adapters = {m for lora in model.modules() if isinstance(lora, LoraLinear) for m in (lora.lora_A, lora.lora_B)}
    sizes = [m.weight.numel() for m in linears if m not in adapters]
    embeddings = {id(p): p.numel() for m in (model.get_input_embeddings(), head) if m for p in m.parameters()}
    return {
        "all": sum(p.numel() for p in model.parameters()),
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "linear": sum(sizes),
        "largest_linear": max(sizes, default=0),
        "embeddings": sum(embeddings.values()),
        "largest_embedding": max(embeddings.values(), default=0),
        "experts_per_choice": max(map(layer_experts_per_choice, _layers(model)), default=1.0),
        "num_layers": len(_layers(model)),
        "largest_in_layer": max(
            (p.numel() for layer in _layers(model) for p in layer.parameters() if p.requires_grad), default=0
        ),
    }


def _layers(model: nn.Module) -> list[nn.Module]:
    """The items of the model's longest list of decoder layers."""
    lists = [
        m for m in model.modules() if isinstance(m, nn.ModuleList) and len({type(x) for x in m}) <= len(m) // 2 + 1
    ]
    return list(max(lists, key=lambda m: sum(p.numel() for p in m.parameters()), default=[]))


def describe_widest(recorder: Recorder, model: nn.Module, lengths: Lengths) -> list[dict[str, Any]]:
    """For each length that tensors grow with: the elements for each token in the largest, and what it is."""
    found = []
    for index in (1, 2, 4):
        if index not in recorder.widest:
            continue
        elements = recorder.widest[index][0]
        names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and m.out_features == elements]
        what = f"the output of {names[0]}" if names else f"a tensor of {elements:,.0f} elements a token"
        if elements == model.config.get_text_config(decoder=True).hidden_size:
            what = "a tensor of hidden states"
        found.append({"symbol": index, "elements": elements, "what": what})
    return found


def _short(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
