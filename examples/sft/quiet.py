"""What a run says, and how it ends: without warnings that mean nothing here, and with one line for an error or for Ctrl-C.

Called before anything heavy is imported, as imports take seconds and say things, too.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import time
import warnings
from pathlib import Path
from types import TracebackType

# Others' warnings that ask for nothing from who runs this example: the start of each (a regular expression), and why.
_WARNINGS = {
    # DeepSpeed's ZeRO and accelerate's FSDP2 call torch by names that torch has since renamed. They go on working.
    r"`torch\.distributed\.\w+` is deprecated": FutureWarning,
    # accelerate saves FSDP1's weights by them.
    r"FSDP\.state_dict_type\(\) and FSDP\.set_state_dict_type\(\) are being deprecated": FutureWarning,
    # transformers 5.23 renamed it; this example, TRL and PEFT use the name that every version here knows.
    r"`(is_)?gradient_checkpointing` is deprecated": FutureWarning,
}
_LINES = {
    # bitsandbytes looks for faster CPU kernels when it is imported. Nothing is quantized on a CPU but in the QLoRA scripts,
    # where its own ones do.
    "bitsandbytes.backends.cpu.ops": ("Failed to load CPU gemm_4bit_forward",),
    # The number is the Trainer's, and stands in DeepSpeed's configuration alone; accelerate uses that one, which is right.
    "accelerate.accelerator": ("Gradient accumulation steps mismatch",),
    # The error that follows says the same, once for all ranks.
    "datasets.packaged_modules.json.json": ("Failed to load JSON from file",),
}
_AGAIN_SECONDS = 2  # a second Ctrl-C after so long ends the process where it stands; a launcher passes the first one on


def begin() -> None:
    """To be called first of all. `--debug`, without a value, shows where an error comes from."""
    debug = take_debug(sys.argv)
    for message, category in _WARNINGS.items():
        warnings.filterwarnings("ignore", message, category)
    for name, lines in _LINES.items():
        leave_out(name, *lines)
    if os.environ.get("RANK", "0") != "0" or not sys.stderr.isatty():  # bars in a file, and one of each rank
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers looks at this one too
    interrupt = _Interrupt()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where a shell has it ignored
        signal.signal(signal.SIGINT, interrupt)
    if not debug:
        sys.excepthook = lambda kind, error, trace: end(kind, error, trace, interrupted=interrupt.at is not None)


def leave_out(logger: str, *lines: str) -> None:
    """Leaves lines with these words in them out of what a logger says."""
    logging.getLogger(logger).addFilter(lambda record: not any(words in record.getMessage() for words in lines))


def end(kind: type[BaseException], error: BaseException, _: TracebackType | None, *, interrupted: bool) -> None:
    """Ends the process with one line."""
    rank, others = os.environ.get("RANK", "0"), int(os.environ.get("WORLD_SIZE", "1")) > 1
    interrupted = interrupted or issubclass(kind, KeyboardInterrupt)
    if interrupted:
        text = how_to_continue(_output_dir(sys.argv)) if rank == "0" else ""
    else:
        if rank != "0":
            time.sleep(2)  # the launcher ends this process, where rank 0 has failed in the same way
        lines = [f"{kind.__name__}: {error}", *getattr(error, "__notes__", ())]
        text = "\n".join(" ".join(str(line).split()) for line in lines)
        text = f"train.py{f', rank {rank}' if others and rank != '0' else ''}: {text} (--debug shows where)"
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        # Not to sys.stderr, in whose place torch's hook has a buffer here, for what comes back from this one.
        print(text, file=sys.__stderr__, end="\n" if text else "", flush=True)
    # Without the ends of engines, which wait for ranks that are gone, or warn that nobody said goodbye.
    os._exit(130 if interrupted else 1)


def how_to_continue(output_dir: str | None) -> str:
    """What to say after Ctrl-C."""
    from checkpoints import find_problem

    folders = sorted(Path(output_dir or ".").glob("checkpoint-*[0-9]"), key=lambda path: -int(path.name.split("-")[-1]))
    newest = next((path for path in folders if path.is_dir() and find_problem(path) is None), None)
    if newest is None:
        return (
            f"interrupted; no checkpoint is complete in {output_dir}, so the next run starts anew (SAVE_STRATEGY=steps with "
            "--save_steps N writes one every N steps: then continue with RESUME=last)"
        )
    return f"interrupted; continue with RESUME=last (--resume_from_checkpoint last), from {newest}"


class _Interrupt:
    """Handler of Ctrl-C: an exception for the first one. The launcher's, which comes with the terminal's, is no second."""

    at: float | None = None

    def __call__(self, number: int, frame: object) -> None:
        if self.at is None:
            self.at = time.monotonic()
            raise KeyboardInterrupt
        if time.monotonic() - self.at > _AGAIN_SECONDS:
            os._exit(130)


def take_debug(argv: list[str]) -> bool:
    """Whether the flag is there without a value, and takes it out; with one it is the Trainer's own."""
    for i, word in enumerate(argv):
        if word == "--debug" and (i + 1 == len(argv) or argv[i + 1].startswith("--")):
            del argv[i]
            return True
    return False


def _output_dir(argv: list[str]) -> str | None:
    for i, word in enumerate(argv):
        if word.startswith("--output_dir="):
            return word.partition("=")[2]
        if word == "--output_dir" and i + 1 < len(argv):
            return argv[i + 1]
    return None
