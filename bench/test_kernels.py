"""Micro-benchmarks of single kernels, to see a regression in seconds: ``pytest bench/``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.inputs import Inputs, Shape, make
from bench.rivals import EMU
from emu_kernels import emu_mutate, ops
from emu_kernels.backends.base import Batch, LossState
from emu_kernels.mask import rate_to_threshold
from emu_kernels.reference import SIMILARITIES

SHAPE = Shape()


@pytest.fixture(scope="module")
def inputs() -> Inputs:
    return make(SHAPE)


@pytest.fixture(params=SIMILARITIES)
def similarity(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["emu", "softmax"])
def batch(request: pytest.FixtureRequest, similarity: str, inputs: Inputs) -> Batch:
    """What the private operators take first."""
    return Batch(
        query=inputs.query.detach(),
        table=inputs.table.detach(),
        scale=None,
        weights=None,
        positive=inputs.positive,
        negative=inputs.negative,
        seed=torch.tensor(1),
        thresholds=None,
        row_offset=0,
        mutation="component" if request.param == "emu" else "none",
        threshold=rate_to_threshold(EMU["mutation_rate"]),
        similarity=similarity,
        phase_scale=1.0,
    )


def loss_forward(batch: Batch, *, need_grad: bool) -> Any:
    extra = (EMU["beta"], EMU["alpha"], None, None, "mean", need_grad)
    return LossState(*ops.OPS.loss_forward(*batch, "cpu", *extra))


def test_loss_alone(benchmark: BenchmarkFixture, batch: Batch) -> None:
    benchmark(loss_forward, batch, need_grad=False)


def test_forward(benchmark: BenchmarkFixture, batch: Batch) -> None:
    """The loss with the query's gradient, which the forward pass makes."""
    benchmark(loss_forward, batch, need_grad=True)


@pytest.mark.parametrize("form", ["dense", "sparse"])
def test_table_gradient(benchmark: BenchmarkFixture, batch: Batch, form: str) -> None:
    state = loss_forward(batch, need_grad=True)
    weights = (state.row_scale, state.weight, state.mutated_weight, state.grad_positive)
    run = ops.OPS.table_gradient if form == "dense" else ops.OPS.table_gradient_sparse
    benchmark(run, *batch, "cpu", *weights)


def test_scores(benchmark: BenchmarkFixture, batch: Batch) -> None:
    if not batch.mutated:
        pytest.skip("emu_scores always mutates")
    benchmark(ops.OPS.scores_forward, *batch, "cpu")


def test_mutate(benchmark: BenchmarkFixture, inputs: Inputs) -> None:
    """The masks, with their (B, K, D) tensors read and written: a tenth of the batch."""
    rows = SHAPE.batch // 10
    table = inputs.table.detach()
    positive, negative = table[inputs.positive[:rows]], table[inputs.negative[:rows]]
    benchmark(
        emu_mutate, positive, negative, mutation_rate=EMU["mutation_rate"], seed=1, backend="cpu"
    )
