"""What the arguments mean: ids, padding, sets of negatives, weights, reductions, layouts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from emu_kernels import (
    Expected,
    Mixup,
    emu_mutate,
    emu_scores,
    fused_emu_loss,
    fused_softmax_loss,
    one_vs_all_loss,
)
from emu_kernels.similarity import SIMILARITIES
from tests.ops.support import (
    LOSS,
    Inputs,
    Options,
    assert_agree,
    assert_near,
    evaluate,
    exact,
    make,
    random_like,
    same_bits,
)

Call = tuple[Callable[..., Any], Options]
LOSSES: list[Call] = [(fused_emu_loss, LOSS), (fused_softmax_loss, {})]


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_sets_of_negatives(groups: int, padding: bool, backend: str, device: torch.device) -> None:
    """(G, K) is the same as a copy of its set for each row, and (K,) the same as (1, K)."""
    inputs = make(6, 7, 21, groups=groups, padding=padding, device=device)
    whole = inputs._replace(negative=inputs.negative.repeat_interleave(6 // groups, 0))
    options = LOSS | {"backend": backend, "reduction": "none"}
    assert_agree(
        evaluate(fused_emu_loss, inputs, **options), evaluate(fused_emu_loss, whole, **options)
    )
    if groups == 1:
        flat = inputs._replace(negative=inputs.negative[0])
        assert same_bits(
            evaluate(fused_emu_loss, flat, **options), evaluate(fused_emu_loss, inputs, **options)
        )


@pytest.mark.parametrize("groups", [1, 3])
def test_padding_takes_no_part(groups: int, backend: str, device: torch.device) -> None:
    """Appended padding changes nothing: −1 is not the table's last row."""
    inputs = make(6, 7, 21, groups=groups, device=device)
    pad = torch.full((groups, 3), -1, device=device)
    padded = inputs._replace(negative=torch.cat([inputs.negative, pad], dim=1))
    for function, options in LOSSES:
        options = options | {"backend": backend, "reduction": "none"}
        assert_agree(evaluate(function, padded, **options), evaluate(function, inputs, **options))


def test_row_of_padding_only(backend: str, device: torch.device) -> None:
    inputs = make(4, 5, 21, rows=4, device=device)
    inputs.positive.copy_(torch.tensor([0, 1, 2, 3]))
    inputs.negative.copy_(torch.tensor([0, 1, 2, 0, 1]))
    inputs.negative[3] = -1
    for function, options in LOSSES:
        result = evaluate(function, inputs, reduction="none", backend=backend, **options)
        assert result.outputs[0][3] == 0
        assert (result.outputs[0][:3] > 0).all()
        assert (result.query[3] == 0).all()
        assert (result.table[3] == 0).all()
        for tensor in (*result.outputs, *result[1:]):
            assert tensor.isfinite().all()


def test_scores_of_padding(backend: str, device: torch.device) -> None:
    """−inf, and no gradient for any upstream gradient, even an infinite one."""
    inputs = make(4, 5, 21, padding=True, device=device)
    real = inputs.negative >= 0
    assert real.any()
    assert (~real).any()
    upstream = [
        torch.ones(4),
        *(torch.where(real.cpu(), 1.0, bad) for bad in (torch.inf, torch.nan, -torch.inf)),
    ]
    options: Options = {"mutation_rate": 0.5, "seed": 1, "backend": backend}
    result = evaluate(emu_scores, inputs, upstream=upstream, **options)
    for scores in result.outputs[1:]:
        assert ((scores == -torch.inf) == ~real).all()
        assert scores[real].isfinite().all()
    upstream = [torch.ones(4), *[real.float()] * 3]
    expected = evaluate(emu_scores, inputs, upstream=upstream, **options)
    torch.testing.assert_close(result[1:], expected[1:], rtol=0, atol=0)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_sample_weight(reduction: str, backend: str, device: torch.device) -> None:
    inputs = make(6, 7, 21, padding=True)
    weight = torch.tensor([0.5, 2.0, 0.0, 1.0, 0.25, 3.0])
    for function, options in LOSSES:
        rows = exact(function, inputs, reduction="none", **options).outputs[0]
        weighted = rows * weight
        expected = {
            "none": weighted,
            "sum": weighted.sum(),
            "mean": weighted.sum() / weight.sum(),
        }[reduction]
        for dtype in (torch.float32, torch.float16, torch.float64):
            options = options | {"reduction": reduction, "sample_weight": weight.to(device, dtype)}
            actual = evaluate(function, inputs.to(device), backend=backend, **options)
            assert_near(actual.outputs[0], expected)
            assert actual.outputs[0].dtype == torch.float32
            options["sample_weight"] = weight.double()
            assert_agree(actual, exact(function, inputs, **options))


