"""One process of a distributed run: trains every case of a list with a real engine and saves what came out.

Started by `torch.distributed.run` (see `engines.py`). Each case is trained twice, unconverted and converted, from the
same weights and the same data, or converted alone where processes share sequences; rank 0 saves parameters, losses, engine
class and process count, or the error. After an error the process ends, as an engine that failed half-way must not touch the
next case: `engines.py` starts another.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from engine_cases import LEARNING_RATE, STEPS, Case, deepspeed_config, make_model, micro_loss, mini_sequence
from models import count_layers

from ds_minis import convert_to_mini_sequence, mini_sequence_report
from ds_minis.layer.attention.kept_attention import KeptAttention
from ds_minis.layer.kept.layer_graph import LayerGraph
from ds_minis.layer.tiled.tiled_layer import TiledLayer
from ds_minis.loss.forward.forward_hooks import loss_fallback_reason
from ds_minis.tiling.modules.tiled_module import TiledModule

kept_layers: list[LayerGraph] = []  # each that was run backward
kept_attentions: list[KeptAttention] = []  # each that was run backward
COLLECTIVE_TIMEOUT = datetime.timedelta(seconds=100)  # of ranks that wait for each other: an error, not a hang


def trainable(model) -> list[torch.nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def tiling(model) -> dict:
    """What became of the conversion, if there was one."""
    tiled = sum(isinstance(m, TiledModule) for m in model.modules())
    return {
        "tiled": tiled,
        "layers": count_layers(model),
        "loss": loss_fallback_reason(model),
        "parallel": mini_sequence_report(model).parallel if tiled else "",
        "last_loss": mini_sequence_report(model).last_loss if tiled else "",
    }


def train_deepspeed(case: Case, *, converted: bool, seed: int | None = None) -> dict:
    import deepspeed

    rank = dist.get_rank()
    config = deepspeed_config(case)
    if converted:
        config["mini_sequence"] = mini_sequence(case, rank)
    model = make_model(case, seed)
    optimizer = torch.optim.SGD(trainable(model), lr=LEARNING_RATE)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    losses = []
    for step in range(STEPS):
        for micro in range(case.accumulation):
            loss = micro_loss(case, engine, rank // case.sequence_parallel, step, micro)
            engine.backward(loss)
            engine.step()
            losses.append(loss.detach().float().item())
    # ZeRO-3 gathers what it has put its hooks on, and these hooks would run once per chunk.
    inside = {
        m for layer in model.modules() if isinstance(layer, TiledLayer) for m in layer.modules() if m is not layer
    }
    hooked = sum(bool(m._forward_pre_hooks) for m in inside)
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        params = {n: p.detach().float().clone() for n, p in model.named_parameters() if p.requires_grad}
    return {
        "engine": type(engine).__name__,
        "zero_stage": engine.zero_optimization_stage(),
        "offload": bool(engine.zero_cpu_offload()),
        "hooked_inside": hooked,
        **tiling(model),
        "losses": losses,
        "params": params,
    }


def wrapped(case: Case, model):
    """The model in one of torch's own engines: a decoder layer is the unit of FSDP, and so is the LM head of FSDP2."""
    from accelerate import FullyShardedDataParallelPlugin
    from peft.utils.other import fsdp_auto_wrap_policy
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy
    from torch.nn.parallel import DistributedDataParallel

    from ds_minis.integrations.accelerate import fsdp1_units_around_tiled_modules

    layers = [m for m in model.modules() if type(m).__name__.endswith("DecoderLayer")]
    if case.engine == "ddp":
        return DistributedDataParallel(model)
    if case.engine == "fsdp2":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        # A weight that is tied must be in one unit with both of its users: the model's. One that is read outside too.
        alone = not model.config.tie_word_embeddings and case.loss != "weight"
        head = [model.get_output_embeddings()] if alone else []
        for module in (*layers, *head, model):
            fully_shard(module, mesh=mesh)
        return model
    peft = case.engine in ("fsdp1_peft", "fsdp1_trainer")
    plugin = FullyShardedDataParallelPlugin(fsdp_version=1, use_orig_params=case.engine in ("fsdp1", "fsdp1_trainer"))
    plugin.auto_wrap_policy = fsdp_auto_wrap_policy(model) if peft else ModuleWrapPolicy({type(layers[0])})
    trainer = case.engine == "fsdp1_trainer"
    with fsdp1_units_around_tiled_modules(plugin, model) if trainer else contextlib.nullcontext():
        settings = {"auto_wrap_policy": plugin.auto_wrap_policy, "use_orig_params": plugin.use_orig_params}
        return FullyShardedDataParallel(model, **settings, device_id=torch.device("cpu"))


def clip(engine, norm: float) -> float:
    """Clips the gradients as the engine wants it done; gives the norm before."""
    if not norm:
        return 0.0
    own_clip = getattr(engine, "clip_grad_norm_", None)
    return float(own_clip(norm) if own_clip else torch.nn.utils.clip_grad_norm_(engine.parameters(), norm))


def train_torch(case: Case, *, converted: bool, seed: int | None = None) -> dict:
    model = make_model(case, seed)
    if converted:
        convert_to_mini_sequence(model, mini_sequence(case, dist.get_rank()))
    return steps_torch(case, model, wrapped(case, model))


