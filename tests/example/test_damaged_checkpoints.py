"""Damaged checkpoints of real runs: what `--resume_from_checkpoint` takes, what it refuses, and what it says."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import sft_runs
from accelerate import DistributedType
from transformers import TrainerState

pytestmark = pytest.mark.engine
ONE, DDP, ZERO2 = "one", "ddp", "zero2"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The output folder of a run of 4 steps with checkpoints at 2 and 4, by launcher."""
    folders = {}

    def folder(launcher: str) -> Path:
        if launcher not in folders:
            output = tmp_path_factory.mktemp(launcher)
            status, printed = sft_runs.run(launcher, output)
            assert status == 0, printed[-5000:]
            folders[launcher] = output
        return folders[launcher]

    return folder


@pytest.fixture
def checkpoints(monkeypatch):
    monkeypatch.syspath_prepend(sft_runs.EXAMPLE)
    import checkpoints

    return checkpoints


def arguments(output: Path, wanted: str, world_size: int = 1, launcher: str = ONE):
    engine = DistributedType.DEEPSPEED if launcher == ZERO2 else DistributedType.NO
    return SimpleNamespace(
        output_dir=str(output), resume_from_checkpoint=wanted, process_index=0,
        world_size=2 if launcher == ZERO2 else world_size, should_save=True, save_on_each_node=False,
        distributed_state=SimpleNamespace(distributed_type=engine),
    )  # fmt: skip


def cut(path: Path, keep: float = 0.9) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])


def drop(path: Path) -> None:
    path.unlink()


def empty(path: Path) -> None:
    path.write_bytes(b"")


def garble(path: Path) -> None:
    path.write_bytes(b"\0" * path.stat().st_size)


DAMAGES = [
    (ONE, "trainer_state.json", drop, "missing"),
    (ONE, "trainer_state.json", cut, "no valid JSON"),
    (ONE, "trainer_state.json", empty, "empty"),
    (ONE, "adapter_model.safetensors", cut, "header asks for"),
    (ONE, "adapter_model.safetensors", garble, "header"),
    (ONE, "adapter_model.safetensors", empty, "empty"),
    (ONE, "optimizer.pt", cut, "cut short"),
    (ONE, "optimizer.pt", drop, "missing"),
    (ONE, "scheduler.pt", drop, "missing"),
    (ONE, "rng_state.pth", drop, "missing"),
    (ONE, "rng_state.pth", garble, "damaged"),
    (DDP, "rng_state_1.pth", drop, "missing"),
    (DDP, "rng_state_0.pth", drop, "missing"),
    (DDP, "rng_state_1.pth", cut, "cut short"),
    (ZERO2, "latest", drop, "missing"),
    (ZERO2, "global_step4/zero_pp_rank_1_mp_rank_00_optim_states.pt", drop, "missing"),
    (ZERO2, "global_step4/zero_pp_rank_0_mp_rank_00_optim_states.pt", cut, "cut short"),
    (ZERO2, "global_step4/mp_rank_00_model_states.pt", drop, "missing"),
    (ZERO2, "rng_state_1.pth", drop, "missing"),
]


@pytest.mark.parametrize(("launcher", "name", "damage", "word"), DAMAGES)
def test_a_damaged_checkpoint_is_named_and_passed_over(
    trained, checkpoints, tmp_path, caplog, launcher, name, damage, word
):
    output = tmp_path / "output"
    shutil.copytree(trained(launcher), output)
    newest = output / "checkpoint-4"
    assert checkpoints.checkpoint_to_resume(arguments(output, "last", launcher=launcher)) == str(newest)
    assert checkpoints.checkpoint_to_resume(arguments(output, str(newest), launcher=launcher)) == str(newest)
    damage(newest / name)

    caplog.clear()
    assert checkpoints.checkpoint_to_resume(arguments(output, "last", launcher=launcher)) == str(
        output / "checkpoint-2"
    )
    said = caplog.messages[0]
    assert "checkpoint-4" in said and name in said and word in said and "passing it over" in said
    with pytest.raises(ValueError) as error:
        checkpoints.checkpoint_to_resume(arguments(output, str(newest), launcher=launcher))
    for part in (str(newest), name, word, "Complete in", "checkpoint-2", "`last`"):
        assert part in str(error.value)
    with pytest.raises(ValueError, match="no complete checkpoint-.*checkpoint-4 is not complete.*start anew"):
        shutil.rmtree(output / "checkpoint-2")
        checkpoints.checkpoint_to_resume(arguments(output, "last", launcher=launcher))


