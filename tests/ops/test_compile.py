"""torch.compile: full graphs, results equal to eager ones, no recompilation for new seeds.

The reference is traced into hundreds of operators, which is slow, so it is compiled only in tests
where the public functions treat it differently from the kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

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
from tests.ops.support import LOSS, Options, emulated, evaluate, make

RATES: Options = {"mutation_rate": 0.5, "beta": 0.3, "alpha": 0.2}


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def no_recompilation() -> Any:
    return torch.compiler.set_stance("fail_on_recompile")


CALLS: list[tuple[Callable[..., Any], Options]] = [
    (fused_emu_loss, LOSS),
    (fused_emu_loss, LOSS | {"reduction": "none", "row_offset": 7}),
    (fused_softmax_loss, {"reduction": "sum"}),
    (emu_scores, {"mutation_rate": 0.5, "seed": 1, "margin": 2.0}),
    (fused_emu_loss, RATES | {"mutation_rate": Expected(0.5)}),
    (emu_scores, {"mutation_rate": Expected(0.5)}),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("function", "options"), CALLS)
def test_equals_eager(
    function: Callable[..., Any],
    options: Options,
    dtype: torch.dtype,
    backend: str,
    device: torch.device,
) -> None:
    inputs = make(6, 5, 21, groups=2, dtype=dtype, device=device)

    def call(*inputs: Tensor) -> Any:
        out = function(*inputs, backend=backend, **options)
        return out if isinstance(out, Tensor) else tuple(out)

    torch.testing.assert_close(
        evaluate(torch.compile(call, fullgraph=True, backend="aot_eager"), inputs),
        evaluate(call, inputs),
    )


def test_inductor(kernel: str, device: torch.device) -> None:
    """A whole training step in one graph: query, loss, and the use of its terms."""
    inputs = make(6, 5, 21, device=device)
    weight = torch.linspace(1, 2, 6, device=device)

    def step(query: Tensor, table: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        query = torch.tanh(query) * table[positive.flip(0)]
        loss = fused_emu_loss(
            query, table, positive, negative, sample_weight=weight, backend=kernel, **LOSS
        )
        return loss + 1e-3 * table[positive].abs().pow(3).sum()

    fused = torch.compile(step, fullgraph=True)
    torch.testing.assert_close(evaluate(fused, inputs), evaluate(step, inputs))


def test_mutate_and_uls(backend: str, device: torch.device) -> None:
    """The building blocks, around a black-box scorer."""
    generator = torch.Generator().manual_seed(0)
    positive = torch.randn(3, 21, generator=generator).to(device).requires_grad_()
    negative = torch.randn(3, 5, 21, generator=generator).to(device).requires_grad_()

    def loss(positive: Tensor, negative: Tensor) -> Tensor:
        mutated = emu_mutate(positive, negative, mutation_rate=0.5, seed=1, backend=backend)
        return uls_cross_entropy(positive.tanh().sum(1), mutated.tanh().sum(2), beta=0.3)

    fused = torch.compile(loss, fullgraph=True, backend="aot_eager")
    leaves = (positive, negative)
    torch.testing.assert_close(fused(*leaves), loss(*leaves))
    torch.testing.assert_close(
        torch.autograd.grad(fused(*leaves), leaves), torch.autograd.grad(loss(*leaves), leaves)
    )


@pytest.mark.parametrize("needed", [(True, False), (False, True), (False, False)])
def test_mutate_where_few_gradients_are_needed(
    needed: tuple[bool, bool], backend: str, device: torch.device
) -> None:
    made = (torch.randn(3, 21), torch.randn(3, 5, 21))
    leaves = [x.to(device).requires_grad_(need) for x, need in zip(made, needed, strict=True)]

    def mutate(positive: Tensor, negative: Tensor) -> Tensor:
        return emu_mutate(positive, negative, mutation_rate=0.5, seed=1, backend=backend)

    fused = torch.compile(mutate, fullgraph=True, backend="aot_eager")
    out = fused(*leaves)
    assert torch.equal(out, mutate(*leaves))
    assert out.requires_grad == any(needed)
    wanted = [leaf for leaf, need in zip(leaves, needed, strict=True) if need]
    if wanted:
        both = (torch.autograd.grad(f(*leaves).sum(), wanted) for f in (fused, mutate))
        torch.testing.assert_close(*both)


def test_seed_tensor_does_not_recompile(backend: str, device: torch.device) -> None:
    inputs = make(device=device)
    query = inputs.query.requires_grad_()

    def loss(seed: Tensor) -> Tensor:
        return fused_emu_loss(query, *inputs[1:], seed=seed, backend=backend, **RATES)

    fused = torch.compile(loss, fullgraph=True, backend="aot_eager")
    fused(torch.tensor(0, device=device)).backward()
    with no_recompilation():
        for value in (1, 2, 2**40, 2**63 - 1):
            seed = torch.tensor(value, device=device)
            out = fused(seed)
            torch.testing.assert_close(out, loss(seed))
            out.backward()


def test_seed_int_does_not_recompile(kernel: str, device: torch.device) -> None:
    """Dynamo makes an int symbolic when it sees a second value, or at once if told to."""
    inputs = make(device=device)

    def loss(seed: int, row_offset: int) -> Tensor:
        return fused_emu_loss(*inputs, seed=seed, row_offset=row_offset, backend=kernel, **RATES)

    for dynamic, seen in ((True, [(2, 2)]), (None, [(2, 2), (3, 3)])):
        torch.compiler.reset()
        fused = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        for arguments in seen:
            fused(*arguments)
        with no_recompilation():
            for arguments in ((4, 9), (5, 2**31 + 3), (2**40, 17), (2**63 - 1, 2)):
                torch.testing.assert_close(fused(*arguments), loss(*arguments))


def test_no_seed_draws_anew_at_each_call(kernel: str, device: torch.device) -> None:
    inputs = make(device=device)
    module = EMULoss(**RATES, backend=kernel)
    calls: list[Callable[[], Tensor]] = [
        lambda: fused_emu_loss(*inputs, backend=kernel, **RATES),
        lambda: module(*inputs),
        lambda: emu_scores(*inputs, mutation_rate=0.5, backend=kernel).mutated.sum(),
    ]
    for call in calls:
        fused = torch.compile(call, fullgraph=True, backend="aot_eager")
        fused()
        with no_recompilation():
            values = {fused().item() for _ in range(4)}
        assert len(values) == 4


def test_tensor_coefficients_do_not_recompile(kernel: str, device: torch.device) -> None:
    inputs = make(device=device)
    query = inputs.query.requires_grad_()

    def loss(beta: float | Tensor, alpha: float | Tensor) -> Tensor:
        return fused_emu_loss(
            query,
            *inputs[1:],
            mutation_rate=0.5,
            beta=beta,
            alpha=alpha,
            seed=1,
            backend=kernel,
        )

    fused = torch.compile(loss, fullgraph=True, backend="aot_eager")
    fused(torch.tensor(0.1, device=device), torch.tensor(0.2, device=device)).backward()
    with no_recompilation():
        for pair in ((0.5, 0.6), (0.0, 0.9), (1.0, 0.0)):
            out = fused(*(torch.tensor(v, device=device) for v in pair))
            torch.testing.assert_close(out, loss(*pair))
            out.backward()


def test_any_batch_size(kernel: str, device: torch.device) -> None:
    """Sizes may be symbolic."""

    def loss(query: Tensor, table: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        return fused_emu_loss(query, table, positive, negative, backend=kernel, **LOSS)

    fused = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch, count in ((6, 5), (8, 7), (12, 3)):
        inputs = make(batch, count, 21, rows=batch + 4, device=device)
        torch.testing.assert_close(evaluate(fused, inputs), evaluate(loss, inputs))


def test_module(backend: str, device: torch.device) -> None:
    inputs = make(device=device)
    eager = EMULoss(**RATES, backend=backend)
    module = EMULoss(**RATES, backend=backend)
    fused = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(fused(*inputs, seed=3), eager(*inputs, seed=3))
    assert module.last_terms is not None
    assert eager.last_terms is not None
    torch.testing.assert_close(module.last_terms, eager.last_terms)


def test_order_of_mixup_changes(kernel: str, device: torch.device) -> None:
    """The compiler makes a number that changes symbolic."""
    inputs = make(device=device)
    module = EMULoss(**RATES | {"mutation_rate": Mixup(1)}, backend=kernel)
    fused = torch.compile(module, fullgraph=True, backend="aot_eager")
    for order in (1, 2, 3):
        module.mutation_rate = Mixup(order)
        torch.testing.assert_close(fused(*inputs, seed=3), module(*inputs, seed=3))


def test_bad_ids_raise(backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if the ids' values are used only at run time."""
    monkeypatch.setenv("EMU_KERNELS_CHECK", "1")  # on a GPU they would raise later
    inputs = make(device=device)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def loss(negative: Tensor) -> Tensor:
        return fused_emu_loss(*inputs[:3], negative, backend=backend, **LOSS)

    loss(inputs.negative)
    with pytest.raises(IndexError, match=r"negative: .*got 9"):
        loss(inputs.negative.clamp(max=-1) + 10)


def test_bad_coefficient_raises(backend: str, device: torch.device) -> None:
    if device.type != "cpu" or emulated(backend, device):
        pytest.skip("on a GPU a coefficient is not read before the launch: a bad one gives NaN")
    inputs = make(device=device)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def loss(beta: Tensor) -> Tensor:
        return fused_emu_loss(*inputs, backend=backend, **LOSS | {"beta": beta})

    loss(torch.tensor(0.5))
    with pytest.raises(ValueError, match=r"beta: .*-0\.5"):
        loss(torch.tensor(-0.5))


@pytest.mark.parametrize(("function", "options"), CALLS)
def test_second_derivative_raises(
    function: Callable[..., Any], options: Options, kernel: str, device: torch.device
) -> None:
    inputs = make(device=device)
    query = inputs.query.requires_grad_()

    def loss(query: Tensor) -> Tensor:
        out = function(query, *inputs[1:], backend=kernel, **options)
        return out.sum() if isinstance(out, Tensor) else out.mutated.sum()

    fused = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (grad,) = torch.autograd.grad(fused(query), query, create_graph=True)
    with pytest.raises(RuntimeError, match=r"double backward|second derivative"):
        grad.square().sum().backward()
