"""TRL's trainers with a trained LM head: SFT and DPO, full fine-tuning or a head beside LoRA adapters.

accelerate launch --config_file X.yaml trl_heads.py --model_name_or_path MODEL --trainer dpo --output_dir FOLDER ...
"""

from dataclasses import dataclass

import torch
from common import leave, ready_for_deepspeed_on_cpu, save_facts
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer


@dataclass
class ScriptArguments:
    model_name_or_path: str
    trainer: str = "sft"
    save_head: bool = False  # LoRA, and the head in PEFT's modules_to_save


def texts(trainer: str) -> Dataset:
    words = [f"word{i % 7} and {i % 5} more of it" for i in range(16)]
    if trainer == "sft":
        return Dataset.from_dict({"text": [" ".join([word] * (2 + i % 4)) for i, word in enumerate(words)]})
    rows = {"prompt": words, "chosen": [f" yes, {word}" for word in words], "rejected": [" no"] * len(words)}
    return Dataset.from_dict(rows)


def main() -> None:
    ready_for_deepspeed_on_cpu()
    script_args, _ = HfArgumentParser(ScriptArguments).parse_args_into_dataclasses(return_remaining_strings=True)
    config_class, trainer_class = {"sft": (SFTConfig, SFTTrainer), "dpo": (DPOConfig, DPOTrainer)}[script_args.trainer]
    _, training_args = HfArgumentParser((ScriptArguments, config_class)).parse_args_into_dataclasses()
    model = AutoModelForCausalLM.from_pretrained(script_args.model_name_or_path, dtype=torch.float32)
    settings = {}
    if script_args.save_head:
        settings["peft_config"] = LoraConfig(
            r=4, target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM"
        )
    trainer = trainer_class(
        model=model,
        args=training_args,
        train_dataset=texts(script_args.trainer),
        processing_class=AutoTokenizer.from_pretrained(script_args.model_name_or_path),
        **settings,
    )
    trainer.train()

    accelerator = trainer.accelerator
    params = accelerator.get_state_dict(trainer.model_wrapped)
    log, engine = trainer.state.log_history, trainer.model_wrapped
    facts = {"log": log, "params": params}
    save_facts(f"{training_args.output_dir}/facts.pt", engine, accelerator.distributed_type.value, **facts)
    leave()


if __name__ == "__main__":
    main()