def test_without_a_note_of_the_ranks_the_files_tell(trained, checkpoints, tmp_path):
    """A checkpoint of another program: rank 1 is known from ZeRO's file where its random state is missing."""
    folder = tmp_path / "checkpoint-4"
    shutil.copytree(trained(ZERO2) / "checkpoint-4", folder)
    state = json.loads((folder / "trainer_state.json").read_text())
    assert state["stateful_callbacks"].pop("saved_by")["attributes"] == {"ranks": [0, 1]}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    assert checkpoints.find_problem(folder) is None
    (folder / "rng_state_1.pth").unlink()
    assert checkpoints.find_problem(folder) == "rng_state_1.pth is missing"


@pytest.mark.parametrize("sharded", [False, True])
def test_checkpoints_of_fsdp(checkpoints, tmp_path, sharded):
    """What torch's own distributed checkpoint writes, and accelerate's names around it."""
    import torch
    import torch.distributed.checkpoint as dcp

    states = {"pytorch_model_fsdp": {"w": torch.ones(50)}, "optimizer": {"m": torch.ones(60)}}
    for name, state in states.items():
        if sharded:
            dcp.save(state, checkpoint_id=tmp_path / f"{name}_0", no_dist=True)
        else:
            torch.save(state, tmp_path / f"{name}.bin")
    for name in ("scheduler.pt", "rng_state_0.pth", "rng_state_1.pth"):
        torch.save({}, tmp_path / name)
    TrainerState(global_step=4).save_to_json(str(tmp_path / "trainer_state.json"))
    assert checkpoints.find_problem(tmp_path) is None

    files = sorted(p for p in tmp_path.rglob("*") if p.is_file() and p.name.endswith((".bin", ".distcp", ".metadata")))
    assert len(files) == (4 if sharded else 2)
    for file in files:
        content = file.read_bytes()
        for damage in (drop, cut, empty):
            damage(file)
            found = checkpoints.find_problem(tmp_path)
            # Without its model's file, a folder does not look like FSDP's any more: the plain Trainer's are missed.
            named = file.relative_to(tmp_path).as_posix()
            assert named in found or (damage is drop and "missing" in found), (named, damage, found)
            file.write_bytes(content)


def test_what_an_earlier_run_left_is_gone_before_a_checkpoint_is_begun(trained, checkpoints, tmp_path):
    folder = tmp_path / "checkpoint-4"
    shutil.copytree(trained(ONE) / "checkpoint-4", folder)
    state = TrainerState(stateful_callbacks={})
    with checkpoints.writing(folder, state, arguments(tmp_path, "last", world_size=3)):
        assert not folder.exists()
    assert state.stateful_callbacks["saved_by"]["attributes"] == {"ranks": [0, 1, 2]}


@pytest.mark.parametrize("launcher", [ONE, ZERO2])
def test_a_run_continues_from_the_newest_complete_checkpoint(trained, tmp_path, launcher):
    output = tmp_path / "output"
    shutil.copytree(trained(launcher), output)
    expected = sft_runs.losses(output)
    (output / "checkpoint-4" / "trainer_state.json").unlink()
    status, printed = sft_runs.run(launcher, output, resume_from_checkpoint="last")
    assert status == 0, printed[-5000:]
    assert printed.count("checkpoint-4 is not complete (trainer_state.json") == 1
    assert "continuing from checkpoint-2" in printed
    assert sft_runs.losses(output) == expected and len(expected) == 4


