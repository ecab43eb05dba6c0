"""What is planned for an engine against the live bytes of real steps in two processes: all that a rank holds at its peak."""

import json
import subprocess
from pathlib import Path

import pytest
from planner_models import SIZES
from support import warm
from transformers import LlamaConfig

from ds_minis.planner.inputs.setup import Setup
from ds_minis.planner.plan.planner import Planner

WORKER, RANKS = Path(__file__).with_name("engine_bytes_worker.py"), 2
CONFIG = LlamaConfig(**SIZES | {"num_hidden_layers": 4})
ENGINES = {  # their classes, and ZeRO's stage
    "ddp": ("DistributedDataParallel", None),
    "fsdp2": ("FSDPLlamaForCausalLM", None),
    **{f"zero{stage}": ("DeepSpeedEngine", stage) for stage in range(4)},
}
HALF, WHOLE = {"dtype": "bfloat16"}, {"dtype": "float32"}
LARGE_CHUNKS = {"chunk_size": 200, "loss_chunk_size": 150}
CASES = {
    "DDP": ({"engine": "ddp", **WHOLE}, 650),
    "FSDP2": ({"engine": "fsdp2", **HALF}, 650),
    "FSDP2, LoRA": ({"engine": "fsdp2", "train": "lora", **HALF}, 650),
    "ZeRO-0": ({"engine": "zero0", **HALF}, 64),
    "ZeRO-1": ({"engine": "zero1", **HALF}, 650),
    "ZeRO-1, few tokens": ({"engine": "zero1", **WHOLE}, 64),  # the reduction of all gradients is the peak
    "ZeRO-2": ({"engine": "zero2", **WHOLE}, 650),
    "ZeRO-2, few tokens": ({"engine": "zero2", **HALF}, 64),  # the optimizer's step is the peak
    "ZeRO-3, all kept": ({"engine": "zero3", **HALF}, 650),
    "ZeRO-3, not converted": ({"engine": "zero3", "reuse_distance": 1000, "settings": None, **WHOLE}, 200),
    "ZeRO-3, nothing kept": ({"engine": "zero3", "reuse_distance": 1000, **WHOLE}, 650),
    "ZeRO-3, LoRA, products kept": (
        {"engine": "zero3", "train": "lora", "settings": LARGE_CHUNKS | {"keep": "matmuls"}, **HALF},
        650,
    ),
}


@pytest.fixture(scope="module")
def counted(tmp_path_factory) -> dict[str, int]:
    """Bytes at the peak of the busier rank, by case, in the engine that was asked for."""
    folder = tmp_path_factory.mktemp("bytes")
    cases = {
        name: (CONFIG.to_dict(), {"settings": LARGE_CHUNKS} | fields, tokens)
        for name, (fields, tokens) in CASES.items()
    }
    (folder / "cases").write_text(json.dumps(cases))
    command = [warm.python(), str(WORKER), str(folder / "cases"), str(folder)]
    subprocess.run(command, check=True, env=warm.environment() | {"PYTHONPATH": ""}, timeout=500)
    found = {}
    for name in CASES:
        ranks = [json.loads((folder / f"{name}.{rank}.json").read_text()) for rank in range(RANKS)]
        assert [rank["ran"] for rank in ranks] == [[*ENGINES[CASES[name][0]["engine"]], RANKS]] * RANKS, name
        found[name] = max(rank["peak"] for rank in ranks)
    return found


@pytest.fixture(scope="module")
def planner() -> Planner:
    return Planner(CONFIG)


@pytest.mark.engine
@pytest.mark.parametrize("name", CASES)
def test_planned_bytes_are_those_of_real_steps(name, counted, planner):
    fields, tokens = CASES[name]
    estimate = planner.estimate(Setup(**{"settings": LARGE_CHUNKS} | fields, gpus=RANKS), tokens)
    assert estimate.allocated == pytest.approx(counted[name], rel=0.03), [(t.name, t.nbytes) for t in estimate.terms]
