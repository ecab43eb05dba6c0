"""Faults of real runs of the SFT example: what the user sees, and what can be continued from afterwards."""

import os
import resource
import shutil
import signal
import tempfile
import time
from pathlib import Path

import psutil
import pytest
import sft_runs
from support import warm

pytestmark = pytest.mark.engine
LONG = {"max_steps": 100000, "save_steps": 2, "save_total_limit": 3}


def _complete(output: Path) -> list[Path]:
    return [folder for folder in output.glob("checkpoint-*") if (folder / "trainer_state.json").is_file()]


@pytest.mark.parametrize("launcher", ["ddp", "zero2"])
def test_a_killed_rank_ends_the_run_and_leaves_a_checkpoint_to_continue_from(tmp_path, launcher):
    process = sft_runs.start(sft_runs.command(launcher, tmp_path, **LONG), cold=True)
    sft_runs.wait_for(lambda: len(_complete(tmp_path)) >= 2, process)
    workers = [sft_runs.worker(process, rank) for rank in (0, 1)]
    workers[1].kill()
    killed = time.monotonic()
    printed = sft_runs.finish(process, timeout=120)
    assert process.returncode != 0 and time.monotonic() - killed < 60
    assert "SIGKILL" in printed or "-9" in printed, printed[-3000:]
    assert "rank" in printed.lower() and "train.py" in printed
    psutil.wait_procs(workers, timeout=30)
    assert not any(worker.is_running() for worker in workers)

    newest = max(int(folder.name.split("-")[1]) for folder in _complete(tmp_path))
    status, printed = sft_runs.run(launcher, tmp_path, resume_from_checkpoint="last", max_steps=newest + 2)
    assert status == 0, printed[-5000:]
    assert "continuing from checkpoint-" in printed and len(sft_runs.losses(tmp_path)) == newest + 2


def test_interrupt_ends_a_run_promptly(tmp_path):
    process = sft_runs.start(sft_runs.command("one", tmp_path, **LONG), cold=True)
    sft_runs.wait_for(lambda: _complete(tmp_path), process)
    process.send_signal(signal.SIGINT)
    printed = sft_runs.finish(process, timeout=30)
    line = printed.splitlines()[-1]
    assert process.returncode == 130 and line.startswith("interrupted; continue with RESUME=last"), printed[-3000:]
    assert "Traceback" not in printed
    newest = max(int(folder.name.split("-")[1]) for folder in _complete(tmp_path))
    status, printed = sft_runs.run("one", tmp_path, resume_from_checkpoint="last", max_steps=newest + 2)
    assert status == 0, printed[-5000:]


def test_a_disk_that_fills_up_during_a_checkpoint(tmp_path):
    """Stands for a full disk: files may not grow beyond 1 MB, so that weights are written and the optimizer is not."""
    status, printed = sft_runs.run("one", tmp_path / "first")  # makes the base model, which is larger
    assert status == 0, printed[-5000:]
    output = tmp_path / "output"
    shutil.copytree(tmp_path / "first", output)
    shutil.rmtree(output / "checkpoint-4")

    def limit_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))

    status, printed = sft_runs.run("one", output, resume_from_checkpoint="last", popen={"preexec_fn": limit_files})
    assert status == 1
    note = printed.strip().splitlines()[-1]
    assert f"{output / 'checkpoint-4'} was not written to its end" in note and "MiB are free" in note, printed[-2000:]
    assert (output / "checkpoint-4" / "adapter_model.safetensors").is_file()
    assert not (output / "checkpoint-4" / "trainer_state.json").exists()

    status, printed = sft_runs.run("one", output, resume_from_checkpoint="last")
    assert status == 0 and "checkpoint-4 is not complete" in printed, printed[-3000:]
    assert sft_runs.losses(output) == sft_runs.losses(tmp_path / "first")


def test_an_output_path_that_is_a_file_stops_before_the_model_is_loaded(tmp_path):
    (tmp_path / "results").write_text("mine")
    status, printed = sft_runs.run("one", tmp_path / "results")
    message = printed.strip().splitlines()[-1]
    assert (
        status == 1
        and message.startswith("train.py: ValueError: --output_dir")
        and str(tmp_path / "results") in message
    )
    assert "exists" in message and "Give a folder" in message and "base model" not in printed
    assert (tmp_path / "results").read_text() == "mine"


