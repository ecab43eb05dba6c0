"""The launch scripts: a real Slurm with two nodes on loopback, and the twin without Slurm, on the same configurations."""

import json
import os
import shlex
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import yaml
from support import slurm, warm

pytestmark = pytest.mark.engine
ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "scripts"
SECONDS = 300  # for what takes a few, on a busy machine


def make_configs(folder: Path, name: str, **fields) -> tuple[Path, Path]:
    """Three stages of the shipped recipe for two nodes: the folder of their configurations, and that of their checkpoints."""
    recipe = yaml.safe_load((ROOT / "examples" / "long_context" / "cpu_2nodes.yaml").read_text())
    recipe |= {
        "name": name, "checkpoints_path": str(folder / name), "sequence_length": [64, 80, 96], "train_steps": [1, 13, 14],
        "rope_base_length": 32, "checkpoint_interval": 100, "timeout_seconds": 60,
    }  # fmt: skip
    recipe |= fields
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    configs = folder / f"configs_{name}"
    command = [warm.python(), SCRIPTS / "create_config.py", folder / f"{name}.yaml", "--output_dir", configs]
    subprocess.run(command, check=True, capture_output=True, env=os.environ | warm.environment())
    return configs, folder / name


def wait_for(condition, what: str):
    end = time.monotonic() + SECONDS
    while not (value := condition()):
        assert time.monotonic() < end, what
        time.sleep(0.05)
    return value


