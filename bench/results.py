"""Measurements as rows of a CSV file for each device, which only ever grows."""

from __future__ import annotations

import csv
import dataclasses
import datetime
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

import emu_kernels

ROOT = Path(__file__).resolve().parents[1]
FOLDER = Path(__file__).with_name("results")
MIB = 2**20

TIME, RATIO, MEMORY = "time", "time ratio", "peak memory"
SHARE, BANDWIDTH = "share of the copy bandwidth", "copy bandwidth"
SPEED = "triples a second"
UNITS = {
    TIME: "ms", RATIO: "x", MEMORY: "MiB", SHARE: "share", BANDWIDTH: "GB/s", SPEED: "1/s",
}  # fmt: skip
"""What a row tells, and in which unit."""


@dataclass(frozen=True)
class Row:
    """One measurement. All rows of one run bear the same date."""

    date: str  # when the run began, UTC
    commit: str  # of this repository, "-dirty" where files differ from it
    family: str  # of comparisons, as on the command line
    what: str
    rival: str
    phase: str  # of what a step or a run consists of
    base: str  # the rival by whose time a ratio divides, or ""
    graph: str  # the triples' origin, or "" for random tensors
    model: str  # or "" for the operator alone
    optimizer: str  # or ""
    similarity: str
    B: int
    K: int
    D: int
    N: int
    dtype: str
    gradient: str  # of the table, "dense" or "sparse"
    threads: int  # of the CPU
    median: float
    q20: float
    q80: float
    unit: str
    device: str
    instruction_set: str
    library: str  # the rival's, with its version, or ""
    emu_kernels: str
    torch: str
    python: str


COLUMNS = tuple(field.name for field in dataclasses.fields(Row))
T = TypeVar("T")
_TYPES: dict[str, type] = {"int": int, "float": float, "str": str}


def _cpu_model() -> str:
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text()
    except OSError:
        cpuinfo = ""
    found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


def device(of: str = "cpu") -> str:
    """The GPU, or this machine's CPU with the number of cores that this process may use."""
    if torch.device(of).type == "cuda":
        return torch.cuda.get_device_name(of)
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count()
    return f"{_cpu_model()}, {cores} core{'s' if cores != 1 else ''}"


def slug(name: str) -> str:
    """A device's name as a file name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def commit() -> str:
    """The commit that is checked out; where git cannot tell, BENCH_COMMIT or "unknown"."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        name = git("rev-parse", "--short=12", "HEAD")
        # The results themselves change with every run.
        changed = git("status", "--porcelain", "--", ".", ":(exclude)bench/results")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("BENCH_COMMIT", "unknown")
    return name + ("-dirty" if changed else "")


def environment(of: str = "cpu") -> dict[str, Any]:
    """The columns that are the same for all rows of a run on a device that begins now."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "device": device(of),
        "emu_kernels": emu_kernels.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def append(folder: Path, rows: Iterable[Row]) -> list[Path]:
    """Add rows to the files of their devices; returns these.

    Raises:
        ValueError: a file that has other columns.
    """
    by_device: dict[str, list[Row]] = {}
    for row in rows:
        by_device.setdefault(row.device, []).append(row)
    paths = []
    for name, of_device in by_device.items():
        paths.append(folder / f"{slug(name)}.csv")
        append_to(paths[-1], of_device)
    return paths


def read(path: Path) -> list[Row]:
    """The rows of a file or, in the order of their names, of a folder's files.

    Raises:
        ValueError: a file that is not of this form, with the line.
    """
    if path.is_dir():
        return [row for file in sorted(path.glob("*.csv")) for row in read(file)]
    return read_from(path, Row)


def append_to(path: Path, rows: Sequence[Any]) -> None:
    """Add dataclass instances, all of one class, to a file.

    Raises:
        ValueError: it has other columns.
    """
    fresh = not path.exists()
    if not fresh:
        read_from(path, type(rows[0]))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="", encoding="utf-8") as file:
        columns = [field.name for field in dataclasses.fields(rows[0])]
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if fresh:
            writer.writeheader()
        for row in rows:
            values = dataclasses.asdict(row)
            writer.writerow(
                {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in values.items()}
            )


def read_from(path: Path, kind: type[T]) -> list[T]:
    """What :func:`append_to` wrote.

    Raises:
        ValueError: a file that is not of this form, with the line.
    """
    fields = {field.name: _TYPES[str(field.type)] for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    rows = []
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != tuple(fields):
            raise ValueError(f"{path}: expected the columns {', '.join(fields)}")
        for record in reader:
            try:
                values = {name: convert(record[name]) for name, convert in fields.items()}
            except (TypeError, ValueError) as error:
                raise ValueError(f"{path}: line {reader.line_num}: {error}") from error
            rows.append(kind(**values))
    return rows
