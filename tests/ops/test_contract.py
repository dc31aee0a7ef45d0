"""What autograd promises around a Function: hooks on what is saved, recomputation, torch.func."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from emu_kernels import (
    Expected,
    emu_mutate,
    emu_scores,
    fused_emu_loss,
    fused_softmax_loss,
)
from emu_kernels.one_vs_all import one_vs_all_loss
from tests.ops.support import LOSS, make

IN = make(6, 5, 20, padding=True)
MANY = make(64, 2500, 20, groups=1)
COEFFICIENTS: dict[str, Any] = {"beta": 0.3, "alpha": 0.2}

Function = Callable[[Tensor, Tensor], Tensor]  # of query and table
CASES: dict[str, Function] = {
    "emu": lambda q, t: fused_emu_loss(q, t, *IN[2:], **LOSS),
    "expected": lambda q, t: fused_emu_loss(
        q, t, *IN[2:], **LOSS | {"mutation_rate": Expected(q.detach().sigmoid())}
    ),
    "softmax": lambda q, t: fused_softmax_loss(q, t, *IN[2:]),
    "scores": lambda q, t: emu_scores(
        q, t, *IN[2:3], MANY.negative[0, :7], mutation_rate=0.5, seed=1
    )
    .mutated.square()
    .sum(),
    "mutate": lambda q, t: emu_mutate(q, t[IN.negative.clamp(min=0)], mutation_rate=0.5, seed=1)
    .square()
    .sum(),
    "products": lambda q, t: fused_softmax_loss(q.repeat(11, 1)[:64], t, *MANY[2:]),
    "all, dot": lambda q, t: one_vs_all_loss(
        q, t, IN.positive, mutation_rate=Expected(0.4), **COEFFICIENTS
    ),
    "all, l2": lambda q, t: one_vs_all_loss(
        q, t, IN.positive, mutation_rate=Expected(0.4), similarity="l2", **COEFFICIENTS
    ),
}  # fmt: skip


@pytest.fixture(params=CASES)
def function(request: pytest.FixtureRequest) -> Function:
    return CASES[request.param]


def leaves() -> tuple[Tensor, Tensor]:
    return IN.query.clone().requires_grad_(), IN.table.clone().requires_grad_()


def gradients(made: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, ...]:
    both = leaves()
    return torch.autograd.grad(made(*both), both)


def same(left: tuple[Tensor, ...], right: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(left, right, strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(function: Function, reentrant: bool) -> None:
    def recomputed(query: Tensor, table: Tensor) -> Tensor:
        out: Tensor = checkpoint(function, query, table, use_reentrant=reentrant)
        return out

    if reentrant:  # it supports backward() alone
        both = leaves()
        recomputed(*both).backward()
        found = tuple(x.grad for x in both if x.grad is not None)
    else:
        found = gradients(recomputed)
    assert same(found, gradients(function))


@pytest.mark.parametrize("name", ["emu", "expected", "softmax", "mutate"])
def test_activation_checkpointing_compiled(name: str) -> None:
    def recomputed(query: Tensor, table: Tensor) -> Tensor:
        out: Tensor = checkpoint(CASES[name], query.tanh(), table, use_reentrant=False)
        return 2 * out

    # aot_eager recomputes as the compiler does, without compiling C++.
    found = gradients(torch.compile(recomputed, backend="aot_eager", fullgraph=True))
    for actual, expected in zip(found, gradients(recomputed), strict=True):
        torch.testing.assert_close(actual, expected)


def test_saved_tensors_are_unpacked_as_often_as_packed(function: Function) -> None:
    counts = [0, 0]

    def seen(which: int) -> Callable[[Tensor], Tensor]:
        def hook(x: Tensor) -> Tensor:
            counts[which] += 1
            return x.clone()  # nothing relies on the tensor itself

        return hook

    def hooked(query: Tensor, table: Tensor) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(seen(0), seen(1)):
            return function(query, table)

    assert same(gradients(hooked), gradients(function))
    assert counts[0] == counts[1] > 0


def test_saved_on_the_cpu(function: Function) -> None:
    def offloaded(query: Tensor, table: Tensor) -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            return function(query, table)

    assert same(gradients(offloaded), gradients(function))


def test_functional_gradient(function: Function) -> None:
    found = torch.func.grad(function, argnums=(0, 1))(IN.query, IN.table)
    assert same(found, gradients(function))


def test_accumulation_and_tensor_hooks(function: Function) -> None:
    query, table = leaves()
    query.register_hook(lambda grad: grad * 2)
    for _ in range(2):
        function(query, table).backward()
    by_query, by_table = gradients(function)
    assert query.grad is not None
    assert table.grad is not None
    assert torch.equal(query.grad, by_query * 4)
    assert torch.equal(table.grad, by_table * 2)


def test_vmap_says_what_to_do_instead() -> None:
    def loss(query: Tensor) -> Tensor:
        return fused_softmax_loss(query, *IN[1:])

    for mapped in (torch.vmap(loss), torch.vmap(torch.func.grad(loss))):
        with pytest.raises(RuntimeError, match=r"query: torch\.vmap is not supported"):
            mapped(IN.query.expand(2, 6, 20))
