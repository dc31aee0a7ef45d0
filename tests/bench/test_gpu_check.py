"""``make gpu-check`` without a GPU: its stages by fakes, its programs in small on the CPU."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TextIO

import pytest
import torch

from bench import gpu_cases, gpu_check
from bench.__main__ import _parser
from bench.gpu_check import FAILED, OK, SKIPPED, TIMEOUT, Result, Stage, exit_status, run_stages
from emu_kernels.similarity import SIMILARITIES


def stage(name: str, seconds: float = 100.0, **more: object) -> Stage:
    return Stage(name, ("program", name), seconds, **more)  # type: ignore[arg-type]


class Fake:
    """A runner that tells of each stage what it is told to, and a clock that it moves."""

    def __init__(self, **outcomes: tuple[int | None, float]) -> None:
        self.outcomes = outcomes
        self.now = 1000.0
        self.limits: dict[str, float] = {}

    def run(self, stage: Stage, seconds: float, log: TextIO) -> tuple[int | None, str]:
        self.limits[stage.name] = seconds
        status, took = self.outcomes.get(stage.name, (0, 1.0))
        self.now += min(took, seconds)
        output = f"{stage.name} began\nlast line of {stage.name}\n"
        log.write(output)
        return (None if took > seconds else status), output

    def clock(self) -> float:
        return self.now


def run(
    fake: Fake, stages: list[Stage], folder: Path, minutes: float | None = None
) -> list[Result]:
    tools = {"present"}
    return run_stages(
        stages, folder, minutes=minutes, run=fake.run, clock=fake.clock, has_tool=tools.__contains__
    )


def test_a_failing_stage_does_not_stop_the_others(tmp_path, capsys):
    fake = Fake(b=(3, 2.0), c=(0, 200.0))
    found = run(fake, [stage(name) for name in "abcd"], tmp_path / "out")
    assert [r.status for r in found] == [OK, FAILED, TIMEOUT, OK]
    assert found[1].detail == "exit 3: last line of b"
    assert [r.seconds for r in found] == [1.0, 2.0, 100.0, 1.0]
    assert exit_status(found) == 1
    log = (tmp_path / "out" / "log.txt").read_text()
    assert [line for line in log.splitlines() if line.startswith("==")] == [
        f"== {name}: program {name}" for name in "abcd"
    ]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [(r["stage"], r["status"]) for r in summary] == [
        ("a", OK), ("b", FAILED), ("c", TIMEOUT), ("d", OK),
    ]  # fmt: skip
    out = capsys.readouterr().out
    assert "b began" in out  # the end of what a failing one said
    assert "a began" not in out


def test_a_missing_tool_is_a_line_and_no_failure(tmp_path, capsys):
    fake = Fake()
    stages = [stage("a", tool="absent"), stage("b", tool="present")]
    found = run(fake, stages, tmp_path)
    assert [r.status for r in found] == [SKIPPED, OK]
    assert exit_status(found) == 0
    assert "absent is not installed" in capsys.readouterr().out


def test_stages_are_cut_to_the_time_for_all(tmp_path):
    """Two minutes: the second stage gets what is left but for the last's share."""
    fake = Fake(a=(0, 60.0), b=(0, 50.0), c=(0, 1.0), d=(0, 1.0))
    found = run(fake, [stage(name) for name in "abcd"], tmp_path, minutes=2.0)
    assert fake.limits == {"a": 100.0, "b": 40.0, "d": 20.0}
    assert [r.status for r in found] == [OK, TIMEOUT, TIMEOUT, OK]
    assert found[2].detail == "no time was left for it"


def test_output_of_a_shown_stage_is_printed(tmp_path, capsys):
    run(Fake(), [stage("a", shown=True)], tmp_path)
    assert "a began" in capsys.readouterr().out


