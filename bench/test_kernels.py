"""Micro-benchmarks of the public functions, to see a regression in seconds: ``pytest bench/``.

On each backend that can run here; a GPU's include launches.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.inputs import SIMILARITIES, Shape, make
from bench.measure import synchronize
from bench.rivals import BACKENDS, EMU
from emu_kernels import backends, emu_mutate, emu_scores, fused_emu_loss, fused_softmax_loss

CALLS: dict[str, tuple[Any, dict[str, Any]]] = {
    "emu": (fused_emu_loss, EMU),
    "softmax": (fused_softmax_loss, {}),
    "scores": (emu_scores, {"mutation_rate": 0.94}),
}
CASES = [(call, s) for call in CALLS for s in SIMILARITIES] + [("mutate", "")]


@pytest.mark.parametrize("gradient", [None, "dense", "sparse"], ids=str)  # None: forward only
@pytest.mark.parametrize(("name", "similarity"), CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_call(
    benchmark: BenchmarkFixture, backend: str, name: str, similarity: str, gradient: str | None
) -> None:
    device = BACKENDS[backend]
    reason = backends.get(backend).unavailable()
    if reason is not None or (device == "cuda" and not torch.cuda.is_available()):
        pytest.skip(reason or "torch sees no GPU")
    inputs = make(Shape(device=device))
    leaves = [inputs.query, inputs.table]
    if name == "mutate":  # a tenth of the batch, whose (B, K, D) tensors are read and written
        ids = (inputs.positive[:100], inputs.negative[:100])
        leaves = [inputs.table.detach()[i].requires_grad_() for i in ids]

    def step() -> None:
        with torch.set_grad_enabled(gradient is not None):
            if name == "mutate":
                value: Any = emu_mutate(*leaves, mutation_rate=0.94, seed=1, backend=backend)
            else:
                function, options = CALLS[name]
                kind = {"similarity": similarity, "sparse_grad": gradient == "sparse"}
                value = function(*inputs, backend=backend, **kind, **options)
        if gradient is not None:
            value = value.mutated if name == "scores" else value
            torch.autograd.grad(value.sum(), leaves)
        synchronize(device)

    benchmark(step)
