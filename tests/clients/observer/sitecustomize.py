"""For a program that cannot be asked (`trl sft`): with this folder on PYTHONPATH, rank 0 writes at its end what it ran.

It reads what is in memory then, and changes nothing.
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


if os.environ.get("RANK") == "0":
    atexit.register(lambda: "trl.trainer.sft_trainer" in sys.modules and save_facts())
