"""What the client scripts share: data, facts about a run for the tests to compare, and an end that gloo survives.

The scripts stand for programs of users who have never heard of this project: nothing here knows of it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist


class Texts(torch.utils.data.Dataset):
    """Few different token ids, so that a model learns which; prompts masked. Every text has another length."""

    def __init__(self, count: int, *, seed: int):
        generator = torch.Generator().manual_seed(seed)
        self.texts = [torch.randint(10, 16, (14 + 11 * i % 37,), generator=generator) for i in range(count)]

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        labels = self.texts[index].clone()
        labels[: 1 + 5 * index % 11] = -100
        return {"input_ids": self.texts[index], "labels": labels}


def collate(texts: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Pads on the right, to the longest text of this batch alone."""

    def padded(key: str, value: int) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence([text[key] for text in texts], batch_first=True, padding_value=value)

    input_ids = padded("input_ids", 1)
    return {"input_ids": input_ids, "attention_mask": (input_ids != 1).long(), "labels": padded("labels", -100)}


def ready_for_deepspeed_on_cpu() -> None:
    """What DeepSpeed needs on a machine without accelerator, where a program is to run it; before anything else.

    Its shared-memory op is a C++ build of 90 seconds at first use. `TrainingArguments(deepspeed=...)` passes no backend
    on, so that accelerate would take two processes for two runs of one: they get a state that was made before.
    """
    by_trainer = "--deepspeed" in sys.argv
    if by_trainer or os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if by_trainer:
        from accelerate import PartialState

        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        sys.argv += ["--accelerator_config", '{"use_configured_state": true}']
        PartialState(backend="gloo")


def save_facts(path: str, engine: torch.nn.Module, distributed_type: str, **facts) -> None:
    """Rank 0 writes what ran, and what came out."""
    started = dist.is_initialized()
    if not started or dist.get_rank() == 0:
        mlps = [type(module).__qualname__ for name, module in engine.named_modules() if name.endswith(".mlp")]
        processes = dist.get_world_size() if started else 1
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        stage = engine.zero_optimization_stage() if hasattr(engine, "zero_optimization_stage") else None
        facts |= {"engine": type(engine).__name__, "type": distributed_type, "processes": processes, "mlps": mlps}
        torch.save(facts | {"stage": stage}, path)


def leave() -> None:
    """Ends this process once all ranks are here. gloo now and then aborts while it is torn down (pytorch#190489)."""
    if dist.is_initialized():
        dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