def test_sample_weight_is_not_differentiated(backend: str, device: torch.device) -> None:
    inputs = make(device=device)
    weight = torch.rand(6, device=device).requires_grad_()
    query = inputs.query.requires_grad_()
    loss = fused_emu_loss(query, *inputs[1:], sample_weight=weight, backend=backend, **LOSS)
    loss.backward()
    assert weight.grad is None
    plain = fused_emu_loss(
        inputs.query.detach(), *inputs[1:], sample_weight=weight, backend=backend, **LOSS
    )
    assert not plain.requires_grad


def test_sample_weight_of_zeros(backend: str, device: torch.device) -> None:
    inputs = make(device=device)
    weight = torch.zeros(6, device=device)
    result = evaluate(fused_emu_loss, inputs, sample_weight=weight, backend=backend, **LOSS)
    assert result.outputs[0] == 0
    assert (result.query == 0).all()
    assert (result.table == 0).all()


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_upstream_gradient(
    reduction: str, sparse: bool, backend: str, device: torch.device
) -> None:
    """Of both signs, zero, and as an expanded scalar (stride 0)."""
    inputs = make(6, 7, 21, padding=True)
    options = LOSS | {"reduction": reduction}
    if reduction == "none":
        upstreams = [*random_like([inputs.positive]), torch.tensor([0.0, 1, -2, 0, 0, 3])]
        upstreams += [torch.tensor(-1.5).expand(6)]
    else:
        upstreams = [torch.tensor(v) for v in (-2.5, 0.0, 1e3)]
    for upstream in upstreams:
        expected = exact(fused_emu_loss, inputs, upstream=[upstream], **options)
        actual = evaluate(
            fused_emu_loss,
            inputs.to(device),
            upstream=[upstream],
            backend=backend,
            sparse_grad=sparse,
            **options,
        )
        assert_agree(actual, expected)


@pytest.mark.parametrize("sparse", [False, True])
def test_retain_graph(sparse: bool, backend: str, device: torch.device) -> None:
    """Two backward passes through one graph give the same bits, even with another in between."""
    inputs = make(6, 7, 21, padding=True, device=device)
    query, table = (t.requires_grad_() for t in inputs[:2])
    loss = fused_emu_loss(
        query, table, *inputs[2:], backend=backend, sparse_grad=sparse, reduction="none", **LOSS
    )
    scores = emu_scores(
        query, table, *inputs[2:], mutation_rate=0.5, seed=1, backend=backend, sparse_grad=sparse
    )
    outputs = (loss, scores.positive)

    def gradients(factor: float) -> list[Tensor]:
        upstream = [torch.full_like(o, factor) for o in outputs]
        grads = torch.autograd.grad(outputs, (query, table), upstream, retain_graph=True)
        return [g.to_dense() for g in grads]

    first = gradients(1.0)
    gradients(-7.0)
    for left, right in zip(first, gradients(1.0), strict=True):
        assert torch.equal(left, right)


def test_tensor_coefficients(backend: str, device: torch.device) -> None:
    inputs = make(6, 7, 21, padding=True, device=device)
    expected = evaluate(fused_emu_loss, inputs, backend=backend, **LOSS)
    for shape, dtype in (((), torch.float32), ((1,), torch.float64)):
        tensors = {
            name: torch.full(shape, LOSS[name], dtype=dtype, device=device)
            for name in ("beta", "alpha")
        }
        for chosen in ({"beta"}, {"alpha"}, {"beta", "alpha"}):
            options = LOSS | {name: tensors[name] for name in chosen}
            actual = evaluate(fused_emu_loss, inputs, backend=backend, **options)
            assert_agree(actual, expected)


