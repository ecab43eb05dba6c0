"""What can be known about the folders of a run before anything is loaded from them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

PICKLED = "pytorch_model*.bin", "adapter_model.bin"
RECORD = "run.json"
# What a run leaves that a later one would take for its own, or a loader for a part of the later one's.
_LEFT = "base_model", "checkpoint-*", "*.safetensors", "*.safetensors.index.json", "adapter_config.json", "config.json"


def require_input(flag: str, name: str) -> None:
    """Refuses a folder that does not exist, and weights that are pickled; a hub id is looked up by who loads it.

    The libraries take a path that does not exist for a hub id, and complain about its form or about the network.
    """
    folder = Path(name)
    looks_like_a_path = name.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") > 1
    if looks_like_a_path and not folder.exists():
        raise ValueError(
            f"{flag} {name}: there is no such folder (looked for {folder.absolute()}). Give a folder that exists, or a hub id"
        )
    pickled = sorted(path.name for pattern in PICKLED for path in folder.glob(pattern))
    if pickled and not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"{flag} {name}: its weights are pickled ({', '.join(pickled)}), and loading a pickle can run any code. Only "
            "safetensors are loaded: save the model anew with a current save_pretrained, or take a copy with *.safetensors"
        )


def require_output(flag: str, name: str) -> None:
    """Refuses a folder that cannot be written to, before hours of training whose result could not be saved."""
    try:
        os.makedirs(name, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=name, prefix=".writable-") as probe:
            probe.write(b"x" * 4096)
            probe.flush()
    except OSError as error:
        raise ValueError(
            f"{flag} {name}: cannot write there ({error.strerror}). Give a folder that this user may write to, on a disk "
            "with room"
        ) from error


def describe_run(model: str, configuration: dict[str, Any], seed: int, mode: str) -> dict[str, Any]:
    """What makes a run another one, as JSON types. `mode`: "full", "lora" or "qlora"."""
    fields = {
        name: value for name, value in configuration.items() if name not in ("transformers_version", "_name_or_path")
    }
    text = json.dumps(fields, sort_keys=True, default=str)
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return {"model": model, "configuration": digest, "seed": seed, "mode": mode}


def claim_output(name: str, run: dict[str, Any], *, overwrite: bool, resumes: bool, writes: bool) -> None:
    """Makes an output folder this run's: records what it is, or refuses the folder of another run.

    A second run there would load the first one's base model in place of its own, and leave its weights beside the other's.
    One that starts anew beside complete checkpoints, with other data, say, would later be continued from those.

    Args:
        name: the output folder.
        run: see `describe_run`.
        overwrite: remove what another run left.
        resumes: whether a checkpoint in the folder is to be continued; it may have been made without a record.
        writes: whether this process is the one that writes.

    Raises:
        ValueError: the folder is another run's; the message says in what they differ.
    """
    folder = Path(name)
    left = sorted({path for pattern in _LEFT for path in folder.glob(pattern)})
    if overwrite and writes:
        for path in left:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    elif left and not overwrite:
        _require_same(name, run, folder / RECORD, left, resumes)
        _require_no_checkpoint(name, left, resumes)
    if writes:
        (folder / RECORD).write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")


def _require_same(name: str, run: dict[str, Any], record: Path, left: list[Path], resumes: bool) -> None:
    if record.is_file():
        earlier = json.loads(record.read_text(encoding="utf-8"))
        changed = [key for key, value in run.items() if earlier.get(key) != value]
        differing = [f"{key} {earlier.get(key)!r} there, {run[key]!r} now" for key in changed]
    else:
        what = ", ".join(path.name for path in left)
        differing = [] if resumes else [f"it holds {what}, and no {RECORD} that says of what run"]
    if differing:
        raise ValueError(
            f"--output_dir {name} is another run's: {'; '.join(differing)}. Give another --output_dir (OUTPUT_DIR of the run "
            "scripts), or --overwrite_output_dir True to remove what that run left"
        )


def _require_no_checkpoint(name: str, left: list[Path], resumes: bool) -> None:
    from checkpoints import find_problem

    found = [path.name for path in left if path.name.startswith("checkpoint-")] if not resumes else []
    complete = [checkpoint for checkpoint in found if find_problem(Path(name, checkpoint)) is None]
    if complete:
        raise ValueError(
            f"--output_dir {name} holds {', '.join(complete)} of an earlier run, from which this one, if interrupted, "
            "would be continued: continue that run with --resume_from_checkpoint last (RESUME=last of the run scripts), give "
            "another --output_dir (OUTPUT_DIR), or --overwrite_output_dir True to remove what that run left"
        )
