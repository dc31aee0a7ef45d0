"""Turns, rounds and clocks; the GPU's by fakes that note what is called."""

from __future__ import annotations

import pytest
import torch

from bench import measure, memory
from bench.measure import Spread, Step


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The calls to torch.cuda, and a GPU whose steps take 2.5 ms and 300 bytes beside 1000."""
    made: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            made.append("record")

        def synchronize(self) -> None:
            made.append("wait")

        def elapsed_time(self, other: Event) -> float:
            return 2.5

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: made.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: made.append("sleep"), raising=False)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: made.append("reset"))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 1000)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 1300)
    return made


@pytest.fixture
def step(calls: list[str]) -> Step:
    return Step(lambda argument: calls.append(f"run {argument}"), lambda: calls.append("before"))


def test_a_gpus_time_is_between_its_events_behind_a_busy_queue(calls, step):
    assert measure.cuda_clock(step) == 0.0025
    assert calls == ["before", "synchronize", "sleep", "record", "run None", "record", "wait"]


def test_wall_time_on_a_gpu_ends_when_it_is_idle(calls, step):
    assert measure.wall_clock_synchronized(step) > 0
    assert calls == ["synchronize", "before", "run None", "synchronize"]


def test_memory_on_a_gpu_is_of_the_timed_part(calls, step):
    assert memory.cuda_peak(step) == 300
    assert calls == ["before", "synchronize", "reset", "run None", "synchronize"]


def test_the_clock_goes_with_the_device():
    assert measure.clock_of("cpu") is measure.wall_clock
    assert measure.clock_of("cuda:0") is measure.cuda_clock


def test_a_turn_is_one_long_call_or_the_median_of_short_ones():
    step = Step(lambda _: None)
    assert measure.turn(step, 1.0, clock=lambda _: 2.0) == 2.0
    ticks = iter([0.9, 0.3, 0.1, 0.2, 0.4, 100.0])  # the first finds a cold cache
    assert measure.turn(step, 1.0, clock=lambda _: next(ticks)) == pytest.approx(0.25)


def test_rivals_alternate_and_the_first_moves_on():
    order: list[str] = []
    steps = {name: Step(lambda _, name=name: order.append(name)) for name in "abc"}  # type: ignore[misc]

    def clock(step: Step) -> float:
        step()
        return 1.0

    times = measure.alternate(steps, 3, min_seconds=0.5, clock=clock)
    assert times == {name: [1.0] * 3 for name in "abc"}
    assert "".join(order) == "abc" + "abc" + "bca" + "cab"  # the first of them to warm up


def test_what_comes_before_is_not_timed():
    seen: list[int] = []
    step = Step(seen.append, before=lambda: 7)
    assert measure.wall_clock(step) >= 0
    step()
    assert seen == [7, 7]


def test_spreads():
    spread = Spread.of([4.0, 1.0, 2.0, 3.0, 5.0])
    assert spread == pytest.approx((3.0, 1.8, 4.2))
    assert spread.per(9.0) == pytest.approx((3.0, 9 / 4.2, 5.0))
