"""Negatives of the public sampler: they are false, have fitting types, and follow the weights."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from emu_kernels.negatives import KnownTriples, Negatives
from emu_kernels.queries import Side

N, R, B, K = 20, 4, 12, 50


def triples(count: int = 300) -> Tensor:
    """Triples of relations 0 to 2: relation 3 has none."""
    draws = torch.Generator().manual_seed(7)
    return torch.stack([torch.randint(n, (count,), generator=draws) for n in (N, 3, N)], dim=1)


def make(data: Tensor, **options: Any) -> Negatives:
    return Negatives(data, N, R, batch_size=B, count=K, **options)


def test_negatives_are_false() -> None:
    data = triples()
    truth = {tuple(triple) for triple in data.tolist()}
    head, relation, tail = data[:B].T
    for options in ({}, {"candidates": "typed"}, {"weight": torch.arange(N)}, {"sets": 3}):
        draw, plain = (make(data, filtered=x, **options) for x in (True, False))
        sides: list[tuple[Side, Tensor]] = [("tail", head), ("head", tail)]
        for to, given in sides:
            found, drawn = draw(0, given, relation, to), plain(0, given, relation, to)
            assert found.shape == drawn.shape == (options.get("sets", B), K)
            assert drawn.min() >= 0
            assert drawn.max() < N
            block = B // len(found)
            for i, (row, before) in enumerate(zip(found.tolist(), drawn.tolist(), strict=True)):
                for candidate, kept in zip(before, row, strict=True):
                    known = any(
                        ((g, r, candidate) if to == "tail" else (candidate, r, g)) in truth
                        for g, r in zip(
                            given[i * block : (i + 1) * block].tolist(),
                            relation[i * block : (i + 1) * block].tolist(),
                            strict=True,
                        )
                    )
                    assert kept == (-1 if known else candidate)


def test_types() -> None:
    """All entities that a relation has on a side are drawn equally often, and no others."""
    data = torch.tensor([[0, 0, 5], [1, 0, 5], [1, 0, 6], [2, 1, 7], [2, 1, 9]])
    draw = Negatives(
        data, N, R, batch_size=3, count=20_000, candidates="typed", filtered=False, seed=2
    )
    relation = torch.tensor([0, 1, 3])
    expected: dict[Side, list[list[int]]] = {"tail": [[5, 6], [7, 9]], "head": [[0, 1], [2]]}
    for to, pools in expected.items():
        found = draw(0, torch.tensor([0, 2, 4]), relation, to)
        for row, pool in zip(found, (*pools, range(N)), strict=True):
            ids, counts = row.unique(return_counts=True)
            assert ids.tolist() == list(pool)
            wanted = 20_000 / len(pool)
            assert ((counts - wanted).abs() < 5 * wanted**0.5).all()


def test_weights() -> None:
    weight = torch.rand(N, generator=torch.Generator().manual_seed(1)) ** 4
    weight[[2, 17]] = 0
    draw = Negatives(
        triples(), N, R, batch_size=100, count=2000, weight=weight, filtered=False, seed=5
    )
    counts = draw(0, *triples(100)[:, :2].T).flatten().bincount(minlength=N)
    wanted = weight / weight.sum() * 200_000
    assert ((counts - wanted).abs() <= 5 * wanted**0.5).all()
    assert counts[2] == counts[17] == 0


def test_seed_step_and_a_short_batch() -> None:
    data = triples()
    given, relation = data[:B, :2].T
    first, second = make(data, seed=3), make(data, seed=3)
    wanted = [first(step, given, relation).clone() for step in range(3)]
    assert torch.equal(second(2, given, relation), wanted[2])
    assert not torch.equal(wanted[1], wanted[2])
    assert not torch.equal(make(data, seed=4)(2, given, relation), wanted[2])
    assert torch.equal(second(2, given[:5], relation[:5]), wanted[2][:5])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"sets": 5}, "sets: expected a divisor of batch_size 12, got 5"),
        ({"candidates": "any"}, "candidates"),
        ({"candidates": "typed", "sets": 3}, "candidates: 'typed' takes no weight"),
        ({"weight": torch.ones(3)}, r"weight: expected shape \(20,\), got \(3,\)"),
        ({"weight": -torch.ones(N)}, "weight: expected finite"),
        ({"weight": torch.zeros(N)}, "weight: expected finite"),
    ],
)
def test_bad_options(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make(triples(), **options)


def test_bad_sizes_and_types() -> None:
    data, given, relation = triples(), *triples(B)[:, :2].T
    good: dict[str, Any] = {"num_entities": N, "num_relations": R, "batch_size": B, "count": K}
    for name in (*good, "sets"):
        for value, error in ((-1, ValueError), (2.5, TypeError), ("2", TypeError)):
            with pytest.raises(error, match=f"^{name}: expected"):
                Negatives(data, **{**good, name: value})
    with pytest.raises(ValueError, match="step: expected at least 0, got -1"):
        make(data)(-1, given, relation)
    with pytest.raises(TypeError, match="seed: expected an int, got str"):
        make(data, seed="1")
    with pytest.raises(TypeError, match="filtered: expected True or False, got 'no'"):
        make(data, filtered="no")
    assert make(data, filtered=numpy.True_)(0, given, relation).shape == (B, K)
    anything: Any = data.tolist()
    with pytest.raises(TypeError, match=r"triples: expected a .*, got list"):
        make(anything)
    with pytest.raises(TypeError, match=r"weight: expected a .*, got list"):
        make(data, weight=[1.0] * N)
    with pytest.raises(TypeError, match=r"given: expected a .*, got list"):
        make(data)(0, anything, relation)
    with pytest.raises(TypeError, match=r"relation: expected a .*, got list"):
        make(data)(0, given, anything)


def test_drawn_on_the_device_of_the_triples() -> None:
    data = triples()
    given, relation = data[:B, :2].T
    for options in ({}, {"candidates": "typed"}, {"weight": torch.arange(N)}):
        wanted = make(data, **options)(0, given, relation)
        with torch.device("meta"):
            assert torch.equal(make(data, **options)(0, given, relation), wanted)


def test_bad_input() -> None:
    data = triples()
    with pytest.raises(ValueError, match=r"triples: expected shape \(M, 3\)"):
        make(data[:0])
    with pytest.raises(TypeError, match="triples: expected int64"):
        make(data.int())
    given, relation = data[: B + 1, :2].T
    with pytest.raises(ValueError, match="given: expected 12 rows, got 13"):
        make(data)(0, given, relation)
    with pytest.raises(ValueError, match="given: expected 12 rows, got 5"):
        make(data, sets=3)(0, given[:5], relation[:5])
    bad: Any = "tails"
    with pytest.raises(ValueError, match=r"to: .*tails"):
        make(data)(0, given[:B], relation[:B], bad)
    with pytest.raises(ValueError, match="63 bits"):
        KnownTriples(data, 2**31, 4)
    with pytest.raises(IndexError, match="given: expected ids from 0 to 19, got 20"):
        make(data)(0, torch.full((B,), N), relation[:B])
    with pytest.raises(IndexError, match="relation: expected ids from 0"):
        make(data)(0, given[:B], torch.full((B,), -1))
    with pytest.raises(TypeError, match="relation: expected an integer"):
        make(data)(0, given[:B], relation[:B].float())
    with pytest.raises(ValueError, match="given and relation: expected the same shape"):
        make(data)(0, given[:B], relation[:1])


def test_the_index_of_known_triples_checks_what_it_is_given() -> None:
    data = triples()
    given, relation = data[:B, :2].T
    index = KnownTriples(data, N, R)
    some = torch.zeros(B, K, dtype=torch.int64)
    with pytest.raises(ValueError, match=f"negative: .* G dividing {B}, got 5 sets"):
        index.remove(given, relation, some[:5])
    with pytest.raises(ValueError, match=r"negative: .* got 0 sets"):
        index.remove(given, relation, some[:0])
    with pytest.raises(IndexError, match="negative: expected ids from 0"):
        index.remove(given, relation, some + N)
    with pytest.raises(IndexError, match="target: expected ids from 0"):
        index.holds(given, relation, some + N, "tail")
    with pytest.raises(ValueError, match=r"negative: expected shape \(G, K\), got"):
        index.remove(given, relation, some[0])
    with pytest.raises(TypeError, match=r"negative: expected .*integer"):
        index.remove(given, relation, some.float())
    bad: Any = "tails"
    with pytest.raises(ValueError, match=r"to: .*tails"):
        index.remove(given, relation, some, bad)
    with pytest.raises(IndexError, match="relation: expected ids from 0"):
        index.holds(given, relation + R, some, "tail")
    with pytest.raises(ValueError, match=r"to: .*tails"):
        index.lists(given, relation, bad)
    with pytest.raises(TypeError, match="num_entities: expected an int, got str"):
        KnownTriples(data, bad, R)
    with pytest.raises(IndexError, match="triples, heads and tails: expected ids from 0"):
        KnownTriples(data + N, N, R)
    listed: Any = data.tolist()
    with pytest.raises(TypeError, match=r"triples: expected a .*, got list"):
        KnownTriples(listed, N, R)


@pytest.mark.parametrize(
    ("column", "match"), [(0, "heads and tails"), (1, "relations"), (2, "heads and tails")]
)
@pytest.mark.parametrize("bad", [-1, N])
def test_triples_outside_the_graph(column: int, match: str, bad: int) -> None:
    data = triples()
    data[3, column] = bad
    for options in ({}, {"filtered": False}, {"candidates": "typed"}):
        with pytest.raises(IndexError, match=f"triples, {match}: expected ids from 0"):
            make(data, **options)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_narrow_ids_do_not_overflow(dtype: torch.dtype) -> None:
    entities, relations, rows = 14_541, 237, 64
    data = torch.randint(200, (rows, 3), generator=torch.Generator().manual_seed(0))
    data[:, 1] += 37  # with N² R above 2³¹
    draw = Negatives(data, entities, relations, batch_size=rows, count=3)
    given, relation, known = data.T
    draw._draw._ids[0] = known[:, None]  # all of them known
    draw._draw._block = 0
    negative = draw(0, given.to(dtype), relation.to(dtype))
    assert (negative == -1).all()
    index = KnownTriples(data, entities, relations)
    given, relation = given.to(dtype), relation.to(dtype)
    assert index.holds(given, relation, known[:, None], "tail").all()
    removed = index.remove(given, relation, known[:, None].to(dtype))
    assert removed.dtype == torch.int64
    assert (removed == -1).all()


@pytest.mark.parametrize(
    "options", [{}, {"filtered": False}, {"filtered": False, "weight": torch.ones(N)}]
)
def test_drawn_negatives_may_be_changed(options: dict[str, Any]) -> None:
    data = triples()
    given, relation = data[:B, :2].T
    draw = make(data, **options)
    first = draw(0, given, relation)
    before = first.clone()
    first.fill_(-1)
    assert torch.equal(draw(0, given, relation), before)
