"""Supervised fine-tuning with mini-sequences: LoRA, QLoRA or full, on any engine that accelerate launches.

    sh run_peft_deepspeed.sh                                                            # everything by default
    accelerate launch --config_file accelerate_configs/zero3.yaml examples/sft/train.py --model_name_or_path ... \
        --dataset_name ... --output_dir ...

Mini-sequences are turned on by the engine's configuration (`mini_sequence` in accelerate's YAML or in the DeepSpeed JSON) or
by `--mini_sequence`.
"""

from __future__ import annotations

if __name__ == "__main__":
    import quiet

    quiet.begin()  # what follows imports for seconds, and says things

import os
import sys
from pathlib import Path
from typing import Any

import cpu
import torch
import torch.distributed
from accelerate import DistributedType
from arguments import (
    DataArguments,
    ModelArguments,
    check_head,
    deepspeed_launched,
    fsdp_launched,
    parse_arguments,
)
from checkpoints import asks_to_resume, checkpoint_to_resume, writing
from data import load_splits
from folders import claim_output, describe_run, require_input, require_output
from long_context import STOPPED, StopFile, callbacks
from modeling import (
    is_config_only,
    is_dense,
    load_model,
    load_tokenizer,
    looked_for,
    lora_config,
    require_adapted_modules,
)
from progress import Progress
from summary import summarize
from transformers import AutoConfig, PrinterCallback, TrainerCallback, set_seed
from transformers.utils import logging
from trl import SFTConfig, SFTTrainer
from trl.data_utils import is_conversational

from ds_minis import convert_to_mini_sequence

logger = logging.get_logger("train")


class MiniSequenceSFTTrainer(SFTTrainer):
    """TRL's trainer, with complete checkpoints only."""

    def _save_checkpoint(self, model, trial):
        folder = Path(self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}")
        with writing(folder, self.state, self.args):
            super()._save_checkpoint(model, trial)


def main() -> int:
    """Trains; gives the exit status."""
    model_args, data_args, training_args = parse_arguments()
    mini_sequence = model_args.mini_sequence_settings()
    require_engine(training_args)
    if fsdp_launched() and not torch.accelerator.is_available():
        cpu.prepare_fsdp(training_args)
    check_head(model_args)
    require_input("--model_name_or_path", model_args.model_name_or_path)
    require_input("--dataset_name", data_args.dataset_name)
    require_output("--output_dir", training_args.output_dir)
    configuration = claim_folder(model_args, data_args, training_args)
    if model_args.use_peft_lora and training_args.ddp_find_unused_parameters is None and is_dense(configuration):
        # The Trainer has DDP look for idle adapters, in each step, and DDP then warns that there are none.
        training_args.ddp_find_unused_parameters = False
    training_args.resume_from_checkpoint = checkpoint_to_resume(training_args)
    set_seed(training_args.seed)

    train_dataset, eval_dataset = load_splits(data_args, training_args.dataset_text_field)
    if eval_dataset is None and training_args.eval_strategy != "no":
        if training_args.process_index == 0:
            logger.warning(f"no evaluation: {data_args.dataset_name} has no second split (--splits)")
        training_args.eval_strategy = "no"
    tokenizer = load_tokenizer(model_args, training_args)
    require_chat_template(tokenizer, train_dataset, model_args)
    deepspeed = training_args.distributed_state.distributed_type == DistributedType.DEEPSPEED
    model = load_model(model_args, training_args, tokenizer, deepspeed=deepspeed)
    if model_args.use_peft_lora:
        require_adapted_modules(model_args, model)
    if mini_sequence is not None:
        convert_to_mini_sequence(model, mini_sequence)

    training_args.include_num_input_tokens_seen = "non_padding"
    trainer = MiniSequenceSFTTrainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset if training_args.eval_strategy != "no" else None,
        processing_class=tokenizer,
        peft_config=lora_config(model_args),
    )
    trainer.add_callback(RequireWrapped(trainer))
    pretrained = not is_config_only(model_args.model_name_or_path)
    for callback in callbacks(model_args, training_args.max_length, pretrained=pretrained):
        trainer.add_callback(callback)
    if training_args.disable_tqdm:
        trainer.remove_callback(PrinterCallback)
    trainer.add_callback(progress := Progress())
    return train_and_save(trainer, training_args, progress)


