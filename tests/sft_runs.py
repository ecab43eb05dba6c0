"""Starts `examples/sft/train.py` on the embedded default as its users do, small, and with any launcher."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
from support import warm

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "sft"
DEFAULT = EXAMPLE / "default"
LAUNCHERS = {
    "one": ["python"],
    "ddp": ["python", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"],
    "zero2": [
        "python", "-m", "accelerate.commands.launch", "--config_file", "accelerate_configs/zero2.yaml",
        "--num_processes=2", "--num_machines=1", "--main_process_port=0",
    ],
}  # fmt: skip
_RAN = {  # what a run by such a launcher says of itself at its end
    "one": ("NO, PeftModelForCausalLM", 1),
    "ddp": ("MULTI_CPU, DistributedDataParallel", 2),
    "zero2": ("DEEPSPEED, DeepSpeedEngine", 2),
}
_FLAGS = {
    "model_name_or_path": DEFAULT / "model", "dataset_name": DEFAULT / "data", "max_length": 128, "max_steps": 4,
    "per_device_train_batch_size": 1, "save_strategy": "steps", "save_steps": 2, "logging_steps": 1,
    "learning_rate": 3e-3, "use_peft_lora": True, "report_to": "none", "disable_tqdm": True,
}  # fmt: skip


def command(launcher: str, output_dir: Path, **flags) -> list[str]:
    settings = _FLAGS | {"output_dir": output_dir} | flags
    words = [str(word) for name, value in settings.items() for word in (f"--{name}", value)]
    return [*LAUNCHERS[launcher], str(EXAMPLE / "train.py"), *words]


def start(argv: list[str], *, cold: bool = False, **kwargs) -> subprocess.Popen:
    """Starts a run that Ctrl-C reaches, also where these tests are a shell's background job, which ignores it.

    A `cold` one imports everything anew, and its processes are below its launcher's: they can be found and limited.
    """
    env = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    env |= (
        {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
        if cold
        else warm.environment()
    )
    settings = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": ROOT, "env": env}
    settings["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(argv, start_new_session=True, **settings | kwargs)


def finish(process: subprocess.Popen, timeout: float = 300) -> str:
    """What the process printed until it ended. One that hangs is ended with all it started, and fails the test."""
    try:
        return process.communicate(timeout=timeout)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGABRT)
        raise AssertionError(f"still running after {timeout} seconds: {process.communicate()[0][-5000:]}") from None


def run(launcher: str, output_dir: Path, *, popen: dict | None = None, **flags) -> tuple[int, str]:
    """Exit status of a run and what it printed; one that ended well had the engine and the processes of its launcher."""
    process = start(command(launcher, output_dir, **flags), cold=popen is not None, **popen or {})
    printed = finish(process)
    if process.returncode == 0:
        summary = json.loads((output_dir / "summary.json").read_text())
        assert (summary["engine"], summary["num_processes"]) == _RAN[launcher], printed[-5000:]
    return process.returncode, printed


def losses(output_dir: Path) -> list[float]:
    state = json.loads((output_dir / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


def wait_for(condition, process: subprocess.Popen, timeout: float = 300):
    """The first true value of `condition()`, while the process runs."""
    end = time.monotonic() + timeout
    while not (value := condition()):
        if process.poll() is not None or time.monotonic() > end:
            raise AssertionError(f"exit status {process.poll()}; printed:\n{finish(process, 5)[-5000:]}")
        time.sleep(0.02)
    return value


def worker(process: subprocess.Popen, rank: int) -> psutil.Process:
    """The process of that rank, below its launcher."""
    for child in psutil.Process(process.pid).children(recursive=True):
        if child.environ().get("RANK") == str(rank) and "train.py" in " ".join(child.cmdline()):
            return child
    raise AssertionError(f"no process of rank {rank}")
