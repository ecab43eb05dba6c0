"""Loads the training and evaluation splits."""

from __future__ import annotations

import difflib
from pathlib import Path

from arguments import DataArguments
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

_BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
_DEFAULT_SPLITS = DataArguments.__dataclass_fields__["splits"].default


def load_splits(args: DataArguments) -> tuple[Dataset, Dataset | None]:
    """The training split and, if a second one is named, the evaluation split.

    Raises:
        ValueError: a split does not exist; the message lists those that do.
    """
    names = [name.strip() for name in args.splits.split(",") if name.strip()]
    if not 1 <= len(names) <= 2:
        raise ValueError(f"--splits: one or two split names are allowed, got {args.splits!r}")
    if Path(args.dataset_name).is_file():
        return _load_file(args, names)
    _require_no_missing_file(args.dataset_name)
    saved = Path(args.dataset_name, "dataset_dict.json").is_file()
    dataset: DatasetDict = load_from_disk(args.dataset_name) if saved else load_dataset(args.dataset_name)
    for name in names:
        if name not in dataset:
            raise ValueError(f"--splits: {args.dataset_name} has no split {name!r}; allowed: {', '.join(dataset)}")
    return dataset[names[0]], dataset[names[1]] if len(names) == 2 else None


def _require_no_missing_file(name: str) -> None:
    """Refuses a file that is not there: it would be asked for on the hub, for a minute where there is no network."""
    path = Path(name)
    if path.suffix.lower() in _BUILDERS:
        beside = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, beside, n=1)
        raise ValueError(
            f"--dataset_name {name}: there is no such file (looked for {path.absolute()})"
            + (f"; did you mean {path.with_name(near[0])}?" if near else "")
        )


def _load_file(args: DataArguments, names: list[str]) -> tuple[Dataset, None]:
    """A single file: training data alone."""
    path = Path(args.dataset_name)
    builder = _BUILDERS.get(path.suffix.lower())
    if builder is None:
        raise ValueError(f"--dataset_name {path}: a file that ends in one of {', '.join(_BUILDERS)} is allowed")
    if args.splits != _DEFAULT_SPLITS and names != ["train"]:
        raise ValueError(
            f"--splits {args.splits!r}: {path} is one file, which is the split train; for an evaluation split give a folder "
            "with train.jsonl and test.jsonl"
        )
    return load_dataset(builder, data_files=str(path), split="train"), None
