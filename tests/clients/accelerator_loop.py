"""A bare `Accelerator` loop, in the style of accelerate's own examples.

accelerate launch --config_file X.yaml accelerator_loop.py --model_name_or_path MODEL --output FILE [--cpu]
"""

import argparse

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from common import Texts, collate, leave, ready_for_deepspeed_on_cpu, save_facts
from transformers import AutoModelForCausalLM


def main(handlers=(), **settings) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model_name_or_path", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--cpu", action="store_true")
    args = parser.parse_args()
    ready_for_deepspeed_on_cpu()

    process_group = InitProcessGroupKwargs(backend="gloo")
    accelerator = Accelerator(
        cpu=args.cpu, gradient_accumulation_steps=2, kwargs_handlers=[process_group, *handlers], **settings
    )
    model = AutoModelForCausalLM.from_pretrained(args.model_name_or_path)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    loader = torch.utils.data.DataLoader(Texts(24, seed=0), batch_size=2, collate_fn=collate)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    model.train()
    losses, lengths = [], []
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        losses += accelerator.gather(loss.detach().reshape(1)).tolist()
        accelerator.print(f"loss {losses[-1]:.4f}")
        lengths += accelerator.gather(torch.tensor([batch["input_ids"].shape[1]])).tolist()

    params = accelerator.get_state_dict(model)
    save_facts(args.output, model, accelerator.distributed_type.value, losses=losses, lengths=lengths, params=params)
    leave()


if __name__ == "__main__":
    main()
