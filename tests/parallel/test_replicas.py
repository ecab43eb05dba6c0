"""What is decided without other processes: refusals, schedulers, slices of a dispatcher, random numbers of a group."""

import copy
from types import SimpleNamespace

import accelerate  # before the integrations, which its own import attaches
import pytest
import torch
from accelerate.scheduler import AcceleratedScheduler
from accelerate.utils import DummyScheduler
from models import build
from transformers.models.phimoe.modeling_phimoe import PhimoeConfig, PhimoeRotaryEmbedding

from ds_minis import convert_to_mini_sequence, sampler_arguments
from ds_minis.config_sources import Request
from ds_minis.config_values import SequenceParallel
from ds_minis.integrations.accelerate_replicas import Replicas
from ds_minis.integrations.data import of_first_ranks, schedules_for_replicas, slice_of_replica, step_for_replicas
from ds_minis.parallel.attention.state import Parallel
from ds_minis.parallel.communication.cut import Cut
from ds_minis.parallel.model.loss import has_standard_loss
from ds_minis.parallel.model.rotary import depends_on_length, noise_of_whole

SETTINGS = {"sequence_parallel": 2, "chunk_size": 5}


def accelerator(processes: int, zero_stage: int | None = None, **sizes) -> SimpleNamespace:
    plugin = None if zero_stage is None else SimpleNamespace(zero_stage=zero_stage)
    config = SimpleNamespace(**{"cp_size": 1, "sp_size": 1, "tp_size": 1} | sizes) if sizes else None
    state = SimpleNamespace(deepspeed_plugin=plugin)
    return SimpleNamespace(num_processes=processes, parallelism_config=config, state=state, _dataloaders=[])


def requested(size: int) -> Replicas:
    from ds_minis import MiniSequenceConfig

    return Replicas(Request(MiniSequenceConfig(sequence_parallel=size), "a file"))


@pytest.mark.parametrize(
    ("sizes", "stage", "words"),
    [
        ({"cp_size": 2}, None, "cp_size=2: torch's context parallelism cuts every batch among cp_size ranks itself"),
        ({"tp_size": 2}, None, "tp_size=2: tensor parallelism gives its tp_size ranks one batch each"),
        ({"sp_size": 4}, 1, "with ZeRO-1, which is configured here, its gradients are 4 times too large"),
        ({"sp_size": 4}, 3, "sp_size=4: DeepSpeed's Ulysses cuts every batch"),
    ],
    ids=str,
)
def test_what_accelerate_would_divide_itself_is_refused_beside_groups(sizes, stage, words):
    with pytest.raises(ValueError) as error:
        requested(2).size(accelerator(8, stage, **sizes))
    assert words in str(error.value) and str(error.value).startswith("a file: ")
    assert ("too large" in str(error.value)) == (stage == 1)
    assert requested(1).size(accelerator(8, stage, **sizes)) == 1


def test_a_size_is_refused_that_does_not_divide_the_processes():
    assert requested(2).size(accelerator(4, dp_size=4)) == 2
    with pytest.raises(ValueError, match="a file: .*: 4 processes cannot be divided into groups of 3; .* 1, 2, 4"):
        requested(3).size(accelerator(4))


def test_the_launchers_number_of_processes_is_enough_to_refuse_a_size(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "5")
    with pytest.raises(ValueError, match="5 processes cannot be divided into groups of 2"):
        convert_to_mini_sequence(build("llama"), SETTINGS)


def test_a_model_that_is_converted_by_hand_tells_its_accelerator():
    model, made = convert_to_mini_sequence(build("llama"), SETTINGS), accelerator(2)
    known = Replicas(None)
    assert known.size(made) == known.decided() == 1
    known.see(made, [build("llama"), model])
    assert known.size(made) == known.decided() == 2
    made._dataloaders.append("a loader")
    known.see(made, [model])  # prepared for these groups
    late = Replicas(None)
    late.size(made)
    with pytest.raises(ValueError, match="a data loader was prepared before this model"):
        late.see(made, [model])


def test_settings_that_are_off_make_no_groups():
    from ds_minis import MiniSequenceConfig

    off = Replicas(Request(MiniSequenceConfig(enabled=False, sequence_parallel=2), "a file"))
    assert off.size(accelerator(2)) == 1 and off.decided() == 1


def test_each_replica_counts_once():
    gathered = torch.arange(12).view(4 * 3, 1)  # 3 rows of each of 4 ranks
    assert of_first_ranks(gathered, 4, 2).flatten().tolist() == [0, 1, 2, 6, 7, 8]


def test_a_dispatcher_gives_all_ranks_of_a_group_one_part():
    def given(data, tensor_slice, process_index=None, num_processes=None):
        return data[tensor_slice]

    data = list(range(8))  # 2 replicas of 2 ranks
    parts = [slice_of_replica(given, 2, data, slice(rank * 4, rank * 4 + 4), rank, 2) for rank in range(4)]
    assert parts == [data[:4], data[:4], data[4:], data[4:]]
    # the beginning of the first batch, which completes the last
    assert {tuple(slice_of_replica(given, 2, data, slice(0, 2), rank, 2)) for rank in range(4)} == {(0, 1)}


