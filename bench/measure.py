"""Times of rivals that take turns in one process, so that a disturbance slows all; peak memory."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import re
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from bench.inputs import is_gpu

T = TypeVar("T")
Step = Callable[[], Callable[[], Any]]  # prepares, and returns what is timed
Turn = Callable[[], float]  # takes one turn and returns the seconds of a step
Prepare = Callable[[str, Any], Callable[[], Any]]  # of a rival by its name and a task, steps to run
MEMORY_STEPS = 3
MIB = 2**20


def synchronize(device: str) -> None:
    if is_gpu(device):
        torch.cuda.synchronize()


def wall_clock(step: Step, device: str = "cpu") -> float:
    """Seconds of a call; on a GPU from idle to idle, launches included."""
    run = step()
    synchronize(device)
    start = time.perf_counter()
    result = run()
    synchronize(device)
    seconds = time.perf_counter() - start
    del result  # freeing it is not timed
    return seconds


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
    result = run()
    end.record()
    end.synchronize()
    del result
    return start.elapsed_time(end) / 1000


def turn_of(
    step: Step, device: str, min_seconds: float | None = None, *, wall: bool = False
) -> Turn:
    """Warm up. A turn is one long call, or the median of short ones that last ``min_seconds``.

    The first of several does not count: it runs with the caches as another rival left them.
    """
    if min_seconds is None:
        min_seconds = 0.002 if is_gpu(device) else 0.05
    clock = cuda_clock if is_gpu(device) and not wall else partial(wall_clock, device=device)

    def turn() -> float:
        first = clock(step)
        if first >= min_seconds:
            return first
        times: list[float] = []
        while not times or sum(times) < min_seconds:
            times.append(clock(step))
        return statistics.median(times)

    step()()
    return turn


def alternate(
    names: Iterable[str], start: Callable[[str], Turn], rounds: int
) -> dict[str, list[float]]:
    """Seconds of each in each round. The order rotates by one each round.

    ``start`` makes the turns of a name, and warms it up. One that cannot be started is said to have
    failed, and does not stop the others.
    """
    turns: dict[str, Turn] = {}
    for name in names:
        try:
            turns[name] = start(name)
        except Exception as error:  # noqa: PERF203
            reason = str(error).strip().partition("\n")[0]
            print(f"failed: {name}: {type(error).__name__}: {reason}", flush=True)
    times: dict[str, list[float]] = {name: [] for name in turns}
    order = deque(turns)
    for _ in range(rounds):
        for name in order:
            times[name].append(turns[name]())
        order.rotate(-1)
    return times


def _field(file: str, name: str) -> int:
    """Bytes that a file of /proc states in kB."""
    found = re.search(rf"^{name}:\s+(\d+) kB$", Path(file).read_text(), re.MULTILINE)
    assert found, f"{file} has no {name}"
    return int(found[1]) * 1024


def resident(name: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at its peak since :func:`reset_peak`."""
    return _field("/proc/self/status", name)


def reset_peak() -> None:
    """Return freed memory to the system, and let the peak begin at what is left."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # proc(5): sets VmHWM to VmRSS


def free_bytes(device: str) -> int:
    """What can still be allocated."""
    if is_gpu(device):
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return _field("/proc/meminfo", "MemAvailable")


def too_large(needed: float, device: str) -> str | None:
    """Why an allocation of so many bytes does not fit, or None."""
    free = free_bytes(device)
    reason = f"needs about {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
    return None if needed < free else reason


def _peak_here(prepare: Prepare, name: str, shape: Any, threads: int) -> float:
    torch.set_num_threads(threads)
    prepare(name, shape.tiny())()
    run = prepare(name, shape)
    reset_peak()
    before = resident("VmRSS")
    run()
    return max(resident("VmHWM") - before, 0) / MIB


def peak(prepare: Prepare, name: str, shape: Any, threads: int) -> float:
    """MiB by which ``prepare(name, shape)()`` raises the peak memory of a fresh process.

    The process warms up on a tiny shape, and returns to the system what it has freed. The kernel
    counts pages in batches: below about 1 MiB the result is noise. Needs Linux.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_peak_here, prepare, name, shape, threads).result()


def cuda_peak(run: Callable[[], T]) -> tuple[T, float]:
    """Its result, and the MiB by which it raises the peak of torch's allocator."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = run()
    torch.cuda.synchronize()
    return result, (torch.cuda.max_memory_allocated() - before) / MIB


class Captured:
    """A step as a CUDA graph; a call replays it and returns the step's result.

    A replay reads and writes the memory of the step's own tensors, so the step lives as long.
    """

    def __init__(self, step: Callable[[], Any]) -> None:
        self.step = step
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
