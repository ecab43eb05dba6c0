"""A needle run on 2 and on 4 processes, in one start; run by test_needle_run.py. python needle_worker.py OUTPUT_FOLDER"""

import json
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from needle_models import maker, model
from support.forked import fork_ranks

from ds_minis.context.needle.model import prepare
from ds_minis.context.needle.run import Ranks, run_needle

CELLS = [(length, depth) for length in (201, 256) for depth in (0.0, 0.6, 1.0)]
ABOUT = {"model": "tiny"}
SIZES = {"shared": 2, "in turn": 1}  # processes that share a sequence, of two
TASK = {"num_samples": 2, "num_distractors": 1}


def results_of(size: int, ranks: Ranks, output: Path | None = None) -> dict:
    """With the seconds taken out, which no two runs share."""
    prepared = prepare(model(), length=400, sequence_parallel=size)
    results = run_needle(
        prepared, maker(**TASK), CELLS, about=ABOUT, ranks=ranks, batch_size=2, output=output
    )  # fmt: skip
    results.pop("seconds")
    for cell in results["cells"]:
        cell.pop("seconds")
    return results


def main(rank: int, world: int, folder: Path) -> None:
    store = dist.FileStore(str(folder / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=60))
    found = {}
    for name, size in SIZES.items():
        found[name] = results_of(size, Ranks.current(size), folder / f"{name}.json")
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(fork_ranks(2, lambda rank: main(rank, 2, Path(sys.argv[1]))))
