"""Programs of users in which groups of ranks share sequences, several in one start; run by test_clients_of_groups.py.

torchrun --nproc_per_node N client_worker.py OUTPUT.pt SIZE PROGRAM...    # SIZE ranks in a group; 1 is the reference

Rank 0 writes what each program logged, and its weights at the end. The ranks draw other random numbers before they shuffle.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1] / "clients"))
from common import Texts, collate, leave

OUTPUT, SIZE = Path(sys.argv[1]), int(sys.argv[2])
TOKENIZER = Path(__file__).parents[2] / "examples" / "sft" / "default" / "model"
LEARNING_RATE, CLIP = 0.3, 0.5
SETTINGS = {"chunk_size": 10, "loss_chunk_size": 9, "sequence_parallel": SIZE}


def model() -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, pad_token_id=1))


def weights(of: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name.removeprefix("module."): param.detach().clone() for name, param in of.named_parameters()}


def ran(engine: torch.nn.Module) -> list:
    """The engine's class, the number of processes, and ZeRO's stage: what a silent fallback would change."""
    stage = engine.zero_optimization_stage() if hasattr(engine, "zero_optimization_stage") else None
    return [type(engine).__name__, dist.get_world_size() if dist.is_initialized() else 1, stage]


def loop() -> dict:
    """A bare accelerate loop; its loaders are prepared before the model, its ranks are seeded differently."""
    from accelerate import Accelerator, InitProcessGroupKwargs

    import ds_minis

    handlers = [InitProcessGroupKwargs(backend="gloo")] if dist.is_torchelastic_launched() else []
    handlers += [ds_minis.MiniSequencePlugin(**SETTINGS)] if SIZE > 1 else []
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, kwargs_handlers=handlers)
    net = model()
    torch.manual_seed(11 * accelerator.process_index)
    optimizer = torch.optim.SGD(net.parameters(), lr=LEARNING_RATE)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 40)
    make = torch.utils.data.DataLoader
    train = make(Texts(22, seed=0), batch_size=2, collate_fn=collate, shuffle=True)
    test, stream = make(Texts(7, seed=1), batch_size=2, collate_fn=collate), make(Numbers(11), batch_size=2)
    train, test, stream, net, optimizer, scheduler = accelerator.prepare(train, test, stream, net, optimizer, scheduler)
    logs = []
    for _ in range(2):
        for batch in train:
            with accelerator.accumulate(net):
                loss = net(**batch).loss
                accelerator.backward(loss)
                norm = accelerator.clip_grad_norm_(net.parameters(), CLIP) if accelerator.sync_gradients else 0.0
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            logs.append([accelerator.gather(loss.detach()).mean().item(), float(norm), scheduler.get_last_lr()[0]])
    labels = [accelerator.gather_for_metrics(batch["labels"].ne(-100).sum(1)).tolist() for batch in test]
    objects = [accelerator.gather_for_metrics([str(len(row)) for row in batch["labels"]]) for batch in test]
    skipped = accelerator.skip_first_batches(stream, 1)
    streams = [[accelerator.gather_for_metrics(batch).tolist() for batch in part] for part in (stream, skipped)]
    facts = {"labels": labels, "objects": objects, "streams": streams, "steps": len(train)}
    return {"logs": logs, "weights": weights(net), "facts": facts, "ran": ran(net)}


class Numbers(torch.utils.data.IterableDataset):
    """A stream, which accelerate reads on process 0 and dispatches; no other process could read it."""

    def __init__(self, count: int):
        self._count = count

    def __iter__(self):
        assert not dist.is_initialized() or dist.get_rank() == 0
        yield from range(self._count)


def arguments(folder: str, kind: type, **others):
    settings = {
        "use_cpu": True, "ddp_backend": "gloo" if dist.is_torchelastic_launched() else None, "bf16": False,
        "per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "gradient_accumulation_steps": 2,
        "num_train_epochs": 2, "optim": "sgd", "learning_rate": LEARNING_RATE, "lr_scheduler_type": "linear",
        "max_grad_norm": CLIP, "logging_steps": 1, "eval_strategy": "epoch", "save_strategy": "no", "report_to": [],
        "disable_tqdm": True, "include_num_input_tokens_seen": "all",
    }  # fmt: skip
    return kind(str(OUTPUT.parent / folder), **settings | others)


def metrics(prediction) -> dict:
    """Of every sample once, in order."""
    predicted, labels = prediction.predictions[:, :-1].argmax(-1), prediction.label_ids[:, 1:]
    counted = labels != -100
    return {"right": int((predicted == labels)[counted].sum()), "each": [int(n) for n in counted.sum(1)]}


def results(trainer) -> dict:
    facts = {"steps": trainer.state.max_steps, "batch": trainer.get_total_train_batch_size(trainer.args)}
    log, engine = trainer.state.log_history, trainer.model_wrapped
    return {"log": log, "weights": weights(trainer.model), "facts": facts, "ran": ran(engine)}


def trainer() -> dict:
    """The HF Trainer, with metrics over all samples, and again from a checkpoint within an epoch."""
    from transformers import Trainer, TrainingArguments

    import ds_minis

    def make(**others) -> Trainer:
        args = arguments(f"trainer-{SIZE}", TrainingArguments, **others)
        callbacks = [ds_minis.MiniSequenceCallback(**SETTINGS)] if SIZE > 1 else []
        data = {"train_dataset": Texts(22, seed=0), "eval_dataset": Texts(7, seed=1), "data_collator": collate}
        return Trainer(model(), args, **data, compute_metrics=metrics, callbacks=callbacks)

    whole, resumed = make(save_strategy="steps", save_steps=4), make()
    whole.train()
    resumed.train(resume_from_checkpoint=str(OUTPUT.parent / f"trainer-{SIZE}" / "checkpoint-4"))
    return results(whole) | {"resumed": results(resumed)}


def packed() -> dict:
    """TRL's SFTTrainer, which packs several texts into a row and tells them apart by their positions."""
    return sft(packing=True, max_length=32, completion_only_loss=False)


