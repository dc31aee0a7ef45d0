"""EMU in closed form: against sums over all masks, against drawn masks, and at its limits."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor

from emu_kernels import (
    EMULoss,
    EmuScores,
    Expected,
    Mixup,
    emu_mutate,
    emu_scores,
    fused_emu_loss,
    fused_softmax_loss,
    one_vs_all_loss,
    prepare,
    products,
    reference,
    uls_cross_entropy,
)
from emu_kernels.mutation import NoMutation
from emu_kernels.similarity import SIMILARITIES
from tests.ops.support import Inputs, Options, assert_agree, assert_near, evaluate, make

LOSS: Options = {"beta": 0.53, "alpha": 0.11}


def unit(similarity: str) -> str:
    return "pair" if SIMILARITIES[similarity].coupled else "component"


def rates(batch: int, dim: int, similarity: str = "dot", seed: int = 1) -> Tensor:
    units = dim // 2 if unit(similarity) == "pair" else dim
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, units, generator=generator, dtype=torch.float64)


class Moments(NamedTuple):
    scored: EmuScores  # in closed form
    mean: Tensor  # over all masks, as the next two
    variance: Tensor
    cumulant: Tensor  # log E e^ŝ
    gaps: Tensor  # (B, K, U), of the first sum's terms


def moments(similarity: str, rate: Tensor) -> Moments:
    inputs = make(4, 5, 6, dtype=torch.float64)
    query, table, positive, negative = inputs
    scored = emu_scores(
        *inputs, similarity=similarity, mutation_rate=Expected(rate), mask_unit=unit(similarity),
        backend="reference",
    )  # fmt: skip
    scores, chances = [], []
    own, others = table[positive][:, None], table[negative]
    for bits in itertools.product([False, True], repeat=rate.shape[1]):
        mask = torch.tensor(bits)
        chances.append(torch.where(mask, rate, 1 - rate).prod(dim=1)[:, None].expand(4, 5))
        mask = mask.repeat(2) if unit(similarity) == "pair" else mask
        mutated = torch.where(mask, own, others)
        scores.append(reference.phi(similarity, query[:, None], mutated, reference.Options()))
    score, chance = torch.stack(scores), torch.stack(chances)
    mean = (chance * score).sum(dim=0)
    terms = reference.TERMS[similarity]
    none = reference.Options()
    return Moments(
        scored,
        mean,
        variance=(chance * score.square()).sum(dim=0) - mean.square(),
        cumulant=(chance * score.exp()).sum(dim=0).log(),
        gaps=terms(query[:, None], own, none)[0] - terms(query[:, None], others, none)[0],
    )


@pytest.mark.parametrize("similarity", ["dot", "l1", "rotate", "protate"])
def test_sums_have_their_exact_moments(similarity: str) -> None:
    of = moments(similarity, rates(4, 6, similarity))
    assert_near(of.scored.mutated, of.mean)
    assert_near(of.scored.cumulant - of.scored.mutated, of.variance / 2, floor=1.0)
    # The third cumulant of a Bernoulli variable is at most 1 / (6 √3), so Taylor's remainder is at
    # most |u|³ / (36 √3) per component.
    rest = of.gaps.abs().pow(3).sum(dim=-1) / (36 * 3**0.5)
    assert ((of.scored.cumulant - of.cumulant).abs() <= rest + 1e-12).all()


@pytest.mark.parametrize("similarity", ["l2", "hake"])
def test_roots_are_near_their_moments(similarity: str) -> None:
    """The delta method is exact in the limit of many components: here there are 6 or 3."""
    of = moments(similarity, rates(4, 6))
    variance = 2 * (of.scored.cumulant - of.scored.mutated)
    assert (of.scored.mutated - of.mean).abs().max() < 0.05 * of.variance.max().sqrt()
    assert (variance - of.variance).abs().max() < 0.4 * of.variance.max()


def test_bounds_the_mean_of_drawn_losses() -> None:
    """From above, by Jensen's inequality, and closely for many negatives."""
    inputs = make(20, 256, 100, rows=400)
    drawn = torch.stack(
        [fused_emu_loss(*inputs, mutation_rate=0.61, seed=s, **LOSS) for s in range(60)]
    )
    expected = fused_emu_loss(*inputs, mutation_rate=Expected(156 / 256), **LOSS)
    error = float(drawn.std()) / math.sqrt(len(drawn))
    assert drawn.mean() - 3 * error < expected < drawn.mean() + 3 * error + 0.01


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_limits_of_the_rate(similarity: str, backend: str, device: torch.device) -> None:
    inputs = make(4, 9, 14, device=device)

    def scores(rate: float) -> EmuScores:
        return emu_scores(
            *inputs, similarity=similarity, mutation_rate=Expected(rate),
            mask_unit=unit(similarity), backend=backend,
        )  # fmt: skip

    none, every = scores(0.0), scores(1.0)
    for score in (none.mutated, none.cumulant):
        assert_near(score, none.negative)
    for score in (every.mutated, every.cumulant):
        assert_near(score, every.positive[:, None].expand(4, 9))


