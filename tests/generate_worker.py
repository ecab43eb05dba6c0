"""One process of a distributed run: generates between training steps under each engine, converted and not.

Started by `torch.distributed.run` with two processes (see `test_generate.py`). The prompts of the ranks differ in length.
Each rank saves the tokens it generated, and the parameters and losses at the end.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from engine_cases import CHUNKS_OF_RANKS, LEARNING_RATE, Case, make_model, micro_batch
from engine_worker import trainable, wrapped
from models import batch

from ds_minis import convert_to_mini_sequence
from ds_minis.tiling.core.tiled_op import TiledRows

STEPS, NEW_TOKENS = 3, 6
CASES = [Case(engine="ddp"), Case(engine="fsdp2"), Case(engine="deepspeed", zero_stage=3)]


def generate(model, rank: int, step: int, **settings) -> torch.Tensor:
    prompt = batch(5 + 6 * rank + step, seed=100 + 10 * rank + step)
    inputs = {key: prompt[key] for key in ("input_ids", "attention_mask")}
    return model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, use_cache=True, **settings)


def run(case: Case, *, converted: bool) -> dict:
    rank = dist.get_rank()
    model = make_model(case)
    optimizer = torch.optim.SGD(trainable(model), lr=LEARNING_RATE)
    if case.engine == "deepspeed":
        import deepspeed

        config = {
            "train_micro_batch_size_per_gpu": 2,
            "gradient_clipping": 0.0,
            "zero_optimization": {"stage": case.zero_stage, "stage3_param_persistence_threshold": 0},
            "zero_allow_untested_optimizer": True,
        }
        if converted:
            config["mini_sequence"] = CHUNKS_OF_RANKS[rank]
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    else:
        if converted:
            convert_to_mini_sequence(model, CHUNKS_OF_RANKS[rank])
        engine = wrapped(case, model)
        optimizer = torch.optim.SGD(trainable(engine), lr=LEARNING_RATE)
    tokens, losses = [], []
    for step in range(STEPS):
        loss = engine(**micro_batch(case, rank, step, 0)).loss
        # Between forward and backward the weights are needed by both; a rank with a longer prompt takes as many steps.
        tokens.append(generate(model, rank, step, synced_gpus=case.engine != "ddp"))
        if case.engine == "deepspeed":
            engine.backward(loss)
            engine.step()
        else:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        tokens.append(generate(model, rank, step, synced_gpus=case.engine != "ddp"))
        losses.append(loss.item())
    if case.engine == "deepspeed":
        with deepspeed.zero.GatheredParameters(list(model.parameters())):
            params = {name: param.detach().clone() for name, param in model.named_parameters()}
    else:
        params = {n: getattr(p, "full_tensor", p.clone)().detach() for n, p in model.named_parameters()}
    assert model.training
    return {
        "engine": type(engine).__name__,
        "zero_stage": case.zero_stage,
        "processes": dist.get_world_size(),
        "tokens": tokens,
        "losses": losses,
        "params": params,
    }


def main() -> None:
    output = Path(sys.argv[1])
    torch.set_num_threads(1)
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # a C++ build of 90 s that gloo does without
    deepspeed.init_distributed(dist_backend="gloo")
    tiled, forward = [], TiledRows.forward

    def counted(self, *args, **kwargs):
        tiled.append(kwargs["with_backward"])
        return forward(self, *args, **kwargs)

    TiledRows.forward = counted
    for case in CASES:
        results = {}
        for kind in ("converted", "plain"):
            tiled.clear()
            results[kind] = run(case, converted=kind == "converted") | {"tiled": list(tiled)}
        torch.save(results, output / f"{case.name}-{dist.get_rank()}.pt")
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo sometimes aborts at teardown after success (pytorch#190489)


if __name__ == "__main__":
    main()
