"""Runs nvcc, and writes what ptxas reports about a file's kernels to the folder EMU_CUDA_REPORTS,
if that is set in the environment. CMakeLists.txt puts this program before each compiler command;
tests/cuda/test_registers.py reads the reports.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def main(command: list[str]) -> int:
    done = subprocess.run(command, text=True, stderr=subprocess.PIPE)
    noise = ("ptxas info", "    ")  # from -Xptxas -v
    lines = done.stderr.splitlines(keepends=True)
    sys.stderr.writelines(line for line in lines if done.returncode or not line.startswith(noise))
    folder = os.environ.get("EMU_CUDA_REPORTS")
    if folder and "-o" in command:
        target = Path(command[command.index("-o") + 1])
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / f"{target.name}.txt").write_text(done.stderr)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
