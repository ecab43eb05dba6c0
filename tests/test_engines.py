"""Engines for real, two gloo processes: parameters after 4 steps equal the unconverted run's and a one-process run's.

Each rank has other lengths and another number of chunks; labels of prompts are masked; gradients accumulate twice.
"""

import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from engine_worker import Case, train_alone
from models import assert_same_tensors

pytestmark = pytest.mark.engine
PROCESSES = 2
CASES = [
    *(Case(zero_stage=stage, lora=lora) for stage in (0, 1, 2, 3) for lora in (False, True)),
    Case(zero_stage=3, checkpointing=False),
    Case(zero_stage=2, masked_rank=1),
    Case(zero_stage=3, masked_rank=0),
    Case(family="gemma2", zero_stage=3),
    Case(family="llama-tied-bias", zero_stage=2),
    Case(family="llama-tied-bias", zero_stage=3),
    Case(zero_stage=3, lora=True, lora_head=True),
    Case(zero_stage=2, dtype="bfloat16"),
    *(Case(engine=engine, lora=lora) for engine in ("ddp", "fsdp2", "fsdp1") for lora in (False, True)),
    Case(engine="fsdp1_flat"),  # torch itself refuses frozen and trainable weights in one flat parameter
    Case(engine="ddp", checkpointing=False),
    Case(engine="fsdp2", checkpointing=False, family="qwen3"),
]
ENGINES = {
    "deepspeed": "DeepSpeedEngine",
    "ddp": "DistributedDataParallel",
    "fsdp2": "FSDP",
    "fsdp1": "FullyShardedDataParallel",
    "fsdp1_flat": "FullyShardedDataParallel",
}


def launch(script: Path, *args: str, timeout: float = 600, **env: str) -> str:
    """Runs a script in two processes on the CPU and gives what it printed; fails with that if it failed."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={PROCESSES}", f"--master_port={port}"]
    done = subprocess.run(
        [*command, str(script), *args],
        env=os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"} | env,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:]
    return done.stdout


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, dict]:
    """What every case came to, from one launch (most of a launch's time are imports)."""
    output = tmp_path_factory.mktemp("engines")
    cases = json.dumps([dataclasses.asdict(case) for case in CASES])
    launch(Path(__file__).with_name("engine_worker.py"), cases, str(output))
    return {case.name: torch.load(output / f"{case.name}.pt") for case in CASES}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_engine_that_was_asked_for_ran(results, case):
    for kind, result in results[case.name].items():
        assert result["engine"].startswith(ENGINES[case.engine])
        assert result["zero_stage"] == case.zero_stage
        assert result["processes"] == PROCESSES
        assert result["tiled"] == ({"gemma2": 11, "qwen3": 11}.get(case.family, 7) if kind == "converted" else 0)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_parameters_equal_those_of_the_unconverted_run(results, case):
    converted, plain = results[case.name]["converted"], results[case.name]["plain"]
    exact = case.dtype == "float32"
    if case.masked_rank is None:
        rtol = 1e-5 if exact else 1e-2
        torch.testing.assert_close(torch.tensor(converted["losses"]), torch.tensor(plain["losses"]), rtol=rtol, atol=0)
    assert all(loss == loss for loss in converted["losses"])
    assert_same_tensors(converted["params"], plain["params"], rtol=1e-5 if exact else 2e-2)


@pytest.mark.parametrize("case", [c for c in CASES if c.dtype == "float32"], ids=lambda case: case.name)
def test_parameters_equal_those_of_one_process(results, case):
    alone = train_alone(case, PROCESSES)["params"]
    assert_same_tensors(results[case.name]["converted"]["params"], alone)


def test_training_changed_the_parameters(results):
    """Or all of the above would hold for an engine that does nothing."""
    from engine_worker import make_model

    before = {n: p.detach() for n, p in make_model(CASES[0]).named_parameters()}
    after = results[CASES[0].name]["converted"]["params"]
    assert all((after[n] - before[n]).abs().max() > 1e-3 for n in before)


def test_bare_accelerator_loop_with_a_section_in_its_json(tmp_path):
    results = []
    for section in ({"mini_sequence": {"chunk_size": 10, "loss_chunk_size": "auto"}}, {}):
        config = {
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 0.0,
            "zero_optimization": {"stage": 2},
            "zero_allow_untested_optimizer": True,
        }
        (tmp_path / "ds.json").write_text(json.dumps(config | section))
        script = Path(__file__).with_name("accelerate_worker.py")
        args = str(tmp_path / "ds.json"), str(tmp_path / "result.pt")
        launch(script, *args, ACCELERATE_USE_DEEPSPEED="true")
        results.append(torch.load(tmp_path / "result.pt"))
    for result, tiled in zip(results, (7, 0), strict=True):
        assert result["engine"] == "DeepSpeedEngine" and result["type"] == "DEEPSPEED"
        assert result["processes"] == PROCESSES and result["tiled"] == tiled
    torch.testing.assert_close(
        torch.tensor(results[0]["losses"]), torch.tensor(results[1]["losses"]), rtol=1e-5, atol=0
    )
    assert_same_tensors(results[0]["params"], results[1]["params"])