def test_numbers_of_numpy_and_tensors_of_one(backend: str, device: torch.device) -> None:
    inputs = make(6, 7, 20, device=device)
    plain: Options = {
        "mutation_rate": 0.625,
        "beta": 0.5,
        "alpha": 0.25,
        "seed": 7,
        "row_offset": 3,
    }
    expected = evaluate(fused_emu_loss, inputs, backend=backend, **plain)
    numbers: Options = {
        name: numpy.float32(value) if isinstance(value, float) else numpy.int64(value)
        for name, value in plain.items()
    }
    tensors: Options = {name: torch.tensor(value, device=device) for name, value in plain.items()}
    for options in (numbers, tensors):
        assert same_bits(evaluate(fused_emu_loss, inputs, backend=backend, **options), expected)


def test_numbers_of_numpy_in_rules(backend: str, device: torch.device) -> None:
    inputs = make(6, 7, 20, device=device)
    rules = (
        (Expected(0.625), Expected(numpy.float32(0.625))),
        (Mixup(2), Mixup(numpy.int32(2))),
    )
    for plain, other in rules:
        options: Options = {"beta": 0.5, "alpha": 0.25, "seed": 7, "backend": backend}
        expected = fused_emu_loss(*inputs, mutation_rate=plain, **options)
        assert torch.equal(fused_emu_loss(*inputs, mutation_rate=other, **options), expected)


def test_repeated_ids(backend: str, device: torch.device) -> None:
    """The positive among its own negatives, one negative many times, one entity in every role."""
    inputs = make(4, 9, 21, rows=5)
    inputs.positive.copy_(torch.tensor([2, 2, 3, 2]))
    inputs.negative.copy_(torch.tensor([2, 2, 2, 3, 3, 0, -1, 2, 0]))
    for function, options in LOSSES:
        expected = exact(function, inputs, **options)
        for sparse in (False, True):
            actual = evaluate(
                function, inputs.to(device), backend=backend, sparse_grad=sparse, **options
            )
            assert_agree(actual, expected)
            assert (actual.table[[1, 4]] == 0).all()


def test_positive_as_only_negative(backend: str, device: torch.device) -> None:
    """ẑ = z⁻ = z⁺: every softmax is uniform, so the loss has a closed form."""
    inputs = make(3, 4, 21, device=device)
    inputs = inputs._replace(negative=inputs.positive[:, None].repeat(1, 4))
    loss = fused_emu_loss(*inputs, backend=backend, reduction="none", **LOSS)
    log = torch.tensor(5.0).log()
    expected = (log + 0.3 * 4 * log) / 4 + 0.2 * log
    torch.testing.assert_close(loss.cpu(), expected.expand(3))


def strided_rows(table: Tensor) -> Tensor:
    wide = torch.zeros(table.shape[0], table.shape[1] + 5, dtype=table.dtype, device=table.device)
    wide[:, 2:-3] = table
    return wide[:, 2:-3]


def every_third_row(table: Tensor) -> Tensor:
    tall = torch.full((3 * table.shape[0], table.shape[1]), torch.nan).to(table)
    tall[1::3] = table
    return tall[1::3]


def transposed(table: Tensor) -> Tensor:
    return table.t().contiguous().t()


LAYOUTS: list[Callable[[Tensor], Tensor]] = [strided_rows, every_third_row, transposed]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [21, 1])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(
    layout: Callable[[Tensor], Tensor],
    dim: int,
    dtype: torch.dtype,
    backend: str,
    device: torch.device,
) -> None:
    """Arguments with any strides give the same results as contiguous ones."""
    inputs = make(6, 7, dim, dtype=dtype, padding=True, device=device)
    expected = evaluate(fused_emu_loss, inputs, backend=backend, **LOSS)
    strided = Inputs(
        layout(inputs.query),
        layout(inputs.table),
        torch.stack([inputs.positive, inputs.positive + 1], dim=1)[:, 0],
        layout(inputs.negative)
        if layout is not every_third_row
        else inputs.negative.flip(0).flip(0),
    )
    assert not strided.table.is_contiguous() or dim == 1
    weight = torch.rand(6, 2, device=device)[:, 1]
    actual = evaluate(fused_emu_loss, strided, backend=backend, **LOSS)
    assert_agree(actual, expected)
    weighted = [
        fused_emu_loss(*args, sample_weight=w, backend=backend, **LOSS)
        for args, w in ((strided, weight), (inputs, weight.contiguous()))
    ]
    torch.testing.assert_close(*weighted)


