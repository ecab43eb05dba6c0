"""What one call of a layer may keep of its attention and its products, counted while the layer runs."""

from __future__ import annotations

from torch import Tensor, nn

from ds_minis.memory.keep_budget import KeepBudget, kind_of
from ds_minis.tiling.core.out_of_memory import is_out_of_memory


class CallBudget:
    """One call's part of the budget. It holds no tensor of the call.

    Args:
        budget: of the model.
        x: the layer's input.
        level: what the call is to keep.

    Attributes:
        level: what the call keeps, as far as it has run.
    """

    def __init__(self, budget: KeepBudget, layer: nn.Module, x: Tensor, level: str):
        self.level = level
        self._budget, self._account, self._call = budget, budget.account(x), (kind_of(layer, x), x.shape)
        self._reservation = self._account and self._account.hold(0)

    def take(self, num_bytes: int) -> bool:
        """Counts bytes that the call keeps; False if they are too many."""
        if self._account is None:
            return True
        if num_bytes > self._account.left:
            return False
        self._reservation.add(num_bytes)
        return True

    def give_back(self, num_bytes: int) -> None:
        """Counts bytes no longer."""
        if self._account is not None:
            self._reservation.add(-num_bytes)

    def needs(self, level: str, num_bytes: float) -> None:
        """Notes what a level takes."""
        self._budget.learn(level, *self._call, num_bytes)

    def falls_back(self, level: str) -> None:
        """Lowers what the call keeps to this level."""
        self._budget.fell_back(self.level, level)
        self.level = level

    def gives_up(self, error: Exception) -> bool:
        """Whether memory ran out, and the call can go on if it keeps less."""
        if self._account is None or not is_out_of_memory(error):
            return False
        self._budget.out_of_memory(self._account)
        return True

    def release(self) -> None:
        """Releases all that was counted for the call."""
        if self._reservation is not None:
            self._reservation.release()
