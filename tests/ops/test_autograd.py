"""The operators as PyTorch sees them: opcheck, gradcheck, second derivatives, autocast."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from emu_kernels import (
    emu_mutate,
    emu_scores,
    fused_emu_loss,
    fused_softmax_loss,
    uls_cross_entropy,
)
from tests.ops.support import LOSS, Options, evaluate, make, same_bits

OPERATORS = sorted(
    name.removeprefix("emu_kernels::")
    for name in torch._C._dispatch_get_all_op_names()
    if name.startswith("emu_kernels::")
)


def samples(name: str, backend: str, device: torch.device) -> list[tuple[Any, ...]]:
    """Arguments for one private operator, as the public functions would give them."""
    seed = torch.tensor(2**40 + 1, device=device)
    batches = [
        make(6, 5, 20, groups=groups, dtype=dtype, padding=True, device=device)
        for groups, dtype in ((6, torch.float32), (2, torch.bfloat16), (1, torch.float64))
    ]

    def common(index: int, similarity: str, mutation: str, **options: Any) -> tuple[Any, ...]:
        query, table, positive, negative = batches[index]
        scaled, weighted = options.get("scaled"), options.get("weighted")
        return (
            query,
            table,
            query.new_ones(6, scaled) if scaled else None,
            query.new_ones(weighted) if weighted else None,
            positive,
            negative,
            seed,
            options.get("thresholds"),
            3,
            mutation,
            2 if mutation == "mixup" else 128,
            similarity,
            1.0,
            backend,
        )

    thresholds = torch.arange(20, dtype=torch.int16, device=device)
    mutated = [
        common(0, "dot", "component"),
        common(1, "l1", "component", scaled=20, thresholds=thresholds),
        common(2, "rotate", "pair"),
        common(0, "hake", "mixup", scaled=10, weighted=2),
    ]
    plain = common(0, "dot", "none")
    query = [batches[i][0] for i in (0, 1, 2, 0)]
    scores = [(q.new_ones(6), q.new_ones(6, 5), q.new_ones(6, 5)) for q in query]
    sums = [
        (q.new_ones(6), q.new_ones(n, 6, 5), q.new_ones(n, 6, 5), q)
        for q, n in zip(query, (1, 1, 1, 2), strict=True)
    ]
    positive, negative = torch.ones(2, 20, device=device), torch.zeros(2, 5, 20, device=device)
    if name == "loss_forward":
        coefficients = query[0].new_tensor([0.3, 0.2])
        weight = query[0].new_ones(6)
        return [
            (*mutated[0], 0.3, 0.2, None, None, "mean", True),
            (*mutated[0], 0.0, 0.0, coefficients, weight, "none", True),
            (*mutated[1], 0.3, 0.2, None, None, "sum", False),
            (*mutated[2], 0.3, 0.2, None, None, "mean", True),
            (*mutated[3], 0.3, 0.2, None, None, "mean", True),
            (*plain, 0.0, 1.0, None, weight, "mean", True),
        ]
    if name == "scores_forward":
        return [*mutated, plain]
    if name == "query_gradient":
        unmutated = (*plain, *scores[0][:2], query[0].new_empty(0))
        return [*((*m, *s) for m, s in zip(mutated, scores, strict=True)), unmutated]
    if name in ("table_gradient", "table_gradient_sparse"):
        grads = [(*m, *s) for m, s in zip(mutated, sums, strict=True)]
        return [*grads, (*plain, *sums[0][:2], query[0].new_empty(0), query[0])]
    if name == "mutate_forward":
        return [
            (positive.to(dtype), negative.to(dtype), seed, None, 3, unit, 128, backend)
            for dtype, unit in (
                (torch.float32, "component"),
                (torch.bfloat16, "pair"),
                (torch.float64, "component"),
            )
        ]
    if name == "mutate_backward":
        return [
            (negative.to(dtype), seed, thresholds, 3, "component", 0, backend)
            for dtype in (torch.float32, torch.half)
        ]
    if name == "rates_to_thresholds":
        return [(torch.linspace(0, 1, 20, device=device), "mutation_rate")]
    if name == "scale_rows":
        return [(q.detach(), q.new_ones(6), backend) for q in query]
    if name == "checked_ids":
        return [(make(padding=True, device=device).negative, 9, -1, "negative")]
    if name == "checked_coefficient":
        return [(torch.tensor(0.3, device=device), "beta")]
    raise AssertionError(f"the operator {name} has no samples here")


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name: str, kernel: str, device: torch.device) -> None:
    operator = getattr(torch.ops.emu_kernels, name).default
    for arguments in samples(name, kernel, device):
        torch.library.opcheck(operator, arguments)


@pytest.mark.usefixtures("compiled")
def test_gradcheck_of_losses(backend: str, device: torch.device) -> None:
    inputs = make(4, 3, 5, groups=2, rows=6, dtype=torch.float64, padding=True, device=device)
    weight = torch.rand(4, dtype=torch.float64, device=device)
    leaves = [t.requires_grad_() for t in inputs[:2]]
    calls: list[tuple[Callable[..., Tensor], Options]] = [
        (fused_emu_loss, LOSS | {"reduction": "none"}),
        (fused_emu_loss, LOSS | {"sample_weight": weight}),
        (fused_emu_loss, LOSS | {"reduction": "sum", "mutation_rate": 1.0}),
        (fused_softmax_loss, {"reduction": "none"}),
    ]
    for function, options in calls:

        def call(query: Tensor, table: Tensor, function=function, options=options) -> Tensor:
            loss: Tensor = function(query, table, *inputs[2:], backend=backend, **options)
            return loss

        assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.usefixtures("compiled")
def test_gradcheck_of_scores(backend: str, device: torch.device) -> None:
    inputs = make(4, 3, 5, groups=2, rows=6, dtype=torch.float64, padding=True, device=device)

    def scores(query: Tensor, table: Tensor) -> tuple[Tensor, ...]:
        out = emu_scores(query, table, *inputs[2:], mutation=0.5, seed=1, backend=backend)
        return tuple(s.masked_fill(s == float("-inf"), 0) for s in out)

    assert torch.autograd.gradcheck(scores, [t.requires_grad_() for t in inputs[:2]])


@pytest.mark.usefixtures("compiled")
def test_gradcheck_of_mutate(backend: str, device: torch.device) -> None:
    """It is linear: every derivative exists."""
    generator = torch.Generator().manual_seed(0)
    leaves = [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(device).requires_grad_()
        for shape in ((2, 5), (2, 3, 5))
    ]

    def mutate(positive: Tensor, negative: Tensor) -> Tensor:
        return emu_mutate(positive, negative, mutation_rate=0.5, seed=1, backend=backend)

    assert torch.autograd.gradcheck(mutate, leaves)
    assert torch.autograd.gradgradcheck(mutate, leaves)
    assert torch.autograd.gradgradcheck(lambda p, n: mutate(p, n).square(), leaves)


def test_gradcheck_of_uls() -> None:
    generator = torch.Generator().manual_seed(0)
    leaves = [
        torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in ((3,), (3, 4))
    ]

    def loss(positive: Tensor, negative: Tensor) -> Tensor:
        return uls_cross_entropy(positive, negative, beta=0.3, reduction="none")

    assert torch.autograd.gradcheck(loss, leaves)
    assert torch.autograd.gradgradcheck(loss, leaves)


CALLS: list[tuple[Callable[..., Any], Options]] = [
    (fused_emu_loss, LOSS),
    (fused_softmax_loss, {"reduction": "none"}),
    (emu_scores, {"mutation": 0.5, "seed": 1}),
]


@pytest.mark.parametrize(("function", "options"), CALLS)
@pytest.mark.parametrize("leaf", [0, 1])
def test_second_derivative_raises(
    leaf: int, function: Callable[..., Any], options: Options, kernel: str, device: torch.device
) -> None:
    """A gradient penalty is refused, not dropped."""
    inputs = make(device=device)
    leaves = [t.requires_grad_() for t in inputs[:2]]
    out = function(*inputs, backend=kernel, **options)
    total = out.sum() if isinstance(out, Tensor) else out.positive.sum() + out.mutated.sum()
    (grad,) = torch.autograd.grad(total, leaves[leaf], create_graph=True)
    assert grad.requires_grad
    with pytest.raises(RuntimeError, match="second derivative"):
        grad.square().sum().backward()
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(grad.sum(), leaves[1 - leaf])


@pytest.mark.parametrize(("function", "options"), CALLS)
def test_reference_has_a_second_derivative(function: Callable[..., Any], options: Options) -> None:
    inputs = make(2, 2, 3, rows=4, dtype=torch.float64)

    def call(query: Tensor, table: Tensor) -> Any:
        return function(query, table, *inputs[2:], backend="reference", **options)

    assert torch.autograd.gradgradcheck(call, [t.requires_grad_() for t in inputs[:2]])


@pytest.mark.parametrize(("function", "options"), CALLS)
def test_what_requires_a_gradient(
    function: Callable[..., Any], options: Options, backend: str, device: torch.device
) -> None:
    """Each input gets its gradient, alone or with the other the same bits, if it asks for one."""
    inputs = make(padding=True, device=device)
    results: dict[int, list[Tensor]] = {0: [], 1: []}
    values = []
    for need in itertools.product((False, True), repeat=2):
        leaves = [t.detach().requires_grad_(n) for t, n in zip(inputs[:2], need, strict=True)]
        out = function(*leaves, *inputs[2:], backend=backend, **options)
        outputs = (out,) if isinstance(out, Tensor) else tuple(out)
        assert [o.requires_grad for o in outputs] == [any(need)] * len(outputs)
        values.append(outputs)
        if any(need):
            sum(o.masked_fill(o == float("-inf"), 0).sum() for o in outputs).backward()
        for i, leaf in enumerate(leaves):
            assert (leaf.grad is not None) == need[i]
            if leaf.grad is not None:
                results[i].append(leaf.grad)
    for alone, both in results.values():
        assert torch.equal(alone, both)
    for outputs in values[1:]:
        for left, right in zip(outputs, values[0], strict=True):
            torch.testing.assert_close(left, right)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode: Callable[[], Any], backend: str, device: torch.device) -> None:
    inputs = make(device=device)
    for tensor in inputs[:2]:
        tensor.requires_grad_()
    expected = fused_emu_loss(*inputs, backend=backend, **LOSS)
    with mode():
        loss = fused_emu_loss(*inputs, backend=backend, **LOSS)
        scores = emu_scores(*inputs, mutation=0.5, seed=1, backend=backend)
    assert not loss.requires_grad
    assert not any(s.requires_grad for s in scores)
    torch.testing.assert_close(loss, expected.detach())


def test_gradient_flows_to_what_made_the_query(backend: str, device: torch.device) -> None:
    """Query and candidates from one table, as in training: both contributions arrive."""
    inputs = make(6, 5, 20, dtype=torch.float64, device=device)

    def loss(table: Tensor, backend: str) -> Tensor:
        query = table[inputs.positive.flip(0)] * 2
        return fused_emu_loss(query, table, *inputs[2:], backend=backend, **LOSS)

    table = inputs.table.requires_grad_()
    (actual,) = torch.autograd.grad(loss(table, backend), table)
    (expected,) = torch.autograd.grad(loss(table, "reference"), table)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("function", "options"), [*CALLS, (fused_emu_loss, LOSS | {"alpha": 0.0})])
def test_autocast_changes_nothing(
    function: Callable[..., Any],
    options: Options,
    dtype: torch.dtype,
    low: torch.dtype,
    backend: str,
    device: torch.device,
) -> None:
    inputs = make(dim=37, dtype=dtype, device=device)
    expected = evaluate(function, inputs, backend=backend, **options)
    with torch.autocast(device.type, dtype=low):
        inside = evaluate(function, inputs, backend=backend, **options)
    assert same_bits(inside, expected)


def test_autocast_query(backend: str, device: torch.device) -> None:
    """A query that autocast made low-precision is taken as it is, in fp32 from there on."""
    inputs = make(dim=20, device=device)
    matrix = torch.eye(20, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        query = inputs.query @ matrix
        assert query.dtype == torch.bfloat16
        loss = fused_emu_loss(query, *inputs[1:], backend=backend, **LOSS)
    expected = fused_emu_loss(query.float(), *inputs[1:], backend=backend, **LOSS)
    assert torch.equal(loss, expected)


def test_uls_under_autocast() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(3, generator=generator), torch.randn(3, 4, generator=generator)
    expected = uls_cross_entropy(*scores, beta=0.3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(uls_cross_entropy(*scores, beta=0.3), expected)