def test_an_output_folder_that_may_not_be_written_to(monkeypatch):
    """As another user than root, whom no permission stops."""
    monkeypatch.syspath_prepend(sft_runs.EXAMPLE)
    from folders import require_output

    user = os.geteuid()
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o555)
        try:
            os.seteuid(65534 if user == 0 else user)
            for folder in (name, f"{name}/new"):
                with pytest.raises(ValueError, match=f"--output_dir {folder}: cannot write there .Permission denied"):
                    require_output("--output_dir", folder)
        finally:
            os.seteuid(user)
    require_output("--output_dir", tempfile.gettempdir())


NOWHERE = {
    "model": ({"model_name_or_path": "./nope"}, "ValueError: --model_name_or_path ./nope: there is no such folder"),
    "data": ({"dataset_name": "/nope/data"}, "ValueError: --dataset_name /nope/data: there is no such folder"),
    "checkpoint": (
        {"resume_from_checkpoint": "nope"},
        "ValueError: --resume_from_checkpoint nope: there is no such folder",
    ),
    "resume": ({"resume_from_checkpoint": "last"}, "there is no complete checkpoint-* in"),
}


@pytest.mark.parametrize("case", NOWHERE)
def test_what_does_not_exist_is_named_before_the_model_is_loaded(tmp_path, case):
    flags, words = NOWHERE[case]
    status, printed = sft_runs.run("one", tmp_path, **flags)
    assert status == 1 and words in printed.strip().splitlines()[-1], printed[-2000:]
    assert "base model" not in printed and not (tmp_path / "base_model").exists()


def test_a_tokenizer_without_chat_template(tmp_path):
    model = shutil.copytree(sft_runs.DEFAULT / "model", tmp_path / "model")
    (model / "chat_template.jinja").unlink()
    status, printed = sft_runs.run("one", tmp_path / "output", model_name_or_path=model)
    message = printed.strip().splitlines()[-1]
    assert status == 1 and str(model) in message and "--chat_template_format chatml" in message
    assert "base model" not in printed


DS_YAML = (
    "distributed_type: DEEPSPEED\ndeepspeed_config:\n  deepspeed_config_file: nope.json\n  zero3_init_flag: false\n"
)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("nope.yaml", "configuration file `nope.yaml` does not exist. Please pass an existing file"),
        ("ds.yaml", "Expected a string path to an existing deepspeed config"),
    ],
)
def test_a_missing_configuration_is_named(tmp_path, config, words):
    """By accelerate itself: nothing of ours swallows it, on the way through our reading of the same files."""
    (tmp_path / "ds.yaml").write_text(DS_YAML)
    argv = sft_runs.command("zero2", tmp_path / "output")
    argv[argv.index("--config_file") + 1] = config
    process = sft_runs.start(argv, cwd=tmp_path)
    printed = sft_runs.finish(process)
    assert process.returncode == 1 and words in printed and "nope" in printed, printed[-3000:]
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize(
    ("variable", "name", "status", "words"),
    [
        ("ACCELERATE_CONFIG", "nope.yaml", 2, "ACCELERATE_CONFIG=nope.yaml: a file that exists is allowed"),
        ("DEEPSPEED_CONFIG", "nope.json", 2, "DEEPSPEED_CONFIG=nope.json: a file"),
        ("MODEL", "./nope", 1, "ValueError: --model_name_or_path ./nope"),
    ],
)
def test_the_run_script_with_a_missing_file(tmp_path, variable, name, status, words):
    env = os.environ | warm.environment() | {"NUM_PROCESSES": "1", variable: name}
    script = str(sft_runs.EXAMPLE / "run_peft_deepspeed.sh")
    process = sft_runs.start(["sh", script], cwd=tmp_path, env=env)
    printed = sft_runs.finish(process)
    assert process.returncode == status and words in printed, printed[-3000:]
    assert not list(tmp_path.rglob("*.safetensors"))
