"""Which `checkpoint-N` folders a run can be continued from.

The HF Trainer writes a checkpoint in place, in this order: weights, configuration and tokenizer (rank 0); optimizer and
scheduler (rank 0; under ZeRO and sharded FSDP a file of every rank); the random state of every rank; and, by rank 0,
`trainer_state.json`, after the weights and the optimizer of all ranks but without waiting for their random states. So a
folder without it is one that somebody was interrupted in. With it, every file must be there and whole, as a crash of the
machine may cut any of them short: the Trainer itself continues without a word when an optimizer or a random state is missing.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed
from accelerate import DistributedType
from arguments import fsdp_launched
from transformers import TrainerState
from transformers.utils import logging
from trl import SFTConfig

logger = logging.get_logger("train")
STATE, SAVED_BY = "trainer_state.json", "saved_by"
_FLAG = "--resume_from_checkpoint"
DEEPSPEED, FSDP, PLAIN = "DeepSpeed", "FSDP", "plain data parallelism (or one process)"
_WEIGHTS = (
    "model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors", "*/adapter_model.safetensors",
    "pytorch_model.bin", "pytorch_model.bin.index.json",
)  # fmt: skip


def asks_to_resume(args: SFTConfig) -> bool:
    """Whether `--resume_from_checkpoint` was given, as anything but false."""
    return args.resume_from_checkpoint not in (None, False, "False", "false")


def checkpoint_to_resume(args: SFTConfig) -> str | None:
    """The folder that `--resume_from_checkpoint` means, None if it was not given; the same one on every rank.

    Raises:
        ValueError: it is not complete, or, for `last`, there is none that is (`last_if_any` then starts anew).
    """
    if not asks_to_resume(args):
        return None
    wanted = args.resume_from_checkpoint
    complete, passed_over = _complete_everywhere(args)
    there = f"Complete in {args.output_dir}: {', '.join(complete) or 'none'}"
    if wanted not in (True, "True", "true", "last", "last_if_any"):
        if not os.path.isdir(wanted):
            raise ValueError(f"{_FLAG} {wanted}: there is no such folder; give one, or last for the newest. {there}")
        broken = find_problem(Path(wanted))
        if broken:
            raise ValueError(
                f"{_FLAG} {wanted}: this checkpoint is damaged, or was never written to its end: {broken}. {there}. Name "
                f"another folder, or `last` for the newest complete one, or leave the flag out to start anew"
            )
        _require_engine(Path(wanted), args)
        return wanted
    newer = [name for name in passed_over if not complete or _step(name) > _step(complete[0])]
    why = [f"{name} is not complete ({passed_over[name]})" for name in newer]
    if not complete and wanted == "last_if_any":
        for reason in why if args.process_index == 0 else ():
            logger.warning(f"{_FLAG} {wanted}: {reason}; starting anew")
        return None
    if not complete:
        raise ValueError(
            f"{_FLAG} {wanted}: there is no complete checkpoint-* in {args.output_dir}"
            + "".join(f"; {reason}" for reason in why)
            + ". Leave the flag out to start anew"
        )
    for reason in why if args.process_index == 0 else ():
        logger.warning(f"{_FLAG} {wanted}: {reason}; passing it over")
    if args.process_index == 0:
        logger.warning(f"{_FLAG} {wanted}: continuing from {complete[0]}")
    _require_engine(Path(args.output_dir, complete[0]), args)
    return os.path.join(args.output_dir, complete[0])


def _require_engine(folder: Path, args: SFTConfig) -> None:
    """Refuses a checkpoint of another engine, whose optimizer and schedule the Trainer would begin anew without a word.

    Raises:
        ValueError: it was saved under another engine, or by DeepSpeed on another number of ranks.
    """
    saved, runs = _engine_of(folder), _engine_of_run(args)
    way_out = "Continue as it was begun, or start anew in another --output_dir (OUTPUT_DIR of the run scripts)"
    if saved != runs:
        raise ValueError(f"{_FLAG}: {folder} was saved under {saved}, and this run is under {runs}. {way_out}")
    ranks = len(_ranks(folder, json.loads((folder / STATE).read_text(encoding="utf-8"))))
    if saved == DEEPSPEED and not args.save_on_each_node and ranks != args.world_size:
        raise ValueError(
            f"{_FLAG}: {folder} was saved by {ranks} processes, whose optimizer DeepSpeed cannot divide among "
            f"{args.world_size}. {way_out}"
        )


def _engine_of(folder: Path) -> str:
    if (folder / "latest").is_file():
        return DEEPSPEED
    return FSDP if any(folder.glob("pytorch_model_fsdp*")) else PLAIN


def _engine_of_run(args: SFTConfig) -> str:
    if args.distributed_state.distributed_type == DistributedType.DEEPSPEED:
        return DEEPSPEED
    return FSDP if fsdp_launched() else PLAIN


@contextlib.contextmanager
def writing(folder: Path, state: TrainerState, args: SFTConfig) -> Iterator[None]:
    """Inside, the Trainer writes a checkpoint.

    What an earlier run left in the folder is removed first, as it must not complete what is written now. The ranks that
    write are noted in what becomes `trainer_state.json`. An error says what is left and what to do: torch's own words for
    a full disk are "unexpected pos".
    """
    if args.should_save and folder.is_dir():
        shutil.rmtree(folder)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    ranks = [args.process_index] if args.save_on_each_node else list(range(args.world_size))
    state.stateful_callbacks[SAVED_BY] = {"args": {}, "attributes": {"ranks": ranks}}
    try:
        yield
    except Exception as error:
        error.add_note(
            f"{folder} was not written to its end ({shutil.disk_usage(args.output_dir).free / 2**20:,.0f} MiB are free on "
            f"its disk) and will not be continued from; {_FLAG} last takes the newest checkpoint that is complete"
        )
        raise


def find_problem(folder: Path) -> str | None:
    """The first file that is missing or damaged, and how; None if the checkpoint is complete."""
    return next(_problems(folder), None)


def _problems(folder: Path) -> Iterator[str]:
    if not (folder / STATE).is_file():
        yield f"{STATE}, which is written last, is missing"
        return
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        damage = _damage(file)
        if damage:
            yield f"{file.relative_to(folder)} {damage}"
    state = json.loads((folder / STATE).read_text(encoding="utf-8"))  # not reached when it is no JSON
    ranks = _ranks(folder, state)
    if ranks == [0] and not (folder / "rng_state_0.pth").is_file():
        expected = ["rng_state.pth"]
    else:
        expected = [f"rng_state_{rank}.pth" for rank in ranks]
    if (folder / "latest").is_file() or any(folder.glob("global_step*")):
        expected += _deepspeed_files(folder, ranks)
    elif any(folder.glob("pytorch_model_fsdp*")):
        expected += ["scheduler.pt", *_fsdp_files(folder, "pytorch_model_fsdp"), *_fsdp_files(folder, "optimizer")]
    else:
        expected += ["optimizer.pt", "scheduler.pt"]
        if not any(any(folder.glob(pattern)) for pattern in _WEIGHTS):
            expected.append("model.safetensors")
    for index in folder.glob("*.index.json"):
        expected += sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    for name in expected:
        if not (folder / name).is_file():
            yield f"{name} is missing"


def _damage(file: Path) -> str | None:
    """Why the file cannot be what was written to its end; None if it may be. No content is loaded."""
    size = file.stat().st_size
    kind = file.suffix or file.name
    if kind not in (".safetensors", ".pt", ".pth", ".bin", ".distcp", ".json", ".metadata", "latest"):
        return None
    if size == 0:
        return "is empty"
    if kind == ".json":
        try:
            return None if isinstance(json.loads(file.read_bytes()), dict) else "holds no mapping"
        except ValueError:
            return "is not whole (no valid JSON)"
    with file.open("rb") as stream:
        if kind == ".safetensors":
            return _safetensors_damage(stream, size)
        head, tail = stream.read(2), b""
        stream.seek(max(0, size - 22))
        tail = stream.read()
    if kind == ".metadata":
        return None if tail.endswith(b".") else "is cut short"
    # What torch.save writes is a zip archive, whose directory stands at the end (old files are bare pickles).
    if kind != "latest" and not tail.startswith(b"PK\x05\x06") and not head.startswith(b"\x80"):
        return "is cut short or damaged (no end of archive)"
    return None


def _safetensors_damage(stream: Any, size: int) -> str | None:
    header_size = int.from_bytes(stream.read(8), "little")
    try:
        if 8 + header_size > size:
            raise ValueError
        tensors = json.loads(stream.read(header_size))
        end = max((tensor["data_offsets"][1] for name, tensor in tensors.items() if name != "__metadata__"), default=0)
    except (ValueError, KeyError, TypeError, AttributeError):
        return "has a damaged header"
    expected = 8 + header_size + end
    return None if size == expected else f"has {size} bytes where its header asks for {expected}"


def _ranks(folder: Path, state: dict[str, Any]) -> list[int]:
    """The ranks whose files must be there: as noted by `writing`, else as far as any file's number goes."""
    noted = (state.get("stateful_callbacks") or {}).get(SAVED_BY)
    if noted:
        return noted["attributes"]["ranks"]
    numbers = [re.search(r"(?:rng_state|zero_pp_rank)_(\d+)", path.name) for path in folder.rglob("*.pt*")]
    return list(range(max((int(found[1]) for found in numbers if found), default=0) + 1))


