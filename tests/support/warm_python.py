#!/usr/bin/env -S python3 -IS
"""A Python that has imported the training stack already: a server that forks, and the command that asks it to.

Importing torch, transformers, deepspeed, peft and trl takes 5 to 6 CPU-seconds in each process, more than most test runs
train for. So tests put a folder in front of PATH in which `python`, `accelerate`, `torchrun`, ... are this file. It sends
its arguments, environment, working folder, standard streams and signals to the server, which forks a process that runs
what the command would have run, and passes its exit status on. Launchers and ranks are started as their users start them;
only the imports are shared.

What cannot be the same after these imports runs in the real Python: other values of variables that are read while a module
is imported (`READ_AT_IMPORT`), a `sitecustomize` on PYTHONPATH, flags of the interpreter other than -u.

This file imports nothing heavy: as the command it must start in milliseconds.
"""

import contextlib
import json
import os
import signal
import socket
import sys

SOCKET, REAL, COMMANDS = "WARM_PYTHON_SOCKET", "WARM_PYTHON_REAL", ("accelerate", "deepspeed", "torchrun", "trl")
READ_AT_IMPORT = (
    "DS_ACCELERATOR", "DS_MINIS_AUTOLOAD", "HF_DATASETS_CACHE", "HF_HOME", "HF_HUB_OFFLINE", "OMP_NUM_THREADS",
    "PYTHONHASHSEED", "PYTHONWARNINGS", "TORCH_COMPILE_DISABLE", "TORCH_CPP_LOG_LEVEL", "TORCH_DEVICE_BACKEND_AUTOLOAD",
    "TORCH_DISTRIBUTED_DEBUG", "TORCH_LOGS", "TRANSFORMERS_OFFLINE", "TRANSFORMERS_VERBOSITY", "TRITON_INTERPRET",
)  # fmt: skip
# What the command itself sets for the server, so that both agree.
DEFAULTS = {"DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def command_of(argv: list[str]) -> list[str] | None:
    """`[kind, name, *arguments]` of a command line; None for a form that is not known.

    Kind is "file", "module", "code" (the name is the code), or "console" (a console script of an installed package).
    """
    program, *rest = argv
    name = os.path.basename(program)
    if name in COMMANDS:
        return ["console", name, *rest]
    while rest and rest[0] == "-u":
        rest = rest[1:]
    if rest[:1] in (["-m"], ["-c"]) and len(rest) > 1:
        return ["module" if rest[0] == "-m" else "code", *rest[1:]]
    return ["file", *rest] if rest and not rest[0].startswith("-") else None


def fits(environ: dict[str, str]) -> bool:
    """Whether a process with these variables would have imported what the server has."""
    server = json.loads(environ["WARM_PYTHON_VARIABLES"])
    if any(environ.get(name, DEFAULTS.get(name)) != server.get(name) for name in READ_AT_IMPORT):
        return False
    folders = environ.get("PYTHONPATH", "").split(os.pathsep)
    return not any(os.path.exists(os.path.join(folder, "sitecustomize.py")) for folder in folders if folder)


def main() -> None:
    environ = dict(os.environ)
    command = command_of(sys.argv)
    if command is None or not fits(environ):
        real = os.environ[REAL]
        name = os.path.basename(sys.argv[0])
        program = os.path.join(os.path.dirname(real), name) if name in COMMANDS else real
        os.execv(program, [program, *sys.argv[1:]])
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGABRT, signal.SIGUSR1)
    signal.pthread_sigmask(signal.SIG_BLOCK, numbers)  # until it is known to whom they go
    server = socket.socket(socket.AF_UNIX)
    server.connect(os.environ[SOCKET])
    request = json.dumps([command, environ, os.getcwd(), signal.getsignal(signal.SIGINT) == signal.SIG_IGN])
    data = request.encode()
    socket.send_fds(server, [len(data).to_bytes(8, "big")], [0, 1, 2])
    server.sendall(data)
    pid = int.from_bytes(_read(server, 8), "big")
    for number in numbers:
        signal.signal(number, lambda number, frame: _kill(pid, number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
    status = int.from_bytes(_read(server, 8), "big")
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    os._exit(os.WEXITSTATUS(status))


def _kill(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _read(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = connection.recv(size - len(data))
        if not part:
            sys.exit("the server of warm processes has ended")
        data += part
    return data


if __name__ == "__main__":
    main()
