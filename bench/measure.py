"""Times of rivals that take turns in one process, so that what slows the machine slows them all."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

MIN_SECONDS = 0.05
"""A turn lasts at least this long; a rival that needs less is called several times."""


class Spread(NamedTuple):
    median: float
    q20: float
    q80: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        q20, median, q80 = np.quantile(values, (0.2, 0.5, 0.8))
        return Spread(float(median), float(q20), float(q80))


def turn(step: Callable[[], Any], min_seconds: float) -> float:
    """Seconds of a step: of a long one its only call, of a short one the median of several.

    The first of several does not count: it finds the caches as another rival left them.
    """

    def call() -> float:
        start = time.perf_counter()
        result = step()
        seconds = time.perf_counter() - start
        del result
        return seconds

    first = call()
    if first >= min_seconds:
        return first
    times: list[float] = []
    while not times or sum(times) < min_seconds:
        times.append(call())
    return statistics.median(times)


def alternate(
    steps: Mapping[str, Callable[[], Any]], rounds: int, min_seconds: float = MIN_SECONDS
) -> dict[str, list[float]]:
    """Seconds of each step in each round. The first to run moves on by one from round to round."""
    names = list(steps)
    for step in steps.values():
        step()
    times: dict[str, list[float]] = {name: [] for name in names}
    for i in tqdm(range(rounds), desc="time", unit="round"):
        first = i % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(turn(steps[name], min_seconds))
    return times
