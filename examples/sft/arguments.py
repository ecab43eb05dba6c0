"""Command line of `train.py`: PEFT's `examples/sft` names, the mini-sequence switches, and all of TRL's `SFTConfig`."""

from __future__ import annotations

import argparse
import difflib
import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cpu
import torch
import yaml
from transformers import HfArgumentParser
from trl import SFTConfig

from ds_minis import MiniSequenceConfig
from ds_minis.config_sources import requested_by_environment

CHAT_TEMPLATES = ("none", "chatml", "zephyr")


@dataclass
class ModelArguments:
    """The model, its adapter, its quantization, and mini-sequences."""

    model_name_or_path: str = field(
        metadata={
            "help": "Hub id or folder. A folder with a config.json and no weights is trained from scratch (random weights, "
            "saved as the base model in the output folder)."
        }
    )
    dtype: str = field(
        default="auto",
        metadata={
            "help": "Dtype of the loaded weights: float32, bfloat16, float16, or auto (bfloat16 with --bf16 when the base "
            "is frozen or DeepSpeed keeps float32 master weights; float32 otherwise)."
        },
    )
    chat_template_format: str = field(
        default="none", metadata={"help": f"{'|'.join(CHAT_TEMPLATES)}. `none` keeps the tokenizer's own template."}
    )
    use_flash_attn: bool = field(default=False, metadata={"help": "FlashAttention-2 (needs flash-attn and a GPU)."})
    use_reentrant: bool = field(default=False, metadata={"help": "Variant of gradient checkpointing."})

    use_peft_lora: bool = field(default=False, metadata={"help": "Train LoRA adapters instead of all weights."})
    lora_r: int = field(default=8)
    lora_alpha: int = field(default=16)
    lora_dropout: float = field(default=0.1)
    lora_target_modules: str = field(
        default="all-linear", metadata={"help": "Comma-separated module names, or all-linear."}
    )
    lora_modules_to_save: str | None = field(
        default=None, metadata={"help": "Comma-separated modules to train in full beside the adapters."}
    )

    use_8bit_quantization: bool = field(default=False, metadata={"help": "Load the frozen base in 8 bits."})
    use_4bit_quantization: bool = field(default=False, metadata={"help": "Load the frozen base in 4 bits (QLoRA)."})
    use_nested_quant: bool = field(default=False, metadata={"help": "Quantize the 4-bit constants too."})
    bnb_4bit_quant_type: str = field(default="nf4", metadata={"help": "nf4 or fp4."})
    bnb_4bit_compute_dtype: str = field(default="bfloat16")
    bnb_4bit_quant_storage_dtype: str = field(default="uint8", metadata={"help": "FSDP and ZeRO-3: the compute dtype."})

    rope_theta: str | None = field(
        default=None,
        metadata={
            "help": "RoPE's base, changed on load for sequences of --max_length tokens, and computed in float64: a number, "
            "or auto (by the formula of ds_minis.context, from the model's own base and --rope_base_length)."
        },
    )
    rope_base_length: int | None = field(
        default=None,
        metadata={"help": "Tokens that the model was trained with (default: its max_position_embeddings)."},
    )
    stop_file: str | None = field(
        default=None,
        metadata={
            "help": "When this file appears, save a checkpoint at the end of the step, remove it, and stop with exit "
            "status 75."
        },
    )

    mini_sequence: str | None = field(
        default=None,
        metadata={
            "help": "Turns mini-sequences on from here: true, false, or a JSON mapping such as "
            '\'{"chunk_size": 2048}\'. Not needed where the engine\'s configuration has a "mini_sequence" section.'
        },
    )
    mini_sequence_loss: str | None = field(default=None, metadata={"help": "Removed: leave it out."})

    def __post_init__(self):
        if self.mini_sequence_loss is not None:
            raise ValueError(
                "--mini_sequence_loss has been removed: leave it out (in a recipe, too). ds_minis answers TRL's calls for a "
                "loss from the model's own LM head, by chunks, with TRL's metrics; \"loss\": false in the mini-sequence "
                "configuration leaves them to TRL"
            )
        if self.chat_template_format not in CHAT_TEMPLATES:
            raise ValueError(
                f"--chat_template_format: one of {', '.join(CHAT_TEMPLATES)} is allowed, got {self.chat_template_format!r}"
            )
        if self.use_8bit_quantization and self.use_4bit_quantization:
            raise ValueError("--use_8bit_quantization and --use_4bit_quantization exclude each other: give one of them")
        if (self.use_8bit_quantization or self.use_4bit_quantization) and not self.use_peft_lora:
            raise ValueError("a quantized base cannot be trained in full: add --use_peft_lora True")

    @property
    def mode(self) -> str:
        """What is trained: "full", "lora", or "qlora" (adapters on a quantized base)."""
        if not self.use_peft_lora:
            return "full"
        return "qlora" if self.use_4bit_quantization or self.use_8bit_quantization else "lora"

    def mini_sequence_settings(self) -> Any:
        """The value of `--mini_sequence` for `convert_to_mini_sequence`; None when it was not given.

        Raises:
            ValueError: it is neither true, false nor JSON, or its settings are wrong.
        """
        if self.mini_sequence is None:
            return None
        try:
            given = json.loads(self.mini_sequence.lower() if self.mini_sequence[:1] in "TF" else self.mini_sequence)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"--mini_sequence: true, false or a JSON mapping is allowed, got {self.mini_sequence!r} ({error})"
            ) from None
        MiniSequenceConfig.from_value(given, source="--mini_sequence")
        return given


