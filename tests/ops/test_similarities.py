"""Every similarity with every mutation, against formulas and against the specification."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

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
)
from emu_kernels.mask import mixup_share, mutation_mask, rates_to_thresholds
from emu_kernels.mutation import RULES, Mutation
from emu_kernels.similarity import SIMILARITIES
from tests.ops.support import (
    Options,
    assert_near,
    device_of,
    emulated,
    make,
    random_like,
    to_device,
)

KAPPA = 2.5
LOSS: Options = {"beta": 0.3, "alpha": 0.7, "seed": 2**40 + 7, "row_offset": 3}
MUTATIONS: dict[str, Callable[[int], Options]] = {
    "rate": lambda dim: {"mutation_rate": 0.4},
    "rates": lambda dim: {"mutation_rate": torch.linspace(0, 1, dim)},
    "pairs": lambda dim: {"mutation_rate": 0.4, "mask_unit": "pair"},
    "rates of pairs": lambda dim: {
        "mutation_rate": torch.linspace(0, 1, dim // 2),
        "mask_unit": "pair",
    },
    "mixup": lambda dim: {"mutation_rate": Mixup()},
    "mixup 1": lambda dim: {"mutation_rate": Mixup(1)},
    "all": lambda dim: {"mutation_rate": 1.0},
    "expected": lambda dim: {"mutation_rate": Expected(0.4)},
}


def _rule(options: Options) -> str:
    rate = options["mutation_rate"]
    return rate.name if isinstance(rate, Mutation) else options.get("mask_unit", "component")


def test_every_mutation_rule_has_a_case() -> None:
    assert {_rule(options(2)) for options in MUTATIONS.values()} | {"none"} == RULES.keys()


SHAPES: list[Options] = [
    {"batch": 1, "count": 1, "dim": 2, "rows": 4},
    {"batch": 3, "count": 9, "dim": 14, "rows": 5},
    {"batch": 4, "count": 40, "dim": 100, "rows": 30, "groups": 2},
    {"batch": 5, "count": 70, "dim": 258, "rows": 20, "groups": 1},
    {"batch": 30, "count": 200, "dim": 36, "rows": 3},
    {"batch": 2, "count": 3, "dim": 2000, "rows": 5},
]
IDS = ["smallest", "part of a vector", "two sets", "one set", "hubs", "long rows"]
INTERPRETED = [("part of a vector", mutation) for mutation in MUTATIONS]
INTERPRETED += [("two sets", "rate"), ("long rows", "rates of pairs")]
"""The combinations that are tested in Triton's interpreter."""


def mutation_of(mutation: str, similarity: str, dim: int) -> Options:
    options = MUTATIONS[mutation](dim)
    if mutation == "expected" and SIMILARITIES[similarity].coupled:
        options["mask_unit"] = "pair"
    return options


def skip_if_too_slow(shape: Options, mutation: str, kernel: str, device: torch.device) -> None:
    name = IDS[SHAPES.index(shape)]
    interpreted = kernel == "triton" and device.type == "cpu"
    if interpreted and (name, mutation) not in INTERPRETED:
        pytest.skip("Triton's kernels are interpreted, and other shapes are tested")


class Case(NamedTuple):
    leaves: dict[
        str, Tensor
    ]  # query, table and, where the similarity takes them, scale and weights
    ids: tuple[Tensor, Tensor]
    options: Options

    def to(self, device: torch.device) -> Case:
        leaves = {name: leaf.to(device) for name, leaf in self.leaves.items()}
        return self._replace(leaves=leaves, ids=(self.ids[0].to(device), self.ids[1].to(device)))

    def wide(self) -> Case:
        return self._replace(leaves={name: leaf.double() for name, leaf in self.leaves.items()})


