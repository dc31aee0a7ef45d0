"""Which backend a call uses, and the errors if that backend cannot run."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from emu_kernels import backends, emu_mutate, emu_scores, fused_emu_loss
from tests.ops.support import LOSS, make


def test_names() -> None:
    assert backends.NAMES[0] == backends.REFERENCE
    assert "cpu" in backends.NAMES
    assert [name for name, _ in backends.describe()] == list(backends.NAMES)
    assert dict(backends.describe())[backends.REFERENCE] is None


def test_default() -> None:
    """The fastest that can run on the device; the reference if no other can."""
    assert backends.default_backend("cpu") == "cpu"
    assert backends.default_backend(torch.device("cpu")) == "cpu"
    assert backends.default_backend("mps") == backends.REFERENCE
    assert backends.default_backend("xpu") == backends.REFERENCE


def test_default_is_used() -> None:
    inputs = make(9, 40, 100)
    expected = fused_emu_loss(*inputs, backend="cpu", **LOSS)
    assert torch.equal(fused_emu_loss(*inputs, **LOSS), expected)


def test_backend_that_cannot_run_says_why(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = backends.get(kernel)
    monkeypatch.setattr(type(backend), "unavailable", lambda self: "it is out for lunch")
    assert dict(backends.describe())[kernel] == "it is out for lunch"
    inputs = make()
    with pytest.raises(RuntimeError, match=f"'{kernel}'.*out for lunch"):
        fused_emu_loss(*inputs, backend=kernel, **LOSS)
    with pytest.raises(RuntimeError, match=f"'{kernel}'.*out for lunch"):
        emu_scores(*inputs, mutation_rate=0.5, backend=kernel)
    with pytest.raises(RuntimeError, match=f"'{kernel}'.*out for lunch"):
        emu_mutate(torch.ones(1, 2), torch.ones(1, 1, 2), mutation_rate=0.5, backend=kernel)


def test_default_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make()
    expected = fused_emu_loss(*inputs, backend=backends.REFERENCE, **LOSS)
    monkeypatch.setattr(type(backends.get("cpu")), "unavailable", lambda self: "absent")
    with pytest.warns(RuntimeWarning, match="slow: absent"):
        assert backends.default_backend("cpu") == backends.REFERENCE
    assert torch.equal(fused_emu_loss(*inputs, **LOSS), expected)


@pytest.fixture
def gpu_backends(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """cuda and triton, as where both can run."""
    backends._warn_of_unmeasured.cache_clear()

    class OnAGpu:
        device_types = ("cuda",)

        def __init__(self, name: str, measured: bool) -> None:
            self.name, self.measured = name, measured

        def unavailable(self) -> None:
            return None

    standing = [OnAGpu(name, measured=False) for name in ("cuda", "triton")]
    for backend in standing:
        monkeypatch.setitem(backends._BY_NAME, backend.name, backend)
    return standing


def test_a_backend_that_ran_on_no_hardware_warns_once(gpu_backends: list[Any]) -> None:
    choices = r"'cuda'.*emulated.*backend='triton' or backend='reference' chooses another"
    with pytest.warns(RuntimeWarning, match=choices):
        assert backends.default_backend("cuda") == "cuda"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.default_backend("cuda:0") == "cuda"


def test_chosen_or_measured_backends_do_not_warn(gpu_backends: list[Any]) -> None:
    gpu = torch.device("cuda", 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.resolve("cuda", gpu).name == "cuda"
        gpu_backends[0].measured = True
        assert backends.resolve(None, gpu).name == "cuda"
        assert backends.default_backend("cpu") == "cpu"


def test_it_warns_when_a_call_is_compiled(gpu_backends: list[Any]) -> None:
    torch.compiler.reset()
    fused = torch.compile(
        lambda x: x + len(backends.default_backend("cuda")), fullgraph=True, backend="aot_eager"
    )
    with pytest.warns(RuntimeWarning, match="'cuda'.*emulated"):
        assert fused(torch.ones(1)) == 5
    torch.compiler.reset()


def test_kernels_do_not_run_on_other_devices(kernel: str) -> None:
    inputs = [t.to("meta") for t in make()]
    with pytest.raises(ValueError, match=f"backend: '{kernel}'.*meta"):
        fused_emu_loss(*inputs, backend=kernel, **LOSS)


def test_backends_are_told_apart(kernel: str, device: torch.device) -> None:
    """Tests that compare backends compare two implementations, not one with itself."""
    calls: list[str] = []

    class Watched(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            calls.append(str(func))
            return func(*args, **(kwargs or {}))

    inputs = make(device=device)
    for name in (kernel, backends.REFERENCE):
        calls.clear()
        with Watched():
            loss: Tensor = fused_emu_loss(*inputs, backend=name, **LOSS)
        assert loss.isfinite()
        assert any("loss_forward" in call for call in calls) == (name == kernel)


def test_mutation_rate_by_its_former_name() -> None:
    inputs = make()
    expected = emu_scores(*inputs, mutation_rate=0.5, seed=1)
    old: dict[str, Any] = {"mutation": 0.5}
    with pytest.warns(DeprecationWarning, match=r"mutation: .* now named mutation_rate") as caught:
        scores = emu_scores(*inputs, seed=1, **old)
    assert caught[0].filename == __file__  # of the caller
    assert all(torch.equal(x, y) for x, y in zip(scores, expected, strict=True))
    with pytest.raises(TypeError, match=r"mutation_rate: .* mutation, too"):
        emu_scores(*inputs, mutation_rate=0.5, seed=1, **old)