@pytest.mark.parametrize("split", [False, True])
def test_a_scheduler_steps_once_for_each_replica(monkeypatch, clean_accelerate_state, split):
    accelerate.Accelerator(cpu=True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 6)
    monkeypatch.setattr("accelerate.scheduler.AcceleratorState", lambda: SimpleNamespace(num_processes=6))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    inner = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.0, total_steps=7)
    scheduler = AcceleratedScheduler(inner, SimpleNamespace(step_was_skipped=False), split_batches=split)
    step_for_replicas([scheduler], 2)
    scheduler.gradient_state._set_sync_gradients(False)
    scheduler.step()  # accumulates: no step
    scheduler.gradient_state._set_sync_gradients(True)
    scheduler.step()
    assert inner.last_epoch == (1 if split else 3)
    if not split:
        for _ in range(3):
            scheduler.step()  # never beyond the end of a schedule
        assert inner.last_epoch == inner.total_steps


def test_a_schedule_of_deepspeeds_is_as_long_as_the_replicas_make_it():
    schedules = [DummyScheduler(None, total_num_steps=13), DummyScheduler(None)]
    with schedules_for_replicas([None, *schedules], 2):
        assert schedules[0].total_num_steps / 4 == 13 / 2 and schedules[1].total_num_steps is None  # 4 processes
    with schedules_for_replicas(schedules, 1):
        assert schedules[0].total_num_steps == 13


def parallel_of(rank: int) -> Parallel:
    made = Parallel(SequenceParallel(2, (2, 1)), None, None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "ds_minis.parallel.attention.state.make_group", lambda size: SimpleNamespace(rank=rank, size=size)
        )
        made.group()
    return made


def drawn(rank: int, with_dropout: bool) -> tuple[list, list]:
    torch.manual_seed(5)
    inside, outside = [], []
    for _ in range(2):
        with parallel_of(rank).own_random_numbers(torch.device("cpu")):
            inside.append(torch.rand(2).tolist() if with_dropout else None)
        outside.append(torch.rand(2).tolist())
    return inside, outside


def test_ranks_draw_their_own_numbers_in_the_decoder_and_the_same_around_it():
    (inside, outside), (other_inside, other_outside) = drawn(0, True), drawn(1, True)
    assert outside == other_outside and outside[0] != outside[1]
    assert not any(one in other_inside for one in inside) and inside[0] != inside[1]


def test_a_decoder_without_dropout_leaves_the_order_of_the_next_epoch_alone():
    torch.manual_seed(5)
    alone = [torch.rand(2).tolist() for _ in range(2)]
    assert drawn(0, False)[1] == alone


def test_two_passes_in_a_row_do_not_draw_the_same_numbers():
    torch.manual_seed(5)
    found = []
    for _ in range(2):
        with parallel_of(0).own_random_numbers(torch.device("cpu")):
            found.append(torch.rand(1).item())
    assert found[0] != found[1]


def test_a_copy_of_a_model_makes_groups_of_its_own(monkeypatch):
    def make_group(size: int, stride: int = 1) -> SimpleNamespace:
        groups.append(SimpleNamespace(rank=0, size=size, stride=stride))
        return groups[-1]

    groups = []
    monkeypatch.setattr("ds_minis.parallel.attention.state.make_group", make_group)
    made = parallel_of(1)
    grid = made.grid()
    copied = copy.deepcopy(made)
    assert len(groups) == 2 and copied.settings == made.settings
    assert copied.group() is groups[2] and all(a is b for a, b in zip(copied.grid(), groups[3:], strict=True))
    assert made.group().rank == 1 and made.grid() is grid


def test_embeddings_that_depend_on_the_length_are_found():
    scaling = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    found = [depends_on_length(m) for m in build("llama", rope_parameters=scaling).modules()]
    assert sum(found) == 1 and not any(depends_on_length(m) for m in build("llama").modules())
    assert depends_on_length(PhimoeRotaryEmbedding(PhimoeConfig()))


def test_noise_of_embeddings_is_that_of_the_whole_length():
    model = build("llama")
    embeddings = model.get_input_embeddings()
    embeddings.neftune_noise_alpha = 6.0
    with noise_of_whole(model.model, Cut(36, 2, 1)):
        assert embeddings.neftune_noise_alpha / 18**0.5 == pytest.approx(6.0 / 36**0.5)
    assert embeddings.neftune_noise_alpha == 6.0


def test_a_forward_that_replaced_the_models_has_a_loss_of_its_own():
    model = build("llama")
    assert has_standard_loss(model)
    model.forward = lambda *args, **kwargs: None
    assert not has_standard_loss(model)


@pytest.mark.parametrize("wrong", [0, True, "2", None])
def test_arguments_of_a_sampler_need_a_size_or_a_converted_model(wrong):
    with pytest.raises(ValueError, match="a converted model or a number of ranks from 1 is allowed"):
        sampler_arguments(wrong)
    assert sampler_arguments(1) == {"num_replicas": 1, "rank": 0}
    with pytest.raises(ValueError, match="sampler_arguments: sequence_parallel: 1 processes cannot be divided"):
        sampler_arguments(2)


@pytest.mark.parametrize("rank", range(6))
def test_a_sampler_reads_the_data_of_its_ranks_group(monkeypatch, rank):
    for name, value in (("is_initialized", True), ("get_world_size", 6), ("get_rank", rank)):
        monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
    assert sampler_arguments(3) == {"num_replicas": 2, "rank": [0, 0, 0, 1, 1, 1][rank]}


def test_accelerators_that_were_made_before_share_nothing():
    from ds_minis.integrations.accelerate import models_of

    first, second = (object.__new__(accelerate.Accelerator) for _ in range(2))
    assert models_of(first) is models_of(first) is not models_of(second)
