"""For a program that cannot be asked (`trl sft`): with this folder on PYTHONPATH, rank 0 writes at its end what it ran.

It reads what is in memory then. It changes one thing: a rank that ended well leaves before Python takes itself apart,
where gloo's threads abort at times, after all work is done (pytorch#190489; TRL destroys no process group).
"""

import atexit
import gc
import os
import sys


def save_facts() -> None:
    from accelerate import PartialState
    from torch import nn, save

    modules = [type(thing) for thing in gc.get_objects() if issubclass(type(thing), nn.Module)]
    state = PartialState()
    facts = {
        "type": state.distributed_type.value,
        "processes": state.num_processes,
        "mlps": [cls.__qualname__ for cls in modules if "LlamaMLP" in cls.__qualname__],
    }
    save(facts, os.environ["FACTS"])


def leave() -> None:
    if "trl.trainer.sft_trainer" not in sys.modules:
        return  # a process of the launcher
    if os.environ["RANK"] == "0":
        save_facts()
    if not hasattr(sys, "last_value"):  # no exception ended this rank
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


if "RANK" in os.environ:
    atexit.register(leave)
