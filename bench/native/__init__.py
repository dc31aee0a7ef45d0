"""The bare gather and scatter of a step's rows, in C++: the time below which no kernel can go.

Compiled when asked for, with this machine's own compiler and for this very machine.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from bench.inputs import Inputs

SOURCE = Path(__file__).with_name("gather_scatter.cpp")
FLAGS = ("-std=c++20", "-O3", "-march=native", "-shared", "-fPIC", "-pthread")
TRIALS = 5


class CannotCompile(Exception):
    """No compiler, or one that refuses; the message says which."""


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled source, loaded.

    Raises:
        CannotCompile: with the reason.
    """
    name = os.environ.get("CXX", "c++")
    compiler = shutil.which(name)
    if compiler is None:
        raise CannotCompile(f"no C++ compiler {name!r} in PATH (install GCC or Clang, or set CXX)")
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "gather_scatter.so"
        command = [compiler, *FLAGS, str(SOURCE), "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "error" in line]
            raise CannotCompile(f"{name} fails: {(lines or ['no message'])[0]}")
        loaded = ctypes.CDLL(str(target))  # stays mapped when the file is gone
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    loaded.gather_scatter.argtypes = [
        *[pointer] * 3, *[size] * 4, ctypes.c_int, ctypes.c_int, pointer,
    ]  # fmt: skip
    return loaded


def unavailable() -> str | None:
    """Why the yardstick cannot be had here, or None."""
    try:
        library()
    except CannotCompile as reason:
        return str(reason)
    return None


def gather_scatter(inputs: Inputs, *, by_segment: bool) -> Tensor:
    """Gather the rows of ``negative``; (N, D), row n the Σ of query_b over negative_bk = n."""
    query, table, ids = inputs.query, inputs.table, inputs.negative
    for name, tensor, dtype in (
        ("query", query, torch.float32),
        ("table", table, torch.float32),
        ("negative", ids, torch.int64),
    ):
        if tensor.dtype != dtype or not tensor.is_contiguous():
            raise ValueError(f"{name}: expected a contiguous {dtype} tensor")
    gradient = torch.empty(table.shape)
    failed = library().gather_scatter(
        table.data_ptr(), query.data_ptr(), ids.data_ptr(), *ids.shape, query.shape[1],
        table.shape[0], torch.get_num_threads(), by_segment, gradient.data_ptr(),
    )  # fmt: skip
    if failed:
        raise MemoryError("gather_scatter")
    return gradient


def prepare(inputs: Inputs) -> Callable[[], Tensor]:
    """A call with the scatter that is the faster one here."""

    def seconds(by_segment: bool) -> float:
        times = []
        for _ in range(TRIALS):
            start = time.perf_counter()
            gather_scatter(inputs, by_segment=by_segment)
            times.append(time.perf_counter() - start)
        return min(times)

    by_segment = seconds(True) < seconds(False)
    return lambda: gather_scatter(inputs, by_segment=by_segment)