def test_rate_0_is_uls(backend: str, device: torch.device) -> None:
    inputs = make(6, 5, 20, padding=True, device=device)
    expected = evaluate(fused_emu_loss, inputs, mutation_rate=0.0, seed=1, backend=backend, **LOSS)
    actual = evaluate(fused_emu_loss, inputs, mutation_rate=Expected(0.0), backend=backend, **LOSS)
    assert_agree(actual, expected, floor=0.3)


def test_uls_of_the_scores_is_the_loss(backend: str, device: torch.device) -> None:
    inputs = make(6, 5, 20, padding=True, device=device)
    rule = Expected(0.6)
    scored = emu_scores(*inputs, mutation_rate=rule, backend=backend)
    loss = uls_cross_entropy(scored.positive, scored.mutated, cumulant=scored.cumulant, beta=0.53)
    expected = fused_emu_loss(*inputs, mutation_rate=rule, beta=0.53, alpha=0.0, backend=backend)
    assert_near(loss, expected)


def test_module_and_sampled_cumulant() -> None:
    inputs = make()
    module = EMULoss(mutation_rate=Expected(0.6), **LOSS)
    assert torch.equal(
        module(*inputs), fused_emu_loss(*inputs, mutation_rate=Expected(0.6), **LOSS)
    )
    drawn = emu_scores(*inputs, mutation_rate=0.5, seed=1)
    assert torch.equal(drawn.cumulant, drawn.mutated)


@pytest.mark.parametrize(
    ("rule", "options", "error", "message"),
    [
        (lambda: Expected(1.5), {}, ValueError, r"mutation_rate: expected a number in \[0, 1\]"),
        (lambda: Expected(True), {}, TypeError, "rate: expected a number"),
        (lambda: Expected(torch.full((20,), 1.5)), {}, ValueError, r"rates in \[0, 1\], got 1.5"),
        (lambda: Expected(torch.tensor(math.nan)), {}, ValueError, r"rates in \[0, 1\], got nan"),
        (
            lambda: Expected(torch.rand(19)),
            {},
            ValueError,
            r"of shape \(\) or \(20,\) or \(6, 20\)",
        ),
        (lambda: Expected(torch.rand(20).double()), {}, TypeError, "float64 does not mix"),
        (lambda: Expected("a"), {}, TypeError, "expected a number in"),  # type: ignore[arg-type]
        (lambda: Expected(Mixup()), {}, TypeError, "expected a number in"),  # type: ignore[arg-type]
        (lambda: Expected(0.5), {"mask_unit": "pair"}, ValueError, "expected 'component'"),
        (lambda: Expected(0.5), {"similarity": "rotate"}, ValueError, "expected 'pair'"),
    ],
)
def test_bad_rates(
    rule: Any, options: Options, error: type[Exception], message: str, backend: str
) -> None:
    if backend == "cuda" and torch.cuda.is_available():
        pytest.skip("values of a GPU's tensors are not read")
    with pytest.raises(error, match=message):
        fused_emu_loss(*make(), mutation_rate=rule(), backend=backend, **(options | LOSS))


