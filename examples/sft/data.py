"""Loads the training and evaluation splits."""

from __future__ import annotations

from pathlib import Path

from arguments import DataArguments
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk


def load_splits(args: DataArguments) -> tuple[Dataset, Dataset | None]:
    """The training split and, if a second one is named, the evaluation split.

    Raises:
        ValueError: a split does not exist; the message lists those that do.
    """
    names = [name.strip() for name in args.splits.split(",") if name.strip()]
    if not 1 <= len(names) <= 2:
        raise ValueError(f"--splits: one or two split names are allowed, got {args.splits!r}")
    saved = Path(args.dataset_name, "dataset_dict.json").is_file()
    dataset: DatasetDict = load_from_disk(args.dataset_name) if saved else load_dataset(args.dataset_name)
    for name in names:
        if name not in dataset:
            raise ValueError(f"--splits: {args.dataset_name} has no split {name!r}; allowed: {', '.join(dataset)}")
    return dataset[names[0]], dataset[names[1]] if len(names) == 2 else None
