"""Times of rivals that take turns in one process, so that what slows the machine slows them all."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from tqdm import tqdm

MIN_SECONDS = {"cpu": 0.05, "cuda": 0.002}
"""A turn lasts at least this long; a rival that needs less is called several times."""

_HEAD_START = 2_000_000  # cycles, about a millisecond


class Spread(NamedTuple):
    median: float
    q20: float
    q80: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        q20, median, q80 = np.quantile(values, (0.2, 0.5, 0.8))
        return Spread(float(median), float(q20), float(q80))

    def per(self, amount: float) -> Spread:
        """``amount`` over it, as speeds are of times: what is high in one is low in the other."""
        return Spread(amount / self.median, amount / self.q80, amount / self.q20)


@dataclass(frozen=True)
class Step:
    """What is timed, and what makes its argument before the clock starts."""

    run: Callable[[Any], Any]
    before: Callable[[], Any] = lambda: None

    def __call__(self) -> Any:
        return self.run(self.before())


class Clock(Protocol):
    def __call__(self, step: Step) -> float:
        """Seconds of one call."""


def wall_clock(step: Step) -> float:
    argument = step.before()
    start = time.perf_counter()
    result = step.run(argument)
    seconds = time.perf_counter() - start
    del result
    return seconds


def wall_clock_synchronized(step: Step) -> float:
    """From an idle GPU to an idle GPU, launches included."""

    def run(argument: Any) -> None:
        step.run(argument)
        torch.cuda.synchronize()

    torch.cuda.synchronize()
    return wall_clock(Step(run, step.before))


def cuda_clock(step: Step) -> float:
    """Seconds of the GPU, by CUDA events.

    The GPU is kept busy for a moment first, so that what a step launches waits in its queue: a
    launch's cost on the CPU is not counted, for any rival, unless the step itself waits for the
    GPU, as a sparse gradient's compaction does.
    """
    argument = step.before()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(_HEAD_START)
    start.record()
    result = step.run(argument)
    end.record()
    end.synchronize()
    del result
    return start.elapsed_time(end) / 1000


def clock_of(device: str) -> Clock:
    return cuda_clock if torch.device(device).type == "cuda" else wall_clock


def turn(step: Step, min_seconds: float, clock: Clock = wall_clock) -> float:
    """Seconds of a step: of a long one its only call, of a short one the median of several.

    The first of several does not count: it finds the caches as another rival left them.
    """
    first = clock(step)
    if first >= min_seconds:
        return first
    times: list[float] = []
    while not times or sum(times) < min_seconds:
        times.append(clock(step))
    return statistics.median(times)


def alternate(
    steps: Mapping[str, Step],
    rounds: int,
    device: str = "cpu",
    *,
    min_seconds: float | None = None,
    clock: Clock | None = None,
) -> dict[str, list[float]]:
    """Seconds of each step in each round. The first to run moves on by one from round to round."""
    if min_seconds is None:
        min_seconds = MIN_SECONDS[torch.device(device).type]
    clock = clock_of(device) if clock is None else clock
    names = list(steps)
    for step in steps.values():
        step()
    times: dict[str, list[float]] = {name: [] for name in names}
    for i in tqdm(range(rounds), desc="time", unit="round", leave=False):
        first = i % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(turn(steps[name], min_seconds, clock))
    return times
