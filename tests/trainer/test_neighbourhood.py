"""Neighbourhoods: their members, their cache, and the negatives drawn from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from emu_kernels.trainer import neighbourhood
from emu_kernels.trainer.batches import Batch
from emu_kernels.trainer.data import DIRECTIONS
from emu_kernels.trainer.neighbourhood import (
    Neighbourhoods,
    StructureAwareNegatives,
    adjacency,
    cached_neighbourhoods,
    k_hop,
    random_walks,
)

CPU = torch.device("cpu")

# A path 0–1–2–3 with a double edge and a loop, a triangle 4–5–6, an entity with only a loop (7),
# and one without triples (8).
HEADS = [0, 0, 2, 2, 3, 4, 5, 6, 7]
TAILS = [1, 1, 1, 3, 3, 5, 6, 4, 7]
TRIPLES = torch.tensor([HEADS, [0, 1, 0, 0, 1, 0, 0, 1, 0], TAILS]).T
ENTITIES = 9
EDGES = {0: {1}, 1: {0, 2}, 2: {1, 3}, 3: {2}, 4: {5, 6}, 5: {4, 6}, 6: {4, 5}, 7: set(), 8: set()}


def sets(found: Neighbourhoods) -> dict[int, set[int]]:
    assert found.indptr.dtype == torch.int64
    assert found.indices.dtype == torch.int32
    parts = found.indices.split(found.sizes.tolist())
    for part in parts:
        assert (part.diff() > 0).all()  # ascending, so each once
    return {i: set(part.tolist()) for i, part in enumerate(parts)}


def ball(edges: dict[int, set[int]], entity: int, hops: int) -> set[int]:
    reached = {entity}
    for _ in range(hops):
        reached |= {neighbour for i in reached for neighbour in edges[i]}
    return reached - {entity}


def ends(edges: dict[int, set[int]], entity: int, hops: int) -> set[int]:
    at = {entity}
    for _ in range(hops):
        at = {neighbour for i in at for neighbour in edges[i]}
    return at - {entity}


def random_triples(entities: int, count: int) -> torch.Tensor:
    draws = torch.Generator().manual_seed(3)
    return torch.randint(entities, (count, 3), generator=draws)


def batch_of(given: torch.Tensor) -> Batch:
    return Batch(given, torch.zeros_like(given), torch.zeros_like(given), "tail")


def test_adjacency_has_each_pair_once_and_no_loops():
    assert sets(adjacency(TRIPLES, ENTITIES)) == EDGES


@pytest.mark.parametrize("hops", [1, 2, 3])
def test_k_hop_is_the_ball(hops, monkeypatch):
    monkeypatch.setattr(neighbourhood, "_CHUNK_REACH", 2 * ENTITIES)  # several chunks
    found = sets(k_hop(adjacency(TRIPLES, ENTITIES), hops))
    assert found == {i: ball(EDGES, i, hops) for i in range(ENTITIES)}
    data = random_triples(40, 60)
    graph = adjacency(data, 40)
    edges = sets(graph)
    assert sets(k_hop(graph, hops)) == {i: ball(edges, i, hops) for i in range(40)}


@pytest.mark.parametrize("hops", [1, 2, 3])
def test_walks_end_where_walks_can_end(hops, monkeypatch):
    monkeypatch.setattr(neighbourhood, "_CHUNK_IDS", 1000)  # several chunks
    graph = adjacency(TRIPLES, ENTITIES)
    expected = {i: ends(EDGES, i, hops) for i in range(ENTITIES)}
    assert sets(random_walks(graph, hops, 500, seed=0)) == expected
    exact = sets(k_hop(graph, hops))
    for entity, few in sets(random_walks(graph, hops, 2, seed=0)).items():
        assert few <= expected[entity] <= exact[entity]
        assert len(few) <= 2


def test_walks_choose_each_neighbour_with_equal_probability():
    """The ends of 4,000 independent walks of three hops, from the hub of a star with a tail."""
    #       1 – 4 – 5         from 0: 1, 2, 3 with 1/3 each; from 1: 0 or 4; from 4: 1 or 5;
    #   2 – 0 – 3             3 hops: via 1 and 4 to 1 or 5: 1/3 · 1/2 · 1/2 each
    graph = adjacency(torch.tensor([(0, 0, 1), (0, 0, 2), (0, 0, 3), (1, 0, 4), (4, 0, 5)]), 6)
    runs = 4000
    counts = torch.zeros(6)
    for seed in range(runs):
        found = random_walks(graph, 3, 1, seed)
        start, end = found.indptr[0], found.indptr[1]
        counts += found.indices[start:end].bincount(minlength=6)
    # Back at 0 with 1/3 · 1/2 + 2/3 = 5/6 after two hops, then to 1, 2 or 3.
    expected = torch.tensor([0, 5 / 18 + 1 / 12, 5 / 18, 5 / 18, 0, 1 / 12])
    deviation = (runs * expected * (1 - expected)).sqrt()
    assert ((counts - runs * expected).abs() <= 5 * deviation).all()


def test_walks_are_a_function_of_the_seed():
    graph = adjacency(random_triples(200, 600), 200)
    first, again, other = (random_walks(graph, 3, 10, seed) for seed in (0, 0, 1))
    assert sets(first) == sets(again)
    assert sets(first) != sets(other)


def test_negatives_are_uniform_over_the_neighbourhood():
    found = k_hop(adjacency(TRIPLES, ENTITIES), 2)
    expected = sets(found)
    sampler = StructureAwareNegatives(found, 40_000, seed=0, device=CPU)
    negative = sampler(0, batch_of(torch.arange(ENTITIES)))
    assert negative.shape == (ENTITIES, 40_000)
    assert negative.dtype == torch.int64
    for entity in range(ENTITIES):
        members = expected[entity] or set(range(ENTITIES))  # all entities if it has no neighbours
        counts = negative[entity].bincount(minlength=ENTITIES)
        share = 40_000 / len(members)
        for other in range(ENTITIES):
            tolerance = 5 * share**0.5 if len(members) > 1 else 0
            assert abs(int(counts[other]) - share * (other in members)) <= tolerance * (
                other in members
            )


def test_negatives_come_from_the_given_entitys_neighbourhood():
    """The given entity is the head if tails are predicted, else the tail."""
    found = k_hop(adjacency(random_triples(40, 60), 40), 2)
    members = sets(found)
    head, relation, tail = random_triples(40, 30).T
    sampler = StructureAwareNegatives(found, 20, seed=0, device=CPU)
    for direction in DIRECTIONS:
        negative = sampler(5, Batch(head, relation, tail, direction))
        given = head if direction == "tail" else tail
        for entity, row in zip(given.tolist(), negative.tolist(), strict=True):
            assert set(row) <= (members[entity] or set(range(40)))


def test_a_graph_without_edges_gives_uniform_negatives():
    found = random_walks(adjacency(torch.tensor([(1, 0, 1)]), 4), 3, 10, seed=0)
    sampler = StructureAwareNegatives(found, 1000, seed=0, device=CPU)
    assert set(sampler(0, batch_of(torch.tensor([0, 3]))).flatten().tolist()) == {0, 1, 2, 3}


def test_negatives_are_a_function_of_seed_and_step():
    found = k_hop(adjacency(TRIPLES, ENTITIES), 3)
    batch = batch_of(torch.arange(ENTITIES))
    straight = StructureAwareNegatives(found, 50, seed=1, device=CPU)
    expected = [straight(step, batch) for step in range(5)]
    assert torch.equal(StructureAwareNegatives(found, 50, 1, CPU)(3, batch), expected[3])
    assert not torch.equal(StructureAwareNegatives(found, 50, 2, CPU)(3, batch), expected[3])
    assert not torch.equal(expected[2], expected[3])


def cached(folder: Path, **changes: Any) -> Neighbourhoods:
    settings: dict[str, Any] = {
        "triples": TRIPLES,
        "num_entities": ENTITIES,
        "hops": 2,
        "walks": 5,
        "seed": 0,
    }
    return cached_neighbourhoods(**(settings | changes), folder=folder)


def no_computation(*_: object) -> Neighbourhoods:
    raise AssertionError("computed again")


def test_the_cache_spares_the_computation(tmp_path, monkeypatch):
    folder = tmp_path / "made" / "on the way"
    first = cached(folder)
    exact = cached(folder, walks=0)
    monkeypatch.setattr(neighbourhood, "random_walks", no_computation)
    monkeypatch.setattr(neighbourhood, "k_hop", no_computation)
    assert sets(cached(folder)) == sets(first)
    assert sets(cached(folder, walks=0, seed=9)) == sets(exact)  # no walks, so no seed
    assert len(list(folder.iterdir())) == 2  # no temporary files


@pytest.mark.parametrize(
    "change",
    [
        {"hops": 3},
        {"walks": 6},
        {"walks": 0},
        {"seed": 1},
        {"num_entities": ENTITIES + 1},
        {"triples": TRIPLES[:-1]},
    ],
    ids=lambda change: next(iter(change)),
)
def test_the_cache_knows_what_it_holds(tmp_path, change):
    cached(tmp_path)
    fresh = tmp_path / "fresh"
    assert sets(cached(tmp_path, **change)) == sets(cached(fresh, **change))
    assert len(list(tmp_path.glob("*.safetensors"))) == 2


def test_another_format_version_is_another_file(tmp_path, monkeypatch):
    cached(tmp_path)
    monkeypatch.setattr(neighbourhood, "FORMAT_VERSION", neighbourhood.FORMAT_VERSION + 1)
    cached(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_damaged_file_is_computed_again(tmp_path):
    expected = sets(cached(tmp_path))
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    at = whole.rindex(cached(tmp_path).indices.numpy().tobytes())
    foreign = whole[:at] + (1 << 20).to_bytes(4, "little") + whole[at + 4 :]
    for content in (b"", whole[:-4], b"\x80\x04pickle", foreign):  # `foreign`: an id out of range
        path.write_bytes(content)
        assert sets(cached(tmp_path)) == expected
        assert path.read_bytes() == whole


def test_a_folder_that_cannot_be_written_costs_a_warning(tmp_path):
    blocked = tmp_path / "a file"
    blocked.write_text("")
    with pytest.warns(UserWarning, match="not cached"):
        found = cached(blocked)
    assert sets(found) == sets(cached(tmp_path / "other"))


def test_public_graph(nations, tmp_path):
    """Walks on a real graph stay inside the exact neighbourhood."""
    data = nations.triples["train"]
    settings = {"num_entities": nations.num_entities, "seed": 0, "folder": tmp_path}
    exact = sets(cached_neighbourhoods(data, hops=3, walks=0, **settings))
    walked = sets(cached_neighbourhoods(data, hops=3, walks=100, **settings))
    assert all(walked[i] <= exact[i] for i in exact)
    assert sum(map(len, walked.values())) > 0.9 * sum(map(len, exact.values()))
