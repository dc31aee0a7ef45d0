"""Tests that need a GPU; skipped without one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.measure import Captured
from emu_kernels import backends, emu_scores, fused_emu_loss
from emu_kernels.backends import ids
from emu_kernels.backends import triton as backend
from tests.ops.support import LOSS, Inputs, Options, assert_agree, evaluate, exact, make, same_bits

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or backends.get("triton").unavailable() is not None,
    reason="needs a GPU and Triton",
)
RATES: Options = {"mutation_rate": 0.5, "beta": 0.3, "alpha": 0.2, "backend": "triton"}


@pytest.fixture
def device() -> Iterator[torch.device]:
    """The current GPU, without reported ids before and after the test."""
    current = torch.device("cuda", torch.cuda.current_device())
    ids.report(current).zero_()
    yield current
    torch.cuda.synchronize()
    ids.report(current).zero_()


def step(inputs: Inputs, seed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    loss = fused_emu_loss(*inputs, seed=seed, **RATES)
    by_query, by_table = torch.autograd.grad(loss, inputs[:2])
    return loss.detach(), by_query, by_table


def leaves(device: torch.device, **options: Any) -> Inputs:
    inputs = make(64, 48, 100, rows=300, device=device, **options)
    query, table = (t.requires_grad_() for t in inputs[:2])
    return inputs._replace(query=query, table=table)


def test_a_graph_draws_fresh_masks_at_every_replay(device: torch.device) -> None:
    inputs, seed = leaves(device), torch.zeros((), dtype=torch.int64, device=device)
    captured = Captured(lambda: step(inputs, seed))
    seen = set()
    for value in (1, 2, 2**40):
        seed.fill_(value)
        replayed = captured()
        expected = step(inputs, torch.tensor(value, device=device))
        assert all(map(torch.equal, replayed, expected))
        seen.add(replayed[0].item())
    assert len(seen) == 3


def test_inductor_compiles_one_graph(device: torch.device) -> None:
    inputs = leaves(device)

    @torch.compile(fullgraph=True)
    def loss(query: Tensor, table: Tensor, seed: Tensor) -> Tensor:
        return fused_emu_loss(query.tanh(), table, *inputs[2:], seed=seed, **RATES)

    for value in (1, 2):
        seed = torch.tensor(value, device=device)
        expected = fused_emu_loss(inputs.query.tanh(), *inputs[1:], seed=seed, **RATES)
        torch.testing.assert_close(loss(*inputs[:2], seed), expected)


def test_it_follows_the_current_stream(device: torch.device) -> None:
    inputs = make(64, 48, 100, rows=300, device=device)
    expected = evaluate(fused_emu_loss, inputs, **RATES, seed=1)
    torch.cuda.synchronize()
    side = torch.cuda.Stream(device)
    late = inputs._replace(query=torch.zeros_like(inputs.query))
    with torch.cuda.stream(side):
        torch.cuda._sleep(10_000_000)  # cycles: a kernel that does not wait reads zeros
        late.query.copy_(inputs.query)
        actual = evaluate(fused_emu_loss, late, **RATES, seed=1)
    side.synchronize()
    assert same_bits(actual, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_it_follows_the_tensors_device() -> None:
    inputs = make(8, 5, 20)
    last = torch.device("cuda", torch.cuda.device_count() - 1)
    actual = evaluate(fused_emu_loss, inputs.to(last), backend="triton", **LOSS)
    assert_agree(actual, exact(fused_emu_loss, inputs, **LOSS))


@pytest.mark.parametrize(("name", "value"), [("positive", 300), ("negative", -2)])
def test_a_bad_id_is_raised_by_the_next_call(
    name: str, value: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("EMU_KERNELS_CHECK", raising=False)
    inputs = make(64, 48, 100, rows=300, device=device)
    bad = getattr(inputs, name).clone()
    bad.view(-1)[-1] = value
    spoiled = inputs._replace(**{name: bad})
    loss = fused_emu_loss(*spoiled, reduction="none", seed=1, **RATES)
    assert loss.isnan().tolist() == [False] * 63 + [True]  # waits for the kernels
    with pytest.raises(IndexError, match=f"{name}.*got {value}"):
        fused_emu_loss(*inputs, seed=1, **RATES)
    assert fused_emu_loss(*inputs, seed=1, **RATES).isfinite()


def test_nothing_waits_for_the_device(device: torch.device) -> None:
    inputs, seed = leaves(device), torch.tensor(1, device=device)
    step(inputs, seed)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(inputs, seed)
        emu_scores(*inputs, mutation_rate=0.5, seed=seed, backend="triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_atomic_additions_agree(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make(64, 48, 100, rows=30, padding=True)
    monkeypatch.setattr(backend, "table_gradients", "atomic")
    actual = evaluate(fused_emu_loss, inputs.to(device), backend="triton", **LOSS)
    assert_agree(actual, exact(fused_emu_loss, inputs, **LOSS))


def test_the_same_bits_every_time(device: torch.device) -> None:
    inputs = make(256, 256, 100, rows=30, device=device)
    first = evaluate(fused_emu_loss, inputs, backend="triton", **LOSS)
    for _ in range(5):
        assert same_bits(evaluate(fused_emu_loss, inputs, backend="triton", **LOSS), first)
