"""Backends by name, so that a new one joins every test of the operator by being registered."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from emu_kernels import backends
from tests.cuda import emulation

KERNELS = tuple(name for name in backends.NAMES if name != backends.REFERENCE)


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
    """Every backend but the reference."""
    return _usable(request.param)


def _device(name: str) -> torch.device:
    types = ("cpu",) if name == backends.REFERENCE else backends.get(name).device_types
    return torch.device(types[0])


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where the tensors of this test's ``backend`` or ``kernel`` have to be."""
    name = "backend" if "backend" in request.fixturenames else "kernel"
    return _device(request.getfixturevalue(name))


@pytest.fixture
def threads() -> Iterator[None]:
    """Puts torch's number of threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
