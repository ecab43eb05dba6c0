"""How a sequence is cut among the ranks of a group: the zigzag order of ring attention.

The sequence is padded at its end to `2 * size * h` tokens and cut into `2 * size` equal parts. Rank r holds the parts r and
`2 * size - 1 - r`, so that under a causal mask all ranks have the same work.

Shapes: B batch, S tokens of the whole sequence, h of a part, T = 2 * h of a rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Cut:
    """The cut of sequences of `num_tokens` among `size` ranks, seen by one of them.

    Attributes:
        num_tokens: S.
        size: number of ranks in the group.
        rank: this rank's place in the group.
    """

    num_tokens: int
    size: int
    rank: int

    @property
    def part(self) -> int:
        """h, the tokens of a part."""
        return max(1, -(-self.num_tokens // (2 * self.size)))

    @property
    def padded(self) -> int:
        """The length of the padded sequence."""
        return 2 * self.size * self.part

    @property
    def starts(self) -> tuple[int, int]:
        """The positions in the whole sequence at which this rank's two parts begin."""
        return self.rank * self.part, (2 * self.size - 1 - self.rank) * self.part

    def pad(self, x: Tensor, dim: int = 1, fill: float = 0) -> Tensor:
        """The whole sequence with padding behind it."""
        missing = self.padded - x.shape[dim]
        if not missing:
            return x
        shape = list(x.shape)
        shape[dim] = missing
        return torch.cat([x, x.new_full(shape, fill)], dim)

    def mine(self, x: Tensor, dim: int = 1, fill: float = 0) -> Tensor:
        """This rank's tokens of a whole sequence: `(B, S, ...)` -> `(B, T, ...)`."""
        parts = self.pad(x, dim, fill)
        return torch.cat([parts.narrow(dim, start, self.part) for start in self.starts], dim)

    def in_order(self, of_ranks: list[Tensor], dim: int = 1) -> Tensor:
        """The whole sequence, without padding, from the tokens of all ranks: `size` times `(B, T, ...)` -> `(B, S, ...)`."""
        firsts = [x.narrow(dim, 0, self.part) for x in of_ranks]
        seconds = [x.narrow(dim, self.part, self.part) for x in reversed(of_ranks)]
        return torch.cat([*firsts, *seconds], dim).narrow(dim, 0, self.num_tokens)

    def by_rank(self, x: Tensor, dim: int = 1) -> list[Tensor]:
        """The tokens of each rank; the inverse of `in_order`, with zeros as padding."""
        parts = self.pad(x, dim).split(self.part, dim)
        return [torch.cat([parts[r], parts[2 * self.size - 1 - r]], dim) for r in range(self.size)]
