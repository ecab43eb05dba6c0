"""Keeps the results of a layer's linear layers from forward to backward, which then repeats none of their products.

Backward runs the layer's chunks again all the same, and takes each result from here, in the order in which forward computed
those of the chunk. What lies between the products (norms, activations, rotary embeddings) is cheap to compute, and takes as
much memory as their results, so it is not kept. Source: selective activation checkpointing (torch.utils.checkpoint).

Shapes: H hidden size of the layer.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence

from torch import Tensor, nn

from ds_minis.tiling.core.linear import Results, plain_linears
from ds_minis.tiling.core.params import submodules
from ds_minis.tiling.core.replay import patched_forwards

_LEAST_INPUTS = 0.25  # of H: a sum over fewer inputs (the second matrix of LoRA) costs less than keeping its result

_Kept = dict[nn.Linear, list[tuple[int, Tensor, int]]]  # of one pass: number of the chunk, result, its version


class KeptProducts:
    """The results in one call of a layer, for each of its passes over the chunks.

    Args:
        module: the layer.
        width: H.
        chunk: gives the number of the chunk that is running.
        take: counts bytes that are kept; returns False if they are too many. Then all are dropped.
        give_back: called with the number of bytes that are dropped.

    Attributes:
        num_bytes: what is kept now; what was, if it was too much.
        is_too_large: whether it was too much.
    """

    is_too_large = False

    def __init__(
        self,
        module: nn.Module,
        width: int,
        chunk: Callable[[], int],
        take: Callable[[int], bool],
        give_back: Callable[[int], None],
    ):
        self.num_bytes = 0
        self._chunk = chunk
        self._linears = [m for m in plain_linears(module) if m.in_features >= _LEAST_INPUTS * width]
        self._take, self._give_back = take, give_back
        self._kept: dict[str, _Kept] = {}

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
        for linear, results in kept.items():
            if any(y._version != version for _, y, version in results):  # backward would not read what it was
                self.leave_out(name, [linear])

    def leave_out(self, name: str, modules: Iterable[nn.Module]) -> None:
        """Drops the results of a pass that are of some modules."""
        for linear in (part for module in modules for part in submodules(module)):
            results = self._kept[name].get(linear)
            if results:
                num_bytes = sum(y.nbytes for _, y, _ in results)
                results.clear()
                self.num_bytes -= num_bytes
                self._give_back(num_bytes)

    def _recording(self, linear: nn.Linear, kept: _Kept) -> Callable[[Tensor], Tensor]:
        def forward(input: Tensor) -> Tensor:
            y = type(linear).forward(linear, input)
            if not self.is_too_large and _is_kept(input):
                self.num_bytes += y.nbytes
                self.is_too_large = not self._take(y.nbytes)
                if self.is_too_large:
                    self.drop()
                else:
                    kept[linear].append((self._chunk(), y.detach(), y._version))
            return y

        return forward

    def results(self, name: str) -> Results:
        """For a run of a pass in backward: functions that give each layer's kept results, one at a call."""
        return {linear: _in_order(results, self._chunk) for linear, results in self._kept[name].items() if results}

    def replayed(self, name: str) -> contextlib.AbstractContextManager:
        """Context for a run of a pass without a graph."""
        return patched_forwards({linear: _replay(linear, result) for linear, result in self.results(name).items()})

    def drop(self) -> None:
        """Frees everything."""
        num_bytes = sum(y.nbytes for kept in self._kept.values() for results in kept.values() for _, y, _ in results)
        for kept in self._kept.values():
            kept.clear()
        self._give_back(num_bytes)


def _is_kept(input: Tensor) -> bool:
    return input.dim() > 1  # `chunk_forwards` replaces results that have rows, and no others


def _replay(linear: nn.Linear, result: Callable[[Tensor], Tensor | None]) -> Callable[[Tensor], Tensor]:
    def forward(input: Tensor) -> Tensor:
        y = result(input) if _is_kept(input) else None
        return type(linear).forward(linear, input) if y is None else y

    return forward


def _in_order(
    results: Sequence[tuple[int, Tensor, int]], chunk: Callable[[], int]
) -> Callable[[Tensor], Tensor | None]:
    left: dict[int, deque[tuple[Tensor, int]]] = defaultdict(deque)
    for number, y, version in results:
        left[number].append((y, version))

    def result(input: Tensor) -> Tensor | None:
        of_chunk = left[chunk()]
        if not of_chunk:  # a part of the layer that is checkpointed by itself runs a third time
            return None
        y, version = of_chunk.popleft()
        if y.shape[:-1] != input.shape[:-1]:
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