def steps_torch(case: Case, model, engine) -> dict:
    """Trains a model that an engine has wrapped."""
    replica = dist.get_rank() // case.sequence_parallel
    optimizer = torch.optim.SGD(trainable(engine), lr=LEARNING_RATE)
    scaler = torch.amp.GradScaler("cpu", enabled=case.scaler)
    losses = []
    for step in range(STEPS):
        for micro in range(case.accumulation):
            loss = micro_loss(case, engine, replica, step, micro)
            scaler.scale(loss / case.accumulation).backward()
            losses.append(loss.item())
        scaler.unscale_(optimizer)
        clip(engine, case.clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    names = [name for name, param in make_model(case).named_parameters() if param.requires_grad]
    with full_params(engine):
        params = {name.replace("_fsdp_wrapped_module.", ""): param for name, param in model.named_parameters()}
        params = {name: getattr(params[name], "full_tensor", params[name].clone)().detach().float() for name in names}
    return {
        "engine": type(engine).__name__,
        "zero_stage": None,
        "offload": False,
        **tiling(model),
        "losses": losses,
        "params": params,
    }


def full_params(engine):
    from torch.distributed.fsdp import FullyShardedDataParallel

    if isinstance(engine, FullyShardedDataParallel):
        return FullyShardedDataParallel.summon_full_params(engine)
    return contextlib.nullcontext()


def train_alone(case: Case, *, converted: bool = False, seed: int | None = None) -> dict:
    """One process without an engine, on the data of all ranks: what the engines must arrive at."""
    model = make_model(case, seed)
    if converted:
        convert_to_mini_sequence(model, mini_sequence(case, 0))
    return steps_alone(case, model)


def steps_alone(case: Case, model, engine=None) -> dict:
    optimizer = torch.optim.SGD(trainable(model), lr=LEARNING_RATE)
    losses, norms = [], []
    for step in range(STEPS):
        for micro in range(case.accumulation):
            for replica in range(case.replicas):
                loss = micro_loss(case, model, replica, step, micro)
                (loss / (case.accumulation * case.replicas)).backward()
                losses.append(loss.item())
        norms.append(clip(model, case.clip))
        optimizer.step()
        optimizer.zero_grad()
    return {
        "engine": type(model).__name__,
        "zero_stage": None,
        "offload": False,
        **tiling(model),
        "losses": losses,
        "norms": norms,
        "params": {n: p.detach().float() for n, p in model.named_parameters() if p.requires_grad},
    }


def train(case: Case, *, converted: bool) -> dict:
    """One run, or, where the case asks for many seeds, all of them; their parameters are then stacked."""
    train_once = {"deepspeed": train_deepspeed, "none": train_alone}.get(case.engine, train_torch)
    if not case.seeds:
        return train_once(case, converted=converted)
    # Other numbers on each rank, and for the two kinds of run, which are compared as independent samples.
    seeds = [4 * seed + 2 * converted + dist.get_rank() for seed in range(case.seeds)]
    if case.engine in ("ddp", "none"):
        return stacked(train_again(case, converted=converted, seeds=seeds))
    return stacked([train_once(case, converted=converted, seed=seed) for seed in seeds])


def train_again(case: Case, *, converted: bool, seeds: list[int]) -> list[dict]:
    """A run for each seed, all with one model, whose weights are put back before each: its layers are verified once."""
    model = make_model(case)
    if converted:
        convert_to_mini_sequence(model, mini_sequence(case, dist.get_rank() if case.engine == "ddp" else 0))
    steps, engine = (steps_torch, wrapped(case, model)) if case.engine == "ddp" else (steps_alone, model)
    start, runs = [(p, p.detach().clone()) for p in trainable(model)], []
    for seed in seeds:
        with torch.no_grad():
            for param, value in start:
                param.copy_(value)
        torch.manual_seed(seed)
        run = steps(case, model, engine)
        runs.append(run | {"params": {name: param.clone() for name, param in run["params"].items()}})
    return runs


def stacked(runs: list[dict]) -> dict:
    """One result for the runs of all seeds: their parameters have a first dimension more."""
    params = {name: torch.stack([run["params"][name] for run in runs]) for name in runs[0]["params"]}
    return runs[0] | {"params": params}


def main() -> None:
    cases = [Case(**case) for case in json.loads(sys.argv[1])]
    output = Path(sys.argv[2])
    torch.set_num_threads(1)
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # a C++ build of 90 s that gloo does without
    deepspeed.init_distributed(dist_backend="gloo", timeout=COLLECTIVE_TIMEOUT)
    backward = KeptAttention.backward
    KeptAttention.backward = lambda self, *args: kept_attentions.append(self) or backward(self, *args)
    all_backward = LayerGraph.backward
    LayerGraph.backward = lambda self, *args: kept_layers.append(self) or all_backward(self, *args)
    for case in cases:
        if not run(case, output):
            break
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo sometimes aborts at teardown after success (pytorch#190489)


def run(case: Case, output: Path) -> bool:
    """Saves the runs of a case; whether all came to their end on all ranks."""
    results, rank = {}, dist.get_rank()
    for kind in case.kinds:
        error = None
        kept_attentions.clear(), kept_layers.clear()
        try:
            results[kind] = train(case, converted=kind == "converted") | {"kept_attentions": len(kept_attentions)}
        except Exception as e:
            error = f"{type(e).__name__}: {e}"
            (output / f"{case.name}.rank{rank}.error").write_text(f"{kind}: {error}", encoding="utf-8")
        outcomes = [None] * dist.get_world_size()
        dist.all_gather_object(outcomes, (error, len(kept_layers)))
        errors, kept = zip(*outcomes, strict=True)
        if any(errors):
            results[kind] = {"error": next(filter(None, errors)), "ranks_with_error": sum(map(bool, errors))}
        results[kind]["kept_layers"] = kept  # by rank
        results[kind]["processes"] = dist.get_world_size()
    if rank == 0:
        torch.save(results, output / "unfinished")
        (output / "unfinished").rename(output / f"{case.name}.pt")
    return not any("error" in result for result in results.values())


if __name__ == "__main__":
    main()
