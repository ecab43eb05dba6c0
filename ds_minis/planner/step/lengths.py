"""The lengths of a traced step: primes, so that a size in bytes tells which lengths it is a multiple of."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

# What a size may be a multiple of. The order is that of the columns of a trace. "attention": not a size, but 1 while the
# attention is run, for what it takes beside the traced tensors.
SYMBOLS = "one", "tokens", "chunk", "rest", "loss_chunk", "loss_rest", "tokens_squared", "attention"
_FIRST_CHUNK, _FIRST_LOSS_CHUNK = 3001, 3301


@dataclass(frozen=True)
class Lengths:
    """Tokens of a step, and how they are cut: `tokens = 2 * chunk + rest = 2 * loss_chunk + loss_rest`.

    Two whole chunks and a shorter one are what any longer sequence is made of.
    """

    tokens: int
    chunk: int
    rest: int
    loss_chunk: int
    loss_rest: int

    @property
    def values(self) -> list[int]:
        """In the order of `SYMBOLS`, but for the last."""
        return [1, self.tokens, self.chunk, self.rest, self.loss_chunk, self.loss_rest, self.tokens**2]

    def factor(self, nbytes: int, shape: Iterable[int]) -> tuple[int, float]:
        """The symbol that a storage grows with (its index), and the bytes for each of it.

        A size that is a few more than a length (padding of a convolution, say) counts as a multiple of that length.
        """
        values = self.values
        for index in (6, 1, 2, 3, 4, 5):
            if nbytes % values[index] == 0:
                return index, nbytes / values[index]
        for size in shape:
            for index in (1, 2, 3, 4, 5):
                if 0 < abs(size - values[index]) <= 16:
                    return index, nbytes / size
        return 0, float(nbytes)


def lengths_for(sizes: Iterable[int]) -> Lengths:
    """Lengths that divide none of the sizes, which are those of a model's parameters."""
    sizes = set(sizes)
    chunks = (p for p in range(_FIRST_CHUNK, 2 * _FIRST_CHUNK) if _usable(p, sizes))
    for chunk in chunks:
        for rest in range(chunk // 2, chunk):
            tokens = 2 * chunk + rest
            if not (_usable(rest, sizes) and _usable(tokens, sizes)):
                continue
            for loss_chunk in range(chunk * 11 // 10, tokens // 2):
                loss_rest = tokens - 2 * loss_chunk
                if loss_rest > chunk // 3 and _usable(loss_chunk, sizes) and _usable(loss_rest, sizes):
                    return Lengths(tokens, chunk, rest, loss_chunk, loss_rest)
    raise AssertionError("no primes are left")


def _usable(number: int, sizes: set[int]) -> bool:
    return _is_prime(number) and not any(size % number == 0 for size in sizes)


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % d for d in range(2, int(number**0.5) + 1))
