"""Measurements as rows of CSV files, one file for each device, to which runs append."""

from __future__ import annotations

import csv
import datetime
import os
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import emu_kernels
from bench.inputs import is_gpu

if TYPE_CHECKING:
    import pandas

ROOT = Path(__file__).resolve().parents[1]
FOLDER = Path(__file__).with_name("results")

TIME, RATIO, MEMORY = "time", "time ratio", "peak memory"
SPEED = "triples a second"
UNITS = {TIME: "ms", RATIO: "x", MEMORY: "MiB", SPEED: "1/s"}

# date: when the run began, UTC, the same in all its rows; commit: with "-dirty" if files differ;
# family: of comparisons, as on the command line; what: a key of UNITS; base: the rival whose time a
# ratio is relative to; gradient: of the table; library: the rival's. Empty where not applicable.
COLUMNS = (
    "date", "commit", "family", "what", "rival", "phase", "base", "graph", "model", "optimizer",
    "similarity", "B", "K", "D", "N", "dtype", "gradient", "threads", "median", "q20", "q80",
    "unit", "device", "instruction_set", "library", "emu_kernels", "torch", "python",
)  # fmt: skip
QUANTILES = ("median", "q20", "q80")
NUMBERS = dict.fromkeys(("B", "K", "D", "N", "threads"), "int64")
NUMBERS |= dict.fromkeys(QUANTILES, "float64")
Row = dict[str, Any]


def of_values(what: str, values: Any, **columns: Any) -> Row:
    """A row with the values' quantiles."""
    low, median, high = np.quantile(values, (0.2, 0.5, 0.8)).tolist()
    columns |= {"what": what, "unit": UNITS[what]}
    return columns | {"median": median, "q20": low, "q80": high}


def of_times(times: Mapping[str, Any], base: str | None, rival: str, batch: int = 0) -> list[Row]:
    """A rival's time, its speed if the batch is given, and its ratio to the base's times."""
    seconds = np.array(times[rival])
    rows = [of_values(TIME, 1000 * seconds, rival=rival)]
    if batch:
        rows.append(of_values(SPEED, batch / seconds, rival=rival))
    if base is not None:
        rows.append(of_values(RATIO, seconds / np.array(times[base]), rival=rival, base=base))
    return rows


def device_name(device: str = "cpu") -> str:
    """The GPU, or this machine's CPU with the number of cores that this process may use."""
    if is_gpu(device):
        return torch.cuda.get_device_name(device)
    cores = len(os.sched_getaffinity(0))
    found = re.search(r"model name\s*:\s*(.+)\n", Path("/proc/cpuinfo").read_text())
    model = found[1].strip() if found else platform.machine()
    return f"{model}, {cores} core{'s' if cores != 1 else ''}"


def commit() -> str:
    """The commit that is checked out; without git BENCH_COMMIT or "unknown"."""
    git = partial(subprocess.check_output, cwd=ROOT, text=True, stderr=subprocess.DEVNULL)
    try:
        name = git(["git", "rev-parse", "--short=12", "HEAD"]).strip()
        # Without the results, which every run changes.
        changed = git(["git", "status", "--porcelain", "--", ".", ":(exclude)bench/results"])
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("BENCH_COMMIT", "unknown")
    return name + ("-dirty" if changed else "")


def environment(device: str = "cpu") -> Row:
    """The columns that all rows of a run that begins now share."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(), "device": device_name(device), "emu_kernels": emu_kernels.__version__,
        "torch": torch.__version__, "python": platform.python_version(),
    }  # fmt: skip


def append(folder: Path, rows: Sequence[Row], columns: Sequence[str] = COLUMNS) -> Path:
    """Add rows of one device to its file, and return the file. Needs no pandas."""
    folder.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^a-z0-9]+", "-", rows[0]["device"].lower()).strip("-")
    path = folder / f"{name}.csv"
    with path.open("a+", newline="", encoding="utf-8") as file:
        file.seek(0)
        header = file.readline().strip()
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        if not header:
            writer.writeheader()
        elif header != ",".join(columns):
            raise ValueError(f"{path}: expected the columns {', '.join(columns)}")
        for row in rows:
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
    return path


def read(
    path: Path, columns: Sequence[str] = COLUMNS, numbers: Mapping[str, str] = NUMBERS
) -> pandas.DataFrame:
    """The rows of a file, or of a folder's files by name.

    Raises:
        ValueError: a file lacks a column, or a value has another type.
    """
    import pandas as pd

    types = {name: numbers.get(name, "str") for name in columns}
    frames = [pd.DataFrame(columns=list(columns)).astype(types)]
    for file in sorted(path.glob("*.csv")) if path.is_dir() else [path]:
        try:
            frames.append(pd.read_csv(file, dtype=types, usecols=columns, keep_default_na=False))
        except ValueError as error:  # noqa: PERF203
            raise ValueError(f"{file}: {error}") from error
    return pd.concat(frames, ignore_index=True)