def claim_folder(model_args: ModelArguments, data_args: DataArguments, training_args: SFTConfig) -> dict[str, Any]:
    """Refuses the output folder of another run; gives the model's configuration."""
    if data_args.overwrite_output_dir and asks_to_resume(training_args):
        raise ValueError("--overwrite_output_dir and --resume_from_checkpoint exclude each other: give one of them")
    name = model_args.model_name_or_path
    with looked_for(name):
        configuration = AutoConfig.from_pretrained(name, trust_remote_code=training_args.trust_remote_code).to_dict()
    run = describe_run(name, configuration, training_args.seed, model_args.mode)
    how = {
        "overwrite": data_args.overwrite_output_dir,
        "resumes": asks_to_resume(training_args),
        "writes": training_args.process_index == 0,
    }
    with training_args.main_process_first(local=False, desc="looking at the output folder"):
        claim_output(training_args.output_dir, run, **how)
    return configuration


def require_engine(training_args: SFTConfig) -> None:
    """Stops where accelerate would train without the engine, or the processes, that the launcher was asked for.

    On a machine without GPUs it falls back silently, to one process or to plain data parallelism.
    """
    state = training_args.distributed_state
    if (
        deepspeed_launched(sys.argv) or training_args.deepspeed
    ) and state.distributed_type != DistributedType.DEEPSPEED:
        raise RuntimeError(
            f"DeepSpeed was asked for, but accelerate would run {state.distributed_type.value}: leave --use_cpu and "
            "ACCELERATE_USE_CPU out (DeepSpeed on a CPU is DS_ACCELERATOR=cpu)"
        )
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if state.num_processes != processes:
        raise RuntimeError(
            f"{processes} processes were started, but each would train alone ({state.distributed_type.value}): on a CPU, "
            "give --use_cpu True"
        )


def require_chat_template(tokenizer, dataset, model_args) -> None:
    """Stops before the model is loaded: every sample would need the template."""
    if tokenizer.chat_template is None and is_conversational(next(iter(dataset), {})):
        raise ValueError(
            f"the tokenizer of {model_args.model_name_or_path} has no chat template, and the data set holds conversations: "
            "give --chat_template_format chatml (or zephyr), or put a chat_template.jinja into the model's folder"
        )


class RequireWrapped(TrainerCallback):
    """Stops before the first step if the model was not wrapped by the engine that was asked for."""

    def __init__(self, trainer: SFTTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        expected = (
            "DeepSpeedEngine" if deepspeed_launched(sys.argv) or args.deepspeed
            else {"1": "FullyShardedDataParallel", "2": "FSDPModule"}[os.environ.get("FSDP_VERSION", "1")] if fsdp_launched()
            else "DistributedDataParallel" if args.world_size > 1
            else None
        )  # fmt: skip
        wrapped = type(self.trainer.model_wrapped)
        if expected is not None and expected not in [base.__name__ for base in wrapped.__mro__]:
            raise RuntimeError(f"{expected} was asked for, but accelerate would train with {wrapped.__name__}")


def train_and_save(trainer: SFTTrainer, training_args: SFTConfig, progress: Progress) -> int:
    result = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    if any(isinstance(callback, StopFile) and callback.stopped for callback in trainer.callback_handler.callbacks):
        if training_args.process_index == 0:
            logger.warning(f"stopped, as asked: checkpoint-{trainer.state.global_step} can be continued from")
        return STOPPED
    metrics = dict(result.metrics)
    if trainer.eval_dataset is not None:
        metrics |= trainer.evaluate()
    trainer.save_model()
    trainer.save_state()
    trainer.save_metrics("all", metrics)
    summarize(trainer, metrics, progress)
    trainer.accelerator.wait_for_everyone()
    return 0


if __name__ == "__main__":
    status = main()
    if torch.distributed.is_initialized() and not torch.accelerator.is_available():
        # gloo now and then aborts while it is torn down after success (pytorch#190489).
        torch.distributed.barrier()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
