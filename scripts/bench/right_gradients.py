"""Who is right: loss and gradient of a Trainer's step with each sequence on two processes, over the true ones.

python scripts/bench/right_gradients.py                 # ten minutes on 2 CPU cores; needs deepspeed
python scripts/bench/right_gradients.py --json benchmarks/right_gradients_cpu.json

Tiny models in float32 under the HF Trainer, one sequence of 64 tokens of which a prompt has no labels:

- causal: a Llama;
- window: a Mistral whose window is shorter than the sequence;
- packed: the Llama, two documents in the row, told apart by their positions.

Each by `sequence_parallel` of ds_minis, and by accelerate's `sp_size` (DeepSpeed's Ulysses), under ZeRO-0 to 3, and ZeRO-3
with `reduce_scatter: false`. True is the Trainer with the same sequence in one process. torch's context parallelism
(`cp_size`) needs CUDA and is not in the table.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import envelope, write

CASES = "causal", "window", "packed"
WAYS = "ds_minis", "accelerate"
STAGES: dict[str, dict[str, Any]] = {f"ZeRO-{stage}": {"stage": stage} for stage in range(4)}
STAGES["ZeRO-3, reduce_scatter: false"] = {"stage": 3, "reduce_scatter": False}
TOKENS, VOCAB, RATE = 64, 97, 0.1


def make_model(case: str) -> torch.nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "mistral" if case == "window" else "llama", vocab_size=VOCAB, hidden_size=32, intermediate_size=64,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
        **({"sliding_window": 8} if case == "window" else {}),
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")


class OneSequence(torch.utils.data.Dataset):
    """The same sequence again and again."""

    def __init__(self, case: str):
        self._positions = torch.arange(TOKENS)
        if case == "packed":
            self._positions = torch.cat([torch.arange(27), torch.arange(TOKENS - 27)])

    def __len__(self) -> int:
        return 8

    def __getitem__(self, _: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(VOCAB, (TOKENS,), generator=torch.Generator().manual_seed(0))
        labels = ids.clone()
        labels[:7] = -100
        return {"input_ids": ids, "labels": labels, "position_ids": self._positions}


def train(case: str, way: str, stage: str, output: Path) -> None:
    """One step of SGD; rank 0 writes the loss, and the gradient's norm as the weights show it, which is what trains.

    `way` "true" runs in one process, without an engine.
    """
    model = make_model(case)  # before transformers knows of ZeRO-3, under which it would get other weights
    more: dict[str, Any] = {"use_cpu": True}
    if way != "true":
        more = _with_deepspeed(way, STAGES[stage], output)
    from transformers import Trainer, TrainingArguments

    args = TrainingArguments(
        str(output / "run"), per_device_train_batch_size=1, max_steps=1, learning_rate=RATE, optim="sgd", logging_steps=1,
        max_grad_norm=1e6, report_to="none", save_strategy="no", disable_tqdm=True, **more,
    )  # fmt: skip
    model.config.use_cache = False  # with a cache, transformers takes no documents from positions
    before = [weight.detach().clone() for weight in model.parameters()]
    trainer = Trainer(model, args, train_dataset=OneSequence(case))
    trainer.train()
    loss = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    with gathered(model):
        changes = [old - weight.detach() for old, weight in zip(before, model.parameters(), strict=True)]
    norm = torch.cat([change.flatten() for change in changes]).double().norm().item() / RATE
    if args.process_index == 0:
        (output / "log.json").write_text(json.dumps({"loss": loss, "gradient": norm}))
    sys.stdout.flush()
    os._exit(0)  # gloo aborts some processes that end by themselves (pytorch#190489)


def gathered(model: torch.nn.Module) -> contextlib.AbstractContextManager:
    """Inside, the weights are whole on each rank."""
    if not any(hasattr(weight, "ds_id") for weight in model.parameters()):
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(list(model.parameters()))


def _with_deepspeed(way: str, zero: dict[str, Any], output: Path) -> dict[str, Any]:
    """Arguments of the trainer; DeepSpeed is set up as `accelerate launch` does it: `deepspeed=` forgets the backend here."""
    import deepspeed
    from accelerate.utils import DeepSpeedSequenceParallelConfig, ParallelismConfig

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # or it is compiled for the CPU
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto", "gradient_clipping": "auto",
        "zero_optimization": zero, "zero_allow_untested_optimizer": True,
    }  # fmt: skip
    more: dict[str, Any] = {"ddp_backend": "gloo"}
    if way == "ds_minis":
        config["mini_sequence"] = {"chunk_size": 16, "sequence_parallel": 2}
    else:
        handler = DeepSpeedSequenceParallelConfig(sp_seq_length_is_variable=True, sp_attn_implementation="sdpa")
        more["parallelism_config"] = ParallelismConfig(sp_size=2, sp_backend="deepspeed", sp_handler=handler)
    (output / "ds.json").write_text(json.dumps(config))
    os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(output / "ds.json")}
    return more


def run(case: str, way: str, stage: str = "") -> dict[str, Any]:
    """The step in processes of its own."""
    with tempfile.TemporaryDirectory() as folder:
        launch = [sys.executable]
        if way != "true":
            launch += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        done = subprocess.run(
            [*launch, __file__, "--step", case, way, stage, folder],
            env=os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        log = Path(folder) / "log.json"
        if log.exists():
            return json.loads(log.read_text())
        lines = [line for line in done.stderr.splitlines() if "Error" in line]
        return {"fails": (lines or ["no result"])[-1][-200:]}


def compare(case: str, way: str, stage: str, true: dict[str, float]) -> dict[str, Any]:
    result = run(case, way, stage)
    if "fails" not in result:
        result = {key: result[key] / true[key] for key in ("loss", "gradient")}
    return {"case": case, "way": way, "stage": stage, **result}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--stages", nargs="+", choices=list(STAGES), default=list(STAGES))
    parser.add_argument("--json", type=Path, help="e.g. benchmarks/right_gradients_cpu.json")
    parser.add_argument("--step", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        train(*args.step[:3], Path(args.step[3]))
    found = []
    print(f"{'case':<8}{'sequence parallelism':<22}{'stage':<31}{'loss / true':>12}{'gradient / true':>17}")
    for case in args.cases:
        true = run(case, "true")
        for way in args.ways:
            for stage in args.stages:
                row = compare(case, way, stage, true)
                words = row.get("fails") or f"{row['loss']:>12.6f}{row['gradient']:>17.6f}"
                print(f"{case:<8}{way:<22}{stage:<31}{words}", flush=True)
                found.append(row)
    del args.step
    write(args.json, envelope("right_gradients", args, simulated=False, results=found))


if __name__ == "__main__":
    main()
