"""Supervised fine-tuning with LoRA, in the style of PEFT's `examples/sft/train.py`.

accelerate launch --config_file X.yaml sft.py --model_name_or_path MODEL --dataset_name DATA --output_dir FOLDER ...
"""

from dataclasses import dataclass, field

import torch
from common import leave, ready_for_deepspeed_on_cpu, save_facts
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser
from trl import SFTConfig, SFTTrainer


@dataclass
class ModelArguments:
    model_name_or_path: str
    use_peft_lora: bool = False
    lora_alpha: int = 16
    lora_dropout: float = 0.0
    lora_r: int = 8
    lora_target_modules: str = "q_proj,k_proj,v_proj,o_proj,down_proj,up_proj,gate_proj"


@dataclass
class DataTrainingArguments:
    dataset_name: str
    splits: list[str] = field(default_factory=lambda: ["train", "test"])


def main(**settings) -> None:
    ready_for_deepspeed_on_cpu()
    parser = HfArgumentParser((ModelArguments, DataTrainingArguments, SFTConfig))
    model_args, data_args, training_args = parser.parse_args_into_dataclasses()

    train_dataset, eval_dataset = (load_dataset(data_args.dataset_name, split=split) for split in data_args.splits)
    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path)
    model = AutoModelForCausalLM.from_pretrained(model_args.model_name_or_path, dtype=torch.float32)
    peft_config = None
    if model_args.use_peft_lora:
        peft_config = LoraConfig(
            lora_alpha=model_args.lora_alpha,
            lora_dropout=model_args.lora_dropout,
            r=model_args.lora_r,
            task_type="CAUSAL_LM",
            target_modules=model_args.lora_target_modules.split(","),
        )
    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        peft_config=peft_config,
        **settings,
    )
    trainer.train()
    trainer.save_model()

    log, engine = trainer.state.log_history, trainer.model_wrapped
    save_facts(f"{training_args.output_dir}/facts.pt", engine, trainer.accelerator.distributed_type.value, log=log)
    leave()


if __name__ == "__main__":
    main()
