"""`accelerate launch`, for the run scripts: what is wrong is said by `train.py`, and not once more by the launcher.

python launch.py ARGUMENTS OF ACCELERATE LAUNCH    exits as the training processes did; --debug shows the launcher's own words
"""

from __future__ import annotations

import logging
import subprocess
import sys

import torch.distributed.run  # noqa: F401  (its loggers, which `main` looks for)
from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

INTERRUPTED = 130


def main(argv: list[str]) -> int:
    """Runs the training processes; gives their exit status."""
    parser = launch_command_parser()
    parser.error = lambda message: parser.exit(2, f"launch.py: {message}\n")  # not a hundred lines of usage
    args = parser.parse_args(argv)
    if "--debug" in args.training_script_args:
        launch_command(args)
        return 0
    # Which process was ended by which signal, when one has failed: the one that failed has said why. Each of these loggers
    # has a level of its own.
    for name in [name for name in logging.root.manager.loggerDict if name.startswith("torch.distributed.elastic")]:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        launch_command(args)
    except ChildFailedError as error:
        return _status(error)
    except subprocess.CalledProcessError as error:  # of one process
        return error.returncode if error.returncode > 0 else 128 - error.returncode
    except (SignalException, KeyboardInterrupt):
        return INTERRUPTED
    except Exception as error:  # accelerate's, or of the mini_sequence section of its file
        text = " ".join(str(error).split())
        print(f"launch.py: {type(error).__name__}: {text} (--debug shows where)", file=sys.stderr)
        return 1
    return 0


def _status(error: ChildFailedError) -> int:
    rank, failure = error.get_first_failure()
    if failure.exitcode > 0:
        return failure.exitcode
    # Ended by a signal: it could say nothing itself.
    print(f"launch.py: rank {rank} of train.py was ended by {failure.signal_name()}", file=sys.stderr)
    return 128 - failure.exitcode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
