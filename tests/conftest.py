"""Fixtures that run a test once for each backend, and the marks of slow tests.

Every registered backend is tested by all tests of the operators.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    # Before anything imports Triton: its kernels then run in its interpreter, on the CPU.
    os.environ["TRITON_INTERPRET"] = "1"

from emu_kernels import backends
from emu_kernels.backends.triton import interpreted
from tests import emulated
from tests.cuda import emulation
from tests.ops.support import device_of

KERNELS = tuple(name for name in backends.NAMES if name != backends.REFERENCE)


if interpreted() and backends.get("triton").unavailable() is None:
    from tests.triton import interpreter

    interpreter.install()

TOGETHER = (
    "tests/cpu/test_neon.py",  # a program for ARM
    "tests/test_packaging.py",  # a wheel and an sdist
    "tests/integrations/test_torchrec.py",  # runs of several processes
    "tests/triton/test_aot.py",  # the kernels, compiled for GPUs
    "tests/triton/test_messages.py::test_compiled",
    "tests/ops/test_autograd.py::test_opcheck[cpu",  # the recorded calls of each backend
    "tests/ops/test_autograd.py::test_opcheck[cuda",
    "tests/ops/test_autograd.py::test_opcheck[triton",
)
"""Tests that share a slow preparation: one worker runs all whose path begins with one of these."""


def pytest_configure() -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        # The workers share the cores. A test that wants more threads sets them itself.
        torch.set_num_threads(1)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes() -> None:
    """Compile the emulated CUDA kernels once, on all cores, before any worker needs them."""
    if not torch.cuda.is_available():
        emulation.build()


@pytest.hookimpl(tryfirst=True)  # before `-m` reads the marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wrong = emulated.mark_slow(items) + emulated.absent(items)
    everything = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    if wrong and everything and backends.get("triton").unavailable() is None:
        raise pytest.UsageError("tests/emulated.py is not up to date", *wrong)
    if config.pluginmanager.hasplugin("xdist"):
        for item in items:
            for path in TOGETHER:
                if item.nodeid.startswith(path):
                    item.add_marker(pytest.mark.xdist_group(path))
        # The long groups first: a worker that gets one last works on it alone.
        items.sort(key=lambda item: item.get_closest_marker("xdist_group") is None)


def pytest_report_header() -> str:
    lines = [f"{name}: {reason or 'can run'}" for name, reason in backends.describe()]
    return "backends: " + "; ".join(lines)


def _usable(name: str) -> str:
    if name == "cuda" and not torch.cuda.is_available():
        emulation.install()
    reason = dict(backends.describe())[name]
    if reason is not None and name == "cpu":
        pytest.fail(f"the cpu backend must be built for the tests: {reason}", pytrace=False)
    if reason is not None:
        pytest.skip(f"backend {name!r} cannot run here: {reason}")
    return name


@pytest.fixture(params=backends.NAMES)
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend, the reference included."""
    return _usable(request.param)


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest) -> str:
    """Every backend except the reference."""
    return _usable(request.param)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device that the test's ``backend`` or ``kernel`` needs its tensors on."""
    name = "backend" if "backend" in request.fixturenames else "kernel"
    return device_of(request.getfixturevalue(name))


@pytest.fixture
def compiled(request: pytest.FixtureRequest, device: torch.device) -> None:
    """Skip a test for Triton's interpreter, where it takes minutes or cannot fail."""
    name = "backend" if "backend" in request.fixturenames else "kernel"
    if request.getfixturevalue(name) == "triton" and device.type == "cpu":
        pytest.skip("these kernels are interpreted")


@pytest.fixture
def threads() -> Iterator[None]:
    """Restores torch's number of threads after the test."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
