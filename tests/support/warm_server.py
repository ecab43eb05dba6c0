"""The server of `warm_python`: imports the training stack once, and forks a process for each command it is asked to run.

python -m support.warm_server SOCKET OWNER    # ends with the process OWNER

It has one thread, or its children could inherit a lock that nobody will ever release.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import importlib
import importlib.metadata
import json
import os
import random
import runpy
import selectors
import shutil
import signal
import socket
import sys
import threading
import traceback
import types

from support import warm_python

IMPORTS = """
torch torch.distributed.run torch.distributed.fsdp torch.distributed.checkpoint torch.distributed._composable
torch.utils.data torch._dynamo
accelerate accelerate.commands.accelerate_cli accelerate.commands.launch
transformers transformers.trainer transformers.generation transformers.integrations.deepspeed
transformers.models.llama.modeling_llama transformers.models.auto.modeling_auto transformers.models.auto.tokenization_auto
deepspeed deepspeed.launcher.runner deepspeed.launcher.launch deepspeed.runtime.zero.stage3
deepspeed.runtime.zero.stage_1_and_2 deepspeed.ops.op_builder.all_ops
peft peft.utils.other bitsandbytes datasets datasets.packaged_modules.json.json safetensors.torch yaml psutil
trl.trainer.sft_trainer trl.trainer.dpo_trainer trl.cli ds_minis.cli.check
""".split()


PR_SET_PDEATHSIG = 1


def import_all() -> None:
    for name in IMPORTS:
        with contextlib.suppress(ImportError):  # what is missing is missed by whoever needs it
            importlib.import_module(name)
    import torch

    torch.set_num_threads(1)


def serve(path: str, owner: int) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path + ".new")
    import_all()
    gc.collect()
    gc.freeze()  # the children share what they do not write to
    listener.listen(64)
    os.rename(path + ".new", path)  # only now can anybody connect
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ, ("listener",))
    children: dict[int, tuple[int, socket.socket]] = {}  # pid -> its pidfd and the connection of who asked
    libc = ctypes.CDLL(None)
    while os.path.exists(f"/proc/{owner}"):
        for key, _ in selector.select(timeout=2):
            match key.data:
                case ("listener",):
                    connection, _ = listener.accept()
                    pid = _fork(connection, [listener.fileno(), selector.fileno()], children, libc)
                    if pid is None:
                        connection.close()
                        continue
                    pidfd = os.pidfd_open(pid)
                    children[pid] = pidfd, connection
                    selector.register(pidfd, selectors.EVENT_READ, ("ended", pid))
                    selector.register(connection, selectors.EVENT_READ, ("left", pid))
                case ("ended", pid):
                    _, status = os.waitpid(pid, 0)
                    pidfd, connection = children.pop(pid)
                    selector.unregister(pidfd)
                    os.close(pidfd)
                    if connection.fileno() >= 0:
                        selector.unregister(connection)
                        with contextlib.suppress(OSError):
                            connection.sendall(status.to_bytes(8, "big"))
                        connection.close()
                case ("left", pid) if (
                    pid in children
                ):  # and has not ended in this very moment: who asked was killed, and cannot pass the signal on
                    selector.unregister(key.fileobj)
                    key.fileobj.close()
                    os.kill(pid, signal.SIGKILL)
    shutil.rmtree(os.path.dirname(path), ignore_errors=True)  # as its owner was killed, and cannot


def _fork(connection: socket.socket, to_close: list[int], children, libc) -> int | None:
    """The id of a process for what the connection asks; None where who asked was killed before all of it was said."""
    streams: list[int] = []
    try:
        size, streams, _, _ = socket.recv_fds(connection, 8, 3)
        request = warm_python._read(connection, int.from_bytes(size, "big"))
    except (OSError, SystemExit):
        request = b""
    if not request:
        for stream in streams:
            os.close(stream)
        return None
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        for stream in streams:
            os.close(stream)
        with contextlib.suppress(OSError):  # who asked was killed: the next event of the connection says so
            connection.sendall(pid.to_bytes(8, "big"))
        return pid
    status = 1
    try:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # nobody would be told of its end
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        for fd in (*to_close, connection.fileno(), *(fd for fd, _ in children.values())):
            os.close(fd)
        for _, other in children.values():
            other.close()
        status = _run(*json.loads(request))
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def _run(command: list[str], environ: dict[str, str], folder: str, ignores_interrupt: bool) -> int:
    """Runs a command as a Python that was just started would; gives its exit status."""
    os.setsid()
    os.environ.clear()
    os.environ.update(environ)
    os.chdir(folder)
    gc.enable()
    random.seed()
    if "torch" in sys.modules:
        sys.modules["torch"].default_generator.seed()
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()
    signal.signal(signal.SIGINT, signal.SIG_IGN if ignores_interrupt else signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)
    sys.executable = os.path.join(os.path.dirname(environ[warm_python.SOCKET]), "bin", "python")
    kind, name, *arguments = command
    paths = [path for path in environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:0] = [path for path in paths if path not in sys.path]
    status, interrupted = 0, False
    try:
        if kind == "file":
            sys.argv = [name, *arguments]
            sys.path.insert(0, os.path.dirname(os.path.realpath(name)))
            runpy.run_path(name, run_name="__main__")
        elif kind == "module":
            sys.argv = [name, *arguments]
            sys.path.insert(0, folder)
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        elif kind == "code":
            sys.argv = ["-c", *arguments]
            sys.path.insert(0, "")
            sys.modules["__main__"] = module = types.ModuleType("__main__")
            exec(compile(name, "<string>", "exec"), module.__dict__)
        else:
            sys.argv = [os.path.join(os.path.dirname(sys.executable), name), *arguments]
            (entry,) = importlib.metadata.entry_points(group="console_scripts", name=name)
            sys.exit(entry.load()())
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if not isinstance(end.code, int | None):
            print(end.code, file=sys.stderr)
    except KeyboardInterrupt:
        _print_exception()
        interrupted = True
    except BaseException:
        _print_exception()
        status = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    if interrupted:  # a Python ends by the signal, after all else
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    return status & 0xFF


def _print_exception() -> None:
    kind, error, trace = sys.exc_info()
    sys.excepthook(kind, error, trace)


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
