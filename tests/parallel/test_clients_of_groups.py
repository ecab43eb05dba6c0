"""Programs of users under sequence parallelism: what a group of ranks logs is what one process logs that has no group.

Each start of client_worker.py runs several programs. Two ranks in one group are compared with one process, four in two
groups with two: losses, norms, learning rates, steps, epochs, tokens seen, evaluations of every sample, weights at the end.
"""

import subprocess
from pathlib import Path

import pytest
import torch
from models import assert_same_tensors
from support import warm

pytestmark = pytest.mark.engine
WORKER = Path(__file__).parent / "client_worker.py"
PROGRAMS = ["loop", "trainer", "sft", "packed", "zero2"]
OTHERS = ["orders", "refused"]
SHUFFLED = [
    "as it is", "no seedable sampler", "split batches", "split and dispatched", "dispatched",
    "batches that are not made even", "by length", "balanced", "workers",
]  # fmt: skip
ORDERS = [*SHUFFLED, "a stream", "a stream that all ranks read", "a stream of datasets"]
OF_TIME = ("runtime", "per_second")
OF_THE_CALLBACK = {
    "peak_memory_gib",
    "tokens_per_second",
    "mfu",
}  # MiniSequenceCallback logs them, a run without it does not


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """A function that starts programs in a number of processes, once, and gives their results."""
    folder, known = tmp_path_factory.mktemp("groups"), {}

    def start(processes: int, size: int, *programs: str) -> dict:
        output = folder / f"{processes}-{size}" / "results.pt"
        if output not in known:
            output.parent.mkdir()
            command = ["torchrun", "--standalone", "--nproc_per_node", str(processes), str(WORKER), str(output)]
            environment = warm.environment() | {"CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}
            environment["PYTHONPATH"] = str(WORKER.parents[2])
            done = subprocess.run(
                [*command, str(size), *programs], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                text=True, timeout=300,
            )  # fmt: skip
            assert done.returncode == 0, done.stdout[-6000:]
            known[output] = torch.load(output)
        return known[output]

    return start


def assert_same_logs(log: list, expected: list) -> None:
    for entry, other in zip(log, expected, strict=True):
        assert entry.keys() - OF_THE_CALLBACK == other.keys() - OF_THE_CALLBACK
        for key in [key for key in other.keys() - OF_THE_CALLBACK if not any(word in key for word in OF_TIME)]:
            rel = 1e-5 if isinstance(other[key], float) else 0
            assert entry[key] == pytest.approx(other[key], rel=rel, abs=0), (key, other)


def assert_ran(found: dict, program: str, processes: int) -> None:
    """In the engine that was asked for, in so many processes."""
    engine, stage = ("DeepSpeedEngine", 2) if program == "zero2" else ("DistributedDataParallel", None)
    assert found["ran"] == [engine, processes, stage]


def assert_same_results(of_groups: dict, expected: dict) -> None:
    assert of_groups["facts"] == expected["facts"]
    if "logs" in expected:
        assert torch.tensor(of_groups["logs"]).allclose(torch.tensor(expected["logs"]), rtol=1e-5, atol=1e-9)
        assert len({tuple(row) for row in expected["logs"]}) == len(expected["logs"])
    else:
        assert_same_logs(of_groups["log"], expected["log"])
        assert {"eval_loss", "grad_norm", "learning_rate", "total_flos"} <= set().union(*expected["log"])
    assert_same_tensors(of_groups["weights"], expected["weights"])


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_group_of_two_ranks_trains_as_one_process(started, program):
    of_groups, alone = started(2, 2, *PROGRAMS, *OTHERS), started(1, 1, *PROGRAMS, "orders")
    assert_ran(of_groups[program], program, 2)
    assert_ran(alone[program], program, 1)
    assert_same_results(of_groups[program], alone[program])


@pytest.mark.parametrize("program", ["loop", "trainer"])
def test_two_groups_of_two_ranks_train_as_two_processes(started, program):
    of_groups, two = started(4, 2, "loop", "trainer"), started(2, 1, "loop", "trainer")
    assert_ran(of_groups[program], program, 4)
    assert_ran(two[program], program, 2)
    assert_same_results(of_groups[program], two[program])


@pytest.mark.parametrize("processes", [2, 4])
def test_a_training_of_groups_resumes_where_it_was(started, processes):
    programs = [*PROGRAMS, *OTHERS] if processes == 2 else ["loop", "trainer"]
    whole = started(processes, 2, *programs)["trainer"]
    resumed = whole["resumed"]
    assert_ran(resumed, "trainer", processes)
    training = [entry for entry in whole["log"] if "grad_norm" in entry]
    assert_same_logs([entry for entry in resumed["log"] if "grad_norm" in entry], training)
    assert_same_tensors(resumed["weights"], whole["weights"])


def joined(batches: list[list]) -> list:
    return [value for batch in batches for value in batch]


@pytest.mark.parametrize("processes", [2, 4])
def test_every_sample_is_evaluated_once_and_in_order(started, processes):
    programs = [*PROGRAMS, *OTHERS] if processes == 2 else ["loop", "trainer"]
    found = started(processes, 2, *programs)
    labels = [13, 19, 25, 42, 11, 28, 34]
    each = [entry["eval_each"] for entry in found["trainer"]["log"] if "eval_each" in entry]
    assert each == [labels] * 2
    facts = found["loop"]["facts"]
    assert joined(facts["labels"]) == labels and len(joined(facts["objects"])) == len(labels)
    batch = len(facts["streams"][0][0])
    assert [joined(stream) for stream in facts["streams"]] == [list(range(11)), list(range(batch, 11))]


@pytest.mark.parametrize("name", ORDERS)
def test_all_ranks_of_a_group_are_given_what_one_process_is_given(started, name):
    found, alone = started(2, 2, *PROGRAMS, *OTHERS)["orders"][name], started(1, 1, *PROGRAMS, "orders")["orders"][name]
    assert found == alone * 2
    if name in SHUFFLED:
        assert alone[0][0] != alone[0][1]
    assert len(alone[0][2]) == len(alone[0][0]) - 2


REFUSED = {
    "a size that does not divide": "ValueError: MiniSequencePlugin: sequence_parallel: 2 processes cannot be divided into "
    "groups of 3; allowed with 2 processes: 1, 2",
    "a size that does not divide, in code": "ValueError: convert_to_mini_sequence: sequence_parallel: 2 processes cannot be",
    "a loader before its model": "sequence_parallel=2: a data loader was prepared before this model, and gives each rank",
    "batches of its own": "DistributedSampler(data, **ds_minis.sampler_arguments(model))",
    "deepspeed": "beside DeepSpeed's sequence_parallel_size=2",
    "Ulysses": "beside accelerate's parallelism_config with sp_size=2: DeepSpeed's Ulysses cuts every batch "
    "among sp_size ranks itself, and drops masks, sliding windows too; with ZeRO-2, which is configured here, its gradients "
    "are 2 times too large under the Trainer",
    "a model that is not converted": "ValueError: sampler_arguments: this LlamaForCausalLM was not converted",
    "no size": "ValueError: sampler_arguments: a converted model or a number of ranks from 1 is allowed, got 0",
}


def test_what_cannot_be_is_refused_before_training_with_the_way_out(started):
    messages = started(2, 2, *PROGRAMS, *OTHERS)["refused"]["messages"]
    assert messages.keys() == REFUSED.keys()
    for name, words in REFUSED.items():
        assert words in messages[name], messages[name]
        assert "\n" not in messages[name]


def test_a_sampler_of_ones_own_is_told_replicas(started):
    of_ranks = started(2, 2, *PROGRAMS, *OTHERS)["refused"]["sampler"]
    alone = {"num_replicas": 1, "rank": 0}
    assert of_ranks == [[{"num_replicas": 2, "rank": rank}, alone, alone] for rank in range(2)]
