"""``make gpu-check``: its stages, its commands, its cases, and all of it without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import gpu_check, results
from bench.__main__ import _parser
from bench.gpu_check import FAILED, OK, ROOT, SKIPPED, TIMEOUT, Stage

ABSENT = ("hypothesis", "pooch", "pykeen", "setuptools", "torch_geometric", "torchkge", "tqdm")
"""What a machine with a GPU may lack, or have in a version that is too old."""
STAND_IN = '#!/bin/sh\nwhile [ ! -x "$1" ]; do shift; done\nexec "$@"\n'  # runs what it is given
FAMILIES = {"a": "captured kernels steps", "b": "", "c": "captured closed scale-D steps"}


def test_stages(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setattr(gpu_check, "GRACE", 1.0)
    sleep = "import subprocess, sys; print('began', flush=True); subprocess.run(['sleep', '60'])"
    told = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('its report')"
    deaf = "import signal, time; signal.signal(2, signal.SIG_IGN); print('deaf'); time.sleep(60)"
    quick = f"{sys.executable} -S -c"  # to start, on a busy machine too
    stages = [
        Stage("a", "GIVEN=value env", 60, shown=True),
        Stage("b", f"{sys.executable} -c 'import sys; print(1); sys.exit(4)'", 60),
        Stage("c", f'{quick} "{sleep}"', 3.0),
        Stage("d", "no-such-program", 60),
        Stage("e", "true", 60, tools="no_such_tool"),
        Stage("f", f'{quick} "{told}"', 3.0),
        Stage("g", f'{quick} "{deaf}"', 3.0),
        Stage("h", "echo failed: a rival", 60),
    ]
    start = time.monotonic()
    found = gpu_check.run_stages(stages, tmp_path)
    assert time.monotonic() - start < 40  # the stage's child was killed too
    expected = [OK, FAILED, TIMEOUT, FAILED, SKIPPED, TIMEOUT, TIMEOUT, FAILED]
    assert [r.status for r in found] == expected
    assert found[1].detail == "exit 4: 1"
    assert [r.detail for r in found[5:]] == ["its report", "deaf", "1 failed, failed: a rival"]
    assert "GIVEN=value" in capsys.readouterr().out
    record = json.loads((tmp_path / "summary.json").read_text())
    assert "".join(r["stage"] for r in record) == "abcdefgh"
    (cut,) = gpu_check.run_stages([stages[0]], tmp_path, minutes=0)
    assert cut.detail == "no time was left for it"


@pytest.mark.parametrize("part", gpu_check.PARTS)
def test_commands(part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for stage in gpu_check.stages(part, tmp_path, "90"):
        command = stage.command.split()
        if command[1:3] == ["-m", "bench"]:
            assert _parser().parse_args(command[3:]).results == tmp_path / "results"
        assert all((ROOT / word).exists() for word in command if word.startswith("tests/"))
    if not torch.cuda.is_available():
        assert gpu_check.main(["--out", str(tmp_path)]) == 2
        assert "nothing to check" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("part", gpu_check.PARTS)
def test_a_part_ends_with_its_facts_saved(part: str, tmp_path: Path) -> None:
    """The same programs on tiny sizes; compute-sanitizer and ncu run what they are given."""
    out = tmp_path / "out"
    for name in ("compute-sanitizer", "ncu"):
        (tmp_path / name).write_text(STAND_IN)
        (tmp_path / name).chmod(0o755)
    text = f"import sys\nsys.modules.update(dict.fromkeys({ABSENT}))\n"
    (tmp_path / "sitecustomize.py").write_text(text)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    environment |= {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    # pytest looks for its plugins among what is installed, not among what can be imported.
    environment |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": "-p xdist.plugin"}
    make = f"make gpu-check PYTHON={sys.executable} PART={part} OUT={out} 'GPU_CHECK=--device cpu'"
    done = subprocess.run(make, shell=True, cwd=ROOT, env=environment, capture_output=True)
    stages = json.loads((out / part / "summary.json").read_text())
    log = (out / part / "log.txt").read_text()
    # Compiling every rival takes longer than a part has; on a busy machine so does building.
    late = {stage["stage"] for stage in stages if stage["status"] == TIMEOUT}
    assert late <= {"build", "growth", "tables", "all tables"}, log
    # On a CPU torch.compile needs setuptools, on a GPU it does not: that rival is left out.
    lost = {stage["stage"] for stage in stages if stage["status"] == FAILED}
    assert lost <= {"tables", "all tables"}, log
    failures = [line for line in log.splitlines() if line.strip().startswith("failed: ")]
    assert all("compiled-emu" in x and "setuptools halted" in x for x in failures), log
    # NBFNet's step needs the trainer's pooch, which is hidden here, as a GPU machine may lack it.
    assert {stage["stage"] for stage in stages if stage["status"] == SKIPPED} <= {"nbfnet"}, log
    assert sum(stage["seconds"] for stage in stages) < 9.5 * 60
    assert done.returncode == (2 if late or lost else 0)  # make's
    found = set(results.read(out / part / "results")["family"]) if part != "b" else set()
    assert found == {*FAMILIES[part].split()}
