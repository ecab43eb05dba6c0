"""Decides what a call of a layer keeps from forward to backward, from a budget of bytes and what earlier calls have kept.

Nothing here waits for the device or for another rank.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ds_minis.config import AUTO, MiniSequenceConfig
from ds_minis.tiling.core.warn import Warnings

INPUT, ATTENTION, ALL = "input", "attention", "all"
_AFTER_TOO_LARGE = 1.25  # a graph that was given up would have grown at least this much further
_AFTER_OUT_OF_MEMORY = 0.8


@dataclass(frozen=True)
class Need:
    """Bytes that layers of one kind keep: per token, and per token and token of its sequence."""

    per_token: float
    per_pair: float = 0.0

    def of(self, batch: int, num_tokens: int) -> float:
        return batch * num_tokens * (self.per_token + num_tokens * self.per_pair)


def choose_level(
    budget: float, layers: int, num_tokens: int, width: int, all_bytes: float, attention_bytes: float
) -> str:
    """What the first of `layers` layers keeps.

    The last layers keep most, since their memory is needed for the shortest time. Seconds saved per byte: with H the hidden
    size and S tokens, a layer of a Llama in bfloat16 keeps about 60 H bytes per token to save 26 H^2 + 2 S H operations, and
    its attention's output 2 H bytes to save 2 S H. So attentions come first from S = H / 2 on.

    Args:
        budget: bytes left, also for computing with what is kept: as much again as one layer keeps.
        layers: this layer and those behind it.
        all_bytes, attention_bytes: what one such layer keeps of each kind.
    """
    room = budget - all_bytes
    if layers * all_bytes <= room:
        return ALL
    if 2 * num_tokens < width:
        wholes = max(0, int(room // all_bytes)) if all_bytes else 0
        budget -= (wholes + 1) * all_bytes if wholes else 0
        layers -= wholes
    return ATTENTION if (layers + 1) * attention_bytes <= budget else INPUT


class Reservation:
    """Bytes that one call keeps; released at the latest when nothing refers to it."""

    def __init__(self, live: dict[int, float], num_bytes: float):
        self._live = live
        live[id(self)] = num_bytes

    def release(self) -> None:
        self._live.pop(id(self), None)

    __del__ = release


class KeepBudget:
    """The decisions of one model. A copy starts with nothing learned.

    Attributes:
        budget: bytes; None without one.
        last: level -> number of layers, of the last forward pass in training.
    """

    def __init__(self, config: MiniSequenceConfig, warnings: Warnings):
        self._config, self._warnings = config, warnings
        self.budget = None if config.memory_budget is None else config.memory_budget * 2**30
        self.last: dict[str, int] = {}
        self._told = False
        self._live: dict[int, float] = {}
        self._all: dict[Any, Need] = {}
        self._attention: dict[Any, Need] = {}
        self._order: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()

    def __reduce__(self):
        return KeepBudget, (self._config, self._warnings)

    @property
    def live_bytes(self) -> float:
        """What is kept now."""
        return sum(list(self._live.values()))

    @property
    def may_keep_all(self) -> bool:
        """Whether a layer may keep everything."""
        return self._config.keep == ALL or self.budget is not None

    def level(self, layer: nn.Module, x: Tensor, num_layers: int) -> str:
        """What a call keeps.

        Args:
            x: the layer's input, `(B, S, H)`.
            num_layers: of the model, in one forward pass.
        """
        position = self._order.setdefault(layer, len(self._order))
        level = self._config.keep
        if level == AUTO:
            level = INPUT if self.budget is None else self._choice(layer, x, max(1, num_layers - position))
        self.last = {} if position == 0 else self.last
        self.last[level] = self.last.get(level, 0) + 1
        return level

    def _choice(self, layer: nn.Module, x: Tensor, layers: int) -> str:
        batch, num_tokens, width = x.shape
        left, kind = self.budget - self.live_bytes, kind_of(layer, x)
        # Until a call has shown what a layer keeps, the limit alone decides.
        need, attention = self._all.get(kind), self._attention.get(kind, Need(4.0 * width * x.element_size()))
        all_bytes = 0.0 if need is None else need.of(batch, num_tokens)
        level = choose_level(left, layers, num_tokens, width, all_bytes, attention.of(batch, num_tokens))
        return INPUT if level == ATTENTION and self._config.head_groups != 1 else level

    def limit(self, layer: nn.Module, x: Tensor) -> float:
        """Bytes that a call may keep, of which as many again are needed to compute with."""
        return float("inf") if self.budget is None else (self.budget - self.live_bytes) / 2

    def reserve(self, num_bytes: float) -> Reservation | None:
        """Counts what a call keeps until the result is dropped; None if it is too much."""
        if self.budget is not None and num_bytes > self.budget - self.live_bytes:
            return None
        return Reservation(self._live, num_bytes)

    def reserve_attention(self, layer: nn.Module, x: Tensor, num_bytes: float) -> Reservation | None:
        """`reserve` for an attention's output; learns its size."""
        self.learn(ATTENTION, layer, x, num_bytes)
        reservation = self.reserve(num_bytes)
        if reservation is None:
            self.fell_back(ATTENTION)
        return reservation

    def learn(self, level: str, layer: nn.Module, x: Tensor, num_bytes: float, pair_bytes: float = 0.0) -> None:
        """Notes what a call keeps, of which `pair_bytes` grow with the square of the length."""
        batch, num_tokens, _ = x.shape
        tokens = max(1, batch * num_tokens)
        need = Need((num_bytes - pair_bytes) / tokens, pair_bytes / (tokens * max(1, num_tokens)))
        (self._all if level == ALL else self._attention)[kind_of(layer, x)] = need

    def too_large(self, layer: nn.Module, x: Tensor, num_bytes: float) -> None:
        """Notes that a call was given up when it had kept this much, and keeps its input alone."""
        self.learn(ALL, layer, x, _AFTER_TOO_LARGE * num_bytes)
        self.fell_back(ALL)

    def fell_back(self, level: str) -> None:
        """Counts a layer of the last forward pass that keeps its input alone, and not what was chosen."""
        self.last[level] = self.last.get(level, 1) - 1
        self.last[INPUT] = self.last.get(INPUT, 0) + 1

    def out_of_memory(self) -> None:
        """Shrinks the budget, and says so once."""
        before, told, self._told = self.budget, self._told, True
        self.budget = _AFTER_OUT_OF_MEMORY * min(self.budget, max(self.live_bytes, 0.5 * self.budget))
        if told:
            return
        self._warnings.once(
            f"memory ran out while a layer kept what its backward reads, so it keeps its input alone, and the budget shrinks "
            f'from {before / 2**30:.2f} to {self.budget / 2**30:.2f} GiB: a smaller "memory_budget" avoids that'
        )

    def in_words(self) -> str:
        """What the last step kept; empty where all layers kept their inputs alone."""
        if not any(self.last.get(level) for level in (ALL, ATTENTION)):
            return ""
        words = {ALL: "everything", ATTENTION: "the attention's output", INPUT: "the input alone"}
        parts = [f"{self.last[level]} layers kept {words[level]}" for level in words if self.last.get(level)]
        return ", ".join(parts)


def kind_of(layer: nn.Module, x: Tensor) -> tuple:
    """Layers of one kind keep about the same."""
    return type(layer), x.dtype, x.shape[2], layer.training
