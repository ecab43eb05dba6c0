"""Live bytes of real training steps in two gloo processes: what the planner's figures for engines are compared with.

    python engine_bytes_worker.py CASES FOLDER     # CASES: JSON, name -> [engine, settings of a Setup, tokens]

Each rank counts every storage from before the model is built on: parameters, gradients, optimizer states, the engine's
buffers, activations. The peak is that of the second step, with ZeRO-3 of the third: in the first modules are verified, and
ZeRO-3 writes down in which order it meets them.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "scripts" / "bench")]
from live_bytes import LiveBytes  # noqa: E402
from support.forked import fork_ranks  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402

from ds_minis import convert_to_mini_sequence  # noqa: E402
from ds_minis.planner.inputs.setup import Setup  # noqa: E402
from ds_minis.planner.step.adapters import add_lora  # noqa: E402
from ds_minis.planner.step.stubs import register  # noqa: E402

RANKS = 2


def model_of(setup: Setup, config: dict, attention: str) -> torch.nn.Module:
    fields = dict(config)
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    torch.manual_seed(0)
    dtype = getattr(torch, setup.dtype)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention).train()
    if setup.train == "lora":
        add_lora(model, setup.lora_rank)
    if setup.engine == "fsdp2":  # as accelerate does
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.data = parameter.data.float()
    if setup.settings is not None and setup.engine[:4] != "zero":
        with contextlib.redirect_stdout(io.StringIO()):
            convert_to_mini_sequence(model, dict(setup.settings))
    elif setup.settings is None and setup.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def engine_of(setup: Setup, model: torch.nn.Module):
    """The engine, and a function that runs a step."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if setup.engine[:4] == "zero":
        return _deepspeed(setup, model, trained)
    if setup.engine == "ddp":
        engine = torch.nn.parallel.DistributedDataParallel(model)
    elif setup.engine == "fsdp2":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        half = setup.dtype != "float32"
        dtype = getattr(torch, setup.dtype)
        policy = MixedPrecisionPolicy(dtype, dtype, dtype) if half else MixedPrecisionPolicy()
        mesh = init_device_mesh("cpu", (RANKS,))
        for module in (*(m for m in model.modules() if type(m).__name__.endswith("DecoderLayer")), model):
            fully_shard(module, mesh=mesh, mp_policy=policy)
        engine, trained = model, [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)

    def step(ids):
        engine(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return engine, step


def _deepspeed(setup: Setup, model: torch.nn.Module, trained: list):
    import deepspeed

    hidden = model.config.hidden_size
    zero = {
        "stage": int(setup.engine[-1]),
        "overlap_comm": setup.engine in ("zero2", "zero3"),
        "reduce_bucket_size": setup.bucket or hidden**2,
        "stage3_prefetch_bucket_size": int(0.9 * hidden**2),
        "stage3_param_persistence_threshold": 10 * hidden,
    }
    if setup.reuse_distance is not None:
        zero["stage3_max_reuse_distance"] = setup.reuse_distance
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": setup.dtype == "bfloat16"},
        "gradient_clipping": 0.0,
    }
    if setup.settings is not None:
        config["mini_sequence"] = dict(setup.settings) or True
    with contextlib.redirect_stdout(io.StringIO()):
        engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(trained, fused=True), config=config)

    def step(ids):
        engine.backward(engine(input_ids=ids, labels=ids, use_cache=False).loss)
        engine.step()

    return engine, step


def ran(engine: torch.nn.Module) -> list:
    """The engine's class, ZeRO's stage, and the number of processes: what a silent fallback would change."""
    stage = engine.zero_optimization_stage() if hasattr(engine, "zero_optimization_stage") else None
    return [type(engine).__name__, stage, dist.get_world_size()]


def measure(config: dict, fields: dict, tokens: int, trace: bool) -> dict:
    setup = Setup(**fields, gpus=RANKS)
    with LiveBytes(trace=trace, with_meta=False) as live:
        model = model_of(setup, config, register())
        for tensor in (*model.parameters(), *model.buffers()):
            live.hold(tensor, "model")
        engine, step = engine_of(setup, model)
        ids = torch.zeros(1, tokens, dtype=torch.int64)
        for _ in range(3 if setup.engine == "zero3" else 2):
            live.peak, live.at_peak = live.now, []
            step(ids)
    return {"ran": ran(engine), "peak": live.peak, "now": live.now, "summary": live.summary(30)}


def main(rank: int, cases: dict, folder: Path) -> None:
    import deepspeed

    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # a C++ build of 90 s that gloo does without
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    store = dist.FileStore(str(folder / "store"), RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=timedelta(seconds=100))
    deepspeed.init_distributed(dist_backend="gloo")
    for name, (config, fields, tokens) in cases.items():
        found = measure(config, fields, tokens, trace=bool(os.environ.get("LIVE_TRACE")))
        (folder / f"{name}.{rank}.json").write_text(json.dumps(found))
    dist.barrier()


if __name__ == "__main__":
    cases, folder = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    sys.exit(fork_ranks(RANKS, lambda rank: main(rank, cases, folder)))
