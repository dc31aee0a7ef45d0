"""Every kernel's results and gradients against the specification's, computed in fp64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from emu_kernels import emu_scores, fused_emu_loss, fused_softmax_loss
from tests.ops.support import (
    LOSS,
    Inputs,
    Options,
    affordable,
    assert_agree,
    assert_near,
    emulated,
    evaluate,
    exact,
    make,
    random_like,
    skip_if_too_slow,
)


@dataclass(frozen=True)
class Shape:
    batch: int
    count: int
    dim: int
    rows: int
    groups: int
    why: str
    loose: float = 1.0  # see assert_near

    def make(self, **options: Any) -> Inputs:
        return make(self.batch, self.count, self.dim, rows=self.rows, groups=self.groups, **options)

    def affordable(self, kernel: str, device: torch.device) -> bool:
        return affordable(kernel, device, batch=self.batch, count=self.count, dim=self.dim)

    def skip_if_too_slow(self, kernel: str, device: torch.device) -> None:
        skip_if_too_slow(kernel, device, batch=self.batch, count=self.count, dim=self.dim)


SHAPES = [
    Shape(1, 1, 1, 4, 1, "every size at its least"),
    Shape(3, 1, 7, 5, 3, "less than a vector, less than a Philox block, one negative"),
    Shape(2, 3, 100, 40, 2, "the paper's width: whole blocks and a rest; fewer rows than threads"),
    Shape(5, 256, 129, 50, 5, "one past a whole number of every vector, the paper's K"),
    Shape(3, 256, 1000, 300, 3, "longer than what fits in registers"),
    Shape(4, 1000, 100, 300, 1, "one long set of negatives for the batch"),
    Shape(12, 30, 64, 25, 4, "a set for each block of three rows; whole Philox blocks"),
    Shape(64, 3, 100, 1000, 64, "more rows than negatives, to be split over threads"),
    Shape(40, 256, 36, 3, 40, "three entities, each with thousands of contributions"),
    Shape(1, 70_000, 3, 70_001, 1, "columns and entities past 16 bits", 10),
    Shape(70_000, 1, 3, 9, 1, "batch rows past 16 bits, all with the same negative", 10),
    Shape(1, 3, 1000, 20, 1, "one long row, also where kernels are emulated"),
    Shape(1, 1000, 7, 30, 1, "many negatives of one row, also where kernels are emulated"),
]
WHY = [shape.why for shape in SHAPES]
# One of each kind that depends on the dtype: partial vectors, hubs, long rows, shared negatives.
TYPED = [SHAPES[3], SHAPES[4], SHAPES[6], SHAPES[8]]


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=WHY)
def test_loss(shape: Shape, padding: bool, kernel: str, device: torch.device) -> None:
    shape.skip_if_too_slow(kernel, device)
    inputs = shape.make(padding=padding)
    options = LOSS | {"row_offset": 17, "reduction": "none"}
    upstream = random_like([inputs.positive])
    expected = exact(fused_emu_loss, inputs, upstream=upstream, **options)
    actual = evaluate(
        fused_emu_loss, inputs.to(device), upstream=upstream, backend=kernel, **options
    )
    assert_agree(actual, expected, loose=shape.loose)


@pytest.mark.parametrize("shape", SHAPES, ids=WHY)
def test_softmax_loss(shape: Shape, kernel: str, device: torch.device) -> None:
    shape.skip_if_too_slow(kernel, device)
    inputs = shape.make(padding=True)
    expected = exact(fused_softmax_loss, inputs)
    actual = evaluate(fused_softmax_loss, inputs.to(device), backend=kernel)
    assert_agree(actual, expected, loose=shape.loose)


def finite_sums(*inputs: Tensor, **options: Any) -> tuple[Tensor, ...]:
    """The scores, with 0 instead of −inf for padding, to be multiplied by upstream gradients."""
    return tuple(s.masked_fill(s == float("-inf"), 0) for s in emu_scores(*inputs, **options))


@pytest.mark.parametrize("shape", SHAPES, ids=WHY)
def test_scores(shape: Shape, kernel: str, device: torch.device) -> None:
    shape.skip_if_too_slow(kernel, device)
    inputs = shape.make(padding=True)
    options: Options = {"mutation_rate": 0.61, "seed": 5, "row_offset": 17, "margin": 2.0}
    with torch.no_grad():
        upstream = random_like(finite_sums(*inputs, backend="reference", **options))
    expected = exact(finite_sums, inputs, upstream=upstream, **options)
    actual = evaluate(finite_sums, inputs.to(device), upstream=upstream, backend=kernel, **options)
    assert_agree(actual, expected, loose=shape.loose)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", TYPED, ids=[s.why for s in TYPED])
def test_table_dtypes(shape: Shape, dtype: torch.dtype, kernel: str, device: torch.device) -> None:
    shape.skip_if_too_slow(kernel, device)
    inputs = shape.make(dtype=dtype, padding=True)
    calls: list[tuple[Callable[..., Any], Options]] = [
        (fused_emu_loss, LOSS),
        (finite_sums, {"mutation_rate": 0.61, "seed": 5}),
    ]
    for function, options in calls:
        actual = evaluate(function, inputs.to(device), backend=kernel, **options)
        assert actual.outputs[0].dtype == inputs.query.dtype
        assert actual.table.dtype == dtype
        assert_agree(actual, exact(function, inputs, **options))


@pytest.mark.parametrize("query_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_query_dtypes(
    query_dtype: torch.dtype, dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    inputs = make(dim=37, dtype=dtype, query_dtype=query_dtype)
    actual = evaluate(fused_emu_loss, inputs.to(device), backend=backend, **LOSS)
    assert actual.outputs[0].dtype == torch.float32
    assert actual.query.dtype == query_dtype
    assert_agree(actual, exact(fused_emu_loss, inputs, **LOSS))


@pytest.mark.parametrize(
    "options",
    [
        {"alpha": 0.0},
        {"beta": 0.0},
        {"alpha": 0.0, "beta": 0.0},
        {"alpha": 5.0, "beta": 2.0},
        {"mutation_rate": 0.0},
        {"mutation_rate": 1.0},
        {"mutation_rate": 1 / 256},
        {"mutation_rate": 255 / 256, "beta": 0.0},
        {"reduction": "sum"},
        {"reduction": "none"},
        {"row_offset": 2**32 - 8},
        {"seed": 2**63 - 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [SHAPES[2], SHAPES[6]], ids=["own", "shared"])
def test_options(shape: Shape, options: Options, kernel: str, device: torch.device) -> None:
    batch = 4 if emulated(kernel, device) else 8
    inputs, options = replace(shape, batch=batch).make(), LOSS | options
    expected = exact(fused_emu_loss, inputs, **options)
    assert_agree(evaluate(fused_emu_loss, inputs.to(device), backend=kernel, **options), expected)


@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8], ids=str
)
def test_id_dtypes(dtype: torch.dtype, backend: str, device: torch.device) -> None:
    inputs = make(rows=120, ids=dtype, padding=dtype != torch.uint8)
    expected = exact(fused_emu_loss, inputs, **LOSS)
    assert_agree(evaluate(fused_emu_loss, inputs.to(device), backend=backend, **LOSS), expected)


@pytest.mark.parametrize("shift", [0.0, 3000.0, -3000.0])
def test_large_scores(shift: float, kernel: str, device: torch.device) -> None:
    """With scores in the thousands, loss and softmax weights keep fp32's relative precision.

    In one dimension with a query of 1, scores are table entries and rows' gradients are weights.
    ``shift`` puts the positive's score near its negatives', far above or far below them.
    """
    count = 100 if kernel == "triton" and emulated(kernel, device) else 1000
    generator = torch.Generator().manual_seed(0)
    table = torch.randint(-20, 20, (count + 1, 1), generator=generator).float()
    table[0] += 5 + shift
    table += 4096
    inputs = Inputs(torch.ones(1, 1), table, torch.tensor([0]), torch.arange(1, count + 1)[None])
    options: Options = {"mutation_rate": 0.0, "beta": 0.5, "alpha": 0.7, "seed": 1}
    actual = evaluate(fused_emu_loss, inputs.to(device), backend=kernel, **options)
    expected = exact(fused_emu_loss, inputs, **options)
    assert_near(actual.outputs[0], expected.outputs[0])
    assert_near(actual.table, expected.table)


def test_every_element_is_written(kernel: str, device: torch.device) -> None:
    """Torch's deterministic mode fills new memory with NaN, so an unwritten element stays NaN."""
    shapes = [SHAPES[2], SHAPES[6], SHAPES[9], Shape(4, 0, 9, 5, 4, "no negatives")]
    calls: list[tuple[Callable[..., Any], Options]] = [
        (fused_emu_loss, LOSS | {"reduction": "none"}),
        (fused_softmax_loss, {}),
        (finite_sums, {"mutation_rate": 0.61, "seed": 5}),
    ]
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        for shape in shapes:
            if not shape.affordable(kernel, device):
                continue
            inputs = shape.make(padding=True).to(device)
            for function, options in calls:
                results = [evaluate(function, inputs, backend=kernel, **options)]
                results += [evaluate(function, inputs, backend=kernel, sparse_grad=True, **options)]
                for result in results:
                    for tensor in (*result.outputs, result.query, result.table):
                        assert tensor.isfinite().all()
    finally:
        torch.use_deterministic_algorithms(False)
