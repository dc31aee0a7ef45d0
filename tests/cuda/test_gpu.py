"""Tests that need a GPU: streams, captured graphs, late reports of ids, no synchronisation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bench.measure import Captured
from emu_kernels import Expected, fused_emu_loss
from emu_kernels.backends import ids
from tests.ops.support import LOSS, Inputs, Options, evaluate, make, same_bits

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="there is no GPU: nothing here can be emulated"
)
RATES: Options = {"mutation_rate": 0.5, "beta": 0.3, "alpha": 0.2, "backend": "cuda"}


@pytest.fixture
def inputs() -> Inputs:
    return make(32, 40, 100, rows=300, device="cuda")


def test_captured_graph_draws_fresh_masks(inputs: Inputs) -> None:
    """Each replay equals an eager call with the same seed, including gradients."""
    query, table = inputs.query.clone().requires_grad_(), inputs.table.clone().requires_grad_()
    seed = torch.zeros((), dtype=torch.int64, device="cuda")

    def step() -> tuple[Tensor, ...]:
        loss = fused_emu_loss(query, table, *inputs[2:], seed=seed, **RATES)
        return (loss, *torch.autograd.grad(loss, (query, table)))

    captured = Captured(step)
    losses = set()
    for value in (3, 4, 2**40 + 5):
        seed.fill_(value)
        replayed = [t.clone() for t in captured()]
        assert all(torch.equal(a, b) for a, b in zip(replayed, step(), strict=True))
        losses.add(replayed[0].item())
    assert len(losses) == 3


def test_current_stream(inputs: Inputs) -> None:
    """A call waits for earlier work on its stream only."""
    expected = evaluate(fused_emu_loss, inputs, backend="cuda", **LOSS)
    stream = torch.cuda.Stream()
    late = inputs._replace(query=torch.zeros_like(inputs.query))
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.query.copy_(inputs.query)
        actual = evaluate(fused_emu_loss, late, backend="cuda", **LOSS)
    torch.cuda.synchronize()
    assert same_bits(actual, expected)


def test_nothing_waits_for_the_device(inputs: Inputs) -> None:
    evaluate(fused_emu_loss, inputs, backend="cuda", **LOSS)
    rates = torch.full((100,), 0.4, device="cuda", requires_grad=True)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        seed = torch.zeros((), dtype=torch.int64, device="cuda")
        evaluate(fused_emu_loss, inputs, seed=seed, **RATES)
        for rule in (Expected(0.4), Expected(rates)):
            evaluate(fused_emu_loss, inputs, **RATES | {"mutation_rate": rule})
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_rate_out_of_range_gives_nan(inputs: Inputs) -> None:
    """Nothing waits to see it."""
    rates = torch.full((32, 100), 0.5, device="cuda")
    rates[3, 7] = 1.5
    options = RATES | {"mutation_rate": Expected(rates), "reduction": "none"}
    assert fused_emu_loss(*inputs, **options).isnan().nonzero().flatten().tolist() == [3]


def test_ids_are_reported_by_the_next_call(inputs: Inputs) -> None:
    negative = inputs.negative.clone()
    negative[3, 7] = 300
    options = LOSS | {"backend": "cuda", "reduction": "none"}
    loss = fused_emu_loss(*inputs[:3], negative, **options)
    assert loss.isnan().nonzero().flatten().tolist() == [3]
    with pytest.raises(IndexError, match=r"negative.*earlier call.*got 300"):
        fused_emu_loss(*inputs, **options)
    ids.report(inputs.table.device).zero_()
    assert fused_emu_loss(*inputs, **options).isfinite().all()


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_torch_compile(compiler: str, inputs: Inputs) -> None:
    def call(*tensors: Tensor, **options: Any) -> Tensor:
        loss: Tensor = fused_emu_loss(*tensors, backend="cuda", **LOSS)
        return loss

    fused = torch.compile(call, fullgraph=True, backend=compiler)
    assert same_bits(evaluate(fused, inputs), evaluate(call, inputs))


@pytest.mark.parametrize("rule", [0.5, Expected(0.4)], ids=["masks", "moments"])
def test_same_bits_every_time(rule: float | Expected, inputs: Inputs) -> None:
    options = LOSS | {"mutation_rate": rule, "backend": "cuda"}
    first = evaluate(fused_emu_loss, inputs, **options)
    for _ in range(5):
        assert same_bits(evaluate(fused_emu_loss, inputs, **options), first)
