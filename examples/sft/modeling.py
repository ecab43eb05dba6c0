"""Loads (or, from a config alone, makes) the model, its tokenizer and its adapter configuration."""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from arguments import ModelArguments
from long_context import prepare_model, stage_config
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import logging
from trl import SFTConfig

logger = logging.get_logger("train")
_TEMPLATES = Path(__file__).parent / "chat_templates"
_TEMPLATE_TOKENS = {"chatml": ["<|im_start|>", "<|im_end|>"], "zephyr": ["<|system|>", "<|user|>", "<|assistant|>"]}


@contextlib.contextmanager
def looked_for(name: str) -> Iterator[None]:
    """Says what was looked for where neither a folder nor the hub has it: transformers' error may name the hub alone.

    Raises:
        ValueError: instead of an OSError.
    """
    try:
        yield
    except OSError as error:
        if Path(name).exists():
            raise
        near = difflib.get_close_matches(name, [path.name for path in Path().iterdir()], n=1)
        raise ValueError(
            f"--model_name_or_path {name}: there is no such folder here"
            + (f" (did you mean {near[0]}?)" if near else "")
            + f", and the hub was asked in vain: {error}"
        ) from error


def load_tokenizer(args: ModelArguments, training_args: SFTConfig) -> PreTrainedTokenizerBase:
    with looked_for(args.model_name_or_path):
        tokenizer = AutoTokenizer.from_pretrained(
            args.model_name_or_path, trust_remote_code=training_args.trust_remote_code
        )
    if args.chat_template_format != "none":
        tokenizer.chat_template = (_TEMPLATES / f"{args.chat_template_format}.jinja").read_text(encoding="utf-8")
        tokenizer.add_special_tokens({"additional_special_tokens": _TEMPLATE_TOKENS[args.chat_template_format]})
        if args.chat_template_format == "chatml":
            tokenizer.eos_token = "<|im_end|>"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    args: ModelArguments, training_args: SFTConfig, tokenizer: PreTrainedTokenizerBase, *, deepspeed: bool
) -> PreTrainedModel:
    """The model with weights, in the dtype asked for, with room for the tokenizer's added tokens."""
    path = args.model_name_or_path
    if is_config_only(path):
        path = _make_base_model(path, training_args, tokenizer)
    config = AutoConfig.from_pretrained(path, trust_remote_code=training_args.trust_remote_code)
    config = stage_config(args, config, training_args.max_length)
    model = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=_dtype(args, training_args, deepspeed),
        attn_implementation="flash_attention_2" if args.use_flash_attn else None,
        quantization_config=_quantization(args),
        device_map=_device_map(args, training_args),
        use_safetensors=True,  # never a pickle, which could run code
        trust_remote_code=training_args.trust_remote_code,
        **({} if config is None else {"config": config}),
    )
    prepare_model(model, config)
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=8)
    return model


def is_dense(configuration: dict[str, Any]) -> bool:
    """Whether every layer takes part for every token: no experts, no images, no sound (by fields' names)."""
    parts = ("expert", "moe", "vision", "audio")
    return not any(value and part in name for name, value in configuration.items() for part in parts)


def lora_config(args: ModelArguments):
    """PEFT's configuration of the adapters; None for full fine-tuning."""
    if not args.use_peft_lora:
        return None
    from peft import LoraConfig

    targets = args.lora_target_modules
    return LoraConfig(
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=targets if targets == "all-linear" else targets.split(","),
        modules_to_save=args.lora_modules_to_save.split(",") if args.lora_modules_to_save else None,
        bias="none",
        task_type="CAUSAL_LM",
    )


def require_adapted_modules(args: ModelArguments, model: PreTrainedModel) -> None:
    """Refuses names of modules that the model has none of: PEFT passes over them, unless it finds nothing at all.

    Raises:
        ValueError: with the nearest name that there is.
    """
    targets = [] if args.lora_target_modules == "all-linear" else args.lora_target_modules.split(",")
    given = {"--lora_target_modules": targets, "--lora_modules_to_save": (args.lora_modules_to_save or "").split(",")}
    modules = [name for name, _ in model.named_modules()]
    for flag, name in ((flag, name) for flag, names in given.items() for name in filter(None, names)):
        if not any(module == name or module.endswith(f".{name}") for module in modules):
            allowed = sorted({module.rpartition(".")[2] for module in modules} - {""})
            allowed = [leaf for leaf in allowed if not leaf.isdigit()]
            near = difflib.get_close_matches(name, allowed, n=1)
            raise ValueError(
                f"{flag}: no module of this model is called {name!r}"
                + (f"; did you mean {near[0]}?" if near else ".")
                + f" Allowed: {', '.join(allowed)}"
            )


def is_config_only(path: str) -> bool:
    """Whether a model is to be made from its configuration."""
    folder = Path(path)
    has_weights = any(any(folder.glob(pattern)) for pattern in ("*.safetensors", "*.bin", "adapter_config.json"))
    return (folder / "config.json").is_file() and not has_weights


def _make_base_model(path: str, training_args: SFTConfig, tokenizer: PreTrainedTokenizerBase) -> str:
    """Random weights for a config, saved once, so that every rank, and whoever loads the adapter, has the same base."""
    folder = os.path.join(training_args.output_dir, "base_model")
    with training_args.main_process_first(local=False, desc="making the base model"):
        if training_args.process_index == 0 and not os.path.exists(os.path.join(folder, "model.safetensors")):
            logger.warning(f"{path} has no weights: training starts from random ones, saved in {folder}")
            generator_state = torch.get_rng_state()
            torch.manual_seed(training_args.seed)
            with torch.device("cpu"):
                model = _without_zero3(lambda: AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path)))
            torch.set_rng_state(generator_state)
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    return folder


def _without_zero3(make):
    """Calls `make` outside of `zero.Init`, which would wait for the other ranks to build the same model."""
    from transformers.integrations import deepspeed

    config, deepspeed._hf_deepspeed_config_weak_ref = deepspeed._hf_deepspeed_config_weak_ref, None
    try:
        return make()
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = config


def _dtype(args: ModelArguments, training_args: SFTConfig, deepspeed: bool) -> torch.dtype:
    if args.dtype != "auto":
        return getattr(torch, args.dtype)
    return torch.bfloat16 if training_args.bf16 and (args.use_peft_lora or deepspeed) else torch.float32


def _quantization(args: ModelArguments):
    if not (args.use_4bit_quantization or args.use_8bit_quantization):
        return None
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError("quantization needs bitsandbytes: pip install 'ds_minis[quantization]'")
    from transformers import BitsAndBytesConfig

    if args.use_8bit_quantization:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=args.bnb_4bit_quant_type,
        bnb_4bit_compute_dtype=getattr(torch, args.bnb_4bit_compute_dtype),
        bnb_4bit_use_double_quant=args.use_nested_quant,
        bnb_4bit_quant_storage=getattr(torch, args.bnb_4bit_quant_storage_dtype),
    )


def _device_map(args: ModelArguments, training_args: SFTConfig):
    """Quantized weights are loaded straight onto their rank's device, unless ZeRO-3 partitions them."""
    quantized = args.use_4bit_quantization or args.use_8bit_quantization
    if not quantized or is_deepspeed_zero3_enabled() or training_args.use_cpu:
        return None
    return {"": training_args.local_process_index}
