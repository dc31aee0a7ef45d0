"""Backends by name, so that a new one joins every test of the operator by being registered."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    # Before anything imports Triton: its kernels then run on the CPU, and join the tests.
    os.environ["TRITON_INTERPRET"] = "1"

from emu_kernels import backends
from emu_kernels.backends.triton import interpreted
from tests.cuda import emulation

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


EMULATED_CASES = 3
"""How many of a test's parameter sets Triton's kernels are given where they are emulated: the first
by a checksum of their names, so that no dimension of a grid is left out of all of them."""
EMULATED_ALL = {
    # Tests that choose for themselves, by the shape.
    "test_agreement.py::test_loss",
    "test_agreement.py::test_softmax_loss",
    "test_agreement.py::test_scores",
    "test_agreement.py::test_table_dtypes",
    "test_similarities.py::test_loss",
    "test_similarities.py::test_table_dtypes",
    # One set for each similarity.
    "test_similarities.py::test_sparse_gradient_is_the_dense_one",
    "test_similarities.py::test_without_scale_and_weights",
    # What is wrong in most of these is found before there is a backend: those are skipped.
    "test_bad_input.py::test_loss",
    "test_bad_input.py::test_softmax_loss",
    "test_bad_input.py::test_scores",
    # Tests of one kernel each.
    "test_mask.py::test_bits",
}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not interpreted():
        return
    by_test: dict[str, list[pytest.Item]] = {}
    for item in items:
        test = item.nodeid.partition("[")[0]
        given = getattr(item, "callspec", None)
        names = () if given is None else (given.params.get(n) for n in ("kernel", "backend"))
        if "triton" in names and test.rpartition("/")[2] not in EMULATED_ALL:
            by_test.setdefault(test, []).append(item)
    left: set[pytest.Item] = set()
    for cases in by_test.values():
        cases.sort(key=lambda item: zlib.crc32(item.nodeid.encode()))
        left.update(cases[EMULATED_CASES:])
    config.hook.pytest_deselected(items=list(left))
    items[:] = [item for item in items if item not in left]


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
def compiled(request: pytest.FixtureRequest, device: torch.device) -> None:
    """Skips tests that would take minutes in Triton's interpreter, or tell nothing of it."""
    name = "backend" if "backend" in request.fixturenames else "kernel"
    if request.getfixturevalue(name) == "triton" and device.type == "cpu":
        pytest.skip("these kernels are interpreted")


@pytest.fixture
def threads() -> Iterator[None]:
    """Puts torch's number of threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
