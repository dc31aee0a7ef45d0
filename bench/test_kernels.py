"""Micro-benchmarks of the public functions, to see regressions within seconds: ``pytest bench/``.

They run on each backend that can run here; times on a GPU include launches.
"""

from __future__ import annotations

from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.inputs import SIMILARITIES, Shape, make
from bench.measure import synchronize
from bench.rivals import BACKENDS, BY_NAME, fused, ours
from emu_kernels import emu_mutate

CASES = [*product(("emu", "softmax", "scores"), SIMILARITIES), ("mutate", "dot")]


@pytest.mark.parametrize("gradient", [None, "dense", "sparse"], ids=str)  # None: forward only
@pytest.mark.parametrize(("name", "similarity"), CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_call(
    benchmark: BenchmarkFixture, backend: str, name: str, similarity: str, gradient: str | None
) -> None:
    shape = Shape(similarity=similarity, gradient=gradient or "dense", device=BACKENDS[backend])
    if shape.device == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch sees no GPU")
    if (reason := BY_NAME[ours("emu", backend)].unavailable(shape)) is not None:
        pytest.skip(reason)
    inputs = make(shape)
    if name == "mutate":  # a tenth of the batch, whose (B, K, D) tensors are read and written
        ids = (inputs.positive[:100], inputs.negative[:100])
        leaves = [inputs.table.detach()[i].requires_grad_() for i in ids]
        call = partial(emu_mutate, *leaves, mutation_rate=0.94, backend=backend)
    else:
        leaves, call = [*inputs[:2]], partial(fused(name, backend, shape), *inputs)

    def step() -> None:
        with torch.set_grad_enabled(gradient is not None):
            value: Any = call()
        if gradient is not None:
            value = value.mutated if name == "scores" else value
            torch.autograd.grad(value.sum(), leaves)
        synchronize(shape.device)

    benchmark(step)
