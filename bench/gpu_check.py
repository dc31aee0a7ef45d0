"""All checks that need a GPU, in one command: ``make gpu-check``.

Builds in place with the given Python (no network, no environment of its own), runs the tests on
the GPU, sanitizers on a small case of each kernel, the profiler on the hot ones, and the
benchmarks, and prints a summary. Everything is also written to a folder: a log, JSON, CSV rows.
Each stage has a time limit, and a failing one does not stop those after it.

Exit status: 0 where every stage passed or was skipped, 1 where one failed, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
LAST_SECONDS = 20.0  # kept for the summary where there is a total limit
OK, FAILED, TIMEOUT, SKIPPED = "ok", "failed", "out of time", "skipped"


class Stage(NamedTuple):
    name: str
    command: str  # "NAME=value program ..."
    seconds: float  # limit
    tools: str = ""  # programs or modules without which it is skipped
    shown: bool = False  # its output is printed, not only logged


class Result(NamedTuple):
    stage: str
    seconds: float
    status: str
    detail: str

    def __str__(self) -> str:
        return f"{self.stage:<14} {self.status:<12} {self.seconds:6.0f} s  {self.detail}"


def run_stages(
    stages: Sequence[Stage], folder: Path, *, minutes: float = float("inf")
) -> list[Result]:
    """Run the stages in order; ``summary.json`` in the folder is always up to date."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "log.txt"
    log.write_text("")
    end = time.monotonic() + 60 * minutes
    results: list[Result] = []
    for stage in stages:
        kept = 0.0 if stage is stages[-1] else LAST_SECONDS
        results.append(_run(stage, min(stage.seconds, end - time.monotonic() - kept), log))
        print(results[-1], flush=True)
        record = [result._asdict() for result in results]
        (folder / "summary.json").write_text(json.dumps(record, indent=2) + "\n")
    return results


def _run(stage: Stage, limit: float, log: Path) -> Result:
    """Run a stage's command; at its limit it is killed with all that it started."""
    absent = [t for t in stage.tools.split() if not (shutil.which(t) or find_spec(t))]
    if absent:
        return Result(stage.name, 0.0, SKIPPED, f"{absent[0]} is not installed")
    if limit <= 0:
        return Result(stage.name, 0.0, TIMEOUT, "no time was left for it")
    print(f"== {stage.name}: at most {limit:.0f} s", flush=True)
    with log.open("a+", encoding="utf-8", errors="replace") as file:
        print(f"\n== {stage.name}: {stage.command}", file=file, flush=True)
        begin, start = file.tell(), time.monotonic()
        process = subprocess.Popen(
            ["env", "PYTHONUNBUFFERED=1", *shlex.split(stage.command)], cwd=ROOT,
            stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(limit)
            status, reason = (FAILED, f"exit {code}: ") if code else (OK, "")
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            status, reason = TIMEOUT, ""
        seconds = time.monotonic() - start
        file.seek(begin)
        lines = [line for line in file.read().splitlines() if line.strip()]
    if stage.shown or status != OK:
        print("\n".join(lines if stage.shown else lines[-20:]))
    last = lines[-1].strip()[:160] if lines else ""
    return Result(stage.name, seconds, status, reason + last)


def stages(folder: Path, capability: str, *, quick: bool) -> list[Stage]:
    """``capability``: the GPU's, as "90", the only one to compile for."""
    python, out = shlex.quote(sys.executable), shlex.quote(str(folder))
    bench, cases = f"{python} -m bench", f"{python} -m bench.gpu_cases"
    rows = f"{'--quick ' if quick else ''}--results {out}/results"
    # Under a sanitizer everything takes far longer: the two similarities that differ most.
    cases_of = f"{cases} --similarities dot hake" if quick else cases
    sanitizer = "compute-sanitizer --error-exitcode 1 --target-processes all --tool"
    ncu = (
        "ncu --nvtx --nvtx-include hot/ --clock-control none --launch-count 80 --csv "
        "--section SpeedOfLight --section MemoryWorkloadAnalysis --section Occupancy "
        f"--section LaunchStats --page details --force-overwrite --log-file {out}/ncu.csv"
    )
    pip = "-m pip install --no-build-isolation --no-deps --no-index --disable-pip-version-check"
    target = os.environ.get("CMAKE_ARGS") or f"-DCMAKE_CUDA_ARCHITECTURES={capability}-real"
    build = f"CMAKE_ARGS={shlex.quote(target)} {python} {pip} --editable ."
    workers = min(8, os.cpu_count() or 1)
    tests = f"{python} -m pytest -q --maxfail=20 "
    tests += f"-n {workers} " if find_spec("xdist") is not None and workers > 2 else ""
    # Quick: only tests with a backend as a parameter.
    tests += "-k 'cuda or triton' tests/ops" if quick else "tests/ops tests/cuda tests/triton"
    # Each tensor an allocation of its own, so that accesses beyond its end are found.
    memcheck = f"PYTORCH_NO_CUDA_MEMORY_CACHING=1 {sanitizer} memcheck {cases_of}"
    racecheck = f"{sanitizer} racecheck {cases_of}"
    captured = f"{bench} captured --device cuda --results {out}/results"
    messages = f"{bench} messages --device cuda --graph zipf --results {out}/results"
    report = f"{bench} report --results {out}/results"

    def limit(short: float, long: float) -> float:
        return short if quick else long

    return [
        Stage("environment", f"{python} -m torch.utils.collect_env", 60, shown=True),
        Stage("build", build, limit(240, 600)),
        Stage("backends", f"{cases} --list", 60, shown=True),
        Stage("tests", tests, limit(120, 900)),
        Stage("memcheck", memcheck, limit(90, 900), "compute-sanitizer"),
        Stage("racecheck", racecheck, limit(90, 900), "compute-sanitizer"),
        Stage("ncu", f"{ncu} {cases} --hot", limit(60, 300), "ncu"),
        Stage("captured", captured, limit(40, 120)),
        Stage("messages", messages, limit(60, 120)),
        Stage("tables", f"{bench} gpu {rows}", limit(240, 2400)),
        Stage("summary", report, 60, "pandas tabulate", shown=True),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_check", description=__doc__)
    add = parser.add_argument
    add("--out", type=Path, default=ROOT / "build" / "gpu-check", help="folder")
    add("--quick", action="store_true", help="fewer settings, shorter limits")
    add("--minutes", type=float, default=float("inf"), help="for all; stages are cut to fit")
    add("--stages", nargs="+", metavar="NAME", help="only these")
    options = parser.parse_args(arguments)
    try:
        import torch

        reason = None if torch.cuda.is_available() else f"torch {torch.__version__} sees no GPU"
    except ImportError as error:
        reason = f"{error}: set PYTHON to a Python that has torch"
    if reason is not None:
        print(f"gpu-check: nothing to check: {reason}", file=sys.stderr)
        return 2
    capability = "".join(map(str, torch.cuda.get_device_capability()))
    folder = options.out.resolve()
    every = {stage.name: stage for stage in stages(folder, capability, quick=options.quick)}
    if unknown := set(options.stages or ()) - set(every):
        parser.error(f"--stages: no {', '.join(unknown)}; known: {', '.join(every)}")
    chosen = [stage for name, stage in every.items() if name in (options.stages or every)]
    results = run_stages(chosen, folder, minutes=options.minutes)
    print("\n== gpu-check", *results, f"written to {folder}", sep="\n")
    return 0 if all(result.status in (OK, SKIPPED) for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