def test_there_is_nothing_to_mutate_in_closed_form() -> None:
    with pytest.raises(TypeError, match="expected a rate"):
        emu_mutate(torch.rand(2, 4), torch.rand(2, 3, 4), mutation_rate=Expected(0.5))  # type: ignore[arg-type]


# --- by matrix products ---------------------------------------------------------------------------


@pytest.fixture
def always() -> Iterator[None]:
    """Matrix products are used, however few the scores."""
    with mock.patch.dict(products.MIN_SCORES, cpu=1):
        yield


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["softmax", "number", "components", "rows"])
@pytest.mark.parametrize(("groups", "count"), [(1, 30), (2, 7), (1, 2500), (2, 1), (1, 0)])
@pytest.mark.parametrize("sparse", [False, True])
def test_products_are_the_kernels(
    dtype: torch.dtype, kind: str, groups: int, count: int, sparse: bool
) -> None:
    """For sets of negatives with many rows each, with padding, in one tile and in several."""
    batch, dim = 64, 10
    inputs = make(batch, count, dim, rows=40, groups=groups, dtype=dtype, padding=True)
    rate: Any = {
        "number": 0.6, "components": rates(1, dim)[0], "rows": rates(batch, dim),
    }.get(kind)  # fmt: skip
    weight = torch.linspace(0.5, 2, batch)

    def loss(query: Tensor, table: Tensor, *ids: Tensor, backend: str) -> Tensor:
        rule = None if rate is None else rate
        if isinstance(rule, Tensor):
            rule = rule.to(query.dtype)
        given: Options = {
            "sample_weight": weight.to(query),
            "sparse_grad": sparse,
            "backend": backend,
        }
        if rule is None:
            return fused_softmax_loss(query, table, *ids, **given)
        return fused_emu_loss(query, table, *ids, mutation_rate=Expected(rule), **(LOSS | given))

    actual = evaluate(loss, inputs, backend="cpu")
    expected = evaluate(loss, inputs.wide(), backend="reference")
    assert_agree(actual, expected, floor=0.05, loose=3)


def fits(inputs: Inputs, mutation: Any = None, similarity: str = "dot") -> bool:
    request = prepare.scores(
        *inputs, similarity=similarity, mutation=mutation or NoMutation(),
        mask_unit="component", scale=None, similarity_weights=None, phase_scale=1.0, seed=1,
        row_offset=0, sparse_grad=False,
    )  # fmt: skip
    made = prepare.loss(request, beta=0.5, alpha=0.1, sample_weight=None, reduction="mean")
    return products.fits(made, "cpu")


def test_products_are_taken_where_rows_share() -> None:
    one, two, four = (make(256, 2**10, 20, groups=groups) for groups in (1, 2, 4))
    assert fits(one)
    assert fits(one, Expected(0.5))
    assert fits(two)
    assert not fits(four)
    assert not fits(one, 0.5)
    assert not fits(one, similarity="l1")
    assert not fits(make(2, 2**17, 4))  # many negatives of few rows


