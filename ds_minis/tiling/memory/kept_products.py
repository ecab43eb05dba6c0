"""Keeps the results of a layer's linear layers from forward to backward, which then repeats none of their products.

Backward runs the layer's chunks again all the same, and takes each result from here, in the order in which forward computed
them. What lies between the products (norms, activations, rotary embeddings) is cheap to compute, and takes about as much
memory as the products' results, so it is not kept. Source: selective activation checkpointing (torch.utils.checkpoint).

Shapes: H hidden size of the layer.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

from torch import Tensor, nn

from ds_minis.tiling.core.linear import Results, plain_linears
from ds_minis.tiling.core.replay import patched_forwards

_LEAST_INPUTS = 0.25  # of H: a sum over fewer inputs (the second matrix of LoRA) costs less than keeping its result


class KeptProducts:
    """The results in one call of a layer, for each of its passes over the chunks.

    Args:
        module: the layer.
        width: H.
        take: counts bytes that are kept; returns False if they are too many. Then all are dropped.
        give_back: called with the number of bytes that are dropped.

    Attributes:
        num_bytes: what is kept now; what was, if it was too much.
        is_too_large: whether it was too much.
    """

    is_too_large = False

    def __init__(self, module: nn.Module, width: int, take: Callable[[int], bool], give_back: Callable[[int], None]):
        self.num_bytes = 0
        self._linears = [m for m in plain_linears(module) if m.in_features >= _LEAST_INPUTS * width]
        self._take, self._give_back = take, give_back
        self._kept: dict[str, dict[nn.Linear, list[tuple[Tensor, int]]]] = {}

    @contextlib.contextmanager
    def recorded(self, name: str, without: Sequence[nn.Linear] = ()) -> Iterator[None]:
        """Context for a pass of forward.

        Args:
            name: of the pass.
            without: layers whose results backward does not read in this pass.
        """
        kept = self._kept[name] = defaultdict(list)
        with patched_forwards({m: self._recording(m, kept) for m in self._linears if m not in without}):
            yield
        for linear, results in list(kept.items()):
            if any(y._version != version for y, version in results):  # written to: backward would not read what it was
                num_bytes = sum(y.nbytes for y, _ in kept.pop(linear))
                self.num_bytes -= num_bytes
                self._give_back(num_bytes)

    def _recording(
        self, linear: nn.Linear, kept: dict[nn.Linear, list[tuple[Tensor, int]]]
    ) -> Callable[[Tensor], Tensor]:
        def forward(input: Tensor) -> Tensor:
            y = type(linear).forward(linear, input)
            if not self.is_too_large and _is_kept(input):
                self.num_bytes += y.nbytes
                self.is_too_large = not self._take(y.nbytes)
                kept[linear].append((y.detach(), y._version))
                if self.is_too_large:
                    self.drop(taken=self.num_bytes - y.nbytes)
            return y

        return forward

    def results(self, name: str) -> Results:
        """For a run of a pass in backward: what gives each layer's results, one after the other."""
        return {linear: _in_order(results) for linear, results in self._kept[name].items()}

    def replayed(self, name: str) -> contextlib.AbstractContextManager:
        """Context for a run of a pass without a graph."""
        return patched_forwards({linear: _replay(linear, result) for linear, result in self.results(name).items()})

    def drop(self, taken: int | None = None) -> None:
        """Frees everything, of which `taken` bytes were counted (None: all)."""
        self._give_back(self.num_bytes if taken is None else taken)
        for kept in self._kept.values():
            kept.clear()


def _is_kept(input: Tensor) -> bool:
    return input.dim() > 1  # as `chunk_forwards` replaces the results of rows only


def _replay(linear: nn.Linear, result: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda input: result(input) if _is_kept(input) else type(linear).forward(linear, input)


def _in_order(results: Sequence[tuple[Tensor, int]]) -> Callable[[Tensor], Tensor]:
    left = iter(results)

    def result(input: Tensor) -> Tensor:
        y, version = next(left, (None, 0))
        if y is None or y.shape[:-1] != input.shape[:-1]:
            raise RuntimeError(
                "a decoder layer calls its linear layers otherwise in backward than in forward, so their results that were "
                'kept are of no use: set "keep": "attention" in the mini-sequence configuration'
            )
        if y._version != version:
            raise RuntimeError(
                "the result of a linear layer was changed in place between forward and backward: change it after backward, "
                "or make the operation that changes it give a new tensor"
            )
        return y

    return result
