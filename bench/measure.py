"""Times of rivals that take turns in one process, so that disturbances slow all; peak memory."""

from __future__ import annotations

import ctypes
import gc
import itertools
import math
import multiprocessing
import statistics
import textwrap
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.inputs import is_gpu

Step = Callable[[], Callable[[], Any]]  # prepares, and returns the function to time
Turn = Callable[[], float]  # takes one turn and returns the seconds of a step
Run = Callable[[int], float]  # takes so many steps and returns their seconds
MIB = 2**20


def synchronize(device: str) -> None:
    if is_gpu(device):
        torch.cuda.synchronize()


def wall_clock(step: Step, device: str = "cpu") -> float:
    """Seconds of a call; on a GPU from idle to idle, launches included."""
    run = step()
    synchronize(device)
    start = time.perf_counter()
    _kept = run()  # freeing it is not timed
    synchronize(device)
    return time.perf_counter() - start


def cuda_clock(step: Step) -> float:
    """GPU time of a call, by CUDA events.

    The GPU is kept busy for about a millisecond first, so that launches queue up and their cost on
    the CPU is hidden, unless the step itself waits for the GPU (as coalescing does).
    """
    run = step()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000)  # cycles
    start.record()
    with torch.cuda.nvtx.range("hot"):  # for a profiler
        _kept = run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def turn_of(step: Step, device: str, *, tiny: bool = False) -> Turn:
    """Warm up. A turn is a long call, or the median of short ones; with ``tiny`` one call.

    The first of several does not count: it runs with the caches as another rival left them.
    """
    clock, min_seconds = (cuda_clock, 0.002) if is_gpu(device) else (wall_clock, 0.05)

    def turn() -> float:
        first = clock(step)
        if tiny or first >= min_seconds:
            return first
        times: list[float] = []
        while sum(times) < min_seconds:
            times.append(clock(step))
        return statistics.median(times)

    step()()
    return turn


def run_of(step: Callable[[int], Any], device: str) -> Run:
    """A run of steps, each given its number, without waiting for the GPU in between."""
    numbers = itertools.count()

    def train(steps: int) -> None:
        for number in itertools.islice(numbers, steps):
            step(number)

    return lambda steps: wall_clock(lambda: partial(train, steps), device)


def turn_of_run(run: Run, *, tiny: bool = False) -> Turn:
    """Warm up. A turn is as many steps as take a quarter of a second; with ``tiny`` one."""
    run(3)
    steps = 1 if tiny else math.ceil(0.25 / run(1))
    return lambda: run(steps) / steps


def alternate(rivals: Mapping[str, Callable[[], Turn]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each rival in each round. The order rotates by one each round.

    A rival is a function that warms up and returns its turn. One that cannot be started is reported
    as failed, and does not stop the others.
    """
    turns: dict[str, Turn] = {}
    for name, start in rivals.items():
        try:
            turns[name] = start()
        except Exception as error:  # noqa: PERF203
            # The second line may say what was wrong; after an empty one comes advice.
            reason = textwrap.shorten(str(error).strip().partition("\n\n")[0], 300)
            print(f"failed: {name}: {type(error).__name__}: {reason}", flush=True)
    times: dict[str, list[float]] = {name: [] for name in turns}
    order = deque(turns)
    for _ in range(rounds):
        for name in order:
            times[name].append(turns[name]())
        order.rotate(-1)
    return times


def system_bytes(name: str, file: str = "/proc/self/status") -> int:
    """A value of Linux: for this process VmRSS, or VmHWM, its peak since :func:`reset_peak`."""
    (line,) = (x for x in Path(file).read_text().splitlines() if x.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024  # given in kB


def reset_peak() -> None:
    """Return freed memory to the system, and restart the peak at what is left."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # proc(5): sets VmHWM to VmRSS


def too_large(needed: float, device: str) -> str | None:
    """Why an allocation of so many bytes does not fit, or None."""
    free = free_bytes(device)
    reason = f"needs about {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
    return None if needed < free else reason


def free_bytes(device: str) -> int:
    if is_gpu(device):
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return system_bytes("MemAvailable", "/proc/meminfo")


def in_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a function in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def _cpu_peak(prepare: Callable[[Any], Any], shape: Any, threads: int) -> float:
    torch.set_num_threads(threads)
    prepare(shape.tiny())()  # warms up
    run = prepare(shape)
    reset_peak()
    before = system_bytes("VmRSS")
    run()
    return max(system_bytes("VmHWM") - before, 0) / MIB


def peak(prepare: Callable[[Any], Any], shape: Any, threads: int) -> float:
    """MiB by which ``prepare(shape)()`` raises the peak memory: on a GPU that of torch's allocator,
    on a CPU that of a fresh process, where results below about 1 MiB are noise, as Linux counts
    pages in batches.
    """
    if not is_gpu(shape.device):
        return in_process(_cpu_peak, prepare, shape, threads)
    run = prepare(shape)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / MIB


class Captured:
    """A step as a CUDA graph; a call replays it and returns the step's result."""

    def __init__(self, step: Callable[[], Any]) -> None:
        self.step = step  # keeps the tensors that a replay reads and writes
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.result = step()

    def __call__(self) -> Any:
        self.graph.replay()
        return self.result