def losses(checkpoints: Path) -> list[float]:
    state = json.loads((checkpoints / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


def assert_ran(checkpoints: Path, engine: str, processes: int) -> None:
    """In the engine that the recipe names, in so many processes: on a CPU accelerate falls back without a word."""
    summary = json.loads((checkpoints / "summary.json").read_text())
    assert summary["engine"].startswith(engine) and summary["num_processes"] == processes, summary


def ranks_of(stage: Path) -> list[psutil.Process]:
    """The training processes of a stage."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = " ".join(process.info["cmdline"] or ())
        if f"{stage}/train.yaml" in words and "launch.py" not in words and "launch_stage" not in words:
            found.append(process)
    return found


class Jobs:
    """Slurm's commands, in a cluster."""

    def __init__(self, variables: dict[str, str]):
        self.env = os.environ | warm.environment() | variables | {"DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}

    def run(self, *command: str) -> str:
        return subprocess.run(command, env=self.env, check=True, capture_output=True, text=True, cwd=ROOT).stdout

    def submit(self, configs: Path, folder: Path) -> list[str]:
        """As its users do: by a job that submits the stages. Gives those jobs."""
        log = folder / f"submit_{time.monotonic()}.log"
        self.run("sbatch", "--wait", f"--output={log}", str(SCRIPTS / "launch_training.slurm"), str(configs))
        return [line.split("job ")[1].split(",")[0] for line in log.read_text().splitlines() if ": job " in line]

    def state(self, job: str) -> dict[str, str]:
        return dict(word.split("=", 1) for word in self.run("scontrol", "show", "job", job).split() if "=" in word)

    def finished(self, job: str) -> dict[str, str]:
        """The job's state, once it has ended."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        return wait_for(lambda: (s := self.state(job))["JobState"] in ended and s, f"{job}: {self.state(job)}")


@pytest.fixture(scope="module")
def twin(tmp_path_factory):
    """What the twin without Slurm gives: losses, and where it wrote."""
    folder = tmp_path_factory.mktemp("twin")
    configs, checkpoints = make_configs(folder, "twin")
    run = launch_twin(configs)
    assert run.wait(SECONDS) == 0, run.stdout.read()
    return losses(checkpoints), configs, checkpoints


def launch_twin(configs: Path, **variables: str) -> subprocess.Popen:
    env = os.environ | warm.environment() | {"DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"} | variables
    return subprocess.Popen(
        ["sh", SCRIPTS / "launch_training.sh", configs], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )  # fmt: skip


def test_the_twin_runs_the_stages_and_leaves_out_what_is_done(twin):
    of_steps, configs, checkpoints = twin
    assert_ran(checkpoints, "DEEPSPEED, DeepSpeedEngine", 2)
    assert len(of_steps) == 14 and [path.name for path in sorted(checkpoints.glob("*.done"))] == [
        f"stage_{i}.done" for i in range(3)
    ]
    thetas = [
        json.loads((checkpoints / f"checkpoint-{step}" / "config.json").read_text())["rope_parameters"]["rope_theta"]
        for step in (1, 13, 14)
    ]
    names = (configs / "stages").read_text().split()
    assert thetas == [
        float(yaml.safe_load((configs / name / "train.yaml").read_text())["rope_theta"]) for name in names
    ]
    assert launch_twin(configs).communicate(timeout=SECONDS)[0].count("was done before") == 3
    (configs / names[2] / "train.yaml").open("a").write("# changed\n")
    again = launch_twin(configs)
    assert "stage 2: " in (said := again.communicate(timeout=SECONDS)[0]) and "is of other settings" in said
    assert again.returncode == 2


@pytest.mark.skipif(bool(slurm.why_not()), reason=slurm.why_not())
def test_slurm_runs_the_same_stages_on_two_nodes_stops_at_a_failure_and_goes_on_there(twin, tmp_path):
    configs, checkpoints = make_configs(tmp_path, "slurm")
    names = (configs / "stages").read_text().split()
    with slurm.cluster() as variables:
        jobs = Jobs(variables)
        first, second, third = jobs.submit(configs, tmp_path)
        assert jobs.finished(first)["ExitCode"] == "0:0", read_logs(checkpoints)
        assert jobs.state(third)["Dependency"].startswith("afterok:")

        # A rank is killed in the second stage: its job ends on both nodes, and the third stage does not start.
        wait_for(lambda: "step  3/13" in read_logs(checkpoints, second), "stage 1 does not train")
        assert jobs.state(second)["NodeList"] == "node[1-2]"
        rank = next(process for process in ranks_of(configs / names[1]) if process.environ().get("RANK") == "1")
        rank.kill()
        assert jobs.finished(second)["ExitCode"] != "0:0"
        assert "ended by SIGKILL" in read_logs(checkpoints, second)
        assert "stage 1: failed with exit status" in read_logs(checkpoints, second)
        assert jobs.finished(third)["JobState"] == "CANCELLED" and not (checkpoints / "stage_1.done").exists()
        wait_for(lambda: not ranks_of(configs / names[1]), "a rank is left")

        # Submitted again: not the first stage. A time limit's signal saves a checkpoint, and the job ends.
        second, third = jobs.submit(configs, tmp_path)
        wait_for(lambda: "step  3/13" in read_logs(checkpoints, second), "stage 1 does not train")
        jobs.run("scancel", "--batch", "--signal=USR1", second)
        assert jobs.finished(second)["ExitCode"] == "75:0", read_logs(checkpoints, second)
        assert "stopped after it saved a checkpoint" in read_logs(checkpoints, second)
        saved = {int(path.name.split("-")[1]) for path in checkpoints.glob("checkpoint-*")} - {1}
        assert len(saved) == 1 and 3 <= saved.pop() < 13

        second, third = jobs.submit(configs, tmp_path)
        assert jobs.finished(third)["ExitCode"] == "0:0", read_logs(checkpoints)
    assert_ran(checkpoints, "DEEPSPEED, DeepSpeedEngine", 2)
    # The same losses as without Slurm, in spite of the kill and the interruption.
    assert losses(checkpoints) == pytest.approx(twin[0], abs=1e-5)


def read_logs(checkpoints: Path, job: str = "") -> str:
    logs = sorted((checkpoints / "logs").glob(f"*job_{job}*" if job else "*"))
    return "\n".join(path.read_text(errors="replace") for path in logs)


def test_a_stage_on_more_ranks_continues_the_optimizer_under_fsdp_and_saves_on_a_signal(twin, tmp_path):
    """As nanotron's do, the groups grow with the sequences; another engine, interrupted, gives the same losses."""
    stages = {"sequence_length": [64, 80], "train_steps": [1, 13], "sp": [2, 4], "engine": "fsdp"}
    cluster = {"nodes": [2, 4], "gpus_per_node": 1, "gres": "none"}
    configs, checkpoints = make_configs(tmp_path, "grown", **stages, cluster=cluster)
    run, log = launch_twin(configs), checkpoints / "logs" / "stage_1_node_0.log"
    wait_for(lambda: log.exists() and "step  3/13" in log.read_text(), "stage 1 does not train")
    run.send_signal(signal.SIGUSR1)
    said = run.communicate(timeout=SECONDS)[0]
    assert run.returncode == 75 and "start again to continue" in said, said
    assert len(list(checkpoints.glob("checkpoint-*"))) == 2 and not (checkpoints / "save_and_stop").exists()
    said = (run := launch_twin(configs)).communicate(timeout=SECONDS)[0]
    assert run.returncode == 0 and "stage 0: was done before" in said, said
    assert_ran(checkpoints, "FSDP, FSDP", 4)
    assert losses(checkpoints) == pytest.approx(twin[0][:13], abs=1e-4)


def test_a_dry_run_prints_every_command_and_starts_nothing(tmp_path):
    configs, checkpoints = make_configs(tmp_path, "dry")
    names = (configs / "stages").read_text().split()
    env = os.environ | warm.environment() | {"DRY_RUN": "1"}
    for script, words in (("launch_training.sh", "launch_stage.sh"), ("launch_training.slurm", "sbatch")):
        ran = subprocess.run(["sh", SCRIPTS / script, configs], env=env, capture_output=True, text=True, check=True)
        lines = [line for line in (ran.stdout + ran.stderr).splitlines() if words in line]
        assert [name in line for name, line in zip(names, lines, strict=True)] == [True] * 3
    flags = [shlex.split(line) for line in lines]
    assert all({"--nodes=2", "--signal=B:USR1@120", "--kill-on-invalid-dep=yes"} <= set(each) for each in flags)
    assert [any(flag.startswith("--dependency=afterok:") for flag in each) for each in flags] == [False, True, True]
    assert not checkpoints.exists()
    wrong = subprocess.run(["sh", SCRIPTS / "launch_training.sh", tmp_path], env=env, capture_output=True, text=True)
    assert wrong.returncode == 2 and "create_config.py" in wrong.stderr
