"""Attention for one group of heads at a time: the weights of its projections are cut to the rows of those heads.

The analysis of the layer finds these projections: with cut weights, the layer must compute the same heads as with whole
ones.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from ds_minis.config import AUTO
from ds_minis.tiling.core.grad_accum import GradientSums
from ds_minis.tiling.core.params import holders_of


class WrongGroups(ValueError):
    """The number of KV heads is not divisible by the number of groups in the setting."""


def count_groups(wanted: int | str, num_kv_heads: int) -> int:
    """The number of groups of KV heads for a `head_groups` setting.

    Raises:
        WrongGroups: the heads cannot be divided evenly.
    """
    count = num_kv_heads if wanted == AUTO else wanted
    if num_kv_heads % count:
        divisors = [n for n in range(1, num_kv_heads + 1) if num_kv_heads % n == 0]
        raise WrongGroups(
            f'"head_groups": {wanted} groups cannot be made of {num_kv_heads} KV heads; allowed: '
            f'{", ".join(map(str, divisors))} or "auto"; did you mean {min(divisors, key=lambda n: abs(n - count))}?'
        )
    return count


def num_kv_heads(layer: nn.Module) -> int | None:
    """The KV heads of a layer's attention, from the attributes of transformers' modules; None if these are missing.

    Their attention functions repeat keys and values `num_key_value_groups` times.
    """
    for part in layer.modules():
        repeats, config = part.__dict__.get("num_key_value_groups"), part.__dict__.get("config")
        num_heads = getattr(config, "num_attention_heads", None)
        if isinstance(repeats, int) and isinstance(num_heads, int) and repeats > 0 and num_heads % repeats == 0:
            return num_heads // repeats
    return None


@dataclass(frozen=True)
class HeadGroups:
    """Groups of KV heads, each with its query heads.

    Attributes:
        count: G, the number of groups.
        linears: the projections whose output is the concatenated heads.
    """

    count: int
    linears: tuple[nn.Linear, ...]

    @contextlib.contextmanager
    def cut(self, group: int, cut: CutWeights | None = None) -> Iterator[None]:
        """Inside, the projections compute the heads of one group. `cut` makes the parts of the weights, if given."""
        before = []
        try:
            for linear in self.linears:
                for name in ("weight", "bias"):
                    for holder in holders_of(linear, name):
                        whole = holder[name]
                        if whole is not None:
                            before.append((holder, name, whole))
                            size = whole.shape[0] // self.count
                            rows = slice(group * size, (group + 1) * size)
                            holder[name] = whole[rows] if cut is None else cut.part(whole, rows)
            yield
        finally:
            for holder, name, whole in reversed(before):
                holder[name] = whole

    def of_output(self, out: Tensor, group: int) -> Tensor:
        """The group's part of the attention's output for all heads, `(B, S, N, E)`."""
        size = out.shape[2] // self.count
        return out[:, :, group * size : (group + 1) * size]


class CutWeights:
    """Rows of weights as leaves of their own, so that a gradient is only as large as those rows.

    Attributes:
        leaves: the rows that need a gradient.
        sums: the sums of their gradients over chunks.
    """

    def __init__(self, whole: Sequence[Tensor]):
        self._index = {id(leaf): i for i, leaf in enumerate(whole) if leaf.requires_grad}
        self._parts: dict[int, tuple[slice, Tensor]] = {}  # index of the whole -> its rows
        self.leaves: list[Tensor] = []
        self.sums = GradientSums(self.leaves)

    def part(self, whole: Tensor, rows: slice) -> Tensor:
        index = self._index.get(id(whole))
        if index is None:
            return whole[rows].detach()
        if index not in self._parts:
            leaf = whole[rows].detach().requires_grad_()
            self._parts[index] = rows, leaf
            self.leaves.append(leaf)
            self.sums.watch()
        return self._parts[index][1]

    def add_to(self, sums: GradientSums) -> None:
        """Adds the summed gradients to the sums of the whole weights."""
        for (index, (rows, _)), grad in zip(self._parts.items(), self.sums.result(), strict=True):
            if grad is not None:
                sums.add_rows(index, rows, grad)
