"""A model's query and similarity against its published scoring function."""

from __future__ import annotations

import cmath
import math
from typing import Any

import pytest
import torch

from emu_kernels import emu_scores
from emu_kernels.trainer import models
from emu_kernels.trainer.data import DIRECTIONS
from emu_kernels.trainer.models import MODELS, Model

DIM = 6
RANGE = 26 / DIM  # (γ + 2) / d, γ = 24

# Each model with each norm that it supports.
VARIANTS = [
    pytest.param(name, norm, id=f"{name}-l{norm}" if model.norms else name)
    for name, model in MODELS.items()
    for norm in model.norms or (1,)
]


def make(name: str, norm: int = 1, **keywords: Any) -> Model:
    """A model with only random values: HAKE initializes some with constants."""
    draws = torch.Generator().manual_seed(0)
    model = MODELS[name](9, 4, DIM, draws, norm=norm, **keywords)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-RANGE, RANGE, generator=draws)
    return model


def angle(x: float) -> float:
    return x / RANGE * math.pi


def p_norm(differences: list[float], p: int) -> float:
    return sum(abs(x) ** p for x in differences) ** (1 / p)


def published_score(
    name: str, norm: int, h: list[float], r: list[float], t: list[float], w: list[float]
) -> float:
    """The papers' formulas, component by component; a row's parts follow each other."""
    d = range(DIM)

    def parts(row: list[float]) -> list[complex]:
        return [complex(row[j], row[DIM + j]) for j in d]

    if name == "DistMult":
        return sum(h[j] * r[j] * t[j] for j in d)
    if name == "ComplEx":
        products = (a * b * c.conjugate() for a, b, c in zip(*map(parts, (h, r, t)), strict=True))
        return sum(products).real
    if name == "TransE":
        return -p_norm([h[j] + r[j] - t[j] for j in d], norm)
    if name == "RotatE":
        head, tail = parts(h), parts(t)
        return -sum(abs(head[j] * cmath.exp(1j * angle(r[j])) - tail[j]) for j in d)
    if name == "pRotatE":
        # Equal moduli C, with w = 2C: ‖h ∘ r − t‖ = 2C ‖sin((θ_h + θ_r − θ_t) / 2)‖.
        turned = [cmath.exp(1j * angle(h[j] + r[j])) - cmath.exp(1j * angle(t[j])) for j in d]
        return -w[0] / 2 * sum(abs(x) for x in turned)
    if name == "HAKE":
        phase = sum(abs(math.sin(angle(h[j] + r[j] - t[j]) / 2)) for j in d)
        modulus = []
        for j in d:
            r_m = abs(r[DIM + j])
            r_b = min(max(r[2 * DIM + j], -r_m), 1.0)
            modulus.append(h[DIM + j] * (r_m + r_b) - t[DIM + j] * (1 - r_b))
        return -w[0] * phase - w[1] * p_norm(modulus, 2)
    assert name == "PairRE"
    h_norm, t_norm = p_norm(h, 2), p_norm(t, 2)
    return -p_norm([h[j] / h_norm * r[j] - t[j] / t_norm * r[DIM + j] for j in d], norm)


@pytest.mark.parametrize(("name", "norm"), VARIANTS)
def test_both_directions_score_a_triple_as_published(name, norm):
    model = make(name, norm)
    head, relation, tail = torch.cartesian_prod(torch.arange(9), torch.arange(4), torch.arange(9)).T
    h, r, t = model.entity[head], model.relation[relation], model.entity[tail]
    weights = [] if model.similarity_weights is None else model.similarity_weights.tolist()
    expected = torch.tensor(
        [
            published_score(name, norm, *rows, weights)
            for rows in zip(h.tolist(), r.tolist(), t.tolist(), strict=True)
        ]
    )
    for direction in DIRECTIONS:
        given, target = (h, tail) if direction == "tail" else (t, head)
        scores = model.score(model.query(given, r, direction), model.candidates())
        found = scores.gather(1, target.unsqueeze(1)).squeeze(1)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("name", "norm"), VARIANTS)
