"""Starts distributed runs: one script in several processes, and lists of cases that outlive a case that dies."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from engine_cases import RANKS, Case
from support import warm

WORKER = Path(__file__).with_name("engine_worker.py")
# What may pass before the first case begins, and then before a case is done, on a busy machine.
START_SECONDS, CASE_SECONDS, SEED_SECONDS = 240, 240, 10


def launch(script: Path, *args: str, timeout: float = 600, processes: int = RANKS, **env: str) -> str:
    """Runs a script in two processes on the CPU and gives what it printed; fails with that if it failed."""
    returncode, output = run_script(script, *args, patience=timeout, processes=processes, **env)
    assert returncode == 0, output[-5000:]
    return output


def run_script(
    script: Path,
    *args: str,
    patience: float,
    processes: int,
    start: float = 0,
    progress: Callable[[], object] = lambda: None,
    **env: str,
) -> tuple[int | None, str]:
    """Exit status and output of a script in several processes.

    They are ended, and the status is None, when `progress()` has not changed for `patience` seconds; at first for `start`
    seconds more, in which they import what they need.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    command = [warm.python(), "-m", "torch.distributed.run", f"--nproc_per_node={processes}", f"--master_port={port}"]
    launcher = subprocess.Popen(
        [*command, str(script), *args],
        env=os.environ | warm.environment() | env,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        last, end = progress(), time.monotonic() + start + patience
        while time.monotonic() < end:
            with contextlib.suppress(subprocess.TimeoutExpired):
                output, _ = launcher.communicate(timeout=min(2, patience))
                return launcher.returncode, output
            if progress() != last:
                last, end = progress(), time.monotonic() + patience
        launcher.terminate()  # it ends its processes, and waits up to 30 s for them
        output, _ = launcher.communicate(timeout=90)
        return None, output
    finally:
        launcher.terminate()  # after Ctrl-C too; nothing to do where it has ended


def run_cases(cases: list[Case], tell: Callable[[Case], None] = lambda case: None) -> dict[str, dict]:
    """What every case came to, by name: see `engine_worker.run`; {"died": why} where its processes ended or hung.

    One launch runs all cases of one number of processes, as most of a launch's time are imports. A case that ends it early
    is left behind, and another launch goes on with the next. `tell` is called with each case that is done.
    """
    results = {}
    for processes in sorted({case.processes for case in cases}):
        left = [case for case in cases if case.processes == processes]
        while left:
            with tempfile.TemporaryDirectory() as folder:
                found = _run_some(left, processes, Path(folder))
            for case in left[: len(found)]:
                tell(case)
            results |= found
            left = left[len(found) :]
    return results


def _run_some(cases: list[Case], processes: int, output: Path) -> dict[str, dict]:
    """Results of the first cases: all that one launch did, and at least one."""
    arguments = json.dumps([dataclasses.asdict(case) for case in cases]), str(output)
    status, text = run_script(
        WORKER, *arguments, processes=processes, start=START_SECONDS,
        patience=CASE_SECONDS + SEED_SECONDS * max(case.seeds for case in cases),
        progress=lambda: len(list(output.glob("*.pt"))),
    )  # fmt: skip
    results = {}
    for case in cases:
        file = output / f"{case.name}.pt"
        if not file.exists():
            break
        results[case.name] = torch.load(file)
    if not results or (status != 0 and len(results) < len(cases)):
        died = cases[len(results)].name
        what = "took too long and was ended" if status is None else f"ended with status {status}"
        errors = [file.read_text(encoding="utf-8") for file in sorted(output.glob(f"{died}.rank*.error"))]
        results[died] = {"died": f"{what}: {'; '.join(errors) or text[-2000:]}"}
    return results