def case(similarity: str, dtype: torch.dtype = torch.float32, **shape: Any) -> Case:
    inputs = make(dtype=dtype, padding=True, **shape)
    takes = SIMILARITIES[similarity]
    generator = torch.Generator().manual_seed(3)
    rows, dim = inputs.query.shape
    leaves = {"query": inputs.query * inputs.table.double().std().float(), "table": inputs.table}
    if takes.scaled_halves:
        width = dim // takes.halves * takes.scaled_halves
        leaves["scale"] = 0.5 + torch.rand(rows, width, generator=generator)
    if takes.weights:
        leaves["similarity_weights"] = 0.5 + torch.rand(takes.weights, generator=generator)
    options: Options = {"similarity": similarity}
    if takes.phases:
        options["phase_scale"] = KAPPA
    if dtype == torch.float64:
        leaves = {name: leaf.double() for name, leaf in leaves.items()}
    return Case(leaves, (inputs.positive, inputs.negative), options)


def run(
    function: Callable[..., Any],
    made: Case,
    upstream: list[Tensor] | None = None,
    **options: Any,
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Outputs and gradients by name, and the upstream gradients that were used, all on the device
    of the backend in the options."""
    device = device_of(options["backend"])
    made = made.to(device)
    options = {name: to_device(value, device) for name, value in options.items()}
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in made.leaves.items()}
    rest = {name: leaf for name, leaf in leaves.items() if name not in ("query", "table")}
    out = function(leaves["query"], leaves["table"], *made.ids, **made.options, **rest, **options)
    outputs = [out] if isinstance(out, Tensor) else list(out)
    outputs = [o.masked_fill(o == -math.inf, 0) for o in outputs]
    upstream = random_like(outputs) if upstream is None else upstream
    grads = torch.autograd.grad(
        outputs, list(leaves.values()), [u.to(o) for u, o in zip(upstream, outputs, strict=True)]
    )
    named = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
    named |= {f"gradient of {name}": g for name, g in zip(leaves, grads, strict=True)}
    return named, upstream


def assert_agree(function: Callable[..., Any], made: Case, kernel: str, **options: Any) -> None:
    expected, upstream = run(function, made.wide(), backend="reference", **options)
    actual, _ = run(function, made, upstream, backend=kernel, **options)
    # A score's absolute error is a softmax weight's relative error, and grows with the score.
    with torch.no_grad():
        rest = {k: v for k, v in made.wide().leaves.items() if k not in ("query", "table", "rate")}
        leaves = made.wide().leaves
        scored = score(leaves["query"], leaves["table"], *made.ids, **made.options, **rest)
    largest = float(scored.positive.abs().max())
    for name, value in expected.items():
        # A gradient's terms cancel, most of all for weights, whose terms sum over all components.
        floor = {"output": 0.0, "gradient": 0.3}[name.split()[0]]
        if name.endswith("similarity_weights"):
            floor = 3.0
        assert_near(actual[name], value, name, floor=floor, loose=3 + largest / 5)


def score(*arguments: Any, **options: Any) -> Any:
    return emu_scores(*arguments, mutation_rate=0.0, seed=0, backend="reference", **options)


def scores(*arguments: Any, mutation_rate: Any, **options: Any) -> Any:
    return emu_scores(*arguments, mutation_rate=mutation_rate, **options)


@pytest.mark.parametrize("mutation", MUTATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_loss(
    similarity: str, shape: Options, mutation: str, kernel: str, device: torch.device
) -> None:
    skip_if_too_slow(shape, mutation, kernel, device)
    made = case(similarity, **shape)
    options = LOSS | mutation_of(mutation, similarity, shape["dim"])
    assert_agree(fused_emu_loss, made, kernel, reduction="none", **options)


@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_softmax_loss(similarity: str, shape: Options, kernel: str, device: torch.device) -> None:
    skip_if_too_slow(shape, "rates of pairs", kernel, device)
    assert_agree(fused_softmax_loss, case(similarity, **shape), kernel)


@pytest.mark.parametrize("mutation", ["rate", "mixup", "expected"])
@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_scores(
    similarity: str, shape: Options, mutation: str, kernel: str, device: torch.device
) -> None:
    skip_if_too_slow(shape, mutation, kernel, device)
    options = mutation_of(mutation, similarity, shape["dim"])
    assert_agree(scores, case(similarity, **shape), kernel, seed=5, margin=2.0, **options)


def of_rates(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with rates as an additional leaf."""
    return lambda *a, rate, **options: function(*a, mutation_rate=Expected(rate), **options)


@pytest.mark.parametrize("of", ["all", "component", "row"])
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_learned_rates(similarity: str, of: str, kernel: str) -> None:
    made = case(similarity, **SHAPES[1])
    rows, dim = made.leaves["query"].shape
    coupled = SIMILARITIES[similarity].coupled
    units = dim // 2 if coupled else dim
    shape = {"all": (), "component": (units,), "row": (rows, units)}[of]
    generator = torch.Generator().manual_seed(4)
    made.leaves["rate"] = torch.rand(shape, generator=generator)
    options: Options = {"mask_unit": "pair"} if coupled else {}
    assert_agree(of_rates(fused_emu_loss), made, kernel, **LOSS, **options)
    assert_agree(of_rates(scores), made, kernel, **options)


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_scores_without_mutation(similarity: str, backend: str) -> None:
    """Scores and gradients of the negatives themselves; no random number is drawn."""
    made = case(similarity, **SHAPES[1])
    state = torch.get_rng_state()
    options = Options(backend=backend, margin=1.5)
    actual, _ = run(lambda *a, **o: emu_scores(*a, mutation_rate=None, **o)[:2], made, **options)
    assert torch.equal(torch.get_rng_state(), state)
    expected, _ = run(lambda *a, **o: emu_scores(*a, mutation_rate=0.5, **o)[:2], made, **options)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value)
    made = made.to(device_of(backend))
    with torch.no_grad():
        out = emu_scores(
            made.leaves["query"],
            made.leaves["table"],
            *made.ids,
            mutation_rate=None,
            backend=backend,
        )
    assert out.mutated is out.negative


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_table_dtypes(
    similarity: str, dtype: torch.dtype, kernel: str, device: torch.device
) -> None:
    shape = SHAPES[1 if emulated(kernel, device) else 2]
    made = case(similarity, dtype, **shape)
    for mutation in ("rate", "mixup", "expected"):
        options = mutation_of(mutation, similarity, shape["dim"])
        assert_agree(fused_emu_loss, made, kernel, **LOSS, **options)
        assert_agree(scores, made, kernel, seed=1, **options)


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_without_scale_and_weights(similarity: str, kernel: str) -> None:
    made = case(similarity, **SHAPES[1])
    made = made._replace(leaves={name: made.leaves[name] for name in ("query", "table")})
    assert_agree(fused_emu_loss, made, kernel, **LOSS, mutation_rate=0.4)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("mutation", ["rate", "rates of pairs", "mixup", "expected"])
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_gradcheck(similarity: str, mutation: str, backend: str, device: torch.device) -> None:
    made = case(similarity, torch.float64, batch=4, count=3, dim=6, groups=2, rows=6).to(device)
    options = made.options | LOSS | mutation_of(mutation, similarity, 6)
    options = {name: to_device(value, device) for name, value in options.items()}
    names = list(made.leaves)
    loss_of: Callable[..., Tensor] = fused_emu_loss

    def call(*leaves: Tensor) -> Tensor:
        named = dict(zip(names, leaves, strict=True))
        query, table = named.pop("query"), named.pop("table")
        return loss_of(
            query, table, *made.ids, **named, **options, reduction="none", backend=backend
        )

    assert torch.autograd.gradcheck(call, [leaf.requires_grad_() for leaf in made.leaves.values()])