def test_stride_zero(backend: str, device: torch.device) -> None:
    """Expanded tensors: one row as the whole table, one component as a whole row, shared ids."""
    inputs = make(6, 7, 21, padding=True)
    expanded = [
        inputs._replace(table=inputs.table[:1].expand(9, 21)),
        inputs._replace(table=inputs.table[:, :1].expand(9, 21)),
        inputs._replace(query=inputs.query[:1].expand(6, 21)),
        inputs._replace(positive=inputs.positive[:1].expand(6)),
        inputs._replace(negative=inputs.negative[:1].expand(6, 7)),
    ]
    for case in expanded:
        dense = Inputs(*(t.contiguous().to(device) for t in case))
        # Copying to the device made the tensors contiguous.
        case = Inputs(
            *(d.as_strided(c.shape, c.stride()) for c, d in zip(case, dense, strict=True))
        )
        results = [evaluate(fused_emu_loss, i, backend=backend, **LOSS) for i in (case, dense)]
        # If all candidates are the same, gradients cancel to rounding errors of terms of order 1.
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def test_huge_stride(backend: str, device: torch.device, tmp_path: Path) -> None:
    """Rows 2^31 elements apart, in a sparse file: offsets do not fit 32 bits."""
    if device.type != "cpu":
        pytest.skip("a file of holes can only be mapped into host memory")
    inputs = make(3, 4, 21, rows=3)
    stride = 2**31 + 7
    storage = torch.from_file(
        str(tmp_path / "holes"), shared=True, size=2 * stride + 21, dtype=torch.float32
    )
    table = storage.as_strided((3, 21), (stride, 1))
    table.copy_(inputs.table)
    calls: list[Call] = [(fused_emu_loss, LOSS), (emu_scores, {"mutation_rate": 0.5, "seed": 1})]
    for function, options in calls:
        assert_agree(
            evaluate(function, inputs._replace(table=table), backend=backend, **options),
            evaluate(function, inputs, backend=backend, **options),
        )


def test_more_rows_than_32_bits(kernel: str, device: torch.device, tmp_path: Path) -> None:
    """Row i starts at element i of a sparse file, so ids above 2^31 need little memory."""
    if device.type != "cpu":
        pytest.skip("a file of holes can only be mapped into host memory")
    rows, dim = 2**31 + 100, 8
    storage = torch.from_file(
        str(tmp_path / "holes"), shared=True, size=rows + dim, dtype=torch.bfloat16
    )
    generator = torch.Generator().manual_seed(0)
    storage[-64:] = torch.randn(64, generator=generator)
    table = storage.as_strided((rows, dim), (1, 1))
    ids = torch.arange(rows - 8, rows)
    query = torch.randn(2, dim, generator=generator).requires_grad_()
    loss = fused_emu_loss(query, table, ids[:2], ids[2:], backend=kernel, **LOSS)
    (grad,) = torch.autograd.grad(loss, query)
    small = Inputs(query.detach(), table[ids], torch.arange(2), torch.arange(2, 8)[None])
    expected = evaluate(fused_emu_loss, small, backend=kernel, **LOSS)
    torch.testing.assert_close(loss.detach(), expected.outputs[0], rtol=0, atol=0)
    torch.testing.assert_close(grad, expected.query, rtol=0, atol=0)


