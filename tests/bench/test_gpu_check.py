"""``make gpu-check`` from end to end without a GPU: with ``--device cpu`` it runs the same programs
on tiny sizes. Programs that stand in for compute-sanitizer and ncu run what they are given."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import results
from bench.gpu_check import FAILED, OK, PARTS, ROOT, TIMEOUT

ABSENT = ("hypothesis", "pooch", "pykeen", "setuptools", "torch_geometric", "torchkge", "tqdm")
"""What a GPU's machine may lack, or have in a version that is too old."""

STAND_IN = f"""#!{sys.executable}
import os, sys
values = {{"--error-exitcode", "--target-processes", "--report-api-errors", "--tool", "--page",
          "--nvtx-include", "--clock-control", "--launch-count", "--section", "--log-file"}}
switches = {{"--nvtx", "--csv", "--force-overwrite"}}
words = sys.argv[1:]
while words[0].startswith("-"):
    word = words.pop(0)
    if word in values:
        value = words.pop(0)
        if word == "--log-file":
            open(value, "w").write("ID\\n")
    elif word not in switches:
        sys.exit(f"unknown option {{word}}")
os.execvp(words[0], words)
"""


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_a_part_ends_with_its_facts_saved(part: str, tmp_path: Path) -> None:
    programs, blocked, out = tmp_path / "bin", tmp_path / "site", tmp_path / "out"
    for folder in (programs, blocked):
        folder.mkdir()
    for name in ("compute-sanitizer", "ncu"):
        (programs / name).write_text(STAND_IN)
        (programs / name).chmod(0o755)
    text = f"import sys\nsys.modules.update(dict.fromkeys({ABSENT}))\n"
    (blocked / "sitecustomize.py").write_text(text)
    path = os.pathsep.join([str(blocked), str(ROOT)])
    environment = os.environ | {"PATH": f"{programs}:{os.environ['PATH']}", "PYTHONPATH": path}
    # pytest looks for its plugins among what is installed, not among what can be imported.
    environment |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": "-p xdist.plugin"}
    options = "--device cpu"
    make = ["make", "gpu-check", f"PYTHON={sys.executable}", f"PART={part}", f"OUT={out}"]
    done = subprocess.run(
        [*make, f"GPU_CHECK={options}"], cwd=ROOT, env=environment, text=True, capture_output=True
    )
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
    assert {stage["status"] for stage in stages} <= {OK, FAILED, TIMEOUT}, done.stdout + log
    assert sum(stage["seconds"] for stage in stages) < 9.5 * 60
    assert done.returncode == (2 if late or lost else 0)  # make's
    families = set(results.read(out / part / "results")["family"]) if part != "b" else set()
    wanted = {
        "a": {"captured", "kernels", "steps"},
        "b": set(),
        "c": {"closed", "scale-D", "steps"},
    }
    assert families == wanted[part]
