"""NaN or infinity in an embedding makes its rows' results NaN, and leaves other rows alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from emu_kernels import emu_mutate, emu_scores, fused_emu_loss, fused_softmax_loss
from tests.ops.support import LOSS, Inputs, Options, evaluate, make

BAD = [math.nan, math.inf, -math.inf]
PLACES = ["query", "positive", "negative"]
DIM = 37


def clean(batch: int = 4) -> Inputs:
    """Rows without common entities: row b uses 5b..5b+4."""
    inputs = make(batch, 4, DIM, rows=5 * batch)
    ids = torch.arange(5 * batch).reshape(batch, 5)
    return inputs._replace(positive=ids[:, 0].contiguous(), negative=ids[:, 1:].contiguous())


def spoil(inputs: Inputs, place: str, value: float, *, row: int = 1, component: int = 20) -> Inputs:
    """The inputs with ``value`` in one component of an embedding that a row uses."""
    query, table = inputs.query.clone(), inputs.table.clone()
    if place == "query":
        query[row, component] = value
    else:
        table[5 * row + (0 if place == "positive" else 2), component] = value
    return inputs._replace(query=query, table=table)


CALLS: list[tuple[Callable[..., Any], Options]] = [
    (fused_emu_loss, LOSS),
    (fused_emu_loss, LOSS | {"alpha": 0.0, "beta": 0.0}),
    (fused_emu_loss, LOSS | {"mutation_rate": 1.0, "alpha": 0.0}),
    (fused_emu_loss, LOSS | {"mutation_rate": 0.0, "alpha": 0.0}),
    (fused_softmax_loss, {}),
]


@pytest.mark.parametrize(("function", "options"), CALLS)
@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("place", PLACES)
def test_loss(
    place: str,
    value: float,
    function: Callable[..., Any],
    options: Options,
    backend: str,
    device: torch.device,
) -> None:
    """Also if the mutation replaces the bad component, or its term has weight 0."""
    options = options | {"backend": backend}
    good, bad = clean().to(device), spoil(clean(), place, value).to(device)
    expected = evaluate(function, good, reduction="none", **options)
    actual = evaluate(function, bad, reduction="none", **options)
    assert actual.outputs[0].isnan().tolist() == [False, True, False, False]
    others, entities = [0, 2, 3], [*range(5), *range(10, 20)]
    torch.testing.assert_close(actual.outputs[0][others], expected.outputs[0][others])
    torch.testing.assert_close(actual.query[others], expected.query[others])
    torch.testing.assert_close(actual.table[entities], expected.table[entities])
    assert not actual.query[1].isfinite().all()
    for reduction in ("sum", "mean"):
        assert function(*bad, reduction=reduction, **options).isnan()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes(dtype: torch.dtype, backend: str, device: torch.device) -> None:
    for value in BAD:
        for place in PLACES:
            inputs = spoil(clean(), place, value).to(device)
            query = inputs.query.to(torch.float64 if dtype == torch.float64 else torch.float32)
            inputs = inputs._replace(query=query, table=inputs.table.to(dtype))
            loss = fused_emu_loss(*inputs, reduction="none", backend=backend, **LOSS)
            assert loss.isnan().tolist() == [False, True, False, False]


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("place", PLACES)
def test_overflow(place: str, sign: float, backend: str, device: torch.device) -> None:
    """Finite embeddings whose score is not."""
    inputs = clean()
    inputs.query[1, 3] = 1e20
    inputs = spoil(inputs, place, sign * 1e20, component=3)
    inputs.table[5:10, 3] = sign * 1e20
    for function, options in CALLS:
        loss = function(*inputs.to(device), reduction="none", backend=backend, **options)
        assert loss.isnan().tolist() == [False, True, False, False]


def test_everything_is_nan(backend: str, device: torch.device) -> None:
    for value in BAD:
        inputs = make(3, 4, DIM, padding=True, device=device)
        inputs.table.fill_(value)
        real = (inputs.negative >= 0).any(1)
        loss = fused_emu_loss(*inputs, reduction="none", backend=backend, **LOSS)
        assert loss[real].isnan().all()


def test_padding_row_of_the_table(backend: str, device: torch.device) -> None:
    """Entities that a batch does not use, even the first or last, may have any values."""
    inputs = make(4, 4, DIM, padding=True, device=device)
    table = torch.nn.functional.pad(inputs.table, (0, 0, 1, 1), value=math.nan)
    shifted = torch.where(inputs.negative < 0, -1, inputs.negative + 1)
    moved = Inputs(inputs.query, table, inputs.positive + 1, shifted)
    expected = evaluate(fused_emu_loss, inputs, backend=backend, **LOSS)
    actual = evaluate(fused_emu_loss, moved, backend=backend, **LOSS)
    torch.testing.assert_close(actual.outputs, expected.outputs)
    torch.testing.assert_close(actual.query, expected.query)
    torch.testing.assert_close(actual.table[1:-1], expected.table)


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("place", PLACES)
def test_scores(place: str, value: float, kernel: str, device: torch.device) -> None:
    """Scores and gradients equal the reference's, also if the mutation replaced a bad component."""
    components = range(0, DIM, 5)  # one for each row
    inputs = clean(len(components))
    for row, component in enumerate(components):
        inputs = spoil(inputs, place, value, row=row, component=component)

    def run(backend: str) -> list[Tensor]:
        options: Options = {"mutation_rate": 0.5, "seed": 2, "backend": backend}
        result = evaluate(emu_scores, inputs.to(device), **options)
        return [*result.outputs, result.query, result.table]

    results = run(kernel), run("reference")
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, equal_nan=True, rtol=1e-4, atol=1e-5)
    mutated = results[1][2][:, 1]  # of the negatives that may have a bad component
    assert mutated.isfinite().any() == (place != "query")
    assert not mutated.isfinite().all()


@pytest.mark.parametrize("value", BAD)
def test_mutate(value: float, backend: str, device: torch.device) -> None:
    """A component that the mask drops has no effect, whereas a product with 0 would give NaN."""
    shape = (3, 5, DIM)
    good = torch.ones(shape, device=device)
    for positive, negative in (
        (good[:, 0], torch.full_like(good, value)),
        (torch.full_like(good[:, 0], value), good),
    ):
        pos, neg = positive.clone().requires_grad_(), negative.clone().requires_grad_()
        out = emu_mutate(pos, neg, mutation_rate=0.5, seed=1, backend=backend)
        finite = out.isfinite()
        assert finite.any()
        assert not finite.all()
        assert (out[finite] == 1).all()
        for grad in torch.autograd.grad(out, (pos, neg), torch.ones_like(out)):
            assert grad.isfinite().all()
