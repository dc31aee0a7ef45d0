"""16-bit tables: read exactly, summed in fp32, and rounded once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from emu_kernels import emu_scores, fused_emu_loss, fused_softmax_loss
from tests.ops.support import (
    LOSS,
    Inputs,
    assert_agree,
    evaluate,
    exact,
    make,
    skip_if_too_slow,
)

LOW = [torch.bfloat16, torch.float16]


def every_number(dtype: torch.dtype) -> Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_every_number_is_read_exactly(
    dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    """The gradient of a positive's score with respect to the query is the positive's row."""
    row = every_number(dtype)
    for start in (0, 1):  # whole vectors, and a partial one at the end
        table = row[None, start:].to(device)
        query = torch.zeros(1, table.shape[1], device=device).requires_grad_()
        positive = torch.tensor([0], device=device)
        scores = emu_scores(
            query, table, positive, positive[:0], mutation_rate=0.5, seed=1, backend=backend
        )
        (grad,) = torch.autograd.grad(scores.positive.sum(), query)
        torch.testing.assert_close(grad, table.float(), rtol=0, atol=0, equal_nan=True)


def awkward_numbers(dtype: torch.dtype) -> Tensor:
    """fp32 numbers near the edge cases of rounding: ties, subnormals, overflow, NaN."""
    known = every_number(dtype).float()
    step = torch.tensor([1, -1], dtype=torch.int32)[:, None]
    bits = known.view(torch.int32)
    gap = 2**15 if dtype == torch.bfloat16 else 2**12  # half a unit in the last place, normal
    near = [bits, *(bits + step), *(bits + gap + torch.arange(-1, 2, dtype=torch.int32)[:, None])]
    generator = torch.Generator().manual_seed(0)
    subnormal = torch.rand(20_000, generator=generator) * torch.finfo(dtype).smallest_normal * 1.1
    ties = (torch.arange(5000) + 0.5) * torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    values = torch.cat([*(b.view(torch.float32) for b in near), subnormal, -subnormal, ties])
    return torch.cat([values, torch.tensor([torch.inf, -torch.inf, torch.nan, 3.4e38, 65519.996])])


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_gradient_is_rounded_as_torch_rounds(
    dtype: torch.dtype, sparse: bool, backend: str, device: torch.device
) -> None:
    """The gradient of a positive's score with respect to its row is the query."""
    query = awkward_numbers(dtype)[None].to(device)
    table = torch.zeros(2, query.shape[1], dtype=dtype, device=device).requires_grad_()
    positive = torch.tensor([1], device=device)
    scores = emu_scores(
        query,
        table,
        positive,
        positive[:0],
        mutation_rate=0.5,
        seed=1,
        sparse_grad=sparse,
        backend=backend,
    )
    (grad,) = torch.autograd.grad(scores.positive.sum(), table)
    dense = grad.to_dense()
    torch.testing.assert_close(dense[1], query[0].to(dtype), rtol=0, atol=0, equal_nan=True)
    assert (dense[0] == 0).all()


CONTRIBUTIONS = {
    "many small": (torch.full((4099,), 2.0**-10), 2048),
    "small beside one large": (torch.cat([torch.ones(1), torch.full((3,), 2.0**-9)]), 1),
    "smaller beside one large": (torch.cat([torch.ones(1), torch.full((3,), 2.0**-12)]), 2),
    "large that cancel": (torch.cat([torch.full((500,), 3.0), torch.full((500,), -3.0)]), 250),
}
"""Contributions to one row, and how many of them come from positives; the rest come from negatives.
Their sums are exact in fp32 in any order, and wrong if a partial sum is kept in 16 bits."""


@pytest.mark.parametrize("role", ["positive", "negative", "both"])
@pytest.mark.parametrize("name", CONTRIBUTIONS)
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_contributions_are_summed_in_fp32(
    dtype: torch.dtype, name: str, role: str, backend: str, device: torch.device
) -> None:
    values, split = CONTRIBUTIONS[name]
    batch = values.numel()
    skip_if_too_slow(backend, device, batch=batch, count=1, dim=20)
    query = values[:, None].expand(batch, 20)
    table = torch.ones(3, 20, dtype=dtype)
    own = torch.arange(batch) < {"positive": batch, "negative": 0, "both": split}[role]
    positive = torch.where(own, 1, 2)
    negative = torch.where(own, 2, 1)[:, None]
    inputs = Inputs(query, table, positive, negative)
    upstream = [own.float(), (~own).float()[:, None], *[torch.zeros(batch, 1)] * 2]
    result = evaluate(
        emu_scores, inputs.to(device), upstream=upstream, mutation_rate=0.5, seed=1, backend=backend
    )
    expected = values.double().sum().to(dtype)
    assert result.table.dtype == dtype
    assert (result.table[1] == expected).all()
    assert (result.table[[0, 2]] == 0).all()


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_hub(dtype: torch.dtype, backend: str, device: torch.device) -> None:
    """One entity is every negative of every row: 32,000 contributions, rounded once at the end."""
    skip_if_too_slow(backend, device, batch=250, count=128, dim=36)
    inputs = make(250, 128, 36, rows=250, dtype=dtype)
    inputs.negative.fill_(7)
    for function, options in ((fused_emu_loss, LOSS), (fused_softmax_loss, {})):
        actual = evaluate(function, inputs.to(device), backend=backend, **options)
        assert_agree(actual, exact(function, inputs, **options))
