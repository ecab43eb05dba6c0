"""Hugging Face Trainers of tiny models."""

import torch
from models import VOCAB_SIZE
from transformers import Trainer, TrainingArguments

LENGTH, MICRO_BATCH, STEPS = 17, 2, 3


class Texts(torch.utils.data.Dataset):
    """Sequences whose prompts differ, so that every micro-batch counts another number of labels."""

    def __init__(self, count: int):
        self.input_ids = torch.randint(1, VOCAB_SIZE, (count, LENGTH), generator=torch.Generator().manual_seed(count))

    def __len__(self):
        return len(self.input_ids)

    def __getitem__(self, index: int) -> dict:
        labels = self.input_ids[index].clone()
        labels[: 1 + 3 * index % 13] = -100
        return {"input_ids": self.input_ids[index], "labels": labels}


def trainer_of(model, folder, compute_metrics=None, **settings) -> Trainer:
    trainer = {key: settings.pop(key) for key in ("callbacks", "model_init") if key in settings}
    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=MICRO_BATCH,
        per_device_eval_batch_size=MICRO_BATCH,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        **settings,
    )
    return Trainer(
        model, arguments, train_dataset=Texts(12), eval_dataset=Texts(5), compute_metrics=compute_metrics, **trainer
    )