def test_heads_are_tails_of_the_inverse_relation(name, norm):
    model = make(name, norm, inverse_relations=True)
    assert len(model.relation) == 2 * 4
    tail, relation = torch.cartesian_prod(torch.arange(9), torch.arange(4)).T
    t, candidates = model.entity[tail], model.candidates()
    scores = model.score(model.ask(t, relation, "head"), candidates)
    assert torch.equal(scores, model.score(model.ask(t, relation + 4, "tail"), candidates))
    weights = [] if model.similarity_weights is None else model.similarity_weights.tolist()
    rows = zip(t.tolist(), model.relation[relation + 4].tolist(), strict=True)
    expected = [
        [published_score(name, norm, *row, head, weights) for head in model.entity.tolist()]
        for row in rows
    ]
    torch.testing.assert_close(scores, torch.tensor(expected), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("name", "norm"), VARIANTS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_scores_are_the_operators(name, norm, direction, monkeypatch):
    """Ranking uses the same φ as training, and scoring candidates in pieces changes nothing."""
    model = make(name, norm)
    query = model.query(model.entity[:5], model.relation[[0, 1, 2, 3, 0]], direction)
    candidates = model.candidates()
    monkeypatch.setattr(models, "_CANDIDATES", 4)
    scores = model.score(query, candidates)
    trained = emu_scores(
        query.vector,
        candidates,
        torch.arange(5),
        torch.arange(9),
        mutation_rate=0.3,
        **model.phi(query),
    )
    torch.testing.assert_close(scores, trained.negative)
    torch.testing.assert_close(scores.diagonal(), trained.positive)


def test_scoring_leaves_the_global_generator_alone():
    model = make("TransE")
    before = torch.get_rng_state()
    model.score(model.query(model.entity[:2], model.relation[:2], "tail"), model.candidates())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("margin", "dim"), [(24.0, 100), (6.0, 50)])
def test_initial_values_fill_their_range(name, margin, dim):
    model = MODELS[name](500, 40, dim, torch.Generator().manual_seed(0), margin=margin)
    bound = (margin + 2) / dim
    drawn = [model.entity, model.relation[:, :dim] if name == "HAKE" else model.relation]
    for values in drawn:
        assert 0.98 * bound < values.abs().max() <= bound
        assert values.mean().abs() < 0.04 * bound


def test_initial_values_that_are_not_drawn():
    """The constants of the programs by HAKE's and RotatE's authors."""
    settings: tuple[Any, ...] = (9, 4, DIM, torch.Generator().manual_seed(0))
    hake, protate = MODELS["HAKE"](*settings), MODELS["pRotatE"](*settings)
    assert (hake.relation[:, DIM : 2 * DIM] == 1).all()
    assert (hake.relation[:, 2 * DIM :] == 0).all()
    assert hake.similarity_weights is not None
    assert protate.similarity_weights is not None
    torch.testing.assert_close(hake.similarity_weights.detach(), torch.tensor([RANGE / 2, 1.0]))
    torch.testing.assert_close(protate.similarity_weights.detach(), torch.tensor([RANGE / 2]))


def test_rotations_begin_all_around():
    """RotatE's phases are uniform in [−π, π], and so are the phases of a rotated 1."""
    model = MODELS["RotatE"](1, 1000, 20, torch.Generator().manual_seed(0))
    one = torch.cat([torch.ones(1000, 20), torch.zeros(1000, 20)], dim=1)
    turned = torch.complex(*model.query(one, model.relation, "tail").vector.detach().chunk(2, -1))
    torch.testing.assert_close(turned.abs(), torch.ones(1000, 20))
    phases = turned.angle()
    assert phases.abs().max() > 3.13
    assert phases.mean().abs() < 0.05
    assert abs(phases.std() - math.pi / 3**0.5) < 0.05
