"""One process of a bare `Accelerator` loop under DeepSpeed: `accelerate_worker.py DS_JSON OUTPUT`."""

import os
import sys

import deepspeed
import torch
from accelerate import Accelerator, DeepSpeedPlugin, PartialState
from models import batch, build, checkpointed

from ds_minis.tiling.module import TiledModule


def main(ds_json: str, output: str) -> None:
    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    PartialState(backend="gloo")  # or accelerate would take two CPU processes for two runs of one
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=ds_json))
    model = checkpointed(build("llama"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    data = torch.utils.data.DataLoader([0], batch_size=2)  # accelerate reads the batch size from it
    model, optimizer, _ = accelerator.prepare(model, optimizer, data)
    losses = []
    for step in range(3):
        loss = model(**batch(20 + 9 * accelerator.process_index + step, seed=step)).loss
        accelerator.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    result = {
        "engine": type(model).__name__,
        "type": accelerator.distributed_type.value,
        "processes": accelerator.num_processes,
        "tiled": sum(isinstance(m, TiledModule) for m in model.modules()),
        "losses": losses,
        "params": {n: p.detach().clone() for n, p in accelerator.unwrap_model(model).named_parameters()},
    }
    if accelerator.is_main_process:
        torch.save(result, output)
    accelerator.wait_for_everyone()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
