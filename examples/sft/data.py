"""Loads the training and evaluation splits."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from arguments import DataArguments
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError

_BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
_DEFAULT_SPLITS = DataArguments.__dataclass_fields__["splits"].default


_KINDS = ("messages",), ("conversations",), ("prompt", "completion"), ("input_ids",)


def load_splits(args: DataArguments, text_field: str = "text") -> tuple[Dataset, Dataset | None]:
    """The training split and, if a second one is named, the evaluation split.

    Raises:
        ValueError: a split does not exist (the message lists those that do), has no rows, or none that can be trained on.
    """
    splits = _load(args)
    for split in filter(lambda split: split is not None, splits):
        _require_rows(args.dataset_name, split, text_field)
    return splits


def _load(args: DataArguments) -> tuple[Dataset, Dataset | None]:
    names = [name.strip() for name in args.splits.split(",") if name.strip()]
    if not 1 <= len(names) <= 2:
        raise ValueError(f"--splits: one or two split names are allowed, got {args.splits!r}")
    if Path(args.dataset_name).is_file():
        return _load_file(args, names)
    _require_no_missing_file(args.dataset_name)
    saved = Path(args.dataset_name, "dataset_dict.json").is_file()
    with _data_are_named(args.dataset_name):
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
    with _data_are_named(args.dataset_name):
        return load_dataset(builder, data_files=str(path), split="train"), None


@contextlib.contextmanager
def _data_are_named(name: str) -> Iterator[None]:
    """Says of which data an error is, and what it is: `datasets` keeps that for the cause of its own."""
    try:
        yield
    except StopIteration:
        raise ValueError(f"--dataset_name {name}: a file of it has no rows") from None
    except (IndexError, ValueError) as error:
        # IndexError: a split that was saved without rows. ValueError: a file with the names of columns alone.
        if isinstance(error, ValueError) and "no data" not in str(error):
            raise
        raise ValueError(f"--dataset_name {name}: a split of it has no rows ({error})") from error
    except (DatasetGenerationError, ConnectionError) as error:
        raise ValueError(f"--dataset_name {name}: {error.__cause__ or error}") from error


def _require_rows(name: str, dataset: Dataset, text_field: str) -> None:
    """Refuses what TRL would stop at with the name of a column alone."""
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError(f"--dataset_name {name}: a split of it has no rows")
    kinds = (*_KINDS, (text_field,))
    if not any(all(column in first for column in kind) for kind in kinds):
        raise ValueError(
            f"--dataset_name {name}: rows with {', or '.join(' and '.join(kind) for kind in kinds)} are allowed, got "
            f"{', '.join(first)} (a text under another name: --dataset_text_field)"
        )
    talk = first.get("messages")
    if talk is not None and not _is_talk(talk):
        raise ValueError(
            f'--dataset_name {name}: messages: a list of {{"role": ..., "content": ...}} is allowed, got {talk!r:.80}'
        )


def _is_talk(talk: Any) -> bool:
    return isinstance(talk, list) and all(isinstance(one, dict) and {"role", "content"} <= one.keys() for one in talk)
