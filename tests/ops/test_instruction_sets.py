"""Every instruction set of this machine gives the specified results; others raise an error."""

from __future__ import annotations

import pytest

from emu_kernels import _C
from tests.ops.support import run_python

SETS = ("baseline", "avx2", "avx512")
MODULES = (
    "test_mask",
    "test_agreement",
    "test_similarities",
    "test_precision",
    "test_not_finite",
)
REPORT = "from emu_kernels import _C; print(_C.instruction_set())"


@pytest.mark.slow
@pytest.mark.parametrize("name", SETS)
def test_agreement(name: str) -> None:
    """Run the tests of the results again with the instruction set forced."""
    if name not in _C.instruction_sets():
        pytest.skip(f"this machine or this build has no {name}")
    if name == _C.instruction_set():
        return  # all other tests use it
    env = {"EMU_KERNELS_CPU": name}
    assert run_python("-c", REPORT, env=env).stdout.strip() == name
    files = [f"tests/ops/{module}.py" for module in MODULES]
    done = run_python("-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "cpu", *files, env=env)
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout


CHOOSE = """
import os, sys
from tests.ops.support import LOSS, make
from emu_kernels import _C, fused_emu_loss
for os.environ["EMU_KERNELS_CPU"] in sys.argv[1:]:
    try:
        fused_emu_loss(*make(), backend="cpu", **LOSS)
    except ValueError as error:
        print(error)
os.environ["EMU_KERNELS_CPU"] = ""
print(_C.instruction_set())
"""


def test_unavailable() -> None:
    """An unavailable instruction set raises an error that lists the available ones."""
    runnable = _C.instruction_sets()
    missing = ["sse9", "AVX2", *(name for name in SETS if name not in runnable)]
    done = run_python("-c", CHOOSE, *missing)
    assert done.returncode == 0, done.stderr
    *messages, default = done.stdout.splitlines()
    assert default == runnable[0]
    assert len(messages) == len(missing)
    for name, message in zip(missing, messages, strict=True):
        assert message.startswith("EMU_KERNELS_CPU: ")
        assert repr(name) in message
        assert ", ".join(runnable) in message
