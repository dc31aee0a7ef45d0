"""Micro-benchmarks of single kernels, to see a regression in seconds: ``pytest bench/``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.inputs import Inputs, Shape, make
from bench.rivals import EMU
from emu_kernels import emu_mutate, ops
from emu_kernels.mask import rate_to_threshold

SHAPE = Shape()
Batch = tuple[Any, ...]


@pytest.fixture(scope="module")
def inputs() -> Inputs:
    return make(SHAPE)


@pytest.fixture(params=["emu", "softmax"])
def batch(request: pytest.FixtureRequest, inputs: Inputs) -> Batch:
    """What the private operators take first."""
    threshold = rate_to_threshold(EMU["mutation_rate"]) if request.param == "emu" else None
    tensors = (inputs.query.detach(), inputs.table.detach(), inputs.positive, inputs.negative)
    return (*tensors, torch.tensor(1), 0, threshold, "dot", "cpu")


def loss_forward(batch: Batch, *, need_grad: bool) -> Any:
    extra = (EMU["beta"], EMU["alpha"], None, None, "mean", need_grad)
    return ops.OPS.loss_forward(*batch, *extra)


def test_loss_alone(benchmark: BenchmarkFixture, batch: Batch) -> None:
    benchmark(loss_forward, batch, need_grad=False)


def test_forward(benchmark: BenchmarkFixture, batch: Batch) -> None:
    """The loss with the query's gradient, which the forward pass makes."""
    benchmark(loss_forward, batch, need_grad=True)


@pytest.mark.parametrize("form", ["dense", "sparse"])
def test_table_gradient(benchmark: BenchmarkFixture, batch: Batch, form: str) -> None:
    state = loss_forward(batch, need_grad=True)
    _loss, _terms, row_scale, weight, mutated_weight, _grad_query, grad_positive = state
    run = ops.OPS.table_gradient if form == "dense" else ops.OPS.table_gradient_sparse
    benchmark(run, *batch, row_scale, weight, mutated_weight, grad_positive)


def test_scores(benchmark: BenchmarkFixture, batch: Batch) -> None:
    if batch[6] is None:
        pytest.skip("emu_scores always mutates")
    benchmark(ops.OPS.scores_forward, *batch)


def test_mutate(benchmark: BenchmarkFixture, inputs: Inputs) -> None:
    """The masks, with their (B, K, D) tensors read and written: a tenth of the batch."""
    rows = SHAPE.batch // 10
    table = inputs.table.detach()
    positive, negative = table[inputs.positive[:rows]], table[inputs.negative[:rows]]
    benchmark(
        emu_mutate, positive, negative, mutation_rate=EMU["mutation_rate"], seed=1, backend="cpu"
    )
