"""Learns how much memory a step needs by itself, from steps that kept the inputs of layers alone: what is left may be kept.

A step of more tokens than any before keeps the inputs alone, and its peak is noted. Of n batches in random order about ln n
have more tokens than all before, so few steps are slowed. States that an optimizer makes later are in use when the next
forward pass begins. Gradients may be in use then or not (accumulation): how much the passes add to them is noted, too.
"""

from __future__ import annotations

import weakref
from collections import deque
from dataclasses import dataclass

from ds_minis.memory.device_memory import DeviceMemory

# Of the device, for blocks that the allocator cannot use and for what no step has shown (also in config.py and docs).
RESERVE = 0.1
_REMEMBERED = 1024  # passes; more than a step accumulates
Shapes = tuple[tuple[int, int], ...]  # (tokens of the batch, tokens of a sequence) of forward passes, the last one last


@dataclass(frozen=True)
class Noted:
    """A step that kept the inputs of layers alone.

    Attributes:
        shapes: of the forward passes that waited for their backward when it began, and its own.
        transient: the most that was in use until its backward was done, beyond what was when it began.
        growth: what was in use then beyond what was when it began: gradients that it made, if it made them.
    """

    shapes: Shapes
    transient: float
    growth: float

    @property
    def work(self) -> float:
        """What such a step needs beside gradients."""
        return self.transient - self.growth

    def covers(self, shapes: Shapes) -> bool:
        pairs = zip(self.shapes, shapes, strict=False)
        return len(self.shapes) == len(shapes) and all(a >= c and b >= d for (a, b), (c, d) in pairs)

    def transient_of(self, shapes: Shapes) -> float:
        """The most that a larger step needs beside its gradients: that grows with its tokens, or with their pairs."""
        pairs = zip(shapes, self.shapes, strict=True)
        return self.transient * max(tokens / fewer * length / less for (tokens, length), (fewer, less) in pairs)


class ForwardPass:
    """A forward pass whose backward is to come. It ends with `done`, or when nothing refers to it."""

    def __init__(self, memory: LearnedMemory, shapes: Shapes, in_use: float, peak: float):
        self._memory = weakref.ref(memory)
        self.shapes, self.in_use, self.peak = shapes, in_use, peak
        self.measured = False

    def done(self) -> None:
        """Call this when the backward of its first layer is done, so that no optimizer's peak counts."""
        memory = self._memory()
        if memory is not None:
            memory.end(self)


class LearnedMemory:
    """What steps on one device have shown."""

    def __init__(self, memory: DeviceMemory):
        self._memory = memory
        self._noted: list[Noted] = []
        self._growths: deque[float] = deque(maxlen=_REMEMBERED)
        self._waiting: weakref.WeakSet[ForwardPass] = weakref.WeakSet()
        self._most_at_once = 0  # passes that waited for their backward

    @property
    def num_waiting(self) -> int:
        """How many forward passes wait for their backward."""
        return len(self._waiting)

    @property
    def _gradients(self) -> float:
        """The most that the gradients of one pass add, and that stays in use after it."""
        return max(self._growths, default=0.0)

    def begin(self, batch: int, length: int) -> tuple[ForwardPass, float | None]:
        """A forward pass, and the bytes that may be in use beyond what it needs; None if it is to keep the inputs alone.

        Where several passes wait for their backward at once, that is all but the last: what the next ones will need is not
        known.

        Args:
            batch, length: sequences, and tokens in each.
        """
        in_use, usable = self._memory.in_use(), self._memory.usable()
        waiting = sorted(self._waiting, key=lambda one: len(one.shapes))
        shapes = (*(one.shapes[-1] for one in waiting), (batch * length, length))
        current = ForwardPass(self, shapes, in_use, self._memory.peak())
        work = min((noted.work for noted in self._noted if noted.covers(shapes)), default=None)
        current.measured = work is None
        self._waiting.add(current)
        if work is None or len(shapes) < self._most_at_once:
            return current, None
        return current, (1 - RESERVE) * usable - in_use - work - self._gradients

    def end(self, ended: ForwardPass) -> None:
        """Notes the peak of a measured pass."""
        if ended not in self._waiting:
            return
        self._waiting.discard(ended)
        self._most_at_once = max(self._most_at_once, len(ended.shapes))
        growth = max(0.0, self._memory.in_use() - ended.in_use)
        self._growths.append(growth)
        if ended.measured:
            self._note(ended, growth)

    def _note(self, step: ForwardPass, growth: float) -> None:
        """Notes the peak of a step, or a bound of it where an earlier peak hides it."""
        peak, shapes = self._memory.peak(), step.shapes
        if peak < step.peak:
            return  # the statistics were set back in between
        new = Noted(shapes, peak - step.in_use, growth)
        if peak == step.peak:
            bounds = [noted.transient_of(shapes) for noted in self._noted if new.covers(noted.shapes)]
            bounds += [noted.work for noted in self._noted if noted.covers(shapes)]
            new = Noted(shapes, min([new.transient, *(bound + self._gradients for bound in bounds)]), growth)
        self._noted = [old for old in self._noted if not (new.covers(old.shapes) and new.work <= old.work)]
        self._noted.append(new)
