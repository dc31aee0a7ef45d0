"""Peak memory of a step, each measurement in a fresh process.

That process imports everything, makes the inputs and runs the rival once on a tiny shape, so that
thread pools, lazily loaded libraries and the like are there. Then the allocator gives free memory
back, the kernel's high-water mark of resident memory (VmHWM) is set back to what is resident now,
and the rival runs a few steps. The answer is how far the mark has risen: temporaries, what is kept
for backward, and the gradients. The kernel counts pages in batches, so that below about 1 MiB the
answer is noise.
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
from pathlib import Path

import torch

from bench.inputs import TINY, Shape, make
from bench.rivals import BY_NAME

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


def peak_here(rival_name: str, shape: Shape, threads: int) -> int:
    """Bytes by which a step raises this process's peak. For a process that does nothing else."""
    torch.set_num_threads(threads)
    rival = BY_NAME[rival_name]
    rival.prepare(make(TINY))()
    step = rival.prepare(make(shape))
    _trim()
    _reset_peak()
    before = _status("VmRSS")
    for _ in range(STEPS):
        step()
    return max(_status("VmHWM") - before, 0)


def peak(rival_name: str, shape: Shape, threads: int) -> int:
    """:func:`peak_here` in a fresh process.

    Raises:
        RuntimeError: the process failed; with what it wrote.
    """
    order = json.dumps([rival_name, dataclasses.asdict(shape), threads])
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-m", "bench.memory", order],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"memory of {rival_name}: exit {done.returncode}:\n{done.stderr}")
    return int(done.stdout)


if __name__ == "__main__":
    name, fields, threads = json.loads(sys.argv[1])
    print(peak_here(name, Shape(**fields), threads))
