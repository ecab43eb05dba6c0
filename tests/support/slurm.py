"""A real Slurm on this machine: slurmctld, munged, and a slurmd for each of two "nodes" on loopback, for one test's life.

Debian's packages, which scripts/install_slurm.sh installs, as root, as CI does. Everything is in a folder of its own; no
service of the machine is touched.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

NODES = ("node1", "node2")
_CONF = """
ClusterName=loopback
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdSpoolDir={folder}/spool_%n
SlurmdPidFile={folder}/slurmd_%n.pid
SlurmdLogFile={folder}/slurmd_%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/linear
SchedulerType=sched/builtin
SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=100000
ReturnToService=2
MinJobAge=3600
KillWait=10
MessageTimeout=60
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1 State=UNKNOWN
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue")


def why_not() -> str:
    """Why Slurm cannot be started here; empty if it can."""
    missing = [program for program in _PROGRAMS if _find(program) is None]
    if missing:
        return f"NO SLURM HERE ({', '.join(missing)} not found): sh scripts/install_slurm.sh installs Debian's, as root"
    return "" if os.geteuid() == 0 else "NO SLURM HERE: munged and slurmd are started by root"


@contextlib.contextmanager
def cluster() -> Iterator[dict[str, str]]:
    """Starts the cluster; gives the variables by which Slurm's commands find it. All that ran in it has ended afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    folder.chmod(0o755)  # munged's clients come from any user
    started: list[subprocess.Popen] = []
    try:
        variables = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
        _configure(folder)
        _start(started, folder, "munged", "--foreground", *_munge_flags(folder), variables=variables)
        _await(folder, lambda: (folder / "munge.socket").exists(), "munged made no socket")
        _start(started, folder, "slurmctld", "-D", variables=variables)
        for node in NODES:
            _start(started, folder, "slurmd", "-D", "-N", node, variables=variables)
        _await(folder, lambda: _idle(variables), "the nodes did not become idle")
        yield {"SLURM_CONF": variables["SLURM_CONF"]}
        subprocess.run(["scancel", "--quiet", "--full", "--user", "root"], env=variables, check=False)
        with contextlib.suppress(AssertionError):
            _await(folder, lambda: _idle(variables), "a job did not end", seconds=30)
    finally:
        for process in reversed(started):
            process.send_signal(signal.SIGTERM)
        for process in reversed(started):
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
        shutil.rmtree(folder, ignore_errors=True)


def _find(program: str) -> str | None:
    return shutil.which(program, path=os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"]))


def _configure(folder: Path) -> None:
    for name in ("state", *(f"spool_{node}" for node in NODES)):
        (folder / name).mkdir()
    (folder / "munge.key").write_bytes(secrets.token_bytes(1024))
    (folder / "munge.key").chmod(0o400)
    host = socket.gethostname().partition(".")[0]
    conf = _CONF.format(folder=folder, host=host, user="root", ports=_free_ports(1 + len(NODES)))
    (folder / "slurm.conf").write_text(conf)


def _munge_flags(folder: Path) -> list[str]:
    paths = {"socket": "munge.socket", "key-file": "munge.key", "pid-file": "munge.pid", "log-file": "munge.log"}
    return [
        "--force",
        f"--seed-file={folder}/munge.seed",
        *(f"--{flag}={folder}/{name}" for flag, name in paths.items()),
    ]


def _free_ports(number: int) -> list[int]:
    sockets = [socket.socket() for _ in range(number)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def _start(started: list[subprocess.Popen], folder: Path, program: str, *flags: str, variables: dict[str, str]) -> None:
    with open(folder / f"{program}.out", "a") as output:
        process = subprocess.Popen(
            [_find(program), *flags], env=variables, stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd=folder
        )
    started.append(process)


def _idle(variables: dict[str, str]) -> bool:
    ran = subprocess.run(
        ["sinfo", "--noheader", "--format=%T %D"], env=variables, capture_output=True, text=True, check=False
    )
    return ran.stdout.split() == ["idle", str(len(NODES))]


def _await(folder: Path, condition, what: str, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            logs = {
                path.name: path.read_text(errors="replace")[-2000:]
                for path in (*folder.glob("*.out"), *folder.glob("*.log"))
            }
            raise AssertionError(f"{what}: {logs}")
        time.sleep(0.1)
