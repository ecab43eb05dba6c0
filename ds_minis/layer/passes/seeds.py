"""The random numbers of a layer's runs: each chunk draws the same ones before and behind the attention, and in backward."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from ds_minis.tiling.core.replay import random_states, seed_generators, set_random_states


class Seeds:
    """Gives each part of a call its own seed, so that the part draws the same random numbers whenever it runs.

    Parts run inside of `restored`, and all of them once before `advance`. If none drew random numbers by then, none will in
    backward, and no seed is needed. The first seed comes from the CPU's generator. That generator advances only if a part
    drew something.

    Attributes:
        first: the first seed.
        device: whose generator is seeded beside the CPU's; None for none.
        drawn: whether a part drew something.
    """

    def __init__(self, device: torch.device):
        generator = torch.Generator()
        generator.set_state(torch.get_rng_state())
        self.first = int(torch.randint(2**62, (), generator=generator, device="cpu"))
        self.device = device if len(random_states(device)) > 1 else None
        self.drawn = self._has_run = False

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Restores the caller's random state at the end."""
        states = random_states(self.device)
        try:
            yield
        finally:
            set_random_states(self.device, states)

    def part(self, index: int) -> contextlib.AbstractContextManager:
        """Context: seeds the generators for one part, unless all parts have run and none drew anything."""
        return _Part(self, index) if self.drawn or not self._has_run else contextlib.nullcontext()

    def advance(self) -> None:
        """Call this after forward: advances the CPU's generator if this call drew random numbers."""
        self._has_run = True
        if self.drawn:
            torch.rand((), device="cpu")


class _Part:
    def __init__(self, seeds: Seeds, index: int):
        self._seeds, self._index = seeds, index

    def __enter__(self) -> None:
        seeds = self._seeds
        seed_generators(seeds.device, seeds.first + self._index)
        self._before = None if seeds.drawn else random_states(seeds.device)

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            now = random_states(self._seeds.device)
            self._seeds.drawn = not all(map(torch.equal, self._before, now))
