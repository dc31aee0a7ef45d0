"""All checks that need a GPU, the most valuable first: ``make gpu-check PART=a``, then b, then c.

Each part is a call of at most 9.5 minutes. It builds in place with the given Python (without a
network or a new environment) and runs its stages: tests on the GPU, some of them under sanitizers,
measurements, the profiler. Everything is also written to a folder: a log, JSON, and rows, each as
soon as it is measured. Each stage has a time limit, at which it is interrupted as if by Ctrl-C, so
that its report survives; a stage that fails does not stop those after it.

Exit status: 0 if every stage passed or was skipped, 1 if one failed, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple, TextIO

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("a", "b", "c")
LAST_SECONDS = 40.0  # of a part, for the summary
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


def run_stages(stages: Sequence[Stage], folder: Path, minutes: float = 9.5) -> list[Result]:
    """Run the stages in order; ``summary.json`` in the folder is always up to date."""
    folder.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * minutes - GRACE
    results: list[Result] = []
    with (folder / "log.txt").open("w+", encoding="utf-8", errors="replace") as log:
        for stage in stages:
            left = end - time.monotonic() - (0 if stage is stages[-1] else LAST_SECONDS)
            results.append(_run(stage, min(stage.seconds, left), log))
            print(results[-1], flush=True)
            record = [result._asdict() for result in results]
            (folder / "summary.json").write_text(json.dumps(record, indent=2) + "\n")
    return results


def _run(stage: Stage, limit: float, log: TextIO) -> Result:
    """Run a stage's command. At its limit all of its processes are interrupted, then killed."""
    absent = [t for t in stage.tools.split() if not (shutil.which(t) or find_spec(t))]
    if absent:
        return Result(stage.name, 0.0, SKIPPED, f"{absent[0]} is not installed")
    if limit <= 0:
        return Result(stage.name, 0.0, TIMEOUT, "no time was left for it")
    print(f"== {stage.name}: at most {limit:.0f} s", flush=True)
    print(f"\n== {stage.name}: {stage.command}", file=log, flush=True)
    limited = f"timeout --signal=INT --kill-after={GRACE} {limit} env {stage.command}"
    command = ["env", "--default-signal=INT", "PYTHONUNBUFFERED=1", *shlex.split(limited)]
    begin, start = log.seek(0, os.SEEK_END), time.monotonic()
    code = subprocess.call(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    seconds = time.monotonic() - start
    log.seek(begin)
    lines = [line for line in log.read().splitlines() if line.strip()]
    failed = [line for line in lines if line.startswith("failed: ")]  # of bench
    status, reason = (FAILED, f"exit {code}: ") if code else (OK, "")
    if code and seconds >= limit:
        status, reason = TIMEOUT, ""
    elif failed and not code:
        status, lines = FAILED, [*lines, f"{len(failed)} failed, {failed[0]}"]
    if stage.shown or status != OK:
        print("\n".join(lines if stage.shown else lines[-20:]))
    return Result(stage.name, seconds, status, reason + "".join(lines[-1:]).strip()[:160])


def stages(part: str, folder: Path, capability: str, device: str = "cuda") -> list[Stage]:
    """The stages of a part.

    ``capability``: that of the GPU, such as "90"; kernels are compiled for it only. ``device``:
    "cpu" rehearses, with tiny sizes, tests that are only collected, and a build elsewhere without
    the CUDA kernels.
    """
    rehearsed = device == "cpu"
    python, out = shlex.quote(sys.executable), shlex.quote(str(folder))
    tiny = " --tiny --no-memory" if rehearsed else ""
    bench = f"{python} -m bench {{}} --device {device} --results {out}/results{tiny}".format
    target = f"-DCMAKE_CUDA_ARCHITECTURES={capability}-real"
    target = "-DEMU_CUDA=OFF -DCMAKE_BUILD_TYPE=Debug" if rehearsed else target
    target = shlex.quote(os.environ.get("CMAKE_ARGS") or target)
    folders = f"{out}/built {out}/cmake" if rehearsed else "emu_kernels build/gpu-check-cmake"
    build = f"sh bench/gpu_build.sh {python} {folders}"
    workers = min(8, os.cpu_count() or 1)
    pytest = f"{python} -m pytest -q --tb=short --continue-on-collection-errors -p no:cacheprovider"
    pytest += " --collect-only" if rehearsed else ""
    many = f"{pytest} -n {workers}" if find_spec("xdist") and workers > 2 else pytest
    agreement = "tests/ops/test_agreement.py"
    facts = f"tests/cuda/test_gpu.py tests/triton/test_gpu.py {agreement} -k 'test_gpu or cuda'"
    of_triton = f"{agreement} tests/ops/test_mask.py tests/ops/test_similarities.py"
    # Only some tests, of every dtype and kind of gradient: a sanitizer makes them far slower.
    sanitizer = (
        "compute-sanitizer --error-exitcode 1 --target-processes all --report-api-errors no "
        f"--tool {{}} {pytest} {of_triton} tests/ops/test_relational.py "
        "tests/ops/test_specification.py -m 'not slow' -k '(cuda or triton) and (dtypes or sparse "
        "or masks or low_precision or nan_reaches or test_mutate or (similarities and softmax))'"
    ).format
    # Each tensor is allocated by itself, so that accesses beyond its end are found.
    memcheck = f"PYTORCH_NO_CUDA_MEMORY_CACHING=1 {sanitizer('memcheck')}"
    steps = bench("steps --rounds 1 --batch 1024 --dim 512 --entities 14541 200000")
    ncu = (
        f"ncu --nvtx --nvtx-include hot/ --clock-control none --launch-count 160 --csv --set full "
        f"--page details --force-overwrite --log-file {out}/ncu-{{0}}.csv {steps} "
        "--dtype float32 bfloat16 --gradient dense sparse --rivals fused-emu fused-emu-{0} "
        f"--no-memory --results {out}/profiled"
    ).format
    few = "captured --rivals fused-emu-cuda fused-softmax-cuda eager-emu eager-softmax"
    by_part = {
        "a": [
            Stage("tests", f"{many} {facts}", 120),
            Stage("captured", bench(few), 120),
            Stage("kernels", bench("kernels"), 60),
            Stage("ncu cuda", ncu("cuda"), 60, "ncu"),
            Stage("tables", bench("gpu --quick"), 300),
        ],
        "b": [
            Stage("tests of cuda", f"{many} tests/cuda tests/ops -m 'not slow' -k cuda", 270),
            Stage("memcheck", memcheck, 150, "compute-sanitizer"),
            Stage("racecheck", sanitizer("racecheck"), 150, "compute-sanitizer"),
        ],
        # Few of Triton's cases, as compiling them takes longest.
        "c": [
            Stage("tests of triton", f"{many} {of_triton} -m 'not slow' -k triton", 200),
            Stage("captured", bench("captured"), 120),
            Stage("closed", bench("closed"), 60),
            Stage("messages", bench("messages --graph zipf"), 60),
            Stage("nbfnet", bench("messages --graph zipf --aggregate nbfnet"), 30, "pooch"),
            Stage("growth", bench("scale --axes D --gradient dense"), 120),
            Stage("ncu triton", ncu("triton"), 60, "ncu"),
            Stage("all tables", bench("gpu"), 400),
        ],
    }
    report = f"{python} -m bench report --results {out}/results"
    return [
        Stage("environment", f"{python} -m torch.utils.collect_env", 30, shown=True),
        Stage("build", f"CMAKE_ARGS={target} EMU_CUDA_REPORTS={out}/ptxas {build}", 300),
        Stage("backends", f"{python} -m emu_kernels", 30, shown=True),
        *by_part[part],
        *([Stage("summary", report, 60, "pandas tabulate", shown=True)] if part != "b" else []),
    ]  # b measures nothing


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_check", description=__doc__)
    add = parser.add_argument
    add("--out", type=Path, default=ROOT / "build" / "gpu-check", help="folder")
    add("--part", choices=PARTS, default=PARTS[0], help="the stages to run")
    add("--minutes", type=float, default=9.5, help="for the part; stages are cut to fit")
    add("--stages", nargs="+", metavar="NAME", help="only these of the part")
    add("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: rehearse it on tiny sizes")
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
    every = {x.name: x for x in stages(options.part, folder, capability, options.device)}
    if unknown := set(options.stages or ()) - set(every):
        parser.error(f"--stages: no {', '.join(unknown)}; known: {', '.join(every)}")
    chosen = [stage for name, stage in every.items() if name in (options.stages or every)]
    results = run_stages(chosen, folder, options.minutes)
    print("\n== gpu-check", *results, f"written to {folder}", sep="\n")
    return 0 if all(result.status in (OK, SKIPPED) for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