def _deepspeed_files(folder: Path, ranks: list[int]) -> Iterator[str]:
    yield "latest"
    if not (folder / "latest").is_file():
        return
    tag = (folder / "latest").read_text(encoding="utf-8").strip()
    names = [path.name for path in (folder / tag).glob("*_states.pt")]
    if not any(name.endswith("model_states.pt") for name in names):
        yield f"{tag}/mp_rank_00_model_states.pt"
    for name in names:  # of every kind of file that some rank wrote, one of each rank
        for rank in ranks:
            yield f"{tag}/{re.sub('zero_pp_rank_[0-9]+', f'zero_pp_rank_{rank}', name)}"


def _fsdp_files(folder: Path, name: str) -> Iterator[str]:
    whole, sharded = folder / f"{name}.bin", next(folder.glob(f"{name}_*/"), None)
    metadata = sharded / ".metadata" if sharded else None
    if sharded is None or not metadata.is_file():
        yield whole.name if sharded is None else f"{sharded.name}/.metadata"
        return
    # It is a pickle, and stays closed: the names of the files stand in it as they are.
    for part in sorted(set(re.findall(rb"__\d+_\d+\.distcp", metadata.read_bytes()))):
        yield f"{sharded.name}/{part.decode()}"


def _complete_everywhere(args: SFTConfig) -> tuple[list[str], dict[str, str]]:
    """Names of the complete checkpoints, newest first, and of the others with the reason; as all ranks see them."""
    found = {path.name: find_problem(path) for path in Path(args.output_dir).glob("checkpoint-*") if path.is_dir()}
    everyone = [{name: problem for name, problem in found.items() if re.fullmatch(r"checkpoint-\d+", name)}]
    if torch.distributed.is_initialized():
        everyone = everyone * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everyone, everyone[0])
    problems = {}
    for name in sorted(set().union(*everyone), key=_step, reverse=True):
        seen = [of_rank.get(name, "one of the ranks does not see it") for of_rank in everyone]
        problems[name] = next((problem for problem in seen if problem), None)
    return [name for name, p in problems.items() if not p], {name: p for name, p in problems.items() if p}


def _step(name: str) -> int:
    return int(name.rpartition("-")[2])
