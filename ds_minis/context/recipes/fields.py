"""The fields of a recipe, and what may stand in each by itself."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from ds_minis.config import MiniSequenceConfig
from ds_minis.config_values import MODES, nearest
from ds_minis.context.recipes.estimate import ENGINES, bytes_of

REQUIRED = object()
# Fields that may be lists, with the value where they are left out.
STAGE_FIELDS: dict[str, Any] = {
    "sequence_length": REQUIRED,
    "rope_theta": "auto",
    "train_steps": REQUIRED,
    "batch_accumulation_per_replica": 1,
    "micro_batch_size": 1,
    "sp": 1,
    "tp": 1,
    "dataset_folder": REQUIRED,
    "learning_rate": 2e-5,
    "min_decay_lr": None,
    "lr_warmup_steps": 0,
    "lr_decay_steps": None,
}
FIELDS: dict[str, Any] = {
    "name": REQUIRED,
    "init_weights_path": REQUIRED,
    "tokenizer_path": None,
    "model_config": None,
    "checkpoints_path": REQUIRED,
    "resume_checkpoint_path": None,
    "checkpoint_interval": None,
    "steps_are": "cumulative",
    "optimizer": "resume",
    "rope_base_length": None,
    "rope_base_theta": None,
    "engine": "zero3",
    "sp_mode": "auto",
    "mini_sequence": True,
    "timeout_seconds": 1800,
    "seed": 42,
    "cluster": REQUIRED,
    "training_arguments": {},
}
CLUSTER_FIELDS: dict[str, Any] = {
    "nodes": REQUIRED,
    "gpus_per_node": REQUIRED,
    "memory_per_gpu": None,
    "memory_per_node": None,
    "gres": None,
    "time_limit": "24:00:00",
    "save_before_end_seconds": 3600,
    "sbatch": [],
}
_CHOICES = {"steps_are": ("cumulative", "each"), "optimizer": ("resume", "fresh"), "engine": ENGINES, "sp_mode": MODES}
WHOLE = ("sequence_length", "train_steps", "batch_accumulation_per_replica", "micro_batch_size", "sp", "tp", "nodes")


class RecipeError(ValueError):
    """What is wrong with a recipe: the stage, the field, what it is, and what to do."""


def filled(given: Mapping[str, Any], known: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """What is given, and defaults for the rest.

    Raises:
        RecipeError: a field has no such name, or a required one is missing.
    """
    for name in given:
        if name not in known:
            hint = nearest(name, known) or f"; allowed are {', '.join(known)}"
            raise RecipeError(f"{prefix}{name}: no field has this name{hint}")
    missing = [name for name, value in known.items() if value is REQUIRED and given.get(name) is None]
    if missing:
        raise RecipeError(f"{prefix}{missing[0]}: the recipe has none; add it (examples/long_context/ has recipes)")
    return {name: value if given.get(name) is None else given[name] for name, value in known.items()}


def check_fields(fields: dict[str, Any]) -> dict[str, Any] | None:
    """Checks what is the same for all stages, and turns sizes into bytes; gives the settings of mini-sequences, if there are.

    Raises:
        RecipeError: with the field and the fix.
    """
    for name, allowed in _CHOICES.items():
        if isinstance(fields[name], str) and fields[name] in allowed:
            continue
        if name != "sp_mode" or not isinstance(fields[name], Mapping):
            raise RecipeError(f"{name}: one of {', '.join(allowed)} is allowed, got {fields[name]!r}")
    if fields["tokenizer_path"] not in (None, fields["init_weights_path"]):
        raise RecipeError(
            f"tokenizer_path: {fields['tokenizer_path']!r} is not init_weights_path, and train.py takes the tokenizer from "
            "the model; copy the tokenizer's files into the model's folder, and leave this field out"
        )
    if fields["resume_checkpoint_path"] not in (None, fields["checkpoints_path"]):
        raise RecipeError(
            f"resume_checkpoint_path: {fields['resume_checkpoint_path']!r} is not checkpoints_path, the one folder in which "
            "each stage continues; leave this field out, or give a trained model as init_weights_path"
        )
    if isinstance(fields["mini_sequence"], Mapping) and "sequence_parallel" in fields["mini_sequence"]:
        raise RecipeError("mini_sequence.sequence_parallel: each stage has its own; give sp (and sp_mode) instead")
    try:
        mini_sequence = MiniSequenceConfig.from_value(fields["mini_sequence"], source="mini_sequence")
    except ValueError as error:
        raise RecipeError(str(error)) from None
    for name in ("name", "init_weights_path", "checkpoints_path"):
        text(fields[name], name)
    if not re.fullmatch(r"\w[\w.-]*", fields["name"]):
        raise RecipeError(
            f"name: letters, digits, - and . are allowed (jobs and a folder get it), got {fields['name']!r}"
        )
    for name in ("timeout_seconds", "checkpoint_interval"):
        if fields[name] is not None:
            whole(fields[name], name)
    whole(fields["seed"], "seed", least=0)
    if not isinstance(fields["training_arguments"], Mapping):
        raise RecipeError(
            f"training_arguments: a mapping of train.py's arguments is allowed, got {fields['training_arguments']!r}"
        )
    cluster = fields["cluster"]
    cluster["gpus_per_node"] = whole(cluster["gpus_per_node"], "cluster.gpus_per_node")
    _check_slurm(cluster)
    for name in ("memory_per_gpu", "memory_per_node"):
        try:
            cluster[name] = cluster[name] if cluster[name] is None else bytes_of(cluster[name])
        except ValueError as error:
            raise RecipeError(f"cluster.{name}: {error}") from None
    return mini_sequence.to_dict(defaults=False) if mini_sequence.enabled else None


def _check_slurm(cluster: Mapping[str, Any]) -> None:
    if not isinstance(cluster["time_limit"], str):
        raise RecipeError(
            f'cluster.time_limit: a text such as "24:00:00" is allowed, got {cluster["time_limit"]!r}; put it in quotes: '
            "without them YAML makes a number of it"
        )
    whole(cluster["save_before_end_seconds"], "cluster.save_before_end_seconds")
    if cluster["save_before_end_seconds"] > 65535:
        raise RecipeError(
            f"cluster.save_before_end_seconds: Slurm takes 65535 at most, got {cluster['save_before_end_seconds']}"
        )
    limit = _seconds(cluster["time_limit"])
    if cluster["save_before_end_seconds"] >= limit:
        raise RecipeError(
            f"cluster.save_before_end_seconds: {cluster['save_before_end_seconds']} is not less than cluster.time_limit, "
            f"{cluster['time_limit']} ({limit} s): a stage would be told to stop as it starts; lower it, or raise the limit"
        )
    flags = cluster["sbatch"]
    if not isinstance(flags, list) or any(not isinstance(flag, str) or len(flag.split()) != 1 for flag in flags):
        raise RecipeError(
            f'cluster.sbatch: a list of flags without spaces, such as ["--partition=NAME"], is allowed, got {flags!r}'
        )
    if cluster["gres"] is not None:
        text(cluster["gres"], "cluster.gres")


def _seconds(limit: str) -> float:
    """A time limit as Slurm reads it: minutes, minutes:seconds, hours:minutes:seconds, days-hours[:minutes[:seconds]].

    Raises:
        RecipeError: it is none of these.
    """
    if limit.upper() in ("UNLIMITED", "INFINITE"):
        return math.inf
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", limit.strip())
    if found is None:
        raise RecipeError(
            f'cluster.time_limit: minutes, "hours:minutes:seconds" or "days-hours:minutes:seconds" is allowed, got {limit!r}'
        )
    days, *parts = found.groups()
    numbers = [int(part) for part in parts if part is not None]
    if days is None and len(numbers) < 3:  # minutes come first
        numbers.insert(0, 0)
    hours, minutes, seconds = numbers + [0] * (3 - len(numbers))
    return 86400 * int(days or 0) + 3600 * hours + 60 * minutes + seconds


def by_stage(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One mapping for each stage.

    Raises:
        RecipeError: lists differ in length.
    """
    lengths = values["sequence_length"]
    num_stages = len(lengths) if isinstance(lengths, list) else 1
    if not num_stages:
        raise RecipeError("sequence_length: the list is empty; give a length for each stage")
    for name, value in values.items():
        if isinstance(value, list) and len(value) != num_stages:
            where = f"stage {min(len(value), num_stages)}"
            field = "cluster.nodes" if name == "nodes" else name
            raise RecipeError(
                f"{where}: {field}: {len(value)} values, but sequence_length has {num_stages}; give one for each stage, or "
                "one value for all"
            )
    return [
        {name: value[i] if isinstance(value, list) else value for name, value in values.items()}
        for i in range(num_stages)
    ]


def whole(value: Any, where: str, least: int = 1) -> int:
    """A whole number that is not too small.

    Raises:
        RecipeError: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise RecipeError(f"{where}: a whole number of {least} or more is allowed, got {value!r}")
    return value


def number(value: Any, where: str) -> float:
    """A finite number.

    Raises:
        RecipeError: it is none.
    """
    try:  # YAML takes 2e-5, without a point, for a word
        found = float(value)
    except (TypeError, ValueError):
        found = math.nan
    if not math.isfinite(found):
        raise RecipeError(f"{where}: a number is allowed, got {value!r}")
    return found


def text(value: Any, where: str) -> None:
    """Raises a RecipeError for what is no text."""
    if not isinstance(value, str):
        raise RecipeError(f"{where}: a text is allowed, got {value!r}")
