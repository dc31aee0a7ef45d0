"""The NEON build gives the results of the x86-64 baseline, which other tests compare with the
specification.

A program that calls every CPU kernel is compiled for both. The one for ARM runs in an emulator.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.ops.support import ROOT, assert_near

CROSS = "aarch64-linux-gnu-g++"
EMULATOR = next(filter(shutil.which, ("qemu-aarch64", "qemu-aarch64-static")), "qemu-aarch64")
SOURCES = [
    ROOT / "tests/cpu/results.cpp",
    *(path for path in sorted(ROOT.glob("csrc/cpu/*.cpp")) if "avx" not in path.name),
]
FLAGS = ("-std=c++17", "-ffp-contract=off", "-Wall", "-Wextra", "-Wno-psabi", f"-I{ROOT / 'csrc'}")
EXACT = ("mutate", "shares", "relational")
"""Results that no kernel may round differently: components, masks, random bits, ordered sums."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which(CROSS), reason=f"{CROSS} is not installed"),
]


def build(compiler: str, folder: Path, *extra: str) -> Path:
    program = folder / Path(compiler).name
    command = [compiler, *FLAGS, *extra, *map(str, SOURCES), "-o", str(program)]
    done = subprocess.run([*command, "-pthread", "-ldl"], text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return program


def results(*command: str | Path) -> dict[str, Tensor]:
    done = subprocess.run(command, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    return {
        name: torch.frombuffer(bytearray.fromhex(data), dtype=getattr(torch, dtype))
        for name, dtype, data in lines
    }


@pytest.fixture(scope="module")
def neon(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Static, so that it needs no ARM libraries. -O3 would take half as long again."""
    return build(CROSS, tmp_path_factory.mktemp("neon"), "-O2", "-Werror", "-static")


def test_no_compiler_warning(neon: Path) -> None:
    assert neon.is_file()


@pytest.mark.skipif(not shutil.which(EMULATOR), reason=f"{EMULATOR} is not installed")
def test_same_results(neon: Path, tmp_path: Path) -> None:
    """Sums may differ within the tests' tolerance, by fused multiply-adds."""
    expected = results(build(os.environ.get("CXX", "g++"), tmp_path, "-O1"))
    actual = results(EMULATOR, neon)
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        if name.startswith(EXACT) or not tensor.is_floating_point():
            assert torch.equal(tensor, expected[name]), name
        else:
            assert_near(tensor, expected[name], name)
