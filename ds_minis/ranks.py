"""Which process this is, and whether there are others."""

import torch.distributed

from ds_minis.environment import local_world_size, process_rank, world_size


def is_main_process() -> bool:
    """Whether this is rank 0, by torch.distributed if it runs already, else by the launcher's variable."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank() == 0
    return process_rank() == 0


def has_other_ranks() -> bool:
    """Whether this process trains together with others."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return distributed and torch.distributed.get_world_size() > 1


def num_ranks() -> int | None:
    """How many processes train together: by torch.distributed if it runs already, else by the launcher's variable."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size()
    return world_size()


def num_local_ranks() -> int:
    """How many processes train on this machine, by the launcher's variable."""
    return local_world_size()