def test_a_damaged_checkpoint_stops_a_run_before_it_begins(trained, tmp_path):
    output = tmp_path / "output"
    shutil.copytree(trained(ONE), output)
    cut(output / "checkpoint-4" / "optimizer.pt")
    status, printed = sft_runs.run(ONE, output, resume_from_checkpoint=output / "checkpoint-4")
    assert status == 1
    message = printed.strip().splitlines()[-1]
    assert (
        message.startswith("train.py: ValueError: --resume_from_checkpoint") and "optimizer.pt is cut short" in message
    )
    assert "'loss'" not in printed and "Loading weights" not in printed


def test_a_checkpoint_of_another_engine_is_not_continued(trained, checkpoints, tmp_path, monkeypatch):
    """As was seen: DDP took ZeRO-2's weights, and began its optimizer and its schedule anew without a word."""
    engines = {"ds": trained(ZERO2), "plain": trained(ONE)}
    for name, words in (("ds", "DeepSpeed, and this run is under plain"), ("plain", "and this run is under DeepSpeed")):
        output, launcher = engines[name], ONE if name == "ds" else ZERO2
        for wanted in ("last", "last_if_any", str(output / "checkpoint-2")):
            with pytest.raises(ValueError, match=f"was saved under .*{words}"):
                checkpoints.checkpoint_to_resume(arguments(output, wanted, launcher=launcher))
    args = arguments(engines["ds"], "last", launcher=ZERO2)
    args.world_size = 4
    with pytest.raises(ValueError, match="was saved by 2 processes, whose optimizer DeepSpeed cannot divide among 4"):
        checkpoints.checkpoint_to_resume(args)
    args.save_on_each_node = True  # each machine knows its own ranks
    assert checkpoints.checkpoint_to_resume(args).endswith("checkpoint-4")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match=r"plain data parallelism \(or one process\), and this run is under FSDP"):
        checkpoints.checkpoint_to_resume(arguments(engines["plain"], "last"))


def test_missing_checkpoints(checkpoints, tmp_path):
    with pytest.raises(ValueError, match="no such folder.*none"):
        checkpoints.checkpoint_to_resume(arguments(tmp_path, str(tmp_path / "checkpoint-9")))
    with pytest.raises(ValueError, match="no complete checkpoint"):
        checkpoints.checkpoint_to_resume(arguments(tmp_path / "nowhere", "last"))
    assert checkpoints.checkpoint_to_resume(arguments(tmp_path, None)) is None


def whole(folder: Path) -> Path:
    """Files as the Trainer writes them, with the weights in two."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    parts = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for name in parts:
        save_file({name[:11]: torch.ones(3)}, folder / name)
    index = {"metadata": {}, "weight_map": {name[:11]: name for name in parts}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for name in ("optimizer.pt", "scheduler.pt", "rng_state_0.pth"):
        torch.save({}, folder / name)
    TrainerState(global_step=4).save_to_json(str(folder / "trainer_state.json"))
    return folder


def test_a_part_of_the_weights_that_is_missing(checkpoints, tmp_path):
    folder = whole(tmp_path / "checkpoint-4")
    assert checkpoints.find_problem(folder) is None
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert checkpoints.find_problem(folder) == "model-00002-of-00002.safetensors is missing"


def test_a_machine_with_a_folder_of_its_own_notes_its_own_rank(checkpoints, tmp_path):
    args = arguments(tmp_path, "last", world_size=3)
    args.save_on_each_node, args.process_index = True, 2
    state = TrainerState(stateful_callbacks={})
    with checkpoints.writing(tmp_path / "checkpoint-4", state, args):
        pass
    assert state.stateful_callbacks["saved_by"]["attributes"] == {"ranks": [2]}


def test_only_what_every_rank_sees_is_complete(checkpoints, tmp_path, monkeypatch):
    """Two machines, each with a disk of its own; the other one has lost the newest checkpoint."""
    for name in ("checkpoint-2", "checkpoint-4"):
        whole(tmp_path / name)

    def gather(everyone, mine):
        everyone[:] = [mine, {name: problem for name, problem in mine.items() if name != "checkpoint-4"}]

    distributed = checkpoints.torch.distributed
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(distributed, "all_gather_object", gather)
    assert checkpoints.checkpoint_to_resume(arguments(tmp_path, "last", 2)) == str(tmp_path / "checkpoint-2")