def test_a_real_command(tmp_path):
    program = "import os, sys; print(os.environ['GIVEN']); sys.exit(4)"
    real = Stage("real", (sys.executable, "-c", program), 60, {"GIVEN": "value"})
    (found,) = run_stages([real], tmp_path)
    assert (found.status, found.detail) == (FAILED, "exit 4: value")
    absent = Stage("absent", ("no-such-program-anywhere",), 60)
    (found,) = run_stages([absent], tmp_path)
    assert found.status == FAILED


def test_a_real_command_that_takes_too_long_is_ended_with_its_children(tmp_path):
    program = (
        "import subprocess, sys, time\n"
        "print('began', flush=True)\n"
        "subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
    )
    start = time.monotonic()
    (found,) = run_stages([Stage("slow", (sys.executable, "-c", program), 1.0)], tmp_path)
    assert (found.status, found.detail) == (TIMEOUT, "began")
    assert time.monotonic() - start < 30


@pytest.mark.parametrize("quick", [True, False])
def test_the_stages(quick, tmp_path):
    stages = gpu_check.stages("python", tmp_path, "90", quick=quick)
    names = [s.name for s in stages]
    assert names == [
        "environment", "build", "backends", "tests", "memcheck", "racecheck", "ncu", "captured",
        "main table", "similarities", "plans", "summary",
    ]  # fmt: skip
    by_name = dict(zip(names, stages, strict=True))
    assert "--no-index" in by_name["build"].command
    assert {by_name[n].tool for n in ("memcheck", "racecheck")} == {"compute-sanitizer"}
    for name in ("main table", "similarities", "plans"):
        assert ("--quick" in by_name[name].command) == quick
    for name in ("captured", "main table", "summary"):
        assert str(tmp_path / "results") in by_name[name].command  # apart from the profiler's CSV
    for s in stages:
        if s.command[1:3] == ("-m", "bench"):
            assert _parser().parse_args(s.command[3:]).results == tmp_path / "results"
    assert "90" in by_name["build"].environment["CMAKE_ARGS"]
    folders = gpu_check.test_folders(quick=quick)
    assert "tests/ops" in folders
    assert all((gpu_check.ROOT / folder).is_dir() for folder in folders)
    if quick:
        assert sum(s.seconds for s in stages) < 20 * 60


def test_without_a_gpu_it_says_so_at_once(tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert gpu_check.main(["--out", str(tmp_path / "out")]) == 2
    assert "nothing to check on" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_unknown_stage_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(gpu_check, "no_gpu", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    with pytest.raises(SystemExit):
        gpu_check.main(["--stages", "no such"])
    assert "'main table'" in capsys.readouterr().err


def test_the_environment_is_told(capfd):
    gpu_check.print_environment()
    assert f"torch {torch.__version__.partition('+')[0]}" in capfd.readouterr().out


def test_every_kernel_is_among_the_cases():
    cases = list(gpu_cases.cases("cpu"))
    assert {c.shape.similarity for c in cases} == set(SIMILARITIES)
    assert {c.shape.dtype for c in cases} == {"float32", "bfloat16", "float16"}
    assert {c.shape.gradient for c in cases} == {"dense", "sparse"}
    assert any(c.shared for c in cases)


def test_the_cases_run_on_the_cpu(capsys):
    assert gpu_cases.main(["--device", "cpu"]) == 0
    out = capsys.readouterr().out
    for case in gpu_cases.cases("cpu"):
        assert f"cpu: {case.name}\n" in out
    assert "cuda: is measured with --device cuda" in out


def test_the_hot_cases_run_in_small(monkeypatch, capsys):
    monkeypatch.setattr(gpu_cases, "HOT", (gpu_cases.ODD,))
    assert gpu_cases.main(["--device", "cpu", "--hot"]) == 0
    assert "bfloat16" in capsys.readouterr().out


def test_no_backend_is_a_failure(capsys):
    assert gpu_cases.main(["--device", "cpu", "--list", "--backends", "cuda"]) == 1
    assert "cuda: is measured with" in capsys.readouterr().out
