"""What the benchmarks share: model shapes, how a model is built, and the envelope around every JSON file of results."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ds_minis.planner.inputs.models import MODELS

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks"
PACKAGES = "torch", "transformers", "ds_minis", "deepspeed", "liger_kernel", "peft", "trl"
PACKAGES += "triton", "flash_attn", "cut_cross_entropy"
KIB, MIB, GIB = 2**10, 2**20, 2**30


@dataclass(frozen=True)
class Shape:
    """The public sizes of a model: what `AutoConfig.for_model` is given, and where they can be read."""

    model_type: str
    kwargs: dict[str, Any]
    source: str

    def config(self, **changes: Any):
        return AutoConfig.for_model(self.model_type, **{**self.kwargs, **changes})

    def divided(self, by: int, **changes: Any):
        """A configuration in which all widths are so many times smaller; the numbers of heads stay."""
        sizes = {k: v // by for k, v in self.kwargs.items() if k in ("hidden_size", "intermediate_size", "head_dim")}
        return self.config(**sizes, **changes)


def _shape(repository: str) -> Shape:
    more = {
        "max_position_embeddings": 2**22,  # longer than any run here; it sizes no tensor
        "use_cache": False,
        "pad_token_id": None,
    }
    sizes = MODELS[repository] | more
    return Shape(sizes.pop("model_type"), sizes, f"https://huggingface.co/{repository}/blob/main/config.json")


SHAPES = {
    "llama-3-8b": _shape("meta-llama/Meta-Llama-3-8B"),
    "llama-2-7b": _shape("meta-llama/Llama-2-7b-hf"),
    "mistral-7b": _shape("mistralai/Mistral-7B-v0.1"),
    "qwen2-7b": _shape("Qwen/Qwen2-7B"),
    "gemma-2-9b": _shape("google/gemma-2-9b"),
}


def build(config, *, attention: str, dtype: torch.dtype, device: str = "cpu") -> PreTrainedModel:
    """A randomly initialised model in training mode with non-reentrant gradient checkpointing."""
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    return checkpointed(model.train())


def small_llama(args: argparse.Namespace, *, lora: bool) -> PreTrainedModel:
    """A Llama in float32 of `args.hidden`, `args.layers` and `args.vocab`, trained in full or by adapters."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 11 // 4,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=max(1, args.hidden // 256),
        max_position_embeddings=2**22,
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").train()
    if lora:
        from ds_minis.planner.step.adapters import add_lora

        add_lora(model, 16)
    return model


def train_step(model: torch.nn.Module, length: int, vocab: int) -> None:
    """Forward and backward of one sequence, which is the same for a length."""
    ids = torch.randint(vocab, (1, length), generator=torch.Generator().manual_seed(length))
    model.zero_grad(set_to_none=True)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()


def checkpointed(model: PreTrainedModel) -> PreTrainedModel:
    # The successors of what is deprecated here are not in the oldest transformers that is supported.
    warnings.filterwarnings("ignore", ".*is deprecated and will be removed in v6", FutureWarning)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def envelope(benchmark: str, arguments: argparse.Namespace, *, simulated: bool, results: Any) -> dict[str, Any]:
    """Results with all that is needed to repeat them."""
    return {
        "benchmark": benchmark,
        "simulated": simulated,
        "device": f"none: simulated with tensors without values (on {cpu_name()})" if simulated else device_name(),
        "versions": versions(),
        "date": datetime.date.today().isoformat(),
        "commit": COMMIT,
        "command": command(),
        "arguments": {key: value for key, value in vars(arguments).items() if key != "json"},
        "results": results,
    }


def write(path: str | Path | None, content: dict[str, Any]) -> None:
    if path:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")
        print(f"written: {path}", file=sys.stderr)


def command() -> str:
    """The command line, as it is given in the root of the repository."""
    script = Path(sys.argv[0]).resolve()
    script = script.relative_to(ROOT) if script.is_relative_to(ROOT) else script.name
    return shlex.join(["python", str(script), *sys.argv[1:]])


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            if package == "ds_minis":  # on the path, not installed
                import ds_minis

                found[package] = ds_minis.__version__
    return found


def commit() -> str:
    """The commit that the tree stands on, marked where tracked files differ from it."""
    git = ["git", "-C", str(ROOT)]
    try:
        name = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout
        # The results themselves may have changed: they are what is being made.
        status = [*git, "status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks"]
        changed = subprocess.run(status, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return name.strip() + (" with changes" if changed.strip() else "")


COMMIT = commit()  # as the benchmark starts; it may have moved on when that ends


def device_name() -> str:
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return f"{properties.name}, {properties.total_memory / GIB:.1f} GiB"
    return f"{cpu_name()}, {torch.get_num_threads()} threads"


def cpu_name() -> str:
    info, name = Path("/proc/cpuinfo"), platform.processor() or platform.machine()
    for line in info.read_text().splitlines() if info.exists() else ():
        if line.startswith("model name"):
            name = line.partition(":")[2].strip()
            break
    return f"{name}, {os.cpu_count()} cores"
