"""Ranks of a distributed test as forks of one process: what it has imported is imported once."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable


def fork_ranks(num_ranks: int, main: Callable[[int], None]) -> int:
    """Runs `main(rank)` in a fork for each rank; the exit status, 1 if one of them failed."""
    children = []
    for rank in range(num_ranks):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                main(rank)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)  # gloo sometimes aborts at teardown after success (pytorch#190489)
        children.append(child)
    statuses = [os.waitpid(child, 0)[1] for child in children]
    return int(any(statuses))
