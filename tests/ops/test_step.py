"""``backward_and_step``: the same numbers as ``backward()`` and then the optimizer's step."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor

from emu_kernels import (
    _C,
    Expected,
    Mixup,
    RowwiseAdagrad,
    backward_and_step,
    emu_scores,
    fused_emu_loss,
    fused_softmax_loss,
)
from emu_kernels.similarity import SIMILARITIES
from tests.ops.support import LOSS, Inputs, make

New = Callable[..., torch.optim.Optimizer]
EPS = 1e-3  # so that a gradient of nearly 0 does not cause a step of the whole rate


def batches(*sizes: int, device: torch.device | str = "cpu", **options: Any) -> list[Inputs]:
    """Three batches, whose queries' rows are drawn with repeats; ids are −1 at padding."""
    return [make(*sizes, padding=True, seed=seed, device=device, **options) for seed in range(3)]


def given(inputs: Inputs) -> Tensor:
    draws = torch.Generator().manual_seed(len(inputs.query))
    ids = torch.randint(len(inputs.table), (len(inputs.query),), generator=draws)
    return ids.to(inputs.table.device)


def train(
    every: list[Inputs],
    new: New,
    *,
    stepped: bool,
    function: Callable[..., Tensor] = fused_emu_loss,
    options: dict[str, Any] = LOSS,
) -> tuple[Tensor, Tensor | None]:
    """The table after a step for each batch, and the optimizer's sums."""
    table = every[0].table.clone().requires_grad_()
    factor = torch.ones(table.shape[1], device=table.device, requires_grad=True)
    optimizer = new([table, factor], lr=0.1)
    for inputs in every:
        optimizer.zero_grad()
        ids = given(inputs)
        rows = table.detach()[ids].requires_grad_()
        query = rows.to(inputs.query.dtype) * factor + inputs.query
        loss = function(query, table, inputs.positive, inputs.negative, **options)
        if stepped:
            version = table._version
            backward_and_step(loss, optimizer, table, ids, rows)
            assert table._version > version or table.grad is not None
        else:
            loss.backward()
            assert table.grad is not None
            assert rows.grad is not None
            table.grad.index_add_(0, ids, rows.grad)
        optimizer.step()
    return table.detach(), optimizer.state[table].get("sum")


def same(new: New, every: list[Inputs], *, tolerance: float = 2e-6, **options: Any) -> None:
    actual, expected = (train(every, new, stepped=s, **options) for s in (True, False))
    for one, other in zip(actual, expected, strict=True):
        if one is not None:
            torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
    assert not torch.equal(actual[0], every[0].table)


NEW: list[New] = [
    torch.optim.SGD,
    partial(torch.optim.Adagrad, eps=EPS),
    partial(RowwiseAdagrad, eps=EPS),
]


@pytest.mark.parametrize("new", NEW)
def test_on_every_backend(new: New, backend: str, device: torch.device) -> None:
    every = batches(4, 5, 20, rows=12, device=device)
    same(new, every, options=LOSS | {"backend": backend}, tolerance=1e-5)


@pytest.mark.parametrize("new", NEW)
@pytest.mark.parametrize("dim", [1, 7, 16, 33, 100])
@pytest.mark.parametrize("rows", [3, 40, 2000])
def test_sizes(new: New, dim: int, rows: int) -> None:
    """Rows shorter than a vector, and of odd length; segments that span several pieces; rows that
    only the query has."""
    same(new, batches(24, 130, dim, rows=rows))


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("rule", [0.5, 0.0, Mixup(), Expected(0.4)], ids=str)
def test_similarities_and_rules(similarity: str, rule: Any) -> None:
    unit = "component"
    if isinstance(rule, Expected) and SIMILARITIES[similarity].coupled:
        unit = "pair"
    options = LOSS | {"similarity": similarity, "mutation_rate": rule, "mask_unit": unit}
    for new in NEW:
        same(new, batches(12, 30, 38, rows=50), options=options, tolerance=1e-4)


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("sparse", [False, True])
def test_shared_negatives(groups: int, sparse: bool) -> None:
    for new in NEW:
        every = batches(12, 40, 20, rows=60, groups=groups)
        actual = train(every, new, stepped=True, options=LOSS | {"sparse_grad": sparse})
        expected = train(every, new, stepped=False)
        torch.testing.assert_close(actual[0], expected[0], rtol=1e-5, atol=1e-5)


