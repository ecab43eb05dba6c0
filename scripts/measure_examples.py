"""Runs the scripts of examples/sft as they are and writes what came out into the table of its README.

python scripts/measure_examples.py                 # all of them, a quarter of an hour on 2 CPU cores
python scripts/measure_examples.py --only fsdp     # print the rows whose command has this word, and write nothing
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from made_blocks import with_block

EXAMPLE = Path(__file__).parent.parent / "examples" / "sft"
RUNS = {
    "sh run_peft_multigpu.sh": "DDP, LoRA",
    "sh run_peft_fsdp.sh": "FSDP2, LoRA",
    "FSDP_VERSION=1 sh run_peft_fsdp.sh": "FSDP1, LoRA without embeddings and LM head",
    "sh run_peft_deepspeed.sh": "ZeRO-2, LoRA",
    "ZERO_STAGE=3 sh run_peft_deepspeed.sh": "ZeRO-3, LoRA",
    "sh run_peft_qlora_fsdp.sh": "FSDP2, QLoRA (adapters alone)",
    "sh run_peft_qlora_deepspeed_stage3.sh": "ZeRO-3, QLoRA (adapters alone)",
    "FULL=1 sh run_peft_multigpu.sh": "DDP, all weights",
    "FULL=1 sh run_peft_fsdp.sh": "FSDP2, all weights",
    "FULL=1 ZERO_STAGE=3 sh run_peft_deepspeed.sh": "ZeRO-3, all weights",
}


def measured(command: str) -> str:
    """One run's row of the table."""
    words = shlex.split(command)
    env = os.environ | {"PYTHON": sys.executable} | dict(word.split("=") for word in words if "=" in word)
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        done = subprocess.run(
            ["sh", str(EXAMPLE / words[-1])],
            cwd=folder,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        seconds = time.perf_counter() - started
        if done.returncode:
            sys.exit(f"{command} failed:\n{done.stdout[-3000:]}")
        (output,) = Path(folder, "outputs").iterdir()
        summary = json.loads((output / "summary.json").read_text(encoding="utf-8"))
    loss = f"{summary['first_loss']:.3f} to {summary['last_loss']:.3f}"
    return f"| `{command}` | {RUNS[command]} | {summary['num_processes']} | {loss} | {seconds:.0f} s |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="")
    only = parser.parse_args().only
    rows = ["| command | mode | processes | loss, 20 steps | time |", "|---|---|---|---|---|"]
    for command in RUNS:
        if only in command:
            rows.append(measured(command))
            print(rows[-1], flush=True)
    load = f"load {os.getloadavg()[2]:.0f} on {os.cpu_count()} cores"
    machine = (
        torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {load} over the last quarter of an hour"
    )
    rows += [
        "",
        f"As measured on {time.strftime('%Y-%m-%d')} ({machine}, torch {torch.__version__}), imports and saving included.",
    ]
    print("\n".join(rows))
    if not only:
        page = EXAMPLE / "README.md"
        text = with_block(page.read_text(encoding="utf-8"), "runs", "\n".join(rows) + "\n")
        page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
