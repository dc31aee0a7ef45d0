"""Peak memory of a step or of a training run.

On a CPU each measurement has a fresh process. That process imports everything, makes what is given
and runs the same thing once on a tiny shape, so that thread pools, lazily loaded libraries and the
like are there. Then the allocator gives free memory back, the kernel's high-water mark of resident
memory (VmHWM) is set back to what is resident now, and what is measured runs. The answer is how far
the mark has risen. The kernel counts pages in batches, so that below about 1 MiB it is noise.

On a GPU the answer is how far torch's allocator rises above what is allocated before.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.inputs import TINY, Shape, make
from bench.measure import Step

ROOT = Path(__file__).resolve().parents[1]
STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")
STEPS = 3


def _reset_peak() -> None:
    CLEAR_REFS.write_text("5")  # proc(5): sets VmHWM to VmRSS


def unavailable() -> str | None:
    """Why peak memory cannot be measured here, or None."""
    try:
        _reset_peak()
    except OSError as error:
        return f"needs Linux's /proc/self/clear_refs ({error})"
    return None


def _status(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB$", STATUS.read_text(), re.MULTILINE)
    assert found is not None, field
    return int(found[1]) * 1024


def _trim() -> None:
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it
    if trim is not None:
        trim(0)


def free_bytes(device: str) -> int | None:
    """What can still be allocated, or None where nobody tells."""
    if torch.device(device).type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB$", Path("/proc/meminfo").read_text(), re.M)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


# --- what a fresh process measures ----------------------------------------------------------------


def _step(name: str, shape: dict[str, Any]) -> Callable[[], Any]:
    """Temporaries, what is kept for backward, and the gradients."""
    from bench.rivals import BY_NAME, WHOLE

    wanted = Shape(**shape)
    rival = BY_NAME[name]
    same_kind: dict[str, Any] = {"similarity": wanted.similarity, "dtype": wanted.dtype}
    tiny = dataclasses.replace(TINY, gradient=wanted.gradient, **same_kind)
    rival.prepare(make(tiny), WHOLE)()
    step = rival.prepare(make(wanted), WHOLE)

    def run() -> None:
        for _ in range(STEPS):
            step()

    return run


def _training(name: str, task: dict[str, Any], tiny: dict[str, Any]) -> Callable[[], Any]:
    """Model, gradients, optimiser and what the steps need; not the triples."""
    from bench.train import BY_NAME, Task

    rival = BY_NAME[name]
    small, wanted = Task(**tiny), Task(**task)
    rival.prepare(small, small.load())(1)
    graph = wanted.load()
    return lambda: rival.prepare(wanted, graph)(STEPS)


MEASURED: dict[str, Callable[..., Callable[[], Any]]] = {"step": _step, "training": _training}


def peak_here(threads: int, kind: str, *arguments: Any) -> int:
    """Bytes by which it raises this process's peak. For a process that does nothing else."""
    torch.set_num_threads(threads)
    run = MEASURED[kind](*arguments)
    _trim()
    _reset_peak()
    before = _status("VmRSS")
    run()
    return max(_status("VmHWM") - before, 0)


def peak(threads: int, kind: str, *arguments: Any) -> int:
    """:func:`peak_here` in a fresh process, of what JSON can say.

    Raises:
        RuntimeError: the process failed; with what it wrote.
    """
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-m", "bench.memory", json.dumps([threads, kind, *arguments])],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"memory of {arguments[0]}: exit {done.returncode}:\n{done.stderr}")
    return int(done.stdout.split()[-1])  # libraries may have printed before


def cuda_peak(step: Step) -> int:
    """Bytes by which a step's timed part raises the allocator's peak."""
    argument = step.before()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = step.run(argument)
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


if __name__ == "__main__":
    print(peak_here(*json.loads(sys.argv[1])))
