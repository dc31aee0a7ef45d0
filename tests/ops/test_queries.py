"""Queries by name: each gives, with its similarity, its model's defining score both ways."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from emu_kernels import emu_scores, queries

D = 3
CORE = torch.randn(2 * D, 2, 2 * D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def split(row: Tensor, parts: int = 2) -> tuple[Tensor, ...]:
    return row.chunk(parts, dim=-1)


def number(row: Tensor) -> Tensor:
    return torch.complex(*split(row))


def simple(h: Tensor, r: Tensor, t: Tensor) -> Tensor:
    (h1, h2), (r1, r2), (t1, t2) = map(split, (h, r, t))
    return ((h1 * r1 * t2).sum() + (t1 * r2 * h2).sum()) / 2


def pairre(h: Tensor, r: Tensor, t: Tensor) -> Tensor:
    r_h, r_t = split(r)
    return -(h * r_h - t * r_t).abs().sum()


def hake(h: Tensor, r: Tensor, t: Tensor) -> Tensor:
    (h_p, h_m), (r_p, r_m, r_b), (t_p, t_m) = split(h), split(r, 3), split(t)
    r_b = torch.maximum(torch.minimum(r_b, torch.tensor(1.0)), -r_m.abs())
    phases = ((h_p + r_p - t_p) * 1.5 / 2).sin().abs().sum()
    return -0.5 * phases - 2.0 * (h_m * (r_m.abs() + r_b) - t_m * (1 - r_b)).norm()


Score = Callable[[Tensor, Tensor, Tensor], Tensor]

# similarity and its options, the relation's width, the score as the paper gives it
MODELS: dict[str, tuple[dict[str, Any], int, Score]] = {
    "distmult": ({"similarity": "dot"}, 2 * D, lambda h, r, t: (h * r * t).sum()),
    "complex": (
        {"similarity": "dot"},
        2 * D,
        lambda h, r, t: (number(h) * number(r) * number(t).conj()).sum().real,
    ),
    "transe": ({"similarity": "l2"}, 2 * D, lambda h, r, t: -(h + r - t).norm()),
    "rotate": (
        {"similarity": "rotate"},
        D,
        lambda h, r, t: -(number(h) * torch.exp(1j * r) - number(t)).abs().sum(),
    ),
    "protate": (
        {"similarity": "protate", "phase_scale": 1.5, "similarity_weights": [0.5]},
        2 * D,
        lambda h, r, t: -0.5 * ((h + r - t) * 1.5 / 2).sin().abs().sum(),
    ),
    "pairre": ({"similarity": "l1"}, 4 * D, pairre),
    "hake": (
        {"similarity": "hake", "phase_scale": 1.5, "similarity_weights": [0.5, 2.0]},
        3 * D,
        hake,
    ),
    "simple": ({"similarity": "dot"}, 2 * D, simple),
    "rescal": (
        {"similarity": "dot"},
        4 * D * D,
        lambda h, r, t: h @ r.view(2 * D, 2 * D) @ t,
    ),
    "tucker": (
        {"similarity": "dot"},
        2,
        lambda h, r, t: torch.einsum("i,r,j,irj->", h, r, t, CORE),
    ),
}


def query_of(name: str, *given: Any) -> tuple[Tensor, Tensor | None]:
    if name == "tucker":
        given = (*given[:2], CORE, *given[2:])
    made = getattr(queries, name)(*given)
    return made if isinstance(made, tuple) else (made, None)


def test_every_query_is_compared() -> None:
    assert sorted(MODELS) == sorted(queries.__all__)


@pytest.mark.parametrize("name", MODELS)
def test_score_in_both_directions(name: str) -> None:
    options, width, score = MODELS[name]
    draws = torch.Generator().manual_seed(0)
    entity = torch.randn(7, 2 * D, dtype=torch.float64, generator=draws)
    relation = torch.randn(5, width, dtype=torch.float64, generator=draws)
    head, tail = torch.tensor([0, 1, 2, 3, 4]), torch.tensor([6, 5, 0, 1, 4])
    options = dict(options)
    if "similarity_weights" in options:
        options["similarity_weights"] = torch.tensor(
            options["similarity_weights"], dtype=torch.float64
        )
    expected = torch.stack(
        [score(*rows) for rows in zip(entity[head], relation, entity[tail], strict=True)]
    )
    for given, positive, to in ((head, tail, "tail"), (tail, head, "head")):
        query, scale = query_of(name, entity[given], relation, to)
        scored = emu_scores(
            query, entity, positive, tail[:1], mutation_rate=None, scale=scale, **options
        )
        torch.testing.assert_close(scored.positive, expected)
        if to == "tail":
            assert torch.equal(query, query_of(name, entity[given], relation)[0])
        more, _ = query_of(name, entity[given].expand(2, 5, -1), relation.expand(2, 5, -1), to)
        torch.testing.assert_close(more, query.expand(2, 5, -1))


@pytest.mark.parametrize("name", MODELS)
def test_bad_input(name: str) -> None:
    entity, relation = torch.zeros(2, 2 * D), torch.zeros(2, MODELS[name][1])
    core = {"tucker": (CORE.float(),)}.get(name, ())
    query = getattr(queries, name)
    with pytest.raises(ValueError, match=r"to: .*'tails'"):
        query(entity, relation, *core, "tails")
    with pytest.raises(ValueError, match=r"relation: expected .* got shape \(2, 1\)"):
        query(entity, relation[:, :1], *core)
    for bad, error in ((entity.tolist(), TypeError), (torch.tensor(1.0), ValueError)):
        with pytest.raises(error, match="entity: expected"):
            query(bad, relation, *core)
        with pytest.raises(error, match="relation: expected"):
            query(entity, bad, *core)


def test_halves_and_core() -> None:
    with pytest.raises(ValueError, match=r"entity: .* two halves, got shape \(2, 5\)"):
        queries.rotate(torch.zeros(2, 5), torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"core: expected shape \(4, D_r, 4\), got \(4, 2, 3\)"):
        queries.tucker(torch.zeros(2, 4), torch.zeros(2, 2), torch.zeros(4, 2, 3))
