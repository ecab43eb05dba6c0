"""One process of a distributed run with a fault in a chunk: `fault_worker.py CASES OUTPUT`.

Every rank fails at the same place, catches it, drops the batch and goes on, as a training loop that skips a batch would.
Rank 0 saves what came out for the converted model, for the unconverted one with a fault at the same place, and for the
unconverted one that was never given the batch.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from engine_cases import CHUNKS_OF_RANKS, LEARNING_RATE, Case, make_model, micro_batch
from engine_worker import full_params, trainable, wrapped

from ds_minis import convert_to_mini_sequence

FAULTY_STEP, STEPS = 1, 4
FAULTS = {
    "RuntimeError": RuntimeError,
    "OutOfMemoryError": torch.OutOfMemoryError,
    "KeyboardInterrupt": KeyboardInterrupt,
}


class Fault:
    """Put into a module of the second layer's MLP: raises at its n-th call from `arm` on."""

    def __init__(self, model, kind: type[BaseException]):
        self.left, self.kind = 0, kind
        module = next(m for n, m in model.named_modules() if n.endswith("layers.1.mlp.act_fn"))
        own = type(module).forward

        def forward(x):
            if x.is_meta:  # a layer is followed without values at a new length
                return own(module, x)
            self.left -= 1
            if self.left == 0:
                raise self.kind("the fault of this test")
            return own(module, x)

        module.forward = forward


def engine_of(case: Case, model):
    """The engine, and functions for the backward pass and for the optimizer's step."""
    optimizer = torch.optim.SGD(trainable(model), lr=LEARNING_RATE)
    if case.engine != "deepspeed":
        engine = wrapped(case, model)
        optimizer = torch.optim.SGD(trainable(engine), lr=LEARNING_RATE)
        return engine, lambda loss: loss.backward(), optimizer.step, optimizer.zero_grad
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": case.zero_stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine, engine.backward, engine.step, engine.zero_grad


def train(case: Case, *, converted: bool, kind: str | None, backward: bool, rewrap: bool) -> dict:
    rank = dist.get_rank()
    model = make_model(case)
    fault = Fault(model, FAULTS[kind or "RuntimeError"])
    if converted:
        convert_to_mini_sequence(model, CHUNKS_OF_RANKS[rank])
    engine, backpropagate, step, zero_grad = engine_of(case, model)
    losses, failed = [], 0
    for number in range(STEPS):
        inputs = micro_batch(case, rank, number, 0)
        if number == FAULTY_STEP:
            if kind is None:
                continue
            rows = inputs["input_ids"].numel()
            chunks = -(-rows // CHUNKS_OF_RANKS[rank]["chunk_size"]) if converted else 1
            fault.left = chunks * backward + min(chunks, 3)
        try:
            loss = engine(**inputs).loss
            backpropagate(loss)
        except FAULTS[kind or "RuntimeError"] as error:
            if "the fault of this test" not in str(error):
                return {"cannot": f"{type(error).__name__}: {error}", "failed": failed}
            failed += 1
            loss = None
            zero_grad()
            if rewrap:
                engine, backpropagate, step, zero_grad = engine_of(case, model)
            continue
        except Exception as error:  # the engine's own words, when it cannot go on
            return {"cannot": f"{type(error).__name__}: {error}", "failed": failed}
        step()
        zero_grad()
        losses.append(loss.item())
    names = [name for name, param in make_model(case).named_parameters() if param.requires_grad]
    params = dict(model.named_parameters())
    if case.zero_stage is not None:
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(model.parameters())):
            params = {name: params[name].detach().clone() for name in names}
    else:
        with full_params(engine):
            params = {name: getattr(params[name], "full_tensor", params[name].clone)().detach() for name in names}
    return {
        "engine": type(engine).__name__,
        "processes": dist.get_world_size(),
        "failed": failed,
        "losses": losses,
        "params": params,
    }


def main() -> None:
    cases, output = json.loads(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo")
    for number, (settings, kind, backward, rewrap) in enumerate(cases):
        case, how = Case(**settings), {"backward": backward, "rewrap": rewrap}
        results = {
            "converted": train(case, converted=True, kind=kind, **how),
            "plain": train(case, converted=False, kind=kind, **how),
            "clean": train(case, converted=False, kind=None, **how),
        }
        if dist.get_rank() == 0:
            torch.save(results, output / f"{number}.pt")
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
