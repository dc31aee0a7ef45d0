"""Every emulated CUDA kernel on one small batch, under AddressSanitizer and UBSan."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.cuda.emulation import ROOT

SOURCES = [
    "tests/cuda/sanitized.cpp",
    *(f"csrc/cuda/{name}.cu" for name in ("sort", "segments", "mutate")),
]
FLAGS = ["-std=c++20", "-O0", "-g1", "-ffp-contract=off", "-Icsrc", "-Itests/cuda"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


@pytest.mark.slow
def test_no_sanitizer_complains(tmp_path: Path) -> None:
    program = tmp_path / "sanitized"
    command = ["g++", *SANITIZERS, *FLAGS, "-x", "c++", *SOURCES]
    subprocess.run([*command, "-o", program], cwd=ROOT, check=True)
    done = subprocess.run([program], text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
