"""Forcing a plan sets a backend's switch, and puts it back."""

from __future__ import annotations

import importlib
import types

import pytest

from bench.plans import PLANS, forced
from emu_kernels import backends


class OfBackend:
    atomic_gradient = False


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> OfBackend:
    backend = OfBackend()
    monkeypatch.setattr(backends, "get", lambda name: backend)
    return backend


def test_a_switch_of_the_backend(fake):
    seen = []
    for plan in PLANS:
        with forced("cuda", plan):
            seen.append(fake.atomic_gradient)
    assert seen == [False, True]
    assert fake.atomic_gradient is False
    with pytest.raises(ZeroDivisionError), forced("cuda", "atomics"):
        raise ZeroDivisionError
    assert fake.atomic_gradient is False


def test_a_switch_of_its_module(fake, monkeypatch):
    module = types.SimpleNamespace(table_gradients="sorted")
    monkeypatch.setattr(importlib, "import_module", lambda name: module)
    with forced("triton", "atomics"):
        assert module.table_gradients == "atomic"
    assert module.table_gradients == "sorted"


def test_a_backend_without_the_choice(fake):
    with forced("cpu", "atomics"):
        pass
    del OfBackend.atomic_gradient
    try:
        with pytest.raises(AttributeError), forced("cuda", "atomics"):
            pass
    finally:
        OfBackend.atomic_gradient = False


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_the_switches_are_there(backend):
    """In the backends themselves, where this version has them."""
    if backend not in backends.NAMES:
        pytest.skip(f"this version has no backend {backend!r}")
    with forced(backend, "atomics"), forced(backend, "segments"):
        pass