@pytest.mark.parametrize("mutation", ["rate", "mixup", "expected"])
@pytest.mark.parametrize("similarity", [s for s in SIMILARITIES if s != "dot"])
def test_zero_distances(similarity: str, mutation: str, backend: str) -> None:
    """Where q = a ⊙ c the subgradient is 0 on every backend, not NaN."""
    made = case(similarity, batch=3, count=4, dim=8, rows=5)
    table = made.leaves["table"]
    made.leaves["query"].copy_(table[made.ids[0]])
    made.ids[1][:, 0] = made.ids[0]  # the positive among the negatives
    if "scale" in made.leaves:
        made.leaves["scale"].fill_(1)
    options = LOSS | mutation_of(mutation, similarity, 8)
    actual, upstream = run(fused_emu_loss, made, backend=backend, reduction="none", **options)
    expected, _ = run(
        fused_emu_loss, made, upstream, backend="reference", reduction="none", **options
    )
    for name, value in actual.items():
        assert value.isfinite().all()
        assert_near(value, expected[name], name, floor=0.3, loose=3)
    if similarity != "hake":  # a distance of 0 is the maximum of the score
        outputs, _ = run(scores, made, backend=backend, seed=1, mutation_rate=0.0)
        assert (outputs["output 0"] == 0).all()