def test_inputs_are_not_changed(backend: str, device: torch.device) -> None:
    inputs = make(6, 7, 21, padding=True, device=device)
    before = [t.clone() for t in inputs]
    evaluate(fused_emu_loss, inputs, backend=backend, **LOSS)
    evaluate(emu_scores, inputs, backend=backend, mutation_rate=0.5, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(before, inputs, strict=True))


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_equal_rows_have_equal_scores(similarity: str, backend: str, device: torch.device) -> None:
    """Wherever they are in a batch: else rounding would break ties in a ranking."""
    for dim in (2, 20, 36):
        inputs = make(6, 11, dim, device=device)
        same = inputs._replace(table=inputs.table[:1].expand_as(inputs.table).contiguous())
        scored = emu_scores(*same, mutation_rate=None, similarity=similarity, backend=backend)
        assert torch.equal(scored.negative, scored.positive[:, None].expand(6, 11))


def test_default_dtype_does_not_matter(backend: str, device: torch.device) -> None:
    inputs = make(6, 7, 21, padding=True, device=device)
    calls: list[Call] = [(fused_emu_loss, LOSS), (emu_scores, {"mutation_rate": 0.5, "seed": 1})]
    for function, options in calls:
        expected = evaluate(function, inputs, backend=backend, **options)
        torch.set_default_dtype(torch.float64)
        try:
            assert same_bits(evaluate(function, inputs, backend=backend, **options), expected)
        finally:
            torch.set_default_dtype(torch.float32)


def test_default_dtype_does_not_matter_to_products() -> None:
    query, table = torch.rand(128, 8), torch.rand(1024, 8)
    positive, shared = torch.arange(128), torch.arange(1024)  # enough for products
    given, expected = (query, table, positive), LOSS | {"mutation_rate": Expected(0.5)}
    losses = [
        partial(fused_softmax_loss, *given, shared),
        partial(fused_emu_loss, *given, shared, **expected),
        partial(one_vs_all_loss, *given),
    ]
    wanted = [loss() for loss in losses]
    torch.set_default_dtype(torch.float64)
    try:
        assert all(map(torch.equal, [loss() for loss in losses], wanted))  # in dtype, too
    finally:
        torch.set_default_dtype(torch.float32)


EMPTY: list[tuple[tuple[int, ...], int, int]] = [  # shape of negative, batch, rows
    ((0, 5), 0, 9),
    ((1, 5), 0, 9),
    ((5,), 0, 9),
    ((0,), 0, 9),
    ((0, 0), 0, 0),
    ((6, 0), 6, 9),
    ((1, 0), 6, 9),
    ((0,), 6, 9),
]


@pytest.mark.parametrize(("shape", "batch", "rows"), EMPTY)
@pytest.mark.parametrize("sparse", [False, True])
def test_empty(
    shape: tuple[int, ...], batch: int, rows: int, sparse: bool, backend: str, device: torch.device
) -> None:
    """An empty batch and rows without negatives have a loss of 0 and gradients of 0."""
    generator = torch.Generator().manual_seed(0)
    inputs = Inputs(
        torch.randn(batch, 21, generator=generator),
        torch.randn(rows, 21, generator=generator),
        torch.arange(batch),
        torch.zeros(shape, dtype=torch.int64),
    ).to(device)
    calls: list[Call] = [
        (fused_emu_loss, LOSS | {"reduction": "none"}),
        (fused_emu_loss, LOSS),
        (fused_softmax_loss, {"reduction": "sum"}),
    ]
    for function, options in calls:
        result = evaluate(function, inputs, backend=backend, sparse_grad=sparse, **options)
        expected = (batch,) if options.get("reduction") == "none" else ()
        assert result.outputs[0].shape == expected
        assert result.query.shape == inputs.query.shape
        assert result.table.shape == inputs.table.shape
        for tensor in (*result.outputs, *result[1:]):
            assert (tensor == 0).all()
    scores = evaluate(
        emu_scores, inputs, mutation_rate=0.5, seed=1, backend=backend, sparse_grad=sparse
    )
    count = shape[-1]
    assert [tuple(s.shape) for s in scores.outputs] == [(batch,), *[(batch, count)] * 3]
    assert_near(scores.query, inputs.table[inputs.positive])


