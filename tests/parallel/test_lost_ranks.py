"""A rank that is killed or stops answering ends the step on the others of its group, with an error that names ranks.

As was seen: gloo's error has an address and a port, and no rank.
"""

import json
import re
import subprocess
from pathlib import Path

import pytest
import torch
from support import warm

from ds_minis.parallel.communication.collectives import naming_ranks

pytestmark = pytest.mark.engine
WORKER = Path(__file__).parent / "lost_rank_worker.py"
CASES = [
    ["gather", "SIGKILL", "forward"],
    ["ring", "SIGKILL", "backward"],
    ["ulysses", "SIGKILL", "forward"],
    ["ring", "SIGSTOP", "forward"],
]
TIMEOUT_SECONDS = 6  # of the worker's process group


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[list[dict]]:
    folder = tmp_path_factory.mktemp("lost")
    (folder / "cases.json").write_text(json.dumps(CASES))
    paths = f"{WORKER.parents[2]}:{WORKER.parents[1]}"
    done = subprocess.run(
        [warm.python(), str(WORKER), str(folder / "cases.json"), str(folder)],
        env=warm.environment() | {"PYTHONPATH": paths}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:]
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("number", range(len(CASES)), ids=[" ".join(case) for case in CASES])
def test_the_others_end_in_time_and_say_whom_they_waited_for(results, number):
    mode, signal, _ = CASES[number]
    for rank, found in enumerate(results[number]):
        assert found["message"].startswith("RuntimeError: "), found
        told = re.search(r"sequence_parallel: rank (\d) was exchanging tokens with ranks ([\d, ]+), ", found["message"])
        assert told, found["message"]
        neighbours = {(rank + 1) % 4, (rank - 1) % 4} if mode == "ring" else {0, 1, 2, 3} - {rank}
        assert told[1] == str(rank) and told[2] == ", ".join(map(str, sorted(neighbours)))
        assert found["seconds"] < TIMEOUT_SECONDS * (1 if signal == "SIGKILL" else 4)


def test_an_error_of_ones_own_is_not_blamed_on_other_ranks():
    for kind in (ValueError, torch.OutOfMemoryError):
        with pytest.raises(kind) as raised, naming_ranks([0, 1]):
            raise kind("mine")
        assert not hasattr(raised.value, "__notes__")