def by_hand(
    similarity: str, q: list[float], c: list[float], a: list[float], w: list[float]
) -> float:
    """φ of one query and one candidate, in Python floats."""
    half = len(q) // 2
    if similarity == "dot":
        return sum(x * y for x, y in zip(q, c, strict=True))
    if similarity == "rotate":
        both = [complex(*pair) for pair in zip(q[:half], q[half:], strict=True)]
        other = [complex(*pair) for pair in zip(c[:half], c[half:], strict=True)]
        return -sum(abs(x - y) for x, y in zip(both, other, strict=True))
    if similarity == "l1":
        return -sum(abs(x - s * y) for x, y, s in zip(q, c, a, strict=True))
    if similarity == "l2":
        return -math.dist(q, [s * y for s, y in zip(a, c, strict=True)])
    if similarity == "protate":
        return -w[0] * sum(abs(math.sin((y - x) * KAPPA / 2)) for x, y in zip(q, c, strict=True))
    assert similarity == "hake"
    phases = zip(q[:half], c[:half], strict=True)
    phase = sum(abs(math.sin((y - x) * KAPPA / 2)) for x, y in phases)
    modulus = math.dist(q[half:], [s * y for s, y in zip(a, c[half:], strict=True)])
    return -w[0] * phase - w[1] * modulus


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_scores_are_the_formulas(similarity: str, backend: str) -> None:
    made = case(similarity, torch.float64, batch=3, count=4, dim=10, rows=6)
    leaves = {name: leaf.tolist() for name, leaf in made.leaves.items()}
    cases: list[Options] = [{}, {"mask_unit": "pair"}, {"mutation_rate": Mixup(3)}]
    for options in cases:
        options = Options(mutation_rate=0.5, mask_unit="component") | options
        mutation = options["mutation_rate"]
        outputs, _ = run(scores, made, seed=9, backend=backend, **options)
        s_pos, s_neg, s_mut = (outputs[f"output {i}"] for i in range(3))
        seed = torch.tensor(9)
        drawn = mutation_mask(
            3, 4, 10, seed=seed, row_offset=0, threshold=128, pairs=options["mask_unit"] == "pair"
        ).tolist()
        shares = mixup_share(3, 4, seed=seed, row_offset=0, order=3).tolist()
        for b in range(3):
            query, positive = leaves["query"][b], leaves["table"][int(made.ids[0][b])]
            a, w = leaves.get("scale", [[]] * 3)[b], leaves.get("similarity_weights", [])
            assert float(s_pos[b]) == pytest.approx(by_hand(similarity, query, positive, a, w))
            for k in range(4):
                index = int(made.ids[1][b, k])
                if index < 0:
                    continue
                negative = leaves["table"][index]
                if isinstance(mutation, Mixup):
                    mu = shares[b][k]
                    mutated = [
                        mu * n + (1 - mu) * z for n, z in zip(negative, positive, strict=True)
                    ]
                else:
                    triples = zip(drawn[b][k], positive, negative, strict=True)
                    mutated = [z if take else n for take, z, n in triples]
                expected = by_hand(similarity, query, negative, a, w)
                assert float(s_neg[b, k]) == pytest.approx(expected, abs=1e-12)
                expected = by_hand(similarity, query, mutated, a, w)
                assert float(s_mut[b, k]) == pytest.approx(expected, abs=1e-12)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("mutation", ["rate", "rates of pairs", "mixup", "expected"])
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_same_bits_for_any_number_of_threads(
    similarity: str, mutation: str, kernel: str, device: torch.device
) -> None:
    if emulated(kernel, device):
        pytest.skip(f"{kernel} is emulated by one thread")
    made = case(similarity, batch=40, count=90, dim=36, rows=5)
    options = LOSS | mutation_of(mutation, similarity, 36)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(run(fused_emu_loss, made, backend=kernel, **options)[0])
    finally:
        torch.set_num_threads(threads)
    for name, value in results[0].items():
        assert torch.equal(results[1][name], value)
        assert torch.equal(results[2][name], value)


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_sparse_gradient_is_the_dense_one(similarity: str, kernel: str) -> None:
    made = case(similarity, batch=6, count=9, dim=20, rows=200, groups=2)
    for mutation in ("rate", "mixup", "expected"):
        options = LOSS | mutation_of(mutation, similarity, 20)
        dense, _ = run(fused_emu_loss, made, backend=kernel, **options)
        sparse, _ = run(fused_emu_loss, made, backend=kernel, sparse_grad=True, **options)
        assert sparse["gradient of table"].layout == torch.sparse_coo
        for name, value in dense.items():
            assert torch.equal(sparse[name].to_dense(), value)


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_compiles_in_one_graph(similarity: str, backend: str, device: torch.device) -> None:
    made = case(similarity, batch=4, count=5, dim=20, rows=9)
    rates = torch.linspace(0, 1, 20, device=device)
    fused_loss: Callable[..., Tensor] = fused_emu_loss
    cases: list[Options] = [{"mutation_rate": rates}, {"mutation_rate": Mixup()}]
    for options in cases:
        torch.compiler.reset()

        def loss(*arguments: Any, options: Options = options, **rest: Any) -> Tensor:
            return fused_loss(*arguments, **LOSS, **options, **rest)

        fused = torch.compile(loss, fullgraph=True, backend="aot_eager")
        actual, upstream = run(fused, made, backend=backend)
        expected, _ = run(loss, made, upstream, backend=backend)
        for name, value in expected.items():
            torch.testing.assert_close(actual[name], value)


