"""Turns a recipe (a YAML of this folder) into the command that trains it; `sh run.sh` calls this.

A recipe holds: `model`, `dataset`, `splits`; `engine` ("single", "fsdp" or "zero3"), `num_processes`; `gpu_memory` (GB, of
the card that it is meant for); `mini_sequence` (settings); `flags` (of `examples/sft/train.py` and of TRL's `SFTConfig`).
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SFT = ROOT / "examples" / "sft"
DEFAULT = SFT / "default"
KEYS = {"model", "dataset", "splits", "engine", "num_processes", "gpu_memory", "mini_sequence", "flags"}
CONFIGS = {"fsdp": "fsdp.yaml", "zero3": "zero3.yaml"}
PLAN_ENGINES = {"single": "single", "fsdp": "fsdp2", "zero3": "zero3"}
ALLOCATOR = "PYTORCH_CUDA_ALLOC_CONF"
# Of the twin: what only a real model, a GPU or a long run can have.
TINY_FLAGS = {
    "max_length": 256,
    "max_steps": 2,
    "bf16": False,
    "dtype": "float32",
    "use_flash_attn": False,
    "gradient_accumulation_steps": 1,
    "per_device_train_batch_size": 1,
    "logging_steps": 1,
    "warmup_steps": 0,
    "eval_strategy": "no",
    "save_strategy": "no",
}


def names() -> list[str]:
    return sorted(path.stem for path in HERE.glob("*.yaml"))


def read(name: str) -> dict[str, Any]:
    """A recipe.

    Raises:
        ValueError: there is none of this name, or a key of it is wrong.
    """
    if name not in names():
        raise ValueError(f"no recipe {name!r}; there are {', '.join(names())}")
    recipe = yaml.safe_load((HERE / f"{name}.yaml").read_text(encoding="utf-8"))
    if set(recipe) != KEYS:
        raise ValueError(f"{name}.yaml: the keys are {', '.join(sorted(KEYS))}; got {', '.join(sorted(recipe))}")
    if recipe["engine"] not in PLAN_ENGINES:
        raise ValueError(f"{name}.yaml: engine: one of {', '.join(PLAN_ENGINES)} is allowed, got {recipe['engine']!r}")
    return recipe


def command(name: str, recipe: dict[str, Any], extra: list[str]) -> list[str]:
    """The command that trains a recipe."""
    flags = {
        "model_name_or_path": recipe["model"],
        "dataset_name": recipe["dataset"],
        "splits": recipe["splits"],
        "output_dir": f"outputs/{name}",
        **recipe["flags"],
    }
    if recipe["engine"] == "single":
        launch = [sys.executable]
        flags["mini_sequence"] = json.dumps(recipe["mini_sequence"])
    else:  # the accelerate configuration has the section
        config = ROOT / "accelerate_configs" / CONFIGS[recipe["engine"]]
        launch = [sys.executable, str(SFT / "launch.py"), "--config_file", str(config)]
        launch += ["--num_processes", str(recipe["num_processes"]), "--num_machines", "1", "--main_process_port", "0"]
    words = [str(word) for key, value in flags.items() for word in (f"--{key}", value)]
    return [*launch, str(SFT / "train.py"), *words, *extra]


def plan_command(recipe: dict[str, Any]) -> list[str]:
    """`ds-minis plan` for a recipe."""
    flags = recipe["flags"]
    words = [recipe["model"], "--gpu-memory", recipe["gpu_memory"], "--gpus", recipe["num_processes"]]
    words += ["--engine", PLAN_ENGINES[recipe["engine"]], "--seq", flags["max_length"]]
    words += ["--batch", flags.get("per_device_train_batch_size", 1)]
    words += ["--accumulation", flags.get("gradient_accumulation_steps", 1)]
    if flags.get("use_4bit_quantization"):
        words.append("--qlora")
    elif flags.get("use_peft_lora"):
        words.append("--lora")
    words += ["--lora-rank", flags["lora_r"]] if "lora_r" in flags else []
    settings = recipe["mini_sequence"] if isinstance(recipe["mini_sequence"], dict) else {}
    for key, value in settings.items():
        words += ["--set", f"{key}={value if isinstance(value, str) else json.dumps(value)}"]
    return [sys.executable, "-m", "ds_minis.cli", "plan", *map(str, words)]


def tiny_twin(recipe: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The recipe with a tiny random model of the same architecture and with the embedded data; the model is written there."""
    from transformers import AutoTokenizer

    from ds_minis.check.tiny import tiny_config
    from ds_minis.planner.inputs.models import shipped_config

    config = shipped_config(recipe["model"])
    if config is None:
        raise ValueError(f"the dimensions of {recipe['model']} are not shipped with ds_minis, so it has no tiny twin")
    tokenizer = AutoTokenizer.from_pretrained(DEFAULT / "model")
    config = tiny_config(config, dropout=0.0)
    config.vocab_size, config.max_position_embeddings = len(tokenizer), 512
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, name, getattr(tokenizer, name))
    for path in (DEFAULT / "model").iterdir():
        shutil.copy(path, folder)
    config.save_pretrained(folder)
    flags = {**recipe["flags"], **TINY_FLAGS}
    for name in [name for name in flags if "4bit" in name or "quant" in name]:
        del flags[name]
    twin = {"model": str(folder), "dataset": str(DEFAULT / "data"), "splits": "train,test", "flags": flags}
    return {**recipe, **twin, "num_processes": min(2, recipe["num_processes"])}


def main(argv: list[str]) -> int:
    if not argv or argv[0].startswith("-"):
        print("sh run.sh NAME [--plan | --show | --tiny] [flags of train.py]; the recipes:")
        for name in names():
            print(
                f"  {name:24} {(HERE / f'{name}.yaml').read_text(encoding='utf-8').partition(chr(10))[0].lstrip('# ')}"
            )
        return 0 if not argv or argv[0] in ("-h", "--help") else 2
    name, *extra = argv
    mode = extra.pop(0) if extra and extra[0] in ("--plan", "--show", "--tiny") else ""
    try:
        recipe = read(name)
    except ValueError as error:
        print(f"run.sh: {error}", file=sys.stderr)
        return 2
    if mode == "--plan":
        return subprocess.run([*plan_command(recipe), *extra]).returncode
    environment = {ALLOCATOR: "expandable_segments:True"} | os.environ
    with tempfile.TemporaryDirectory() as folder:
        if mode == "--tiny":
            recipe = tiny_twin(recipe, Path(folder))
            environment |= {"HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
            environment["CUDA_VISIBLE_DEVICES"] = ""
        words = command(name, recipe, extra)
        if mode == "--show":
            print(f"{ALLOCATOR}={environment[ALLOCATOR]} {shlex.join(words)}")
            return 0
        return subprocess.run(words, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
