"""The random numbers of a layer's runs: each chunk draws the same ones before and behind the attention, and in backward."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from ds_minis.tiling.core.replay import random_states, seed_generators, set_random_states


class Seeds:
    """Gives each part of a call its own seed, so that the part draws the same random numbers whenever it runs.

    Parts run inside of `restored`, and all of them once before `advance`. If none drew anything by then, none will when it is
    run again, and it needs no seed. The first seed comes from the CPU's generator. That generator advances only if a part
    drew something.
    """

    def __init__(self, device: torch.device):
        generator = torch.Generator()
        generator.set_state(torch.get_rng_state())
        self._first = int(torch.randint(2**62, (), generator=generator, device="cpu"))
        self._device = device if len(random_states(device)) > 1 else None
        self._drawn = self._has_run = False

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Restores the caller's random state at the end."""
        states = random_states(self._device)
        try:
            yield
        finally:
            set_random_states(self._device, states)

    @property
    def are_needed(self) -> bool:
        """False once all parts have run and none drew anything."""
        return self._drawn or not self._has_run

    @contextlib.contextmanager
    def part(self, index: int) -> Iterator[None]:
        """Seeds the generators for one part."""
        seed_generators(self._device, self._first + index)
        before = None if self._drawn else random_states(self._device)
        try:
            yield
        finally:
            if before is not None:
                now = random_states(self._device)
                self._drawn = not all(map(torch.equal, before, now))

    def advance(self) -> None:
        """Call this after forward: advances the CPU's generator if this call drew random numbers."""
        self._has_run = True
        if self._drawn:
            torch.rand((), device="cpu")