def test_large_phases(kernel: str, device: torch.device) -> None:
    """The sine is still accurate for phases of thousands of turns."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(6, 20, generator=generator) * 3e4
    table[:, 10:] = 0
    query = torch.zeros(2, 20)
    ids = torch.tensor([0, 1]), torch.tensor([[2, 3], [4, 5]])
    inputs = (x.to(device) for x in (query, table, *ids))
    out = emu_scores(*inputs, similarity="hake", mutation_rate=0.0, seed=1, backend=kernel)
    expected = -(table[2:, :10].double() * 0.5).sin().abs().sum(dim=1)
    actual = out.negative.flatten().double().cpu()
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-2)


def test_masks_of_pairs_and_rates_are_bit_exact(backend: str, device: torch.device) -> None:
    """emu_mutate of zeros and ones is the mask itself."""
    dim = 52
    positive, negative = torch.ones(3, dim), torch.zeros(3, 9, dim)
    cases: list[Options] = [
        {"mutation_rate": 0.3, "mask_unit": "pair"},
        {"mutation_rate": torch.rand(dim), "mask_unit": "component"},
        {"mutation_rate": torch.rand(dim // 2), "mask_unit": "pair"},
    ]
    for options in cases:
        rate = options["mutation_rate"]
        options["mutation_rate"] = to_device(rate, device)
        threshold = rates_to_thresholds(rate) if isinstance(rate, Tensor) else round(256 * rate)
        expected = mutation_mask(
            3, 9, dim, seed=torch.tensor(11), row_offset=7, threshold=threshold,
            pairs=options["mask_unit"] == "pair",
        )  # fmt: skip
        actual = emu_mutate(
            positive.to(device),
            negative.to(device),
            seed=11,
            row_offset=7,
            backend=backend,
            **options,
        )
        assert torch.equal(actual.cpu().bool(), expected)
        if options["mask_unit"] == "pair":
            assert torch.equal(expected[..., : dim // 2], expected[..., dim // 2 :])


def test_rates_are_the_shares_that_mutate(backend: str, device: torch.device) -> None:
    rates = torch.tensor([0.0, 1.0, 0.25, 0.5], device=device)
    positive, negative = torch.ones(64, 4, device=device), torch.zeros(64, 500, 4, device=device)
    drawn = emu_mutate(positive, negative, mutation_rate=rates, seed=3, backend=backend)
    drawn = drawn.mean(dim=(0, 1))
    assert drawn[0] == 0
    assert drawn[1] == 1
    torch.testing.assert_close(drawn, rates, rtol=0, atol=0.01)  # 4 standard deviations


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_mixup_shares_have_their_distribution(order: int) -> None:
    """Beta(order, 1) has mean order / (order + 1) and P(μ < x) = x^order."""
    shares = mixup_share(200, 500, seed=torch.tensor(1), row_offset=0, order=order)
    assert float(shares.mean()) == pytest.approx(order / (order + 1), abs=0.005)
    for x in (0.25, 0.5, 0.75):
        assert float((shares < x).float().mean()) == pytest.approx(x**order, abs=0.01)


def test_thresholds_of_rates_are_those_of_numbers() -> None:
    rates = torch.linspace(0, 1, 1001, dtype=torch.float64)
    expected = [round(256 * float(rate)) for rate in rates]
    assert rates_to_thresholds(rates).tolist() == expected


BAD: list[tuple[Options, type[Exception], str]] = [
    ({"scale": torch.ones(6, 20)}, ValueError, "scale: similarity 'dot' takes none"),
    (
        {"similarity": "l1", "scale": torch.ones(6, 19)},
        ValueError,
        r"scale: .* expects shape \(B, 20\)",
    ),
    ({"similarity": "hake", "scale": torch.ones(6, 20)}, ValueError, r"scale: .*\(B, 10\)"),
    (
        {"similarity": "hake", "similarity_weights": torch.ones(3)},
        ValueError,
        r"_weights: .*\(2,\)",
    ),
    (
        {"similarity": "l1", "similarity_weights": torch.ones(1)},
        ValueError,
        "weights: .*takes none",
    ),
    ({"similarity": "l2", "scale": torch.ones(6, 20).long()}, TypeError, "scale: expected float32"),
    ({"similarity": "l2", "scale": torch.ones(6, 20).double()}, TypeError, "scale: float64"),
    ({"phase_scale": 2.0}, ValueError, "phase_scale: similarity 'dot' takes none"),
    ({"similarity": "hake", "phase_scale": math.inf}, ValueError, "phase_scale: expected a finite"),
    ({"mask_unit": "bit"}, ValueError, "mask_unit: expected one of 'component', 'pair'"),
    ({"mutation_rate": torch.ones(19)}, ValueError, r"mutation_rate: .*shape \(\) or \(20,\)"),
    ({"mutation_rate": torch.ones(20), "mask_unit": "pair"}, ValueError, r"shape \(\) or \(10,\)"),
    ({"mutation_rate": torch.full((20,), 1.5)}, ValueError, r"rates in \[0, 1\], got 1.5"),
    ({"mutation_rate": torch.full((20,), math.nan)}, ValueError, "got nan at component 0"),
    ({"mutation_rate": torch.ones(20).long()}, ValueError, "mutation_rate: expected a number"),
    ({"mutation_rate": torch.ones(20).requires_grad_()}, ValueError, "is not differentiated"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD, ids=[str(b[2]) for b in BAD])
def test_bad_input(options: Options, error: type[Exception], message: str, backend: str) -> None:
    options = LOSS | {"mutation_rate": 0.5, "backend": backend} | options
    with pytest.raises(error, match=message):
        fused_emu_loss(*make(), **options)


@pytest.mark.parametrize("similarity", ["rotate", "hake"])
def test_odd_rows(similarity: str, backend: str) -> None:
    with pytest.raises(ValueError, match="even number of components, got 7"):
        fused_softmax_loss(*make(dim=7), similarity=similarity, backend=backend)
    with pytest.raises(ValueError, match="'pair' needs an even number"):
        emu_scores(*make(dim=7), mutation_rate=0.5, mask_unit="pair", backend=backend)


def test_bad_mixup() -> None:
    for order in (0, 5):
        with pytest.raises(ValueError, match="order: expected 1 to 4"):
            Mixup(order)
    with pytest.raises(TypeError, match="order: expected an int"):
        Mixup(1.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="got Mixup"):
        emu_mutate(torch.ones(1, 2), torch.ones(1, 1, 2), mutation_rate=Mixup())  # type: ignore[arg-type]
