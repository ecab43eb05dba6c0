"""A bare `deepspeed.initialize` loop.

torchrun --nproc_per_node 2 deepspeed_loop.py --model_name_or_path MODEL --output FILE --deepspeed_config X.json
"""

import argparse

import deepspeed
import torch
from common import Texts, collate, leave, save_facts
from transformers import AutoModelForCausalLM


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model_name_or_path", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--local_rank", type=int)
    parser = deepspeed.add_config_arguments(parser)
    args = parser.parse_args()
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # a C++ build of 90 seconds
    deepspeed.init_distributed(dist_backend="gloo")

    model = AutoModelForCausalLM.from_pretrained(args.model_name_or_path)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    engine, _, loader, _ = deepspeed.initialize(
        args, model=model, optimizer=optimizer, training_data=Texts(24, seed=0), collate_fn=collate
    )
    losses, lengths = [], []
    for batch in loader:
        batch = {name: tensor.to(engine.device) for name, tensor in batch.items()}
        loss = engine(**batch).loss
        engine.backward(loss)
        engine.step()
        facts = torch.tensor([loss.item(), batch["input_ids"].shape[1]])
        of_ranks = [torch.empty(2) for _ in range(engine.world_size)]
        torch.distributed.all_gather(of_ranks, facts)
        losses += [loss.item() for loss, _ in of_ranks]
        lengths += [length.item() for _, length in of_ranks]

    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        params = {name: param.detach().clone() for name, param in model.named_parameters()}
    save_facts(args.output, engine, "none of accelerate's", losses=losses, lengths=lengths, params=params)
    leave()


if __name__ == "__main__":
    main()
