"""What a converted model knows of its group: the settings, the ranks, and the pass in progress."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ds_minis.config_values import SequenceParallel
from ds_minis.parallel.attention.masks import Refused
from ds_minis.parallel.communication.collectives import gather_sequence
from ds_minis.parallel.communication.cut import Cut
from ds_minis.parallel.communication.groups import Group, make_group
from ds_minis.tiling.modules.state import Chunking
from ds_minis.tiling.modules.swap import untiled_class


class Parallel:
    """The sequence parallelism of one model.

    Attributes:
        settings: size of a group and mode.
        chunking: the model's shared state.
        loss_is_local: whether the loss of the pass in progress is computed from this rank's tokens.
        is_running: whether a decoder is running on a part of its tokens.
        last_position: the largest position in the pass of that decoder, of all tokens.
        labels: those of the pass in progress, shifted or not, which a group must be given alike too.
        used: the modes that attention calls ran in, with the reason where it is not the one that was asked for.
        check_layer: see `ds_minis.parallel.model.layers.require_token_wise`.
        known_layers: kinds of layers that were found to be token-wise but for their attention.
        rows: places of the whole sequence whose hidden states alone are wanted (`model.rows`); None for all.
    """

    UNREADABLE = "sequence parallelism has them for this rank's tokens only"
    loss_is_local = is_running = False
    last_position: torch.Tensor | None = None
    labels: Sequence[Any] = ()
    rows: torch.Tensor | None = None

    def __init__(self, settings: SequenceParallel, chunking: Chunking, check_layer: Callable[..., None]):
        self.settings, self.chunking, self.check_layer = settings, chunking, check_layer
        self.used: dict[str, str] = {}
        self.known_layers: set[tuple] = set()
        self._group: Group | None = None
        self._grid: tuple[Group, Group] | None = None

    def __getstate__(self) -> dict:
        """A copy of a model, or another process that loads it, makes groups of its own."""
        return self.__dict__ | {"_group": None, "_grid": None}

    def group(self) -> Group:
        """This rank's group; made at the first call, which all ranks of the job must make.

        Raises:
            GroupError: see `make_group`.
        """
        if self._group is None:
            self._group = make_group(self.settings.size)
        return self._group

    def grid(self) -> tuple[Group, Group]:
        """For the hybrid mode: the ranks that exchange heads (neighbours), and those in a ring; made as `group` is."""
        if self._grid is None:
            inner, outer = self.settings.grid
            self.group()
            self._grid = make_group(inner), make_group(outer, stride=inner)
        return self._grid

    def applies(self) -> bool:
        """Whether the forward pass in progress runs in parallel: it trains, or it has labels."""
        return torch.is_grad_enabled() or any(begun.with_labels for begun in self.chunking.passes)

    @contextlib.contextmanager
    def in_pass(self, last_position: torch.Tensor) -> Iterator[None]:
        """Context for a decoder that runs on this rank's tokens."""
        self.is_running, self.last_position = True, last_position
        try:
            yield
        finally:
            self.is_running, self.last_position = False, None

    @contextlib.contextmanager
    def with_local_loss(self) -> Iterator[None]:
        """Context of a pass whose decoder gives the hidden states of this rank's tokens, see `mine` and `whole`."""
        before, self.loss_is_local = self.loss_is_local, True
        try:
            yield
        finally:
            self.loss_is_local = before

    def mine(self, x: torch.Tensor) -> torch.Tensor:
        """This rank's tokens: `(B, S, ...)` -> `(B, T, ...)`."""
        return self._cut(x.shape[1]).mine(x)

    def whole(self, x: torch.Tensor, num_tokens: int) -> torch.Tensor:
        """Those of all ranks, on each: `(B, T, ...)` -> `(B, num_tokens, ...)`. Backward sums over ranks."""
        return gather_sequence(x, self._cut(num_tokens), self.group())

    def _cut(self, num_tokens: int) -> Cut:
        group = self.group()
        return Cut(num_tokens, group.size, group.rank)

    @contextlib.contextmanager
    def own_random_numbers(self, device: torch.device) -> Iterator[None]:
        """Inside, each rank draws its own random numbers; afterwards all go on with the same.

        A generator that nobody drew from is left where it was, so that without dropout what is drawn next (the order of the
        next epoch, say) is what a process without sequence parallelism draws.
        """
        generators = [torch.default_generator]
        if device.type == "cuda":
            generators.append(torch.cuda.default_generators[device.index])
        before = [generator.get_state() for generator in generators]
        digest = hashlib.blake2b(b"".join(state.numpy().tobytes() for state in before), digest_size=7)
        seed = int.from_bytes(digest.digest(), "big") + self.group().rank
        for generator in generators:
            generator.manual_seed(seed)
        begun = [generator.get_state() for generator in generators]
        try:
            yield
        finally:
            for generator, own, shared in zip(generators, begun, before, strict=True):
                drawn = not torch.equal(generator.get_state(), own)
                generator.set_state(shared)
                if drawn:  # or the next pass would draw the same numbers again
                    torch.empty(1, device=generator.device).random_(generator=generator)

    def note(self, mode: str, reason: str = "") -> None:
        """Records how an attention call ran; says once why it is not the mode that was asked for."""
        if mode not in self.used or (reason and not self.used[mode]):
            self.used[mode] = reason
            if reason:
                self.chunking.warnings.once(f"sequence_parallel: an attention is run by {mode}: {reason}")

    def refuse(self, layer: nn.Module, reason: str) -> None:
        """Raises `Refused` if a layer that has a reason not to runs on this rank's tokens.

        Not collective: ranks may analyze at different calls. One that refuses ends the job, also where others saw no reason.
        """
        if self.is_running:
            raise Refused(
                f"sequence_parallel: {untiled_class(type(layer)).__name__} cannot run on a part of the sequence: {reason}. "
                "Leave sequence_parallel out for this model"
            )

    def require_token_wise(self, layer: nn.Module, args: tuple, kwargs: dict) -> None:
        """`ds_minis.parallel.model.layers.require_token_wise`, for a layer that runs as a whole."""
        self.check_layer(layer, args, kwargs, self)

    def in_words(self) -> str:
        """For the report: the size of a group, the mode, and how the attention calls of the last passes ran."""
        wanted = self.settings.mode if isinstance(self.settings.mode, str) else "{} x {}".format(*self.settings.grid)
        used = "; ".join(f"{mode} ({reason})" if reason else mode for mode, reason in self.used.items())
        return f"each sequence on {self.settings.size} ranks, mode {wanted}{f'; attention by {used}' if used else ''}"

    def tell_whole_pass(self) -> None:
        """Says once that passes without labels and gradients run whole on each rank."""
        self.chunking.warnings.once(
            "sequence_parallel: a forward pass without labels and without gradients (generation) runs whole on each rank"
        )