@dataclass
class DataArguments:
    """The data set."""

    dataset_name: str = field(metadata={"help": "Hub id, or a folder with {split}.jsonl files or a saved data set."})
    splits: str = field(default="train,test", metadata={"help": "Training split, and (optional) evaluation split."})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Remove what another run left in the output folder, and start anew."}
    )
    max_seq_length: int | None = field(default=None, metadata={"help": "PEFT's name for --max_length."})
    append_concat_token: bool = field(default=False, metadata={"help": "Accepted for PEFT's scripts; TRL ignores it."})
    add_special_tokens: bool = field(default=False, metadata={"help": "Accepted for PEFT's scripts; TRL ignores it."})


def deepspeed_launched(argv: list[str]) -> bool:
    """Whether DeepSpeed was asked for: by the configuration of `accelerate launch`, or on the command line."""
    return "--deepspeed" in argv or os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true"


def fsdp_launched() -> bool:
    """Whether `accelerate launch` was given a configuration with FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false") == "true"


def check_head(model_args: ModelArguments) -> None:
    """Refuses what would train an LM head in PEFT's `modules_to_save` wrongly, without a word from the engine.

    TRL's fused LM head reads the head's weight without calling the head. Under FSDP2 the gradient of such a head is then that
    of one process, unless ds_minis, where it tiles the loss, answers TRL's calls from the head itself. FSDP1 makes the head a
    unit of its own, whose weight is in shards when any loss reads it.

    Raises:
        ValueError: with what to do instead.
    """
    saved = "lm_head" in (model_args.lora_modules_to_save or "").split(",")
    if not saved or not fsdp_launched():
        return
    if os.environ.get("FSDP_VERSION", "1") == "1":
        raise ValueError(
            "--lora_modules_to_save lm_head does not work under FSDP1: use FSDP2 (accelerate_configs/fsdp.yaml)"
        )
    if not tiles_loss(model_args):
        raise ValueError(
            "--lora_modules_to_save lm_head under FSDP2: TRL's fused LM head would give it one process's gradient. Turn "
            "mini-sequences on, with their loss (--mini_sequence true, or a section in the engine's configuration), or train "
            "adapters alone"
        )


def tiles_loss(model_args: ModelArguments) -> bool:
    """Whether mini-sequences are asked for, here or in the engine's configuration, and tile the loss."""
    asked, request = model_args.mini_sequence_settings(), requested_by_environment()
    if asked is None and request is None:
        return False
    config = request.config if asked is None else MiniSequenceConfig.from_value(asked, source="--mini_sequence")
    return config.enabled and config.loss and not config.return_logits


