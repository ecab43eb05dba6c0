"""An output folder belongs to one run: another model, configuration, seed or mode is refused before anything is loaded."""

import json

import pytest
import sft_runs

MODEL = {"model_type": "llama", "hidden_size": 32}


@pytest.fixture
def folders(monkeypatch):
    monkeypatch.syspath_prepend(sft_runs.EXAMPLE)
    import folders

    return folders


def claim(folders, path, model="a", configuration=MODEL, seed=1, mode="lora", **how):
    how = {"overwrite": False, "resumes": False, "writes": True} | how
    folders.claim_output(str(path), folders.describe_run(model, configuration, seed, mode), **how)


def leave_weights(path):
    (path / "base_model").mkdir()
    (path / "base_model" / "model.safetensors").write_text("weights")
    (path / "adapter_model.safetensors").write_text("adapter")


OTHERS = {
    "model": {"model": "b"},
    "configuration": {"configuration": MODEL | {"hidden_size": 64}},
    "seed": {"seed": 2},
    "mode": {"mode": "full"},
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_run_is_refused_with_what_differs_and_the_ways_out(folders, tmp_path, name):
    claim(folders, tmp_path)
    leave_weights(tmp_path)
    claim(folders, tmp_path)  # the same one again
    claim(folders, tmp_path, configuration=MODEL | {"transformers_version": "9"})
    with pytest.raises(ValueError, match="is another run's") as error:
        claim(folders, tmp_path, **OTHERS[name])
    message = str(error.value)
    differing = message.partition("another run's: ")[2].partition(". Give")[0]
    assert [part.split()[0] for part in differing.split("; ")] == [name]
    assert "OUTPUT_DIR" in message and "--overwrite_output_dir True" in message
    assert (tmp_path / "base_model").exists()


def test_overwriting_removes_what_the_other_run_left_and_nothing_else(folders, tmp_path):
    claim(folders, tmp_path)
    leave_weights(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    claim(folders, tmp_path, seed=2, overwrite=True, writes=False)  # another rank
    assert (tmp_path / "base_model").exists()
    claim(folders, tmp_path, seed=2, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "run.json"]
    assert json.loads((tmp_path / "run.json").read_text())["seed"] == 2


def test_a_run_that_left_nothing_stands_in_nobodys_way(folders, tmp_path):
    claim(folders, tmp_path)
    claim(folders, tmp_path, model="b")
    assert json.loads((tmp_path / "run.json").read_text())["model"] == "b"


def test_weights_without_a_record_are_somebody_elses_unless_they_are_continued(folders, tmp_path):
    leave_weights(tmp_path)
    with pytest.raises(ValueError, match="it holds adapter_model.safetensors, base_model, and no run.json"):
        claim(folders, tmp_path)
    claim(folders, tmp_path, resumes=True)
    claim(folders, tmp_path)


def leave_checkpoint(path, step, *, complete):
    import torch

    folder = path / f"checkpoint-{step}"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({}, folder / name)
    if complete:
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))


def test_a_run_that_starts_anew_is_never_continued_from_an_earlier_ones_checkpoint(folders, tmp_path):
    claim(folders, tmp_path)
    leave_checkpoint(tmp_path, 4, complete=False)
    claim(folders, tmp_path)  # nothing could be continued from it
    leave_checkpoint(tmp_path, 20, complete=True)
    with pytest.raises(ValueError, match="holds checkpoint-20 of an earlier run") as error:
        claim(folders, tmp_path)
    assert all(way in str(error.value) for way in ("RESUME=last", "OUTPUT_DIR", "--overwrite_output_dir True"))
    claim(folders, tmp_path, resumes=True)
    claim(folders, tmp_path, overwrite=True)
    assert not list(tmp_path.glob("checkpoint-*"))


@pytest.mark.engine
def test_a_second_model_is_not_trained_from_the_first_ones_base(tmp_path):
    """As was seen: base_model/ of the first was loaded, and the second was never trained."""
    status, printed = sft_runs.run("one", tmp_path, max_steps=1, save_strategy="no")
    assert status == 0, printed[-3000:]
    status, printed = sft_runs.run("one", tmp_path, max_steps=1, save_strategy="no", seed=7)
    assert status == 1 and "is another run's: seed 42 there, 7 now" in printed.strip().splitlines()[-1], printed[-3000:]
    flags = {"max_steps": 1, "save_strategy": "no", "seed": 7, "overwrite_output_dir": True}
    status, printed = sft_runs.run("one", tmp_path, **flags)
    assert status == 0 and "has no weights: training starts from random ones" in printed, printed[-3000:]