def sft(**others) -> dict:
    """TRL's SFTTrainer; the model is converted in code."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    import ds_minis

    def data(count: int, seed: int) -> Dataset:
        texts = list(Texts(count, seed=seed))
        masks = [(text["labels"] != -100).long().tolist() for text in texts]
        return Dataset.from_dict({"input_ids": [t["input_ids"].tolist() for t in texts], "completion_mask": masks})

    net = model()
    if SIZE > 1:
        ds_minis.convert_to_mini_sequence(net, SETTINGS)
    settings = {"max_length": 96, "completion_only_loss": True}
    args = arguments(f"sft-{SIZE}", SFTConfig, **settings | others)
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    trained = SFTTrainer(net, args, train_dataset=data(22, 0), eval_dataset=data(7, 1), processing_class=tokenizer)
    trained.train()
    return results(trained)


def zero2() -> dict:
    """A bare `deepspeed.initialize` with `training_data`."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # a C++ build of 90 seconds
    deepspeed.init_distributed(dist_backend="gloo")
    net = model()
    config = {
        "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2, "gradient_clipping": CLIP,
        "zero_allow_untested_optimizer": True, "zero_optimization": {"stage": 2},
        "scheduler": {"type": "WarmupDecayLR", "params": {"warmup_max_lr": LEARNING_RATE, "warmup_num_steps": 2,
                                                          "total_num_steps": 12}},
    }  # fmt: skip
    if SIZE > 1:
        config["mini_sequence"] = SETTINGS
    optimizer = torch.optim.SGD(net.parameters(), lr=LEARNING_RATE)
    engine, _, loader, _ = deepspeed.initialize(
        model=net, optimizer=optimizer, config=config, training_data=Texts(23, seed=0), collate_fn=collate
    )
    logs = []
    for batch in loader:
        loss = engine(**batch).loss
        engine.backward(loss)
        engine.step()
        mean = loss.detach() / dist.get_world_size()
        dist.all_reduce(mean)
        logs.append([mean.item(), float(engine.get_global_grad_norm() or 0), engine.get_lr()[0]])
    return {"logs": logs, "weights": weights(net), "facts": {"steps": len(loader)}, "ran": ran(engine)}


class Numbered(torch.utils.data.Dataset):
    """Number and length of each text, and a number that is drawn when it is read."""

    def __len__(self) -> int:
        return 21

    def __getitem__(self, index: int) -> dict:
        if index >= len(self):
            raise IndexError(index)
        return {"input_ids": [index] * (3 + 5 * index % 7), "drawn": int(torch.randint(1000, ()))}


