"""``sparse_grad=True``: only the touched rows, equal to those of the dense gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import embedding

from emu_kernels import emu_scores, fused_emu_loss, fused_softmax_loss
from tests.ops.support import LOSS, Options, make

CALLS: list[tuple[Callable[..., Any], Options]] = [
    (fused_emu_loss, LOSS),
    (fused_softmax_loss, {}),
    (lambda *a, **o: emu_scores(*a, **o).positive, {"mutation_rate": 0.5, "seed": 1}),
    (
        lambda *a, **o: emu_scores(*a, **o).mutated.clamp(min=-9).sum(1),
        {"mutation_rate": 0.5, "seed": 1},
    ),
]


def table_gradient(
    function: Callable[..., Any], *inputs: Tensor, sparse: bool, **options: Any
) -> Tensor:
    table = inputs[1].detach().requires_grad_()
    loss = function(inputs[0], table, *inputs[2:], sparse_grad=sparse, **options)
    (grad,) = torch.autograd.grad(loss.sum(), table)
    assert grad.is_sparse == sparse
    return grad


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str
)
@pytest.mark.parametrize(("function", "options"), CALLS)
def test_equals_dense(
    function: Callable[..., Any],
    options: Options,
    dtype: torch.dtype,
    backend: str,
    device: torch.device,
) -> None:
    for batch, groups, rows in ((6, 6, 40), (6, 2, 3), (1, 1, 400)):
        inputs = make(
            batch, 7, 37, groups=groups, rows=rows, dtype=dtype, padding=True, device=device
        )
        options = options | {"backend": backend}
        dense = table_gradient(function, *inputs, sparse=False, **options)
        sparse = table_gradient(function, *inputs, sparse=True, **options)
        assert sparse.dtype == dtype
        assert torch.equal(sparse.to_dense(), dense)


def test_has_the_touched_rows_alone(kernel: str, device: torch.device) -> None:
    inputs = make(6, 7, 37, rows=1000, padding=True, device=device)
    grad = table_gradient(fused_emu_loss, *inputs, sparse=True, backend=kernel, **LOSS)
    assert grad.is_coalesced()
    ids = grad.indices()[0]
    assert grad.indices().shape[0] == 1
    assert (ids.diff() > 0).all()
    used = torch.cat([inputs.positive, inputs.negative.view(-1)]).unique()
    assert torch.equal(ids, used[used >= 0])
    assert grad.values().shape == (ids.numel(), 37)


@pytest.mark.parametrize("sparse", [False, True])
def test_optimizers(sparse: bool, backend: str, device: torch.device) -> None:
    """A few training steps in which a sparse embedding looks up the query's rows."""
    batches = [make(6, 7, 20, rows=30, seed=s, device=device) for s in range(3)]

    def train(sparse: bool, optimizer: type[torch.optim.Optimizer], **options: Any) -> Tensor:
        table = batches[0].table.clone().requires_grad_()
        step = optimizer([table], **options)
        for inputs in batches:
            step.zero_grad()
            query = embedding(inputs.positive, table, sparse=sparse).tanh()
            loss = fused_emu_loss(
                query, table, *inputs[2:], sparse_grad=sparse, backend=backend, **LOSS
            )
            loss.backward()
            assert table.grad is not None
            assert table.grad.is_sparse == sparse
            step.step()
        return table.detach()

    # The optimizers make sparse tensors from our gradients: let torch check them.
    with torch.sparse.check_sparse_tensor_invariants():
        for optimizer in (torch.optim.SGD, torch.optim.Adagrad):
            actual = train(sparse, optimizer, lr=0.1)
            torch.testing.assert_close(actual, train(False, optimizer, lr=0.1))
            assert not torch.equal(actual, batches[0].table)
        if sparse:
            assert train(True, torch.optim.SparseAdam, lr=0.1).isfinite().all()


def test_cannot_be_compiled(kernel: str, device: torch.device) -> None:
    """It works in eager mode only, and raises an error in a compiled function."""
    inputs = make(device=device)
    table = inputs.table.requires_grad_()

    @torch.compile(backend="aot_eager", fullgraph=True)
    def loss(table: Tensor) -> Tensor:
        return fused_emu_loss(
            inputs.query, table, *inputs[2:], sparse_grad=True, backend=kernel, **LOSS
        )

    with pytest.raises(RuntimeError, match="sparse_grad=True is eager-only"):
        loss(table).backward()
