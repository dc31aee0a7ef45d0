"""``log_q``: every score minus its candidate's log q, in the logsumexp and in the labels' terms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from emu_kernels import (
    EMULoss,
    Expected,
    Mixup,
    emu_scores,
    fused_emu_loss,
    fused_softmax_loss,
    products,
    uls_cross_entropy,
)
from emu_kernels.backends.base import Loss
from emu_kernels.request import LossRequest
from tests.ops.support import (
    LOSS,
    Options,
    assert_agree,
    assert_near,
    evaluate,
    exact,
    make,
    same_bits,
)

ROWS = 9


def log_q(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
    """log q of very different entities: q is between e⁻⁶ and 1/2."""
    return torch.linspace(-6, -0.7, ROWS, dtype=dtype, device=device).roll(4)


def by_hand(
    query: Tensor,
    table: Tensor,
    positive: Tensor,
    negative: Tensor,
    *,
    mutation: Any,
    beta: float = 0.0,
    alpha: float = 1.0,
    log_q: Tensor,
    **options: Any,
) -> Tensor:
    """The losses (B,) of emu_scores minus log q, by PyTorch's cross-entropy where possible."""
    scored = emu_scores(
        query, table, positive, negative, mutation_rate=mutation, backend="reference", **options
    )
    sets = negative.repeat_interleave(len(positive) // len(negative), dim=0)
    of_negatives = log_q[sets.clamp(min=0)]
    own = scored.positive - log_q[positive]
    logits = torch.cat([own[:, None], scored.negative - of_negatives], dim=1)
    vanilla = cross_entropy(logits, torch.zeros_like(positive), reduction="none")
    if mutation is None:
        return vanilla
    uls = uls_cross_entropy(
        own,
        scored.mutated - of_negatives,
        beta=beta,
        cumulant=scored.cumulant - of_negatives,
        reduction="none",
    )
    return uls + alpha * vanilla


@pytest.mark.parametrize(("similarity", "groups"), [("dot", 6), ("hake", 2), ("rotate", 1)])
@pytest.mark.parametrize("rule", ["none", "rate", "mixup", "expected"])
def test_is_cross_entropy_of_corrected_logits(
    rule: str, similarity: str, groups: int, kernel: str, device: torch.device
) -> None:
    inputs = make(rows=ROWS, groups=groups, padding=True)
    options: Options = {"similarity": similarity, "seed": 3}
    if rule == "expected" and similarity == "rotate":
        options["mask_unit"] = "pair"
    terms: Options = {"beta": 0.3, "alpha": 0.2}
    mutation = {"none": None, "rate": 0.4, "mixup": Mixup(), "expected": Expected(0.4)}[rule]
    expected = evaluate(
        by_hand,
        inputs.wide(),
        log_q=log_q(dtype=torch.float64),
        mutation=mutation,
        **options,
        **terms,
    )
    function: Any = fused_emu_loss
    options |= {**terms, "mutation_rate": mutation}
    if mutation is None:
        function, options = fused_softmax_loss, {"similarity": similarity}
    options |= {"log_q": log_q(device), "reduction": "none", "backend": kernel}
    actual = evaluate(function, inputs.to(device), **options)
    assert_agree(actual, expected)


def test_two_passes_and_many_splits(kernel: str, device: torch.device) -> None:
    """Rows too long for the registers, and so many negatives that several blocks share a row."""
    for count, dim in ((200, 20), (5, 1100)):
        inputs = make(2, count, dim, rows=ROWS, padding=True)
        options = LOSS | {"log_q": log_q()}
        expected = exact(fused_emu_loss, inputs, **options)
        options["log_q"] = log_q(device)
        actual = evaluate(fused_emu_loss, inputs.to(device), backend=kernel, **options)
        assert_agree(actual, expected)


@pytest.mark.parametrize("rule", ["none", "expected"])
def test_products(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(products.MIN_SCORES, "cpu", 1)
    monkeypatch.setattr(products, "MIN_ROWS", 1)
    called: list[LossRequest] = []

    def recorded(request: LossRequest) -> Loss:
        called.append(request)
        return loss(request)

    loss = products.loss
    monkeypatch.setattr(products, "loss", recorded)
    inputs = make(12, 6, rows=ROWS, groups=3, padding=True)
    options: Options = {"log_q": log_q()}
    function: Any = fused_softmax_loss
    if rule == "expected":
        function, options = fused_emu_loss, LOSS | options | {"mutation_rate": Expected(0.4)}
    actual = evaluate(function, inputs, backend="cpu", **options)
    assert called
    assert_agree(actual, exact(function, inputs, **options))


def test_a_constant_cancels(backend: str, device: torch.device) -> None:
    inputs = make(rows=ROWS, padding=True).to(device)
    constant = torch.full((ROWS,), -2.0, device=device)
    plain = evaluate(fused_emu_loss, inputs, backend=backend, **LOSS)
    assert_agree(evaluate(fused_emu_loss, inputs, backend=backend, log_q=constant, **LOSS), plain)
    zeros = torch.zeros_like(constant)
    zero = evaluate(fused_emu_loss, inputs, backend=backend, log_q=zeros, **LOSS)
    assert same_bits(zero, plain)


@pytest.mark.parametrize("bad", [float("nan"), float("-inf"), float("inf")])
@pytest.mark.parametrize("place", ["positive", "negative"])
def test_not_finite(place: str, bad: float, backend: str, device: torch.device) -> None:
    """Only the rows with that candidate are NaN; padding reads nothing."""
    inputs = make(3, 2, rows=ROWS)._replace(
        positive=torch.tensor([1, 2, 3]), negative=torch.tensor([[4, -1], [5, 6], [-1, 7]])
    )
    table = log_q()
    table[0] = bad  # what padding would read
    table[2 if place == "positive" else 6] = bad
    calls: list[tuple[Any, Options]] = [(fused_softmax_loss, {}), (fused_emu_loss, LOSS)]
    for function, options in calls:
        loss = function(
            *inputs.to(device), log_q=table.to(device), reduction="none", backend=backend, **options
        )
        assert loss.isnan().tolist() == [False, True, False]


def test_may_change_before_the_backward_pass(kernel: str, device: torch.device) -> None:
    inputs = make(rows=ROWS).to(device)
    table, given = inputs.table.requires_grad_(), log_q(device)
    loss = fused_softmax_loss(
        inputs.query, table, *inputs[2:], log_q=given, backend=kernel, sparse_grad=True
    )
    given.zero_()
    (grad,) = torch.autograd.grad(loss, table)
    expected = exact(fused_softmax_loss, make(rows=ROWS), log_q=log_q())
    assert_near(grad.to_dense(), expected.table)


def test_module(backend: str, device: torch.device) -> None:
    inputs = make(rows=ROWS).to(device)
    module = EMULoss(mutation_rate=0.5, beta=0.3, alpha=0.2, backend=backend)
    loss = module(*inputs, log_q=log_q(device), seed=LOSS["seed"])
    torch.testing.assert_close(
        loss, fused_emu_loss(*inputs, log_q=log_q(device), backend=backend, **LOSS)
    )


def test_compiles_in_one_graph() -> None:
    inputs = make(rows=ROWS, padding=True)

    def loss(query: Tensor, table: Tensor, given: Tensor) -> Tensor:
        return fused_emu_loss(query, table, *inputs[2:], log_q=given, backend="cpu", **LOSS)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    query, table = (t.requires_grad_() for t in inputs[:2])
    expected = torch.autograd.grad(loss(query, table, log_q()), (query, table))
    actual = torch.autograd.grad(compiled(query, table, log_q()), (query, table))
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ([1.0], TypeError, "list"),
        (torch.zeros(ROWS - 1), ValueError, r"shape \(9,\).*got \(8,\)"),
        (torch.zeros(ROWS, 1), ValueError, r"\(9, 1\)"),
        (torch.zeros(ROWS, dtype=torch.int64), TypeError, "int64"),
        (torch.zeros(ROWS, device="meta"), ValueError, "meta"),
        (torch.zeros(ROWS, requires_grad=True), ValueError, r"log_q\.detach\(\)"),
    ],
)
def test_bad_input(value: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"log_q: .*{message}"):
        fused_softmax_loss(*make(rows=ROWS), log_q=value)
