"""Starts the server of `warm_python` when a test first needs it, one for all pytest processes of a run."""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from support import warm_python

TESTS = Path(__file__).parent.parent
START_SECONDS = 300  # of imports, on a busy machine
FOLDER, OWNER = "WARM_PYTHON_FOLDER", "WARM_PYTHON_OWNER"


def prepare() -> Path | None:
    """To be called when a test run begins: gives the folder to `clean_up` at its end, or None in a worker of xdist."""
    if FOLDER in os.environ:
        return None
    folder = tempfile.mkdtemp(prefix="warm-python-")
    os.environ |= {FOLDER: folder, OWNER: str(os.getpid()), "HF_DATASETS_CACHE": os.path.join(folder, "datasets")}
    return Path(folder)


def clean_up(folder: Path) -> None:
    """Ends the server, if one was started."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        os.kill(int((folder / "pid").read_text()), signal.SIGTERM)
    shutil.rmtree(folder, ignore_errors=True)
    del os.environ[FOLDER], os.environ[OWNER]


@functools.cache
def environment() -> dict[str, str]:
    """Variables for a command that may be run warm: PATH finds the warm `python` and launchers, PYTHON names it."""
    if FOLDER not in os.environ:  # a script that runs cases, such as scripts/parity_matrix.py
        atexit.register(clean_up, prepare())
    folder = Path(os.environ[FOLDER])
    server = {name: value for name in warm_python.READ_AT_IMPORT if (value := os.environ.get(name)) is not None}
    server = warm_python.DEFAULTS | server
    variables = {
        warm_python.SOCKET: str(folder / "socket"),
        warm_python.REAL: sys.executable,
        "WARM_PYTHON_VARIABLES": json.dumps(server),
        "PATH": os.pathsep.join([str(folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHON": str(folder / "bin" / "python"),
        **server,
    }
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "socket").exists():
            _make_commands(folder / "bin")
            _start_server(folder, variables)
    return variables


def python() -> str:
    """A Python for `subprocess`, with `environment()`, that does not import the training stack anew."""
    return environment()["PYTHON"]


def _make_commands(folder: Path) -> None:
    folder.mkdir()
    code = Path(warm_python.__file__).read_text(encoding="utf-8").partition("\n")[2]
    for name in ("python", "python3", *warm_python.COMMANDS):
        (folder / name).write_text(f"#!{sys.executable} -IS\n{code}", encoding="utf-8")
        (folder / name).chmod(0o755)


def _start_server(folder: Path, variables: dict[str, str]) -> None:
    path = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    log = open(folder / "server.log", "w")  # noqa: SIM115 (the server's, as long as it runs)
    server = subprocess.Popen(
        [sys.executable, "-m", "support.warm_server", variables[warm_python.SOCKET], os.environ[OWNER]],
        env=os.environ | variables | {"PYTHONPATH": path}, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
        start_new_session=True,
    )  # fmt: skip
    (folder / "pid").write_text(str(server.pid))
    end = time.monotonic() + START_SECONDS
    while not (folder / "socket").exists():
        if server.poll() is not None or time.monotonic() > end:
            raise RuntimeError(f"the server of warm processes did not start: {(folder / 'server.log').read_text()}")
        time.sleep(0.02)