def test_scores() -> None:
    def loss(*inputs: Tensor) -> Tensor:
        scores = emu_scores(*inputs, mutation_rate=0.5, seed=1)
        return scores.positive.sum() - scores.mutated.clamp(min=-9).exp().mean()

    for new in NEW:
        same(new, batches(6, 7, 20, rows=30), function=loss, options={}, tolerance=1e-5)


def two_terms(*inputs: Tensor, **options: Any) -> Tensor:
    return fused_emu_loss(*inputs, **options) + fused_softmax_loss(*inputs)


def of_a_copy(query: Tensor, table: Tensor, *ids: Tensor, **options: Any) -> Tensor:
    return fused_emu_loss(query, 2 * table, *ids, **options)


def regularized(query: Tensor, table: Tensor, *ids: Tensor, **options: Any) -> Tensor:
    return fused_emu_loss(query, table, *ids, **options) + 0.01 * table.square().sum()


@pytest.mark.parametrize("function", [two_terms, of_a_copy, regularized])
def test_other_gradients_of_the_table_count(function: Callable[..., Tensor]) -> None:
    for new in NEW:
        same(new, batches(6, 7, 20, rows=30), function=function, tolerance=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    """16-bit tables get their gradient as usual."""
    for new in NEW[:2]:
        same(new, batches(12, 30, 21, rows=25, dtype=dtype), tolerance=1e-12)


@pytest.mark.parametrize("new", [torch.optim.SGD, torch.optim.Adagrad])
def test_bits(new: New) -> None:
    """The bits of torch's own step by the dense gradient, if torch uses the same instructions."""
    if not {_C.instruction_set().upper(), torch.backends.cpu.get_cpu_capability()} <= {
        "AVX2",
        "AVX512",
    }:
        pytest.skip("torch or we have no fused multiplication and addition here")
    for rows, dim in ((5, 20), (40, 100), (3000, 33)):
        every = batches(64, 300, dim, rows=rows)
        ours, torchs = (
            train(every, partial(new, fused=True), stepped=stepped) for stepped in (True, False)
        )
        assert torch.equal(ours[0], torchs[0])
        assert ours[1] is None or torchs[1] is None or torch.equal(ours[1], torchs[1])


@pytest.mark.usefixtures("threads")
def test_threads_do_not_change_bits() -> None:
    for new in NEW:
        for rows in (4, 3000):
            every = batches(64, 130, 20, rows=rows)
            torch.set_num_threads(1)
            expected = train(every, new, stepped=True)[0]
            for number in (2, 3, 7):
                torch.set_num_threads(number)
                assert torch.equal(train(every, new, stepped=True)[0], expected)


def test_writes_no_gradient_and_leaves_other_rows_alone() -> None:
    inputs = make(4, 5, 20, rows=100)
    table = inputs.table.requires_grad_()
    before = table.detach().clone()
    optimizer = torch.optim.Adagrad([table], lr=0.1)
    ids = torch.tensor([7, 7, 99, 0])
    rows = table.detach()[ids].requires_grad_()
    loss = fused_emu_loss(rows * 2, table, *inputs[2:], **LOSS)
    backward_and_step(loss, optimizer, table, ids, rows)
    assert table.grad is None
    assert optimizer.state[table]["step"] == 1
    touched = {*ids.tolist(), *inputs.positive.tolist(), *inputs.negative.flatten().tolist()}
    moved = (table.detach() != before).any(dim=1).nonzero()[:, 0]
    assert set(moved.tolist()) == touched


@pytest.mark.parametrize("batch", [0, 3])
@pytest.mark.parametrize("count", [0, 4])
def test_empty(batch: int, count: int) -> None:
    inputs = make(batch, count, 6, rows=5)
    table = inputs.table.requires_grad_()
    for new in NEW:
        optimizer = new([table], lr=0.1)
        loss = fused_emu_loss(inputs.query, table, *inputs[2:], **LOSS | {"reduction": "sum"})
        backward_and_step(loss, optimizer, table)  # the query is made from other rows
        optimizer.step()
        assert table.isfinite().all()


def test_strided_rows_are_stepped_in_place() -> None:
    inputs = make(12, 30, 20, rows=25)
    wide = torch.zeros(25, 50)
    wide[:, 10:30] = inputs.table
    table = wide[:, 10:30].requires_grad_()
    optimizer = torch.optim.SGD([table], lr=0.1)
    backward_and_step(fused_emu_loss(inputs.query, table, *inputs[2:], **LOSS), optimizer, table)
    plain = inputs.table.requires_grad_()
    fused_emu_loss(inputs.query, plain, *inputs[2:], **LOSS).backward()
    assert plain.grad is not None
    assert table.grad is None
    torch.testing.assert_close(wide[:, 10:30], plain.detach() - 0.1 * plain.grad)
    assert not wide[:, :10].any()
    assert not wide[:, 30:].any()


def test_a_step_is_not_part_of_a_failed_backward_pass() -> None:
    """The next backward pass computes gradients again."""
    inputs = make()
    table = inputs.table.requires_grad_()
    optimizer = torch.optim.SGD([table], lr=0.1)

    def fail(gradient: Tensor) -> Tensor:
        raise RuntimeError("no gradient")

    loss = table.new_zeros((), requires_grad=True) * 1
    loss.register_hook(fail)
    with pytest.raises(RuntimeError, match="no gradient"):
        backward_and_step(loss, optimizer, table)
    fused_emu_loss(inputs.query, table, *inputs[2:], **LOSS).backward()
    assert table.grad is not None


def test_a_backward_pass_in_another_thread_gives_gradients() -> None:
    """While this thread is inside ``backward_and_step`` of the same table."""
    inputs = make()
    table = inputs.table.requires_grad_()
    optimizer = torch.optim.SGD([table], lr=0.0)
    seen: list[Tensor | None] = []

    class Meanwhile(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            def other() -> None:
                loss = fused_emu_loss(inputs.query, table, *inputs[2:], **LOSS)
                loss.backward()
                seen.append(table.grad)

            thread = Thread(target=other)
            thread.start()
            thread.join()
            return grad

    query = Meanwhile.apply(inputs.query.clone().requires_grad_())
    loss = fused_emu_loss(query, table, *inputs[2:], **LOSS)
    backward_and_step(loss, optimizer, table)
    assert seen[0] is not None
    assert seen[0].any()


def test_rowwise_adagrad_calls_a_closure() -> None:
    weight = torch.ones(3, 2, requires_grad=True)
    optimizer = RowwiseAdagrad([weight], lr=0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 6
    torch.testing.assert_close(weight.detach(), torch.full((3, 2), 0.9))


def test_a_subclass_takes_sparse_gradients() -> None:
    class Own(RowwiseAdagrad):
        pass

    tables = [torch.nn.Parameter(torch.ones(4, 3)) for _ in range(2)]
    for table, kind in zip(tables, (RowwiseAdagrad, Own), strict=True):
        optimizer = kind([table], lr=0.1)
        table.grad = torch.eye(4, 3).to_sparse(1)
        optimizer.step()
    assert torch.equal(*tables)
    assert not tables[0].equal(torch.ones(4, 3))


def test_rowwise_adagrad_takes_sparse_gradients() -> None:
    weights = [torch.ones(5, 3, requires_grad=True) for _ in range(2)]
    ids = torch.tensor([3, 1, 3])
    for weight, sparse in zip(weights, (False, True), strict=True):
        optimizer = RowwiseAdagrad([weight], lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            factor = torch.arange(9.0).view(3, 3)
            (torch.nn.functional.embedding(ids, weight, sparse=sparse) * factor).sum().backward()
            assert weight.grad is not None
            assert weight.grad.is_sparse == sparse
            optimizer.step()
    torch.testing.assert_close(*weights)


def of_adagrad(table: Tensor) -> torch.optim.Optimizer:
    """RowwiseAdagrad with Adagrad's state: a sum for each component."""
    optimizer = RowwiseAdagrad([table], lr=0.1)
    optimizer.load_state_dict(torch.optim.Adagrad([table], lr=0.1).state_dict())
    return optimizer


def made_in_fp32(table: Tensor) -> torch.optim.Optimizer:
    """Adagrad whose table became fp64 later, as by ``model.double()``."""
    optimizer = torch.optim.Adagrad([table], lr=0.1)
    optimizer.state[table]["sum"] = optimizer.state[table]["sum"].float()
    return optimizer


def on_another_device(table: Tensor) -> torch.optim.Optimizer:
    """Adagrad whose table was moved later, as by ``model.cpu()``."""
    optimizer = torch.optim.Adagrad([table], lr=0.1)
    optimizer.state[table]["sum"] = optimizer.state[table]["sum"].to("meta")
    return optimizer


def test_sums_on_another_device() -> None:
    inputs = make(40, 7, 20, rows=30)
    table = inputs.table.clone().requires_grad_()
    loss = fused_emu_loss(inputs.query, table, *inputs[2:], **LOSS)
    backward_and_step(loss, on_another_device(table), table)
    assert torch.equal(table, inputs.table)
    assert table.grad is not None


@pytest.mark.parametrize("new", [of_adagrad, made_in_fp32])
def test_sums_that_the_kernels_do_not_take(new: Callable[[Tensor], torch.optim.Optimizer]) -> None:
    tables = []
    for stepped in (False, True):
        inputs = make(40, 7, 20, rows=30, dtype=torch.float64)
        table = inputs.table.requires_grad_()
        optimizer = new(table)
        loss = fused_emu_loss(inputs.query, table, *inputs[2:], **LOSS)
        if stepped:
            backward_and_step(loss, optimizer, table)
        else:
            loss.backward()
        optimizer.step()
        tables.append(table.detach())
    torch.testing.assert_close(*tables)


def test_sums_of_a_table_that_grew() -> None:
    inputs = make(40, 7, 20, rows=30)
    table = inputs.table[:20].clone().requires_grad_()
    optimizer = torch.optim.Adagrad([table], lr=0.1)
    table.data = inputs.table.clone()
    loss = fused_emu_loss(inputs.query, table, *inputs[2:], **LOSS)
    backward_and_step(loss, optimizer, table)
    assert torch.equal(table, inputs.table)
    with pytest.raises(RuntimeError, match="size"):
        optimizer.step()


@pytest.mark.parametrize("sparse", [(False, True), (True, False)])
def test_sparse_and_dense_gradients_are_added(sparse: tuple[bool, bool]) -> None:
    inputs = make(40, 7, 20, rows=30)

    def loss(table: Tensor) -> Tensor:
        terms = (
            fused_emu_loss(inputs.query, table, *inputs[2:], **LOSS, sparse_grad=each)
            for each in sparse
        )
        return torch.stack(list(terms)).sum()

    wanted, table = (inputs.table.clone().requires_grad_() for _ in range(2))
    loss(wanted).backward()
    optimizer = torch.optim.SGD([table], lr=0.1)
    backward_and_step(loss(table), optimizer, table)
    optimizer.step()
    assert wanted.grad is not None
    torch.testing.assert_close(table, wanted.detach() - 0.1 * wanted.grad)


def test_a_loss_that_cannot_be_differentiated_is_refused() -> None:
    inputs = make()
    table = inputs.table.requires_grad_()
    optimizer = torch.optim.SGD([table], lr=0.1)
    loss = fused_emu_loss(inputs.query, table, *inputs[2:], reduction="none", **LOSS)
    with pytest.raises(ValueError, match=r"loss: expected a scalar .*, got shape \(\d+,\)"):
        backward_and_step(loss, optimizer, table)
    with pytest.raises(ValueError, match=r"loss: .*, requires_grad False"):
        backward_and_step(loss.detach().sum(), optimizer, table)


def test_rowwise_adagrad_checks_what_it_is_given() -> None:
    line = torch.ones(3, requires_grad=True)
    line.grad = torch.ones(3).to_sparse()
    with pytest.raises(ValueError, match=r"params: expected shape \(N, D\) where .*, got \(3,\)"):
        RowwiseAdagrad([line]).step()
    weight = torch.ones(3, 2, requires_grad=True)
    for bad in (torch.ones((), requires_grad=True), torch.ones(2, 2, 2, requires_grad=True)):
        with pytest.raises(ValueError, match=r"params: expected shape \(N,\) or \(N, D\)"):
            RowwiseAdagrad([bad])
    for options in ({"lr": -1.0}, {"eps": -1.0}):
        with pytest.raises(ValueError, match="expected at least 0, got -1"):
            RowwiseAdagrad([weight], **options)
    with pytest.raises(TypeError, match="lr: expected a number, got str"):
        RowwiseAdagrad([weight], lr="0.1")  # type: ignore[arg-type]
    optimizer = RowwiseAdagrad([weight], lr=torch.tensor(0.1))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"params: expected float32.*complex64"):
        optimizer.add_param_group({"params": torch.ones(3, 2, dtype=torch.complex64)})
    assert len(optimizer.param_groups) == 1
    empty = torch.ones(0, 4, requires_grad=True)
    optimizer = RowwiseAdagrad([weight])
    optimizer.add_param_group({"params": [empty], "lr": 0.1})
    empty.grad = torch.ones(0, 4)
    optimizer.step()


BAD: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (TypeError, "optimizer: expected one of SGD, Adagrad, RowwiseAdagrad.*got Adam",
     {"optimizer": lambda table: torch.optim.Adam([table])}),
    (ValueError, "optimizer: expected no momentum, got 0.9",
     {"optimizer": lambda table: torch.optim.SGD([table], momentum=0.9)}),
    (ValueError, "optimizer: expected no lr_decay, got 0.1",
     {"optimizer": lambda table: torch.optim.Adagrad([table], lr_decay=0.1)}),
    (ValueError, "optimizer: expected table among its parameters",
     {"optimizer": lambda table: torch.optim.SGD([table.detach().clone()])}),
    (ValueError, "table: expected a leaf", {"table": torch.zeros(9, 20)}),
    (ValueError, r"table: expected shape \(N, D\)", {"table": torch.zeros(9, requires_grad=True)}),
    (ValueError, "rows: expected together with ids", {"rows": None}),
    (ValueError, r"rows: expected shape \(2, 20\).*got \(2, 19\)",
     {"rows": torch.zeros(2, 19, requires_grad=True)}),
    (ValueError, "rows: expected a leaf", {"rows": torch.zeros(2, 20)}),
    (IndexError, "ids: expected ids from 0 to 8, got 9", {"ids": torch.tensor([0, 9])}),
    (TypeError, "ids: expected an integer dtype", {"ids": torch.tensor([0.0, 1.0])}),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "changed"), BAD)
def test_bad_input(error: type[Exception], message: str, changed: dict[str, Any]) -> None:
    inputs = make()
    table = changed.get("table", inputs.table.requires_grad_())
    before = inputs.table.detach().clone()
    new = changed.get("optimizer", lambda table: torch.optim.SGD([table], lr=0.1))
    optimizer = new(inputs.table)
    ids = changed.get("ids", torch.tensor([0, 1]))
    rows = changed.get("rows", torch.zeros(2, 20, requires_grad=True))
    loss = fused_emu_loss(inputs.query, inputs.table, *inputs[2:], **LOSS)
    with pytest.raises(error, match=message):
        backward_and_step(loss, optimizer, table, ids, rows)
    assert torch.equal(inputs.table, before)
    assert inputs.table.grad is None
