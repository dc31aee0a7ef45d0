"""The operators as PyTorch sees them: opcheck, gradcheck, second derivatives, autocast."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from emu_kernels import (
    EMULoss,
    Expected,
    Mixup,
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
    if name.startswith("emu_kernels::") and "relational" not in name  # see test_relational.py
)


class Recorder(TorchDispatchMode):
    """Keeps the calls of the package's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, list[tuple[Any, Any]]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Options | None = None
    ) -> Any:
        if func.namespace == "emu_kernels":
            given = tuple(a.detach().clone() if isinstance(a, Tensor) else a for a in args)
            self.calls.setdefault(func._schema.name.partition("::")[2], []).append((func, given))
        return func(*args, **(kwargs or {}))


@cache
def recorded(backend: str, device: torch.device) -> dict[str, list[tuple[Any, Any]]]:
    """The private operators' calls by the public functions: every dtype, one, several and all sets
    of negatives, padding, and each optional argument present and absent."""

    def leaf(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.ones(shape, dtype=dtype, device=device, requires_grad=True)

    rates = torch.linspace(0, 1, 20, device=device)
    schedules = {"beta": torch.tensor(0.3), "alpha": torch.tensor(0.2)}
    single, double = torch.float32, torch.float64
    calls: list[tuple[int, torch.dtype, Options, Options]] = [
        (6, single, {}, {}),
        (6, single, {"similarity": "l2", "sparse_grad": True}, {"reduction": "none"}),
        (2, torch.bfloat16, {"similarity": "l1", "scale": leaf(6, 20, dtype=single)},
         {"mutation_rate": rates, "reduction": "sum"}),
        (3, torch.half, {"similarity": "protate"},
         {"sample_weight": torch.rand(6, device=device),
          "log_q": torch.rand(9, device=device)}),
        (1, double, {"similarity": "rotate"}, {"mask_unit": "pair", **schedules}),
        (6, single, {"similarity": "hake", "scale": leaf(6, 10, dtype=single),
                     "similarity_weights": leaf(2, dtype=single), "phase_scale": 2.0},
         {"mutation_rate": Mixup(3)}),
        (6, single, {"similarity": "hake"}, {"mutation_rate": Expected(leaf(6, 20, dtype=single))}),
        (1, single, {"similarity": "rotate"},
         {"mutation_rate": Expected(0.4), "mask_unit": "pair"}),
    ]  # fmt: skip
    with Recorder() as recorder:
        for groups, dtype, options, more in calls:
            inputs = make(6, 5, 20, groups=groups, dtype=dtype, padding=True, device=device)
            inputs.query.requires_grad_()
            inputs.table.requires_grad_()
            given: Options = {**inputs._asdict(), **options, "backend": backend}
            mutation: Options = LOSS | more
            fused_emu_loss(**given, **mutation).sum().backward()
            fused_softmax_loss(**given).backward()
            rule: Options = {k: mutation[k] for k in ("mask_unit", "seed") if k in mutation}
            for rate in (None, mutation["mutation_rate"]):
                scored = emu_scores(**given, **rule, mutation_rate=rate)
                torch.autograd.backward(scored, [torch.ones_like(s) for s in scored])
            with torch.no_grad():
                fused_emu_loss(**given, **mutation)
            if not isinstance(mutation["mutation_rate"], (Mixup, Expected)):
                pair = leaf(2, 20, dtype=dtype), leaf(2, 5, 20, dtype=dtype)
                rule["mutation_rate"] = mutation["mutation_rate"]
                emu_mutate(*pair, **rule, backend=backend).sum().backward()
        # The operators that check the reference's arguments.
        reference: Options = {**make(device=device)._asdict(), **LOSS, **schedules}
        fused_emu_loss(**reference, backend="reference")
        on_cpu: Options = {**make()._asdict(), **LOSS, "mutation_rate": Expected(torch.rand(20))}
        fused_emu_loss(**on_cpu, backend="reference")
    return recorder.calls


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name: str, kernel: str, device: torch.device) -> None:
    calls = recorded(kernel, device).get(name, [])
    assert calls, f"no public call above reaches {name}"
    for operator, arguments in calls:
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
        out = emu_scores(query, table, *inputs[2:], mutation_rate=0.5, seed=1, backend=backend)
        return tuple(s.masked_fill(s == float("-inf"), 0) for s in out)

    assert torch.autograd.gradcheck(scores, [t.requires_grad_() for t in inputs[:2]])


@pytest.mark.usefixtures("compiled")
def test_gradcheck_of_mutate(backend: str, device: torch.device) -> None:
    """It is linear, so every derivative exists."""
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
    (emu_scores, {"mutation_rate": 0.5, "seed": 1}),
]


@pytest.mark.parametrize(("function", "options"), CALLS)
@pytest.mark.parametrize("leaf", [0, 1])
def test_second_derivative_raises(
    leaf: int, function: Callable[..., Any], options: Options, kernel: str, device: torch.device
) -> None:
    """A gradient penalty raises an error; it is not silently 0."""
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
    """Each input gets a gradient if it requires one, with the same bits whether the other does."""
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
        scores = emu_scores(*inputs, mutation_rate=0.5, seed=1, backend=backend)
    assert not loss.requires_grad
    assert not any(s.requires_grad for s in scores)
    torch.testing.assert_close(loss, expected.detach())


def test_gradient_flows_to_what_made_the_query(backend: str, device: torch.device) -> None:
    """If query and candidates are from one table, as in training, it gets both gradients."""
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
    """A query to which autocast gave low precision is converted to fp32."""
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


def test_a_module_can_be_copied_after_a_transform() -> None:
    query, table, positive, negative = make()
    module = EMULoss(mutation_rate=0.5, beta=0.3, alpha=0.2, backend="cpu")
    torch.func.grad(lambda x: module(x, table, positive, negative))(query)
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert copied.last_terms is None
        assert copied.alpha == module.alpha
