"""Micro-benchmarks of single kernels, to see a regression in seconds: ``pytest bench/``.

Each kernel on each backend that can run here; a GPU's on a GPU, launches included.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.inputs import Inputs, Shape, make
from bench.rivals import BY_NAME, EMU, OURS_DEVICES, ours_name
from emu_kernels import emu_mutate, ops
from emu_kernels.backends.base import Batch, LossState
from emu_kernels.mask import rate_to_threshold
from emu_kernels.similarity import SIMILARITIES

SHAPE = Shape()


@pytest.fixture(scope="module", params=OURS_DEVICES)
def backend(request: pytest.FixtureRequest) -> str:
    name = str(request.param)
    device = OURS_DEVICES[name]
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch sees no GPU")
    reason = BY_NAME[ours_name("emu", name)].unavailable(Shape(device=device))
    if reason is not None:
        pytest.skip(reason)
    return name


@pytest.fixture(scope="module")
def inputs(backend: str) -> Inputs:
    return make(dataclasses.replace(SHAPE, device=OURS_DEVICES[backend]))


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
        seed=torch.tensor(1, device=inputs.table.device),
        thresholds=None,
        row_offset=0,
        mutation="component" if request.param == "emu" else "none",
        threshold=rate_to_threshold(EMU["mutation_rate"]),
        similarity=similarity,
        phase_scale=1.0,
    )


@pytest.fixture
def timed(benchmark: BenchmarkFixture, backend: str) -> Callable[..., None]:
    """``benchmark`` of a call that is over when it returns."""

    def run(function: Callable[..., Any], *arguments: Any, **options: Any) -> None:
        def finished() -> None:
            function(*arguments, **options)
            if OURS_DEVICES[backend] == "cuda":
                torch.cuda.synchronize()

        benchmark(finished)

    return run


def loss_forward(batch: Batch, backend: str, *, need_grad: bool) -> Any:
    extra = (EMU["beta"], EMU["alpha"], None, None, "mean", need_grad)
    return LossState(*ops.OPS.loss_forward(*batch, backend, *extra))


def test_loss_alone(timed: Callable[..., None], batch: Batch, backend: str) -> None:
    timed(loss_forward, batch, backend, need_grad=False)


def test_forward(timed: Callable[..., None], batch: Batch, backend: str) -> None:
    """The loss with the query's gradient, which the forward pass makes."""
    timed(loss_forward, batch, backend, need_grad=True)


@pytest.mark.parametrize("form", ["dense", "sparse"])
def test_table_gradient(timed: Callable[..., None], batch: Batch, backend: str, form: str) -> None:
    state = loss_forward(batch, backend, need_grad=True)
    weights = (state.row_scale, state.weight, state.mutated_weight, state.grad_positive)
    run = ops.OPS.table_gradient if form == "dense" else ops.OPS.table_gradient_sparse
    timed(run, *batch, backend, *weights)


def test_scores(timed: Callable[..., None], batch: Batch, backend: str) -> None:
    timed(ops.OPS.scores_forward, *batch, backend)


def test_query_gradient(timed: Callable[..., None], batch: Batch, backend: str) -> None:
    """The backward pass of the scores, but for the table."""
    weight = batch.query.new_ones(batch.negative.shape)
    mutated = weight if batch.mutated else weight.new_empty(0)
    timed(ops.OPS.query_gradient, *batch, backend, weight[:, 0].contiguous(), weight, mutated)


@pytest.mark.parametrize("pass_", ["forward", "backward"])
def test_mutate(timed: Callable[..., None], inputs: Inputs, backend: str, pass_: str) -> None:
    """The masks, with their (B, K, D) tensors read and written: a tenth of the batch."""
    rows = SHAPE.batch // 10
    table = inputs.table.detach()
    positive, negative = table[inputs.positive[:rows]], table[inputs.negative[:rows]]
    options: dict[str, Any] = {"mutation_rate": EMU["mutation_rate"], "seed": 1}
    if pass_ == "forward":
        timed(emu_mutate, positive, negative, backend=backend, **options)
        return
    leaves = (positive.requires_grad_(), negative.requires_grad_())
    mutated = emu_mutate(*leaves, backend=backend, **options)
    upstream = torch.ones_like(mutated)
    timed(torch.autograd.grad, mutated, leaves, upstream, retain_graph=True)
