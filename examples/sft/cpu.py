"""What the engines need on a machine without an accelerator, where accelerate and torch were not meant to run them.

Nothing here runs where there is an accelerator. It lets the example and the tests try each engine for real anywhere.
"""

from __future__ import annotations

import argparse
import os

import torch
from accelerate import DistributedType, PartialState
from transformers import TrainingArguments


def prepare_deepspeed(argv: list[str]) -> list[str]:
    """Has DeepSpeed run in CPU processes, whichever launcher started them; gives the command line to parse.

    `--deepspeed ds.json` becomes what `accelerate launch` would have put into the environment: given the flag,
    TrainingArguments forgets its `ddp_backend`, and each process would be a run of one.
    """
    import deepspeed

    # The shared-memory op is a C++ build of 90 seconds at first use, which gloo does without.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--deepspeed")
    known, rest = parser.parse_known_args(argv)
    if known.deepspeed is not None:
        os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": known.deepspeed}
    return rest


def prepare_fsdp(training_args: TrainingArguments) -> None:
    """Has accelerate run FSDP in CPU processes, where it would silently run plain data parallelism.

    To be called before the trainer is made: accelerate takes FSDP from the launcher only for the type of distribution that
    processes with a GPU each have.
    """
    if training_args.distributed_state.distributed_type != DistributedType.MULTI_CPU:
        raise RuntimeError("FSDP needs two processes or more: --num_processes 2")
    PartialState._shared_state |= {"distributed_type": DistributedType.MULTI_GPU, "device": torch.device("cpu")}
    _copy_fsdp1_states()


def _copy_fsdp1_states() -> None:
    """Has FSDP1 copy what it gathers for a checkpoint.

    It moves gathered weights and optimizer states to the CPU and then reuses their memory. On a CPU the move is no copy:
    the weights are read after they were freed (a segmentation fault), and Adam's first moments become its second.
    """
    from torch.distributed.fsdp import _optim_utils, _state_dict_utils

    enter, unflatten = _state_dict_utils._enter_unshard_params_ctx, _optim_utils._unflatten_orig_param_states

    def enter_without_offload(*args, **kwargs):
        return enter(*args, **kwargs | {"offload_to_cpu": False})

    def unflatten_with_copy(*args):
        return unflatten(*args[:-1], False)  # the last one is `cpu_offload`

    _state_dict_utils._enter_unshard_params_ctx = enter_without_offload
    _optim_utils._unflatten_orig_param_states = unflatten_with_copy
