"""All checks that need a GPU, in one command: ``make gpu-check``.

Builds in place with the Python at hand (no network, no environment of its own), runs the tests on
the GPU, sanitizers on a small case of each kernel, the profiler on the hot ones, and the benchmark
tables, and prints a summary. Everything is also written below a folder: one log, CSV rows, the
tables, JSON. Each stage has a time limit, and a failing one does not stop those after it.

Exit status: 0 where every stage passed or had no tool, 1 where one failed, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TextIO

ROOT = Path(__file__).resolve().parents[1]
LAST_SECONDS = 20.0  # kept for the summary where there is a limit for all
OK, FAILED, TIMEOUT, SKIPPED = "ok", "failed", "out of time", "skipped"


@dataclass(frozen=True)
class Stage:
    name: str
    command: tuple[str, ...]
    seconds: float  # limit
    environment: Mapping[str, str] = field(default_factory=dict)
    tool: str | None = None  # a program without which it is skipped
    shown: bool = False  # its output is printed, not only logged


@dataclass(frozen=True)
class Result:
    stage: str
    status: str
    seconds: float
    detail: str = ""


Runner = Callable[[Stage, float, TextIO], tuple[int | None, str]]
"""(stage, limit in seconds, log) -> exit status, None where time ran out, and the output."""


def run_command(stage: Stage, seconds: float, log: TextIO) -> tuple[int | None, str]:
    """Run a stage's command with all that it starts; its output goes straight to the log."""
    log.flush()
    path = Path(log.name)
    start = path.stat().st_size
    process = subprocess.Popen(
        stage.command,
        cwd=ROOT,
        env=os.environ | {"PYTHONUNBUFFERED": "1"} | dict(stage.environment),
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    status: int | None = None
    with contextlib.suppress(subprocess.TimeoutExpired):
        status = process.wait(timeout=seconds)
    if status is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return status, path.read_bytes()[start:].decode(errors="replace")


def run_stages(
    stages: Sequence[Stage],
    folder: Path,
    *,
    minutes: float | None = None,
    run: Runner = run_command,
    clock: Callable[[], float] = time.monotonic,
    has_tool: Callable[[str], bool] = lambda name: shutil.which(name) is not None,
) -> list[Result]:
    """Run the stages one after the other; ``summary.json`` in the folder is always up to date."""
    folder.mkdir(parents=True, exist_ok=True)
    began = clock()
    results: list[Result] = []
    path = folder / "log.txt"
    path.write_text("")
    with path.open("a", encoding="utf-8") as log:  # commands append to it too
        for place, stage in enumerate(stages):
            last = place == len(stages) - 1
            limit = stage.seconds
            if minutes is not None:
                limit = min(limit, 60 * minutes - (clock() - began) - (0 if last else LAST_SECONDS))
            if stage.tool is not None and not has_tool(stage.tool):
                result = Result(stage.name, SKIPPED, 0.0, f"{stage.tool} is not installed")
            elif limit <= 0:
                result = Result(stage.name, TIMEOUT, 0.0, "no time was left for it")
            else:
                print(f"== {stage.name}: at most {limit:.0f} s", flush=True)
                log.write(f"\n== {stage.name}: {' '.join(stage.command)}\n")
                log.flush()
                result = _run_stage(stage, limit, log, run, clock)
            results.append(result)
            print(_line(result), flush=True)
            record = [asdict(result) for result in results]
            (folder / "summary.json").write_text(json.dumps(record, indent=2) + "\n")
    return results


def _run_stage(
    stage: Stage, limit: float, log: TextIO, run: Runner, clock: Callable[[], float]
) -> Result:
    start = clock()
    try:
        status, output = run(stage, limit, log)
    except OSError as error:
        return Result(stage.name, FAILED, clock() - start, str(error))
    seconds = clock() - start
    if stage.shown:
        print(output)
    lines = [line for line in output.splitlines() if line.strip()]
    last_line = lines[-1].strip() if lines else ""
    if status == 0:
        return Result(stage.name, OK, seconds, last_line[:160])
    if not stage.shown:
        print("\n".join(lines[-20:]))
    if status is None:
        return Result(stage.name, TIMEOUT, seconds, last_line[:160])
    return Result(stage.name, FAILED, seconds, f"exit {status}: {last_line[:160]}")


def _line(result: Result) -> str:
    return f"{result.stage:<14} {result.status:<12} {result.seconds:6.0f} s  {result.detail}"


def exit_status(results: Sequence[Result]) -> int:
    return 0 if all(result.status in (OK, SKIPPED) for result in results) else 1


# --- the stages -----------------------------------------------------------------------------------


def test_folders(*, quick: bool) -> list[str]:
    """Tests of the operators and, unless quick, of the sources of a GPU's kernels."""
    names = ("ops",) if quick else ("ops", "cuda", "triton")
    return [f"tests/{name}" for name in names if (ROOT / "tests" / name).is_dir()]


def stages(python: str, folder: Path, capability: str, *, quick: bool) -> list[Stage]:
    """Of the check. ``capability``: the GPU's, as "90": all that is compiled for."""

    def bench(*arguments: str) -> tuple[str, ...]:
        return (python, "-m", "bench", *arguments, "--results", str(folder / "results"))

    def limit(short: float, long: float) -> float:
        return short if quick else long

    size = ("--quick",) if quick else ()
    cases = (python, "-m", "bench.gpu_cases")
    # Everything takes far longer under a sanitizer: the two that differ most in their sums.
    some = ("--similarities", "dot", "hake") if quick else ()
    sanitizer = ("compute-sanitizer", "--error-exitcode", "1", "--target-processes", "all")
    parallel = _pytest_parallel()
    # The parameters of tests that have a backend.
    selected = ("-k", "cuda or triton") if quick else ()
    return [
        Stage("environment", (python, "-m", "bench.gpu_check", "--environment"), 60, shown=True),
        Stage(
            "build",
            (
                *(python, "-m", "pip", "install", "--no-build-isolation", "--no-deps"),
                *("--no-index", "--disable-pip-version-check", "--editable", "."),
            ),
            limit(240, 600),
            {"CMAKE_ARGS": _cmake_arguments(capability)},
        ),
        Stage("backends", (*cases, "--list"), 60, shown=True),
        Stage(
            "tests",
            (
                python,
                "-m",
                "pytest",
                "-q",
                "--maxfail=20",
                *parallel,
                *selected,
                *test_folders(quick=quick),
            ),
            limit(120, 900),
        ),
        Stage(
            "memcheck",
            (*sanitizer, "--tool", "memcheck", *cases, *some),
            limit(90, 900),
            # Each tensor an allocation of its own, so that a step beyond its end is seen.
            {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            tool="compute-sanitizer",
        ),
        Stage(
            "racecheck",
            (*sanitizer, "--tool", "racecheck", *cases, *some),
            limit(90, 900),
            tool="compute-sanitizer",
        ),
        Stage(
            "ncu",
            (
                *("ncu", "--nvtx", "--nvtx-include", "hot/", "--clock-control", "none"),
                *("--section", "SpeedOfLight", "--section", "MemoryWorkloadAnalysis"),
                *("--section", "Occupancy", "--section", "LaunchStats"),
                *("--launch-count", "80", "--csv", "--page", "details", "--force-overwrite"),
                *("--log-file", str(folder / "ncu.csv"), *cases, "--hot"),
            ),
            limit(60, 300),
            tool="ncu",
        ),
        Stage("captured", bench("captured", "--device", "cuda"), limit(40, 120)),
        Stage("main table", bench("gpu", "--tables", "main", *size), limit(180, 1800)),
        Stage("similarities", bench("gpu", "--tables", "similarities", *size), limit(60, 600)),
        Stage("plans", bench("gpu", "--tables", "plans", *size), limit(40, 600)),
        Stage("summary", (*bench("report"), "--no-plots"), 60, shown=True),
    ]


def _cmake_arguments(capability: str) -> str:
    given = os.environ.get("CMAKE_ARGS", "")
    return given if given else f"-DCMAKE_CUDA_ARCHITECTURES={capability}-real"


def _pytest_parallel() -> tuple[str, ...]:
    from importlib.util import find_spec

    workers = min(8, os.cpu_count() or 1)
    return ("-n", str(workers)) if find_spec("xdist") is not None and workers > 2 else ()


def no_gpu() -> str | None:
    """Why there is no GPU to check on, or None."""
    try:
        import torch
    except ImportError as error:
        return f"torch cannot be imported ({error}): give a Python that has it, PYTHON=..."
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no CUDA device"
    return None


def print_environment() -> None:
    from importlib.metadata import distributions

    import torch

    print(f"Python {sys.version.split()[0]} at {sys.executable}")
    for name in ("torch", "triton", "pybind11", "ninja", "cmake", "pytest", "numpy", "setuptools"):
        found = next(iter(distributions(name=name)), None)
        print(f"{name} {found.version if found else 'is not installed'}")
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        print(f"{torch.cuda.get_device_name()}, sm_{major}{minor}, CUDA {torch.version.cuda}")
    for command in (("nvidia-smi",), ("nvcc", "--version")):
        tool = shutil.which(command[0])
        if tool is None:
            print(f"{command[0]} is not in PATH")
        else:
            subprocess.run([tool, *command[1:]], check=False)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_check", description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu-check", help="folder")
    parser.add_argument("--quick", action="store_true", help="fewer settings, shorter limits")
    parser.add_argument("--minutes", type=float, help="for everything; stages are cut to fit")
    parser.add_argument("--stages", nargs="+", metavar="NAME", help="some of them only")
    parser.add_argument("--environment", action="store_true", help="print versions; no more")
    options = parser.parse_args(arguments)
    if options.environment:
        print_environment()
        return 0
    reason = no_gpu()
    if reason is not None:
        print(f"gpu-check: nothing to check on: {reason}", file=sys.stderr)
        return 2
    import torch

    capability = "".join(map(str, torch.cuda.get_device_capability()))
    folder = options.out.resolve()
    every = stages(sys.executable, folder, capability, quick=options.quick)
    unknown = set(options.stages or ()) - {stage.name for stage in every}
    if unknown:
        names = ", ".join(repr(stage.name) for stage in every)
        parser.error(f"--stages: expected some of {names}")
    chosen = [stage for stage in every if not options.stages or stage.name in options.stages]
    results = run_stages(chosen, folder, minutes=options.minutes)
    print("\n== gpu-check")
    for result in results:
        print(_line(result))
    print(f"written to {folder}")
    return exit_status(results)


if __name__ == "__main__":
    sys.exit(main())
