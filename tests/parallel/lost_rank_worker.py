"""A rank of a group that ends, or stops, in the midst of a step: what the others are told, and when; forked gloo processes.

python lost_rank_worker.py CASES.json OUTPUT_FOLDER

A case is [mode, signal, place]. The last of four ranks sends itself the signal in its second step, between the attentions of
two layers ("forward") or before backward. Writes the messages of the other ranks and the seconds that they waited.
"""

import json
import os
import signal
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from models import batch, build

from ds_minis import convert_to_mini_sequence

RANKS, TIMEOUT_SECONDS = 4, 6


def train(rank: int, mode: str, name: str, place: str, folder: Path) -> None:
    store = dist.FileStore(str(folder / "store"), RANKS)
    wait = timedelta(seconds=TIMEOUT_SECONDS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=wait)
    model = build("llama", attention="sdpa")
    settings = {"chunk_size": 6, "loss_chunk_size": 5, "sequence_parallel": {"size": RANKS, "mode": mode}}
    convert_to_mini_sequence(model, settings)
    model(**batch(37)).loss.backward()

    def leave(*_) -> None:
        if rank == RANKS - 1:
            os.kill(os.getpid(), getattr(signal, name))

    if place == "forward":
        model.model.layers[0].register_forward_hook(leave)
    start = time.monotonic()
    try:
        loss = model(**batch(41)).loss
        leave()
        loss.backward()
        message = "no error"
    except RuntimeError as error:
        message = "".join(traceback.format_exception_only(error))
    result = {"message": message, "seconds": time.monotonic() - start}
    (folder / f"{rank}.json").write_text(json.dumps(result))


def run(case: list[str], folder: Path) -> list[dict]:
    folder.mkdir()
    children = []
    for rank in range(RANKS):
        child = os.fork()
        if child == 0:
            try:
                train(rank, *case, folder)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(0)  # at once: that its connections are closed is what the next rank is told
        children.append(child)
    *others, lost = children
    for child in others:
        os.waitpid(child, 0)
    os.kill(lost, signal.SIGKILL)  # it may be stopped
    os.waitpid(lost, 0)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(RANKS - 1)]


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[2])
    cases = json.loads(Path(sys.argv[1]).read_text())
    results = [run(case, folder / str(number)) for number, case in enumerate(cases)]
    (folder / "results.json").write_text(json.dumps(results))
