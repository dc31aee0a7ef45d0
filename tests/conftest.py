"""Backends by name, so that a new one joins every test of the operator by being registered."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    # Before anything imports Triton: its kernels then run on the CPU, and join the tests.
    os.environ["TRITON_INTERPRET"] = "1"

from emu_kernels import backends
from emu_kernels.backends.triton import interpreted

KERNELS = tuple(name for name in backends.NAMES if name != backends.REFERENCE)


if interpreted() and backends.get("triton").unavailable() is None:
    from triton.runtime.interpreter import InterpretedFunction

    _call = InterpretedFunction.__call__
    _patched: set[str] = set()

    def _call_once_patched(self: InterpretedFunction, *args: object, **kwargs: object) -> object:
        """A device function's call without patching Triton's language anew, half of a test's time:
        the kernel that calls has done it, and nothing undoes it in Triton's own modules."""
        module = self.fn.__globals__["__name__"]
        if module.startswith("triton.") and module not in _patched:
            _patched.add(module)
            return _call(self, *args, **kwargs)
        return self.rewrite()(*args, **kwargs)

    InterpretedFunction.__call__ = _call_once_patched


def pytest_report_header() -> str:
    lines = [f"{name}: {reason or 'can run'}" for name, reason in backends.describe()]
    return "backends: " + "; ".join(lines)


def _usable(name: str) -> str:
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
def compiled(request: pytest.FixtureRequest, device: torch.device) -> None:
    """Skips tests that would take minutes on kernels that are emulated, or tell nothing of them."""
    name = "backend" if "backend" in request.fixturenames else "kernel"
    if device.type == "cpu" and request.getfixturevalue(name) not in (backends.REFERENCE, "cpu"):
        pytest.skip("these kernels are emulated")


@pytest.fixture
def threads() -> Iterator[None]:
    """Puts torch's number of threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
