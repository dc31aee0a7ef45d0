"""ptxas's reports of every kernel, written as the extension is compiled: registers, stack, spills.

`make` keeps them in build/ptxas (see csrc/cuda/keep_report.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from emu_kernels.backends import cuda
from tests.cuda.emulation import ROOT, similarities

REPORTS = ROOT / "build/ptxas"
ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for 'sm_(?P<target>\d+)\w*'"
    r".*?(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads"
    r".*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)
MOST_REGISTERS = {
    "query_majorI.*PassE0E": 208,  # scores
    "query_majorI.*PassE1E": 248,  # sums, and gradients on the fly
    "query_majorI(NS_3Dot|NS_7PRotate)Ef.*ModeE[14]E.*PassE1E": 128,  # two blocks of 256 threads
    "query_majorI.*ModeE[0-3]E.*PassE2E": 224,  # gradients by given weights
    "query_majorI.*ModeE4E.*PassE2E": 255,  # the same with moments, and the rates' gradients
    "add_segmentsI": 168,
    "row_gradientI.*ModeE[0-3]E": 112,
    "row_gradientI.*ModeE4E": 168,
    "row_lossI": 64,
    "row_weightsI": 64,
}
"""A thread may have 255 registers, a multiprocessor has 65,536. At 255 it still runs eight warps,
each with at least four 16-byte loads per lane in flight; at 128 it runs sixteen."""


class Kernel(NamedTuple):
    name: str  # mangled
    target: int
    stack: int
    spills: int
    registers: int


def kernels() -> Iterator[Kernel]:
    for path in sorted(REPORTS.glob("*.cu.o.txt")):
        for match in ENTRY.finditer(path.read_text()):
            numbers = {key: int(value) for key, value in match.groupdict().items() if key != "name"}
            yield Kernel(
                match["name"],
                numbers["target"],
                numbers["stack"],
                numbers["stores"] + numbers["loads"],
                numbers["registers"],
            )


@pytest.fixture(scope="module")
def reported() -> list[Kernel]:
    found = list(kernels())
    if not found or cuda._load()[0] is None:
        pytest.skip("no reports in build/ptxas: the kernels were not compiled by `make` and nvcc")
    return found


def common(kernel: Kernel) -> bool:
    """Whether training runs it: fp64 is for gradient checks, and CUB's kernels are not ours."""
    ours = kernel.name.startswith("_ZN3emu4cuda")
    double = re.search(r"I(NS_\d+\w+?E)?d[LE]", kernel.name)
    return ours and not double


def test_every_target_has_every_similarity(reported: list[Kernel]) -> None:
    native, _ = cuda._load()
    wanted = re.findall(r"\b(\d+)(?!\S*virtual)", native.architectures)
    assert {kernel.target for kernel in reported} == set(map(int, wanted))
    for target in wanted:
        names = " ".join(kernel.name for kernel in reported if kernel.target == int(target))
        for similarity in similarities():
            for kernel in ("query_major", "add_segments", "row_loss"):
                mangled = f"{kernel}INS_{len(similarity)}{similarity}E"
                assert mangled in names, (target, mangled)


def test_nothing_is_spilled(reported: list[Kernel]) -> None:
    bad = [k for k in reported if common(k) and (k.stack or k.spills)]
    assert not bad, "\n".join(map(str, bad))


def test_registers_are_within_bounds(reported: list[Kernel]) -> None:
    for name, most in MOST_REGISTERS.items():
        used = {
            (k.name, k.target): k.registers
            for k in reported
            if common(k) and re.search(name, k.name)
        }
        assert used
        assert {kernel: n for kernel, n in used.items() if n > most} == {}
