"""All checks that need a GPU, most valuable facts first: ``make gpu-check PART=a``, then b, then c.

Each part is a call of at most 9.5 minutes. It builds in place with the given Python (no network, no
environment of its own) and runs its stages: tests on the GPU, measurements, sanitizers on a small
case of each kernel, the profiler on the hot ones. Everything is also written to a folder: a log,
JSON, and rows, each when it is measured. Each stage has a time limit, at which it is interrupted as
by Ctrl-C, so that its report survives, and a failing one does not stop those after it.

Exit status: 0 where every stage passed or was skipped, 1 where one failed, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
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
PARTS = ("a", "b", "c")
MINUTES = 9.5  # of a part
LAST_SECONDS = 40.0  # of these, for the summary
GRACE = 15.0  # seconds that an interrupted stage has to write its report
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
        left = end - time.monotonic() - kept - GRACE
        results.append(_run(stage, min(stage.seconds, left), log))
        print(results[-1], flush=True)
        record = [result._asdict() for result in results]
        (folder / "summary.json").write_text(json.dumps(record, indent=2) + "\n")
    return results


def _run(stage: Stage, limit: float, log: Path) -> Result:
    """Run a stage's command; at its limit it is interrupted, then killed with all that it
    started."""
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
            ["env", "--default-signal=INT", "PYTHONUNBUFFERED=1", *shlex.split(stage.command)],
            cwd=ROOT,
            stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(limit)
            status, reason = (FAILED, f"exit {code}: ") if code else (OK, "")
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
            with contextlib.suppress(ProcessLookupError):  # nothing of it is left
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            status, reason = TIMEOUT, ""
        seconds = time.monotonic() - start
        file.seek(begin)
        lines = [line for line in file.read().splitlines() if line.strip()]
    failed = [line for line in lines if line.startswith("failed: ")]  # of bench
    if failed and status == OK:
        status, lines = FAILED, [*lines, f"{len(failed)} failed, {failed[0]}"]
    if stage.shown or status != OK:
        print("\n".join(lines if stage.shown else lines[-20:]))
    last = lines[-1].strip()[:160] if lines else ""
    return Result(stage.name, seconds, status, reason + last)


def stages(part: str, folder: Path, capability: str, device: str = "cuda") -> list[Stage]:
    """Those of a part.

    ``capability``: the GPU's, as "90", the only one to compile for. ``device``: "cpu" rehearses
    them: the same programs with tiny sizes, tests that are only collected, and a build elsewhere
    that leaves the CUDA kernels out.
    """
    rehearsed = device == "cpu"
    python, out = shlex.quote(sys.executable), shlex.quote(str(folder))
    tiny = " --tiny --no-memory" if rehearsed else ""
    bench = f"{python} -m bench {{}} --device {device} --results {out}/results{tiny}"
    cases = f"{python} -m bench.gpu_cases --device {device}"
    target = f"-DCMAKE_CUDA_ARCHITECTURES={capability}-real"
    target = "-DEMU_CUDA=OFF -DCMAKE_BUILD_TYPE=Debug" if rehearsed else target
    target = os.environ.get("CMAKE_ARGS") or target
    folders = f"{out}/built {out}/cmake" if rehearsed else "emu_kernels build/gpu-check-cmake"
    build = f"CMAKE_ARGS={shlex.quote(target)} EMU_CUDA_REPORTS={out}/ptxas "
    build += f"sh bench/gpu_build.sh {python} {folders}"
    # Under a sanitizer everything takes far longer: the two similarities that differ most.
    sanitizer = (
        "compute-sanitizer --error-exitcode 1 --target-processes all --report-api-errors no "
        f"--tool {{}} {cases} --similarities dot hake"
    )
    # Each tensor an allocation of its own, so that accesses beyond its end are found.
    memcheck = f"PYTORCH_NO_CUDA_MEMORY_CACHING=1 {sanitizer.format('memcheck')}"
    sections = (
        *("SpeedOfLight", "MemoryWorkloadAnalysis", "Occupancy", "LaunchStats"),
        *("WarpStateStats", "SchedulerStats"),
    )
    ncu = (
        "ncu --nvtx --nvtx-include hot/ --clock-control none --launch-count 80 --csv "
        f"--page details {' '.join(f'--section {name}' for name in sections)} "
        f"--force-overwrite --log-file {out}/ncu-{{0}}.csv {cases} --hot --backends {{0}}"
    )
    workers = min(8, os.cpu_count() or 1)
    xdist = find_spec("xdist") is not None and workers > 2
    pytest = f"{python} -m pytest -q --tb=short --continue-on-collection-errors -p no:cacheprovider"
    pytest += f"{f' -n {workers}' if xdist else ''}{' --collect-only' if rehearsed else ''}"

    def profile(backend: str) -> Stage:
        backend = "cpu" if rehearsed else backend
        return Stage(f"ncu {backend}", ncu.format(backend), 60, "ncu")

    of_gpus = "tests/cuda/test_gpu.py tests/triton/test_gpu.py"
    of_triton = "tests/ops/test_agreement.py tests/ops/test_mask.py tests/ops/test_similarities.py"
    facts = f"{pytest} {of_gpus} tests/ops/test_agreement.py -k 'test_gpu or cuda'"
    of_cuda = f"{pytest} tests/cuda tests/ops -m 'not slow' -k cuda"
    growth = bench.format("scale --axes D --gradient dense")
    by_part = {
        "a": [
            Stage("tests", facts, 120),
            Stage("captured", bench.format("captured"), 120),
            Stage("kernels", bench.format("kernels"), 60),
            profile("cuda"),
            Stage("tables", bench.format("gpu --quick"), 300),
        ],
        "b": [
            Stage("tests of cuda", of_cuda, 270),
            Stage("memcheck", memcheck, 150, "compute-sanitizer"),
            Stage("racecheck", sanitizer.format("racecheck"), 150, "compute-sanitizer"),
        ],
        # Of Triton's cases few: compiling each takes longest.
        "c": [
            Stage("tests of triton", f"{pytest} {of_triton} -m 'not slow' -k triton", 200),
            Stage("closed", bench.format("closed"), 60),
            Stage("messages", bench.format("messages --graph zipf"), 60),
            Stage("nbfnet", bench.format("messages --graph zipf --aggregate nbfnet"), 30, "pooch"),
            Stage("growth", growth, 120),
            profile("triton"),
            Stage("all tables", bench.format("gpu"), 400),
        ],
    }
    report = f"{python} -m bench report --results {out}/results"
    return [
        Stage("environment", f"{python} -m torch.utils.collect_env", 30, shown=True),
        Stage("build", build, 300),
        Stage("backends", f"{python} -m emu_kernels", 30, shown=True),
        *by_part[part],
        *([Stage("summary", report, 60, "pandas tabulate", shown=True)] if part != "b" else []),
    ]  # b measures nothing


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_check", description=__doc__)
    add = parser.add_argument
    add("--out", type=Path, default=ROOT / "build" / "gpu-check", help="folder")
    add("--part", choices=PARTS, default=PARTS[0], help="of the stages")
    add("--minutes", type=float, default=MINUTES, help="for the part; stages are cut to fit")
    add("--stages", nargs="+", metavar="NAME", help="only these of the part")
    rehearsed = "cuda, or cpu: rehearse it all on tiny sizes, without a GPU"
    add("--device", choices=["cuda", "cpu"], default="cuda", help=rehearsed)
    options = parser.parse_args(arguments)
    on_gpu = options.device == "cuda"
    try:
        import torch

        able = torch.cuda.is_available() or not on_gpu
        reason = None if able else f"torch {torch.__version__} sees no GPU"
    except ImportError as error:
        reason = f"{error}: set PYTHON to a Python that has torch"
    if reason is not None:
        print(f"gpu-check: nothing to check: {reason}", file=sys.stderr)
        return 2
    capability = "".join(map(str, torch.cuda.get_device_capability())) if on_gpu else ""
    folder = options.out.resolve() / options.part
    listed = stages(options.part, folder, capability, options.device)
    every = {stage.name: stage for stage in listed}
    if unknown := set(options.stages or ()) - set(every):
        parser.error(f"--stages: no {', '.join(unknown)}; known: {', '.join(every)}")
    chosen = [stage for name, stage in every.items() if name in (options.stages or every)]
    results = run_stages(chosen, folder, minutes=options.minutes)
    print("\n== gpu-check", *results, f"written to {folder}", sep="\n")
    return 0 if all(result.status in (OK, SKIPPED) for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
