"""A fault in a chunk under a real engine, two gloo processes: what can go on does, exactly.

After a fault in forward every engine goes on. After one in backward some cannot, with any model: the gradients of the later
layers are reduced already. There the converted model must do what the unconverted one does, to the word.
"""

import json
from pathlib import Path

import pytest
import torch
from engine_cases import RANKS
from engines import launch
from models import assert_same_tensors
from parity import ENGINE_CLASSES

pytestmark = pytest.mark.engine
DDP, FSDP2 = {"engine": "ddp"}, {"engine": "fsdp2"}
ZERO = [{"zero_stage": stage} for stage in range(4)]
FORWARD = [(engine, "RuntimeError", False, False) for engine in (DDP, FSDP2, *ZERO)]
FORWARD += [(DDP, "OutOfMemoryError", False, False), (ZERO[2], "KeyboardInterrupt", False, False)]
BACKWARD = [(engine, "RuntimeError", True, False) for engine in (ZERO[0], ZERO[1])]
BACKWARD += [(ZERO[1], "KeyboardInterrupt", True, False), (ZERO[1], "OutOfMemoryError", True, False)]
BACKWARD += [(DDP, "RuntimeError", True, True)]  # wrapped in a new DDP after the fault
OWN_WORDS = {
    "ddp": (DDP, "Expected to have finished reduction in the prior iteration"),
    "zero2": (ZERO[2], "has already been reduced"),
    "zero3": (ZERO[3], "AssertionError"),
}
CASES = FORWARD + BACKWARD + [(engine, "RuntimeError", True, False) for engine, _ in OWN_WORDS.values()]
CASES.append((FSDP2, "RuntimeError", True, False))


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, dict]:
    output = tmp_path_factory.mktemp("faults")
    launch(Path(__file__).parents[1] / "fault_worker.py", json.dumps(CASES), str(output))
    return {str(case): torch.load(output / f"{number}.pt") for number, case in enumerate(CASES)}


@pytest.mark.parametrize("case", FORWARD + BACKWARD, ids=str)
def test_the_engine_goes_on_as_if_the_batch_had_not_been_there(results, case):
    converted, clean = results[str(case)]["converted"], results[str(case)]["clean"]
    assert (converted["failed"], clean["failed"]) == (1, 0)
    for result in (converted, clean):
        assert ENGINE_CLASSES[case[0].get("engine", "deepspeed")] in result["engine"] and result["processes"] == RANKS
        assert len(result["losses"]) == 3
    torch.testing.assert_close(torch.tensor(converted["losses"]), torch.tensor(clean["losses"]), rtol=1e-5, atol=0)
    assert_same_tensors(converted["params"], clean["params"])


@pytest.mark.parametrize("name", OWN_WORDS)
def test_an_engine_that_cannot_go_on_says_what_it_says_without_conversion(results, name):
    engine, words = OWN_WORDS[name]
    result = results[str((engine, "RuntimeError", True, False))]
    assert result["converted"]["failed"] == result["plain"]["failed"] == 1
    assert result["converted"]["cannot"] == result["plain"]["cannot"] and words in result["converted"]["cannot"]


def test_fsdp2_keeps_what_it_had_reduced_with_or_without_conversion(results):
    """torch's own: gradients that were on their way join those of the next batch."""
    result = results[str((FSDP2, "RuntimeError", True, False))]
    assert_same_tensors(result["converted"]["params"], result["plain"]["params"])
