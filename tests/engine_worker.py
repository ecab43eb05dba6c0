"""One process of a distributed run: trains every case of a list with a real engine and saves what came out.

Started by `torch.distributed.run` with two processes (see `engines.py`). Each case is trained twice, converted and
unconverted, from the same weights and the same data; rank 0 saves parameters, losses, engine class and process count.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from models import add_lora, batch, build, checkpointed

from ds_minis import convert_to_mini_sequence
from ds_minis.tiling.module import TiledModule

STEPS, ACCUMULATION = 4, 2
LEARNING_RATE = 0.2
CHUNKS = ({"chunk_size": 10, "loss_chunk_size": 9}, {"chunk_size": 7, "loss_chunk_size": 5})  # of rank 0, of rank 1


@dataclass(frozen=True)
class Case:
    """One training run.

    Attributes:
        engine: "deepspeed", "ddp", "fsdp2", "fsdp1", or "fsdp1_flat" (FSDP1 with use_orig_params=False).
        zero_stage: DeepSpeed's ZeRO stage.
        lora: train adapters only.
        lora_head: put an adapter on the LM head too.
        masked_rank: the rank whose labels are all masked, if any.
    """

    family: str = "llama"
    engine: str = "deepspeed"
    zero_stage: int | None = None
    lora: bool = False
    lora_head: bool = False
    checkpointing: bool = True
    masked_rank: int | None = None
    dtype: str = "float32"

    @property
    def name(self) -> str:
        settings = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        return "-".join(f"{k}={v}" for k, v in settings.items() if v != defaults[k])


def micro_batch(case: Case, rank: int, step: int, micro: int) -> dict:
    """Another length on each rank and at each step, prompts masked, one sequence padded."""
    length = 21 + 11 * rank + 5 * step + micro
    prompt = length if case.masked_rank == rank else 6 + rank
    return batch(length, seed=1000 * rank + 10 * step + micro, prompt=prompt, padding=3)


def make_model(case: Case):
    model = build(case.family)
    if case.lora:
        model = add_lora(model, **({"target_modules": ["lm_head", "q_proj", "up_proj"]} if case.lora_head else {}))
    if case.checkpointing:
        checkpointed(model)
    return model.to(getattr(torch, case.dtype))


def trainable(model) -> list[torch.nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def train_deepspeed(case: Case, *, converted: bool) -> dict:
    import deepspeed

    rank = dist.get_rank()
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": ACCUMULATION,
        "gradient_clipping": 0.0,  # the default is 1.0
        "zero_optimization": {"stage": case.zero_stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": case.dtype == "bfloat16"},
    }
    if converted:
        config["mini_sequence"] = CHUNKS[rank]
    model = make_model(case)
    optimizer = torch.optim.SGD(trainable(model), lr=LEARNING_RATE)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    losses = []
    for step in range(STEPS):
        for micro in range(ACCUMULATION):
            loss = engine(**micro_batch(case, rank, step, micro)).loss
            engine.backward(loss)
            engine.step()
            losses.append(loss.detach().float().item())
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        params = {n: p.detach().float().clone() for n, p in model.named_parameters() if p.requires_grad}
    return {
        "engine": type(engine).__name__,
        "zero_stage": engine.zero_optimization_stage(),
        "processes": dist.get_world_size(),
        "tiled": sum(isinstance(m, TiledModule) for m in model.modules()),
        "losses": losses,
        "params": params,
    }


def wrapped(case: Case, model):
    """The model in one of torch's own engines: a decoder layer is the unit of FSDP, and so is the LM head of FSDP2."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy
    from torch.nn.parallel import DistributedDataParallel

    layers = [m for m in model.modules() if type(m).__name__.endswith("DecoderLayer")]
    if case.engine == "ddp":
        return DistributedDataParallel(model)
    if case.engine == "fsdp2":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for module in (*layers, model.get_output_embeddings(), model):
            fully_shard(module, mesh=mesh)
        return model
    policy = ModuleWrapPolicy({type(layers[0])})
    original = case.engine == "fsdp1"
    device = torch.device("cpu")
    return FullyShardedDataParallel(model, auto_wrap_policy=policy, use_orig_params=original, device_id=device)


def train_torch(case: Case, *, converted: bool) -> dict:
    rank = dist.get_rank()
    model = make_model(case)
    if converted:
        convert_to_mini_sequence(model, CHUNKS[rank])
    engine = wrapped(case, model)
    optimizer = torch.optim.SGD(trainable(engine), lr=LEARNING_RATE)
    losses = []
    for step in range(STEPS):
        for micro in range(ACCUMULATION):
            loss = engine(**micro_batch(case, rank, step, micro)).loss
            (loss / ACCUMULATION).backward()
            losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    names = [name for name, param in make_model(case).named_parameters() if param.requires_grad]
    with full_params(engine):
        params = {name.replace("_fsdp_wrapped_module.", ""): param for name, param in model.named_parameters()}
        params = {name: getattr(params[name], "full_tensor", params[name].clone)().detach() for name in names}
    return {
        "engine": type(engine).__name__,
        "zero_stage": None,
        "processes": dist.get_world_size(),
        "tiled": sum(isinstance(m, TiledModule) for m in model.modules()),
        "losses": losses,
        "params": params,
    }


def full_params(engine):
    from torch.distributed.fsdp import FullyShardedDataParallel

    if isinstance(engine, FullyShardedDataParallel):
        return FullyShardedDataParallel.summon_full_params(engine)
    return contextlib.nullcontext()


def train_alone(case: Case, num_ranks: int) -> dict:
    """The unconverted model in one process, on the data of all ranks: what the engines must arrive at."""
    model = make_model(case)
    optimizer = torch.optim.SGD(trainable(model), lr=LEARNING_RATE)
    for step in range(STEPS):
        for micro in range(ACCUMULATION):
            for rank in set(range(num_ranks)) - {case.masked_rank}:  # no label: no loss, no gradient
                loss = model(**micro_batch(case, rank, step, micro)).loss
                (loss / (ACCUMULATION * num_ranks)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {"params": {n: p.detach().float() for n, p in model.named_parameters() if p.requires_grad}}


def main() -> None:
    cases = [Case(**case) for case in json.loads(sys.argv[1])]
    output = Path(sys.argv[2])
    torch.set_num_threads(1)
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # a C++ build of 90 s that gloo does without
    deepspeed.init_distributed(dist_backend="gloo")
    for case in cases:
        train = train_deepspeed if case.engine == "deepspeed" else train_torch
        results = {kind: train(case, converted=kind == "converted") for kind in ("converted", "plain")}
        if dist.get_rank() == 0:
            torch.save(results, output / f"{case.name}.pt")
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo sometimes aborts at teardown after success (pytorch#190489)


if __name__ == "__main__":
    main()
