"""A pass that needs the hidden states of a few tokens only, as where a model is asked for one answer behind a long text.

Without it the decoder's last hidden states are gathered whole, on each rank: 8.6 GB at 1M tokens of Llama-3-8B.

Shapes: B batch, T tokens of a rank, K tokens that are wanted, H hidden size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from ds_minis.parallel.attention.state import Parallel
from ds_minis.parallel.communication.collectives import summed
from ds_minis.parallel.communication.cut import Cut
from ds_minis.parallel.communication.groups import Group


@contextlib.contextmanager
def only_rows(parallel: Parallel, rows: Tensor) -> Iterator[None]:
    """Context in which the decoder gives hidden states at these places of the whole sequence only, `(B, K, H)`, to all ranks.

    For passes without gradients: what is given has none.
    """
    parallel.rows = rows
    try:
        yield
    finally:
        parallel.rows = None


def gather_rows(hidden_BTH: Tensor, rows: Tensor, cut: Cut, group: Group) -> Tensor:
    """The wanted tokens from the ranks that have them; each is on one rank, so a sum with zeros is exact."""
    held = torch.cat([torch.arange(start, start + cut.part, device=rows.device) for start in cut.starts])
    place, wanted = (held[:, None] == rows).nonzero(as_tuple=True)
    mine = hidden_BTH.new_zeros(hidden_BTH.shape[0], len(rows), *hidden_BTH.shape[2:])
    mine[:, wanted] = hidden_BTH[:, place]
    return summed(mine, group)
