"""A command that is run warm (`support.warm_python`) ends as the real Python's does, and none of them ends the server."""

import os
import signal
import socket
import subprocess
import sys

import pytest
from support import warm, warm_python

CODES = {
    "status": "import sys; sys.exit(3)",
    "words": "import sys; sys.exit('words')",
    "no words": "import sys; sys.exit(ValueError('no words'))",
    "interrupt": "import signal; signal.raise_signal(signal.SIGINT)",
    "signal": "import signal; signal.raise_signal(signal.SIGTERM)",
    "main": "import pickle\ndef f(): return 1\nprint(pickle.loads(pickle.dumps(f))())",
    "input": "import sys; print(sys.stdin.read()); print('bye', end='', file=sys.stderr)",
}


def ended(python: str, code: str) -> tuple[int, str, list[str]]:
    """Status, output, and the last line of errors."""
    env = os.environ | warm.environment()
    done = subprocess.run([python, "-c", code], env=env, input="words", capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout, done.stderr.splitlines()[-1:]


@pytest.mark.parametrize("name", CODES)
def test_ends_as_the_real_one_does(name):
    assert ended(warm.python(), CODES[name]) == ended(sys.executable, CODES[name])


def test_numbers_that_nobody_seeded_differ():
    code = "import torch, random, numpy; print(torch.rand(1).item(), random.random(), numpy.random.rand())"
    first, second = (ended(warm.python(), code)[1].split() for _ in range(2))
    assert len(first) == 3 and not set(first) & set(second)


@pytest.mark.parametrize("said", [b"", b"\0" * 7 + b"\5", b"\0" * 7 + b"\5ab"])
def test_who_is_killed_while_asking_does_not_end_the_server(said):
    with socket.socket(socket.AF_UNIX) as asking:
        asking.connect(warm.environment()[warm_python.SOCKET])
        if said:
            socket.send_fds(asking, [said[:8]], [0, 1, 2])
            asking.sendall(said[8:])
    assert ended(warm.python(), "print(1)") == (0, "1\n", [])


def test_who_is_killed_takes_the_process_along():
    code = "import os, time; print(os.getpid(), flush=True); time.sleep(100)"
    env = os.environ | warm.environment()
    command = subprocess.Popen([warm.python(), "-c", code], env=env, stdout=subprocess.PIPE, text=True)
    assert command.stdout.readline()
    command.kill()
    command.wait()
    assert command.stdout.read() == ""  # which ends when the process has
    assert ended(warm.python(), "print(1)")[0] == 0 and command.returncode == -signal.SIGKILL
