"""The HF `Trainer`, with evaluations in between: for the loss, or for the token accuracy too.

accelerate launch --config_file X.yaml trainer.py --model_name_or_path MODEL --output_dir FOLDER [TrainingArguments]
"""

from dataclasses import dataclass

from common import Texts, collate, leave, ready_for_deepspeed_on_cpu, save_facts
from transformers import AutoModelForCausalLM, HfArgumentParser, Trainer, TrainingArguments


@dataclass
class ScriptArguments:
    model_name_or_path: str
    token_accuracy: bool = False


def predicted_tokens(logits, labels):
    return logits.argmax(dim=-1)


def token_accuracy(prediction) -> dict[str, float]:
    predictions, labels = prediction.predictions[:, :-1], prediction.label_ids[:, 1:]
    counted = labels != -100
    return {"token_accuracy": float((predictions == labels)[counted].mean()), "tokens": int(counted.sum())}


def main(**settings) -> None:
    ready_for_deepspeed_on_cpu()
    script_args, training_args = HfArgumentParser((ScriptArguments, TrainingArguments)).parse_args_into_dataclasses()
    model = AutoModelForCausalLM.from_pretrained(script_args.model_name_or_path)
    if script_args.token_accuracy:
        settings |= {"compute_metrics": token_accuracy, "preprocess_logits_for_metrics": predicted_tokens}
    trainer = Trainer(
        model,
        training_args,
        train_dataset=Texts(24, seed=0),
        eval_dataset=Texts(11, seed=1),
        data_collator=collate,
        **settings,
    )
    trainer.train()
    trainer.save_model()

    accelerator = trainer.accelerator
    log, engine = trainer.state.log_history, trainer.model_wrapped
    save_facts(f"{training_args.output_dir}/facts.pt", engine, accelerator.distributed_type.value, log=log)
    leave()


if __name__ == "__main__":
    main()