@pytest.mark.parametrize("similarity", ["dot", "l1", "rotate"])
@pytest.mark.parametrize("count", [0, 3])
def test_empty_batch_with_rates_of_its_own(
    similarity: str, count: int, backend: str, device: torch.device
) -> None:
    query = torch.zeros(0, 4, device=device, requires_grad=True)
    table = torch.ones(9, 4, device=device, requires_grad=True)
    ids = torch.zeros(0, count, dtype=torch.int64, device=device)
    units = 2 if similarity == "rotate" else 4
    rate = torch.full((0, units), 0.5, device=device, requires_grad=True)
    unit = "pair" if similarity == "rotate" else "component"
    options: Options = {"similarity": similarity, "mask_unit": unit, "backend": backend}
    loss = fused_emu_loss(
        query, table, ids.new_zeros(0), ids, **LOSS | options | {"mutation_rate": Expected(rate)}
    )
    loss.backward()
    assert loss == 0
    for tensor in (query, table, rate):
        assert tensor.grad is not None
        assert tensor.grad.shape == tensor.shape
        assert (tensor.grad == 0).all()
    scores = emu_scores(
        query, table, ids.new_zeros(0), ids, mutation_rate=Expected(rate), **options
    )
    assert scores.mutated.shape == (0, count)


def test_forward_mode_is_refused(backend: str, device: torch.device) -> None:
    """Where there is none, it must not give a derivative of 0."""
    generator = torch.Generator().manual_seed(0)
    query, table, tangent = (torch.randn(9, 4, generator=generator).to(device) for _ in range(3))
    positive, negative = (
        torch.arange(9, device=device),
        torch.ones(9, 2, dtype=torch.int64, device=device),
    )

    def loss(query: Tensor) -> Tensor:
        return fused_emu_loss(query, table, positive, negative, backend=backend, **LOSS)

    def scores(query: Tensor) -> Tensor:
        return emu_scores(query, table, positive, negative, mutation_rate=None, backend=backend)[0]

    def mutants(query: Tensor) -> Tensor:
        return emu_mutate(query, query[:, None], mutation_rate=0.5, seed=1, backend=backend)

    def over_all(query: Tensor) -> Tensor:
        return one_vs_all_loss(query, table, positive, backend=backend)

    with pytest.raises(NotImplementedError, match="one_vs_all_loss has backward mode only"):
        torch.func.jvp(over_all, (query,), (tangent,))
    for function in (loss, scores, mutants):
        if backend == "reference":
            forward: Tensor = torch.func.jvp(function, (query,), (tangent,))[1]
            query_grad: Tensor = torch.func.grad(lambda q, f=function: f(q).sum())(query)
            assert_near(forward.sum(), (query_grad * tangent).sum())
            continue
        with pytest.raises(NotImplementedError, match="forward-mode"):
            torch.func.jvp(function, (query,), (tangent,))
        with torch.autograd.forward_ad.dual_level():
            function(query)  # without a tangent
            dual = torch.autograd.forward_ad.make_dual(query, tangent)
            with pytest.raises(NotImplementedError, match="forward-mode"):
                function(dual)


def test_empty_mutate(backend: str, device: torch.device) -> None:
    for batch, count, dim in ((0, 3, 4), (2, 0, 4), (2, 3, 0)):
        positive = torch.ones(batch, dim, device=device).requires_grad_()
        negative = torch.ones(batch, count, dim, device=device).requires_grad_()
        out = emu_mutate(positive, negative, mutation_rate=0.5, seed=1, backend=backend)
        assert out.shape == negative.shape
        for grad in torch.autograd.grad(out.sum(), (positive, negative)):
            assert (grad == 0).all()


def test_mutate_layouts(backend: str, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    positive = torch.randn(21, 3, generator=generator).to(device)
    negative = torch.randn(21, 5, 3, generator=generator).to(device)
    upstream = torch.randn(5, 21, generator=generator).to(device)
    results = []
    for change in (lambda t: t, lambda t: t.contiguous()):
        pos = change(positive.t()).requires_grad_()
        neg = change(negative.permute(2, 1, 0)).requires_grad_()
        out = emu_mutate(pos, neg, mutation_rate=0.5, seed=1, backend=backend)
        grads = torch.autograd.grad(out, (pos, neg), change(upstream.expand(3, 5, 21)))
        results.append((out.detach(), *grads))
    for left, right in zip(*results, strict=True):
        assert torch.equal(left, right)