class NumberedStream(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield from ({"input_ids": [index] * 3, "drawn": 0} for index in range(21))


ORDERS = {  # of a Trainer's training data: its data, its arguments, accelerate's
    "as it is": (Numbered, {}, {}),
    "no seedable sampler": (Numbered, {}, {"use_seedable_sampler": False}),
    "split batches": (Numbered, {"per_device_train_batch_size": 4}, {"split_batches": True}),
    "split and dispatched": (
        Numbered,
        {"per_device_train_batch_size": 4},
        {"split_batches": True, "dispatch_batches": True},
    ),
    "dispatched": (Numbered, {}, {"dispatch_batches": True}),
    "batches that are not made even": (Numbered, {}, {"even_batches": False}),
    "by length": (Numbered, {"train_sampling_strategy": "group_by_length"}, {"use_seedable_sampler": False}),
    "balanced": (Numbered, {"train_sampling_strategy": "batch_rebalance"}, {}),
    "workers": (Numbered, {"dataloader_num_workers": 1}, {}),
    "a stream": (NumberedStream, {"max_steps": 5}, {}),
    "a stream that all ranks read": (NumberedStream, {"max_steps": 5}, {"dispatch_batches": False}),
    "a stream of datasets": ("datasets", {"max_steps": 5}, {"dispatch_batches": False}),
}


def orders() -> dict:
    """What each rank is given in two epochs, and from its third batch on, in the ways there are to ask for data."""
    import datasets
    from transformers import Trainer, TrainingArguments
    from transformers.trainer import skip_first_batches

    import ds_minis

    def read(texts: list[dict]) -> dict:
        return {
            "number": torch.tensor([t["input_ids"][0] for t in texts]),
            "drawn": torch.tensor([t["drawn"] for t in texts]),
        }

    net, mine = model(), {}
    if SIZE > 1:
        ds_minis.convert_to_mini_sequence(net, SETTINGS)
    for name, (kind, others, accelerate) in ORDERS.items():
        if kind == "datasets":
            rows = datasets.Dataset.from_list([{"input_ids": [number], "drawn": 0} for number in range(21)])
            data = rows.to_iterable_dataset(num_shards=4)
        else:
            data = kind()
        more = {"remove_unused_columns": False, "eval_strategy": "no", "accelerator_config": accelerate} | others
        args = arguments("orders", TrainingArguments, **more)
        loader = Trainer(net, args, train_dataset=data, data_collator=read).get_train_dataloader()
        epochs = [loader, loader, skip_first_batches(loader, 2)]
        mine[name] = [[[batch["number"].tolist(), batch["drawn"].tolist()] for batch in epoch] for epoch in epochs]
    of_ranks = [mine] * (dist.get_world_size() if dist.is_initialized() else 1)
    if dist.is_initialized():
        dist.all_gather_object(of_ranks, mine)
    return {name: [of_rank[name] for of_rank in of_ranks] for name in ORDERS}


def refused() -> dict:
    """What cannot be: the message of each."""
    from accelerate import Accelerator, DeepSpeedPlugin, InitProcessGroupKwargs
    from accelerate.parallelism_config import ParallelismConfig
    from accelerate.state import AcceleratorState

    import ds_minis

    def message(function, *args, **kwargs) -> str:
        AcceleratorState._reset_state(reset_partial_state=True)
        try:
            return f"not refused: {function(*args, **kwargs)}"
        except Exception as error:
            return f"{type(error).__name__}: {error}"

    def accelerator(size: int, **others) -> Accelerator:
        handlers = [InitProcessGroupKwargs(backend="gloo")]
        handlers += [ds_minis.MiniSequencePlugin(sequence_parallel=size)] if size > 1 else []
        return Accelerator(kwargs_handlers=handlers, **{"cpu": True} | others)

    def loader_before_its_model() -> None:
        made = accelerator(1)
        made.prepare(torch.utils.data.DataLoader(Texts(8, seed=0), batch_size=2, collate_fn=collate))
        made.prepare(ds_minis.convert_to_mini_sequence(model(), SETTINGS))

    def batches_of_its_own() -> None:
        net = ds_minis.convert_to_mini_sequence(model(), SETTINGS)
        batch = collate([Texts(4, seed=0)[dist.get_rank()]])
        net(**batch)

    def training_of_deepspeed(**config) -> None:
        import deepspeed

        config |= {"train_micro_batch_size_per_gpu": 2, "mini_sequence": SETTINGS}
        deepspeed.initialize(model=model(), config=config)

    zero = {"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": 2}
    ulysses = {"parallelism_config": ParallelismConfig(sp_size=2), "cpu": False}
    found = {
        "a size that does not divide": message(accelerator, 3),
        "a size that does not divide, in code": message(
            ds_minis.convert_to_mini_sequence, model(), sequence_parallel=3
        ),
        "a loader before its model": message(loader_before_its_model),
        "batches of its own": message(batches_of_its_own),
        "deepspeed": message(training_of_deepspeed, sequence_parallel_size=2, data_parallel_size=1),
        "Ulysses": message(accelerator, 2, deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=zero), **ulysses),
        "a model that is not converted": message(ds_minis.sampler_arguments, model()),
        "no size": message(ds_minis.sampler_arguments, 0),
    }
    arguments = [ds_minis.sampler_arguments(size) for size in (1, 2)]
    converted = ds_minis.convert_to_mini_sequence(model(), SETTINGS)
    of_ranks = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, [*arguments, ds_minis.sampler_arguments(converted)])
    return {"messages": found, "sampler": of_ranks}


if __name__ == "__main__":
    from accelerate.state import AcceleratorState

    torch.set_num_threads(1)
    found = {}
    for name in sys.argv[3:]:
        AcceleratorState._reset_state(reset_partial_state=True)
        found[name] = globals()[name]()
    if not dist.is_initialized() or dist.get_rank() == 0:
        torch.save(found, OUTPUT)
    leave()
