"""Counts what layers keep from forward to backward, and what they still may."""

from __future__ import annotations

import math

from torch import Tensor

from ds_minis.memory.learned_memory import ForwardPass, LearnedMemory

_AFTER_OUT_OF_MEMORY = 0.8


class Reservation:
    """Bytes that one call keeps; released at the latest when nothing refers to it."""

    def __init__(self, live: dict[int, float], num_bytes: float):
        self._live = live
        live[id(self)] = num_bytes

    def add(self, num_bytes: float) -> None:
        if id(self) in self._live:
            self._live[id(self)] += num_bytes

    def release(self) -> None:
        self._live.pop(id(self), None)

    __del__ = release


class Account:
    """What layers keep: those of a model on one device, or all of a model with a budget that was given.

    Attributes:
        limit: bytes that may be kept; of the present forward pass, if that is learned.
        later: of these, what the inputs of the pass's later layers will take.
    """

    def __init__(self, limit: float = 0.0, learned: LearnedMemory | None = None):
        self.limit, self.later = limit, 0.0
        self._learned, self._share = learned, 1.0
        self._live: dict[int, float] = {}
        self._pass: object = None
        self._new: ForwardPass | None = None

    @property
    def live_bytes(self) -> float:
        """What is kept now."""
        return sum(list(self._live.values()))

    @property
    def left(self) -> float:
        return self.limit - self.live_bytes - self.later

    @property
    def is_learned(self) -> bool:
        return self._learned is not None

    def enter(self, forward_pass: object, x: Tensor) -> None:
        """Learns at the first layer of a forward pass what may be kept in it.

        Args:
            x: the input of a layer, `(B, S, H)`.
        """
        if self._learned is None or forward_pass is self._pass:
            return
        self._pass = forward_pass
        self._new, left = self._learned.begin(x.shape[0], x.shape[1])
        # Negative until such a step was measured, so that no layer tries to keep more.
        self.limit = -math.inf if left is None else self.live_bytes + self._share * max(0.0, left)

    def take_pass(self) -> ForwardPass | None:
        """Gives the current pass to its first layer that has a backward, and None to all others."""
        new, self._new = self._new, None
        return new

    def reserve(self, num_bytes: float) -> Reservation | None:
        """Counts what a call keeps until the result is dropped; None if it is too much."""
        return None if num_bytes > self.left else self.hold(num_bytes)

    def hold(self, num_bytes: float) -> Reservation:
        """`reserve` for what is kept in any case."""
        return Reservation(self._live, num_bytes)

    def shrink(self) -> None:
        """After memory ran out: nothing more in this pass, if that is learned, and less in all later ones."""
        self._share *= _AFTER_OUT_OF_MEMORY
        self.limit = _AFTER_OUT_OF_MEMORY * min(self.limit, max(self.live_bytes, 0.5 * self.limit))
