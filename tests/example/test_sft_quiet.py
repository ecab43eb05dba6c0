"""How a run of the SFT example ends, what it says on the way, and whose warnings it leaves out."""

import json
import logging
import signal
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import sft_runs
import torch


@pytest.fixture
def quiet(monkeypatch):
    monkeypatch.syspath_prepend(sft_runs.EXAMPLE)
    import quiet

    return quiet


BEGIN = "import os, signal, sys, quiet\nquiet.begin()\n"
ERROR = BEGIN + "error = ValueError('nothing to see')\nerror.add_note('a note')\nraise error"
INTERRUPT = BEGIN + "os.kill(os.getpid(), signal.SIGINT)\nprint('went on')"
# An engine that fails as the other ranks are gone: the interrupt is what happened.
AFTER = (
    BEGIN + "try:\n    os.kill(os.getpid(), signal.SIGINT)\nexcept KeyboardInterrupt:\n    raise RuntimeError('peer')"
)


def _with_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # which a shell's background jobs ignore


def ended(tmp_path, code: str, *flags: str, **env: str) -> tuple[int, str]:
    """Exit status of a script that begins quietly, and what it said."""
    variables = {"RANK": "0", "WORLD_SIZE": "1", "PYTHONPATH": str(sft_runs.EXAMPLE), "PATH": ""} | env
    (tmp_path / "train.py").write_text(code)
    command = [sys.executable, str(tmp_path / "train.py"), "--output_dir", str(tmp_path / "out"), *flags]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=200, env=variables, preexec_fn=_with_interrupts
    )
    assert not done.stdout
    return done.returncode, done.stderr


def test_an_error_is_what_it_says(tmp_path):
    line = "ValueError: nothing to see\na note (--debug shows where)\n"
    assert ended(tmp_path, ERROR) == (1, f"train.py: {line}")
    assert ended(tmp_path, ERROR, RANK="1", WORLD_SIZE="2") == (1, f"train.py, rank 1: {line}")
    status, printed = ended(tmp_path, ERROR, "--debug", "--seed", "3")
    assert status == 1 and printed.startswith("Traceback") and "--debug" not in printed


def test_debug_with_a_value_is_the_trainers(quiet):
    argv = ["train.py", "--debug", "underflow_overflow", "--seed", "1"]
    assert not quiet.take_debug(argv) and argv[1] == "--debug"
    for argv in (["train.py", "--debug"], ["train.py", "--debug", "--seed"]):
        assert quiet.take_debug(argv) and "--debug" not in argv


@pytest.mark.parametrize("code", [INTERRUPT, AFTER])
def test_an_interrupt_is_one_line_of_rank_0(tmp_path, code):
    status, printed = ended(tmp_path, code)
    (line,) = printed.splitlines()
    assert status == 130 and line.startswith(f"interrupted; no checkpoint is complete in {tmp_path / 'out'}")
    assert ended(tmp_path, code, RANK="1", WORLD_SIZE="2") == (130, "")


def test_an_interrupted_run_says_what_it_can_be_continued_from(quiet, tmp_path, monkeypatch):
    import checkpoints

    for step in (2, 4, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
    monkeypatch.setattr(checkpoints, "find_problem", lambda path: "cut short" if path.name == "checkpoint-10" else None)
    text = quiet.how_to_continue(str(tmp_path))
    assert text.startswith("interrupted; continue with RESUME=last") and text.endswith(str(tmp_path / "checkpoint-4"))


def test_only_what_is_listed_is_left_out(quiet, caplog):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for message, category in quiet._WARNINGS.items():
            warnings.filterwarnings("ignore", message, category)
        warnings.warn(
            "`torch.distributed.all_gather_into_tensor` is deprecated. Use another", FutureWarning, stacklevel=1
        )
        warnings.warn("`is_gradient_checkpointing` is deprecated and will be removed", FutureWarning, stacklevel=1)
        warnings.warn("`something_else` is deprecated", FutureWarning, stacklevel=1)
    assert [str(w.message) for w in seen] == ["`something_else` is deprecated"]
    logger = logging.getLogger("of this test")
    quiet.leave_out("of this test", "Gradient accumulation steps mismatch")
    logger.warning("[RANK 0] Gradient accumulation steps mismatch: 1, 2")
    logger.warning("something else")
    assert [r.getMessage() for r in caplog.records] == ["something else"]


def test_a_line_for_each_logged_step(quiet):
    from progress import line_of

    logs = {"loss": 8.34989, "grad_norm": 1.7261, "learning_rate": 0.003, "tokens_per_second": 1480.4}
    expected = "step  7/20  loss 8.3499  gradient norm 1.73  learning rate 3.00e-03  1,480 tokens/s"
    assert line_of(logs, 7, 20) == expected
    assert line_of({"eval_loss": 7.1}, 20, 20) == "step 20/20  eval loss 7.1000" and not line_of(
        {"train_loss": 1.0}, 1, 2
    )


def test_the_throughput_of_a_resumed_run_is_its_own(quiet, tmp_path, capsys):
    from progress import Progress
    from summary import summarize

    state = SimpleNamespace(
        global_step=10,
        num_input_tokens_seen=900,
        log_history=[{"loss": 3.0}, {"loss": 2.0}],
        is_world_process_zero=True,
    )
    progress = Progress()
    progress.on_train_begin(None, state, None)
    state.global_step, state.num_input_tokens_seen = 14, 1300
    trainer = SimpleNamespace(
        state=state, model=torch.nn.Linear(1, 1), model_wrapped=None,
        is_world_process_zero=lambda: True, args=SimpleNamespace(output_dir=str(tmp_path)),
        accelerator=SimpleNamespace(distributed_type=SimpleNamespace(value="NO"), num_processes=1),
    )  # fmt: skip
    summarize(trainer, {"train_runtime": 8.0}, progress)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["tokens_per_second"] == 50.0 and summary["resumed_from_step"] == 10
    assert "throughput   50.0 tokens/s (all processes), from step 10 on" in capsys.readouterr().out


def test_idle_adapters_are_looked_for_where_there_may_be_some(quiet):
    from modeling import is_dense
    from transformers import LlamaConfig, LlavaConfig, MixtralConfig, Qwen3Config, Qwen3MoeConfig

    assert all(is_dense(config().to_dict()) for config in (LlamaConfig, Qwen3Config))
    assert not any(is_dense(config().to_dict()) for config in (MixtralConfig, Qwen3MoeConfig, LlavaConfig))


@pytest.mark.parametrize("words", [["--num_processes", "two", "x.py"], ["--num_procesess"], []])
def test_a_wrong_argument_of_the_launcher_is_one_line(quiet, capsys, words):
    import launch

    with pytest.raises(SystemExit) as end:
        launch.main(words)
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and line.startswith("launch.py: ")


def test_whatever_the_launcher_raises_is_one_line(quiet, capsys, monkeypatch):
    import launch

    def fail(args):
        raise OverflowError("port must be\n0-65535")

    monkeypatch.setattr(launch, "launch_command", fail)
    assert launch.main(["x.py"]) == 1
    assert capsys.readouterr().err == "launch.py: OverflowError: port must be 0-65535 (--debug shows where)\n"
