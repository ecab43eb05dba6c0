"""The largest length that works, by trials that are expensive and may end without an answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class Search:
    """What a search found. All lengths are multiples of its unit.

    Attributes:
        best: the largest length that worked; 0 if none did.
        failed: the smallest length that did not; None if none was seen.
        ended: why the search stopped before the two are one unit apart; empty if they are.
        trials: length -> whether it worked, in the order in which they ran.
    """

    best: int = 0
    failed: int | None = None
    ended: str = ""
    trials: dict[int, bool] = field(default_factory=dict)


def largest(trial: Callable[[int], bool | str], start: int, unit: int, most: int) -> Search:
    """Searches the largest multiple of `unit`, up to `most`, for which `trial` is True.

    Strides outwards from `start` (a prediction), first by a sixteenth of it and then twice as far each time, until one length
    works and one fails; then halves the gap. Whatever works is taken to work for all shorter lengths too.

    Args:
        trial: True where the length works, False where it does not; a text ends the search, and says why.
    """
    search = Search()
    units, limit = max(1, start // unit), most // unit
    if limit < 1:
        raise ValueError(f"most={most}: at least one unit of {unit} tokens must be allowed")
    low, high, stride, here = 0, limit + 1, max(1, units // 16), min(units, limit)
    while low + 1 < high:
        works = trial(here * unit)
        if isinstance(works, str):
            search.ended = works
            break
        search.trials[here * unit] = works
        if works:
            low = here
        else:
            high = here
        seen_works, seen_fails = low > 0, high <= limit
        if seen_works and seen_fails:
            here = (low + high) // 2
        elif seen_works:
            here, stride = min(limit, low + stride), 2 * stride
        else:
            here, stride = max(1, high - stride), 2 * stride
    search.best, search.failed = low * unit, high * unit if high <= limit else None
    return search
