"""The extension as nvcc built it, on any machine."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from emu_kernels.backends import cuda

MOST_BYTES = 40 * 10**6


@pytest.fixture
def native() -> Any:
    module, missing = cuda._load()
    if module is None:
        pytest.skip(f"there is no emu_kernels._cuda: {missing}")
    return module


def test_it_imports_without_a_gpu(native: Any) -> None:
    assert native.toolkit() >= (12, 4)
    if not torch.cuda.is_available():
        assert re.search("driver|device", native.driver_problem())


def test_it_says_why_it_cannot_run(native: Any) -> None:
    reason = cuda.CudaBackend().unavailable()
    if not torch.backends.cuda.is_built():
        assert reason == "this torch was built without CUDA"
    elif torch.cuda.is_available():
        assert reason is None
    else:
        assert reason == native.driver_problem()


def test_size(native: Any) -> None:
    assert Path(native.__file__).stat().st_size <= MOST_BYTES


@pytest.mark.parametrize(
    ("problem", "available", "capability", "words"),
    [
        ("the NVIDIA driver is too old: …", True, (9, 0), "driver is too old"),
        ("", False, (9, 0), "torch finds no CUDA device"),
        ("", True, (7, 5), "compute capability 7.5, and the kernels need 8.0"),
        ("", True, (8, 0), None),
    ],
)
def test_devices_that_cannot_run_it(
    problem: str,
    available: bool,
    capability: tuple[int, int],
    words: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Native:
        def driver_problem(self) -> str:
            return problem

    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A card")
    reason = cuda._device_problem.__wrapped__(Native())
    assert reason is None if words is None else words in str(reason)


def test_without_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "emu_kernels._cuda", None)
    assert "built without CUDA" in str(cuda.CudaBackend().unavailable())
