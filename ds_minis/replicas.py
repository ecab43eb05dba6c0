"""Which data a rank is given under sequence parallelism: the ranks of a group are one data-parallel replica."""

from __future__ import annotations

import torch.distributed as dist
from torch import nn

from ds_minis.convert import mini_sequence_report
from ds_minis.parallel.communication.groups import require_divisible


def group_size(model: nn.Module) -> int:
    """How many ranks share each sequence of a model; 1 for a model that was never converted."""
    report = mini_sequence_report(model)
    return report.config.sequence_parallel.size if report is not None and report.config.enabled else 1


def sampler_arguments(model_or_size: nn.Module | int) -> dict[str, int]:
    """The replica of this rank, for a data loader of your own: `DistributedSampler(data, **sampler_arguments(model))`.

    Accelerate, the Trainer and DeepSpeed's `training_data` need it not: their loaders are told by ds_minis.

    Args:
        model_or_size: a converted model (or what an engine made of it), or its `sequence_parallel` size.

    Returns:
        `num_replicas`, the number of groups of ranks, and `rank`, this rank's group. The same on all ranks of a group.

    Raises:
        ValueError: neither a size nor a converted model; or the processes cannot be divided into such groups.
    """
    if isinstance(model_or_size, nn.Module):
        if mini_sequence_report(model_or_size) is None:
            raise ValueError(
                f"sampler_arguments: this {type(model_or_size).__name__} was not converted: call it after "
                "convert_to_mini_sequence or deepspeed.initialize, or give the size of a group"
            )
        size = group_size(model_or_size)
    else:
        size = model_or_size
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(
                f"sampler_arguments: a converted model or a number of ranks from 1 is allowed, got {size!r}"
            )
    started = dist.is_available() and dist.is_initialized()
    world, rank = (dist.get_world_size(), dist.get_rank()) if started else (1, 0)
    return {"num_replicas": require_divisible(world, size, "sampler_arguments"), "rank": rank // size}
