"""Times several ways to do one thing beside each other: interleaved, in another random order each round, and as ratios."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping


def interleaved(
    steps: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    seed: int = 0,
    seconds: float = float("inf"),
    least: int = 3,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each step in each round.

    Each round runs every step once, in a random order, so that what changes with time (clock speed, other programs) meets all
    of them alike, and none always follows the same other. A first round is run and thrown away.

    Args:
        steps: each returns when its work is done (on a GPU: after a synchronization).
        rounds: rounds that count.
        seconds: no further round begins once these have passed, and `least` rounds have counted.
        clock: the time now, in seconds.
    """
    order, draw, begin = list(steps), random.Random(seed), clock()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        if number > least and clock() - begin > seconds:
            break
        draw.shuffle(order)
        for name in order:
            start = clock()
            steps[name]()
            if number:
                times[name].append(clock() - start)
    return times


def compared(times: Mapping[str, list[float]], reference: str) -> dict[str, dict]:
    """Of each name: the median time, and the median and spread of its ratios to the reference in the same rounds."""
    result = {}
    for name, own in times.items():
        ratios = [a / b for a, b in zip(own, times[reference], strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        result[name] = {
            "seconds": statistics.median(own),
            "ratio": statistics.median(ratios),
            "ratio_quartiles": [low, high],
            "ratio_range": [min(ratios), max(ratios)],
            "rounds": len(own),
            "all_seconds": own,
        }
    return result