class Parser(HfArgumentParser):
    """Its errors are a ValueError each, and not the usage of some two hundred flags."""

    def error(self, message):
        raise ValueError(f"{message} (--help lists what is allowed)")

    def parse_args_into_dataclasses(self, args=None):
        *parsed, unknown = super().parse_args_into_dataclasses(args, return_remaining_strings=True)
        if unknown:
            raise ValueError(f"no such argument: {' '.join(unknown)}{self._near(unknown[0].partition('=')[0])}")
        return parsed

    def parse_file(self, file: str, defaults: dict[str, Any]):
        """The arguments in a YAML or JSON file, with the types that they have on the command line: YAML's 1e-4 is a text."""
        try:
            given = yaml.safe_load(Path(file).read_text(encoding="utf-8"))  # JSON too
        except yaml.YAMLError as error:
            raise ValueError(f"{file} is no YAML: {error}") from None
        if not isinstance(given, dict):
            raise ValueError(f"{file}: a mapping of arguments is allowed, got {type(given).__name__}")
        return self.parse_dict(defaults | {key: self._typed(file, str(key), value) for key, value in given.items()})

    def _typed(self, file: str, key: str, value: Any) -> Any:
        action = self._option_string_actions.get(f"--{key}")
        if action is None:
            raise ValueError(f"{file}: no such argument: {key} (value {value!r}){self._near(f'--{key}')}")
        if action.type in (None, str) or not isinstance(value, str | int | float):
            return value
        try:
            if isinstance(value, bool) and action.type in (int, float):
                raise ValueError("true and false are no numbers")
            typed = action.type(str(value))
        except (ValueError, argparse.ArgumentTypeError) as error:
            raise ValueError(f"{file}: {key}: {value!r} is not allowed: {error}") from None
        if action.choices is not None and typed not in action.choices:
            raise ValueError(f"{file}: {key}: one of {', '.join(map(str, action.choices))} is allowed, got {value!r}")
        return typed

    def _near(self, flag: str) -> str:
        near = difflib.get_close_matches(flag, list(self._option_string_actions), n=1)
        return f"; did you mean {near[0]}?" if near else " (--help lists what is allowed)"


def parse_arguments(argv: list[str] | None = None) -> tuple[ModelArguments, DataArguments, SFTConfig]:
    """The parsed command line, or, as PEFT's script does, the one JSON or YAML file it names.

    Without a GPU the CPU settings are the default: `--bf16 False`, and `--use_cpu True` or, under DeepSpeed, which
    `use_cpu` would silently replace by plain data parallelism, `--ddp_backend gloo`.
    """
    argv = sys.argv[1:] if argv is None else argv
    # `deepspeed train.py --deepspeed_config ds.json` is how DeepSpeed's own examples write it.
    argv = [arg.replace("--deepspeed_config", "--deepspeed", 1) for arg in argv]
    argv = [part for arg in argv for part in (arg.split("=", 1) if arg.startswith("--deepspeed=") else [arg])]
    parser = Parser((ModelArguments, DataArguments, SFTConfig))
    on_cpu = not torch.accelerator.is_available()
    deepspeed = deepspeed_launched(argv)
    if on_cpu and deepspeed:
        argv = cpu.prepare_deepspeed(argv)
    # One line for each logged step (`progress.Progress`) in the place of a bar, and of the Trainer's dictionaries.
    defaults = {"bf16": not on_cpu, "dataloader_pin_memory": not on_cpu, "disable_tqdm": True}
    if on_cpu:
        defaults |= {"ddp_backend": "gloo"} if deepspeed else {"use_cpu": True}
    if len(argv) == 1 and argv[0].endswith((".json", ".yaml", ".yml")):
        model_args, data_args, training_args = parser.parse_file(argv[0], defaults)
    else:
        parser.set_defaults(**defaults)
        model_args, data_args, training_args = parser.parse_args_into_dataclasses(argv)
    if data_args.max_seq_length is not None:
        training_args.max_length = data_args.max_seq_length
    if training_args.gradient_checkpointing:
        # TRL takes the reentrant variant under ZeRO-3 with adapters, and warns where the other one was asked for.
        plugin = training_args.deepspeed_plugin
        forced = model_args.use_peft_lora and plugin is not None and plugin.zero_stage == 3
        training_args.gradient_checkpointing_kwargs = {"use_reentrant": model_args.use_reentrant or forced}
    return model_args, data_args, training_args
