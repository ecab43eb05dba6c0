"""One rank of ZeRO-3 whose tokens go to other experts than the other rank's: plain and converted, tiled and as a whole."""

import sys

import torch
import torch.distributed as dist
from models import build
from torch import nn

CHUNKS = {"chunk_size": 8, "loss_chunk_size": 8}


class Experts(nn.Module):
    """Each expert a module of its own, called only where a token was sent to it; the last one never is."""

    def __init__(self, width: int, rank: int, counts: bool):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(5))
        self.first, self.counts, self.calls = 2 * rank, counts, 0

    def forward(self, x):
        self.calls += self.counts  # state, with which a layer is run as a whole
        rows, y = x.reshape(-1, x.shape[-1]), torch.zeros_like(x.reshape(-1, x.shape[-1]))
        choice = (rows.detach()[:, 0] > 0).long() + self.first
        for number, expert in enumerate(self.experts):
            places = (choice == number).nonzero().flatten()
            if len(places):
                y = y.index_add(0, places, expert(rows[places]))
        return y.view_as(x)


def train(*, converted: bool, counts: bool, leaves: bool) -> dict[str, torch.Tensor]:
    import deepspeed
    from deepspeed.utils import set_z3_leaf_modules

    torch.manual_seed(0)
    rank, model = dist.get_rank(), build("llama")
    for layer in model.model.layers:
        layer.mlp = Experts(model.config.hidden_size, rank, counts)
    if leaves:
        set_z3_leaf_modules(model, [Experts])
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero, "zero_allow_untested_optimizer": True}
    if converted:
        config["mini_sequence"] = CHUNKS
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    generator = torch.Generator().manual_seed(rank)
    ids = torch.randint(0, model.config.vocab_size, (1, 24 + 7 * rank), generator=generator)
    for _ in range(2):
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        return {name: param.detach().clone() for name, param in model.named_parameters()}


def main(path: str) -> None:
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # a C++ build
    dist.init_process_group("gloo")
    plain = train(converted=False, counts=False, leaves=True)
    runs = {
        "tiled": train(converted=True, counts=False, leaves=True),
        "no leaf but ours": train(converted=True, counts=False, leaves=False),
        "whole": train(converted=True, counts=True, leaves=True),
    }
    if dist.get_rank() == 0:
        torch.save((plain, runs), path)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