@pytest.mark.usefixtures("always")
def test_products_have_no_second_derivative() -> None:
    query, table, *ids = make(64, 5, 20, groups=1)
    query.requires_grad_()
    loss = fused_emu_loss(query, table, *ids, mutation_rate=Expected(0.5), **LOSS, backend="cpu")
    (grad,) = torch.autograd.grad(loss, query, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


@pytest.mark.usefixtures("always")
def test_products_compile() -> None:
    inputs = make(64, 5, 20, groups=2, padding=True)
    rate = rates(64, 20).float()

    def call(*inputs: Tensor) -> Tensor:
        return fused_emu_loss(*inputs, mutation_rate=Expected(rate), backend="cpu", **LOSS)

    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert_agree(evaluate(compiled, inputs), evaluate(call, inputs))


@pytest.mark.usefixtures("always")
def test_products_report_what_is_not_finite() -> None:
    query, table, positive, negative = make(64, 5, 20, groups=1)
    query[3, 2] = math.inf
    rows = fused_emu_loss(
        query, table, positive, negative, mutation_rate=Expected(0.5), reduction="none",
        backend="cpu", **LOSS,
    )  # fmt: skip
    assert rows.isnan().tolist() == [row == 3 for row in range(64)]


@pytest.mark.usefixtures("always")
def test_products_leave_padding_alone() -> None:
    """An entity that only padding could stand for is not touched, and may be anything."""
    query, table, positive, negative = make(64, 5, 20, groups=1, padding=True)
    negative[0, 0] = -1
    positive, negative = positive.clamp(min=1), torch.where(negative == 0, 1, negative)
    table[0] = math.nan
    table.requires_grad_()
    loss = fused_emu_loss(
        query, table, positive, negative, mutation_rate=Expected(0.5), sparse_grad=True,
        backend="cpu", **LOSS,
    )  # fmt: skip
    assert loss.isfinite()
    (grad,) = torch.autograd.grad(loss, table)
    touched = torch.cat([positive, negative.flatten()]).unique()
    assert torch.equal(grad.indices()[0], touched[touched >= 0])


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("over_all", [False, True])
def test_autocast_changes_no_product(over_all: bool) -> None:
    query, table, positive, negative = make(64, 5, 20, groups=1, rows=1500)
    leaves = [query.requires_grad_(), table.requires_grad_()]

    def gradients() -> tuple[Tensor, ...]:
        rule: Options = {"mutation_rate": Expected(0.5), "backend": "cpu", **LOSS}
        if over_all:
            loss = one_vs_all_loss(query, table, positive, **rule)
        else:
            loss = fused_emu_loss(query, table, positive, negative, **rule)
        return (loss, *torch.autograd.grad(loss, leaves))

    expected = gradients()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = gradients()
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(one, other)


# --- over all entities ----------------------------------------------------------------------------


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("kind", ["softmax", "uls", "number", "rows"])
def test_one_vs_all(similarity: str, kind: str) -> None:
    """The loss with all entities as each row's set of negatives, known answers being padding."""
    batch, dim, entities = 5, 6, 2100
    inputs = make(batch, 1, dim, rows=entities, dtype=torch.float64)
    query, table, positive, _ = inputs
    offsets, ids = torch.tensor([0, 2, 2, 7, 8, 10]), torch.arange(0, 2000, 200)
    ids[0] = positive[0]
    negative = torch.arange(entities).repeat(batch, 1)
    for b in range(batch):
        negative[b, positive[b]] = -1
        negative[b, ids[offsets[b] : offsets[b + 1]]] = -1
    rate = rates(batch, dim, similarity)
    rule = {"uls": Expected(0.0), "number": Expected(0.6), "rows": Expected(rate)}.get(kind)
    takes = SIMILARITIES[similarity]
    options: Options = {"similarity": similarity}
    leaves = [query, table]
    if takes.scaled_halves:
        scale = 0.5 + torch.rand(batch, dim // takes.halves, dtype=torch.float64)
        leaves.append(scale)
        options["scale"] = scale
    if takes.weights:
        weights = 0.5 + torch.rand(takes.weights, dtype=torch.float64)
        leaves.append(weights)
        options["similarity_weights"] = weights
    if kind == "rows":
        leaves.append(rate)
    for leaf in leaves:
        leaf.requires_grad_()
    emu: Options = (
        {} if rule is None else {"mutation_rate": rule, "mask_unit": unit(similarity), **LOSS}
    )
    actual = one_vs_all_loss(
        query, table, positive, known=(offsets, ids), backend="cpu", **emu, **options
    )
    if rule is None:
        scored = emu_scores(
            query, table, positive, negative, mutation_rate=None, backend="reference", **options
        )
        expected = reference.softmax_rows(scored.positive, scored.negative).mean()
    else:
        expected = fused_emu_loss(
            query, table, positive, negative, backend="reference", **emu, **options
        )
    assert_near(actual.detach(), expected.detach())
    for one, other in zip(
        torch.autograd.grad(actual, leaves), torch.autograd.grad(expected, leaves), strict=True
    ):
        assert_near(one, other, floor=0.01)


def test_one_vs_all_is_cross_entropy() -> None:
    query, table, positive, _ = make(6, 1, 20, rows=1500)
    loss = one_vs_all_loss(query, table, positive)
    assert_near(loss, torch.nn.functional.cross_entropy(query @ table.T, positive))


@pytest.mark.parametrize("similarity", ["dot", "l1"])
def test_one_vs_all_has_no_second_derivative(similarity: str) -> None:
    """Not even by what the rows' losses are multiplied with."""
    query, table, positive, _ = make(6, 3, 8)
    factor = torch.ones(6, requires_grad=True)
    rows = one_vs_all_loss(
        query, table.requires_grad_(), positive, similarity=similarity, reduction="none"
    )
    (grad,) = torch.autograd.grad((factor * rows).sum(), table, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(grad.square().sum(), factor)


def test_one_vs_all_can_be_deterministic() -> None:
    """Then it uses the kernels."""
    query, table, positive, _ = make(6, 1, 20, rows=1500)
    expected = one_vs_all_loss(query, table, positive, mutation_rate=Expected(0.5), **LOSS)
    torch.use_deterministic_algorithms(True)
    try:
        with mock.patch.object(products._LogSumExp, "forward", None):
            actual = one_vs_all_loss(query, table, positive, mutation_rate=Expected(0.5), **LOSS)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_near(actual, expected)


@pytest.mark.parametrize("similarity", ["dot", "l1"])
@pytest.mark.parametrize("rule", [None, Expected(0.5)])
def test_one_vs_all_reports_what_is_not_finite(similarity: str, rule: Expected | None) -> None:
    query, table, positive, _ = make(6, 1, 20, rows=50)
    table[7] = math.inf
    known = torch.tensor([0, 1, 1, 1, 1, 1, 1]), torch.tensor([7])
    rows = one_vs_all_loss(
        query, table, positive.clamp(max=5), known=known, similarity=similarity,
        mutation_rate=rule, reduction="none", **(LOSS if rule else {}),
    )  # fmt: skip
    assert rows[1:].isnan().all()
    assert rows[0].isfinite() or similarity == "dot"


@pytest.mark.parametrize(
    ("known", "error", "message"),
    [
        ([[0], [1]], TypeError, "known: expected"),
        ((torch.zeros(3, dtype=torch.int64), torch.zeros(0)), TypeError, "integer dtype"),
        ((torch.zeros(3, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)), ValueError, "7"),
        ((torch.tensor([0, 1, 0, 1, 1, 1, 1]), torch.tensor([0])), ValueError, "rise from 0 to 1"),
        (
            (torch.tensor([0, 1, 0, 1, 1, 1, 1], dtype=torch.uint8), torch.tensor([0])),
            ValueError,
            "rise from 0 to 1",
        ),
        ((torch.tensor([0, 1, 1, 1, 1, 1, 1]), torch.tensor([9])), IndexError, "known: .* got 9"),
        ((torch.tensor([0, 1, 1, 1, 1, 1, 1]), torch.tensor([-1])), IndexError, "got -1"),
    ],
)
def test_bad_known(known: Any, error: type[Exception], message: str) -> None:
    query, table, positive, _ = make()
    with pytest.raises(error, match=message):
        one_vs_all_loss(query, table, positive, known=known)


@pytest.mark.parametrize("rule", [0.5, 0.0, torch.tensor(0.0), torch.rand(6), Mixup()])
def test_masks_over_all_entities(rule: Any) -> None:
    query, table, positive, _ = make()
    with pytest.raises(TypeError, match="mutation_rate: expected an Expected or None"):
        one_vs_all_loss(query, table, positive, mutation_rate=rule)
