"""Who is right: the first step's loss and gradient of a Trainer with each sequence on two processes, over the true ones.

python scripts/bench/right_gradients.py                 # some minutes on 2 CPU cores; needs deepspeed
python scripts/bench/right_gradients.py --json benchmarks/right_gradients.json

A tiny Llama, and a Mistral whose window is shorter than the sequence, in float32, one sequence of 64 tokens with a masked
prompt, under the HF Trainer: ds_minis' `sequence_parallel`, and accelerate's own sequence parallelism (`sp_size`, DeepSpeed's
Ulysses), each under ZeRO-0 to 3. True is the Trainer with the same sequence in one process.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

MODELS = ("llama", "mistral")
TOKENS, VOCAB = 64, 97


def make_model(name: str):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        name, vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, **({"sliding_window": 8} if name == "mistral" else {}),
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")


class OneSequence(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, _: int) -> dict:
        ids = torch.randint(VOCAB, (TOKENS,), generator=torch.Generator().manual_seed(0))
        labels = ids.clone()
        labels[:7] = -100
        return {"input_ids": ids, "labels": labels, "position_ids": torch.arange(TOKENS)}


def train(name: str, way: str, stage: int, output: Path) -> None:
    """One step; rank 0 writes loss and gradient norm."""
    import deepspeed as engine
    from accelerate.utils import ParallelismConfig
    from transformers import Trainer, TrainingArguments

    engine.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # or it is compiled for the CPU, and serves one machine
    deepspeed = {
        "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto", "gradient_clipping": "auto",
        "zero_optimization": {"stage": stage}, "zero_allow_untested_optimizer": True,
    }  # fmt: skip
    more = {"use_cpu": True} if way == "true" else {"deepspeed": deepspeed}
    if way == "ds_minis":
        deepspeed["mini_sequence"] = {"chunk_size": 16, "sequence_parallel": 2}
    elif way == "accelerate":
        more["parallelism_config"] = ParallelismConfig(sp_size=2, sp_backend="deepspeed")
    args = TrainingArguments(
        str(output / "run"), per_device_train_batch_size=1, max_steps=1, learning_rate=0.1, optim="sgd", logging_steps=1,
        max_grad_norm=1e6, report_to="none", save_strategy="no", disable_tqdm=True, **more,
    )  # fmt: skip
    trainer = Trainer(make_model(name), args, train_dataset=OneSequence())
    trainer.train()
    log = next(entry for entry in trainer.state.log_history if "grad_norm" in entry)
    if args.process_index == 0:
        (output / "log.json").write_text(json.dumps({"loss": log["loss"], "grad_norm": float(log["grad_norm"])}))
    sys.stdout.flush()
    os._exit(0)


def run(name: str, way: str, stage: int) -> dict:
    """The step in processes of its own."""
    with tempfile.TemporaryDirectory() as folder:
        ranks = 1 if way == "true" else 2
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
        launch = [sys.executable] if way == "true" else launch
        done = subprocess.run(
            [*launch, __file__, "--step", name, way, str(stage), folder],
            env=os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        log = Path(folder) / "log.json"
        if log.exists():
            return json.loads(log.read_text())
        lines = [line for line in done.stderr.splitlines() if "Error" in line]
        return {"fails": (lines or ["no result"])[0][:200]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--step", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        train(args.step[0], args.step[1], int(args.step[2]), Path(args.step[3]))
    found = []
    print(f"{'model':<9}{'sequence parallelism':<22}{'stage':>6}{'loss / true':>14}{'gradient / true':>17}")
    for name in MODELS:
        true = run(name, "true", 0)
        for way in ("ds_minis", "accelerate"):
            for stage in (0, 1, 2, 3):
                result = run(name, way, stage)
                row = {"model": name, "way": way, "stage": stage, **result}
                if "fails" in result:
                    print(f"{name:<9}{way:<22}{stage:>6}  fails: {result['fails']}", flush=True)
                else:
                    row |= {key: result[key] / true[key] for key in ("loss", "grad_norm")}
                    print(f"{name:<9}{way:<22}{stage:>6}{row['loss']:>14.5f}{row['grad_norm']:>17.5f}", flush=True)
                found.append(row)
    if args.json:
        versions = {p: __import__(p).__version__ for p in ("torch", "transformers", "accelerate", "deepspeed")}
        args.json.write_text(json.dumps({"versions": versions, "device": "CPU, gloo", "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
