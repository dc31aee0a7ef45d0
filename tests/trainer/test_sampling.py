"""Batches and negatives: complete, uniform, and functions of seed and step only."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from emu_kernels import negatives
from emu_kernels.negatives import KnownTriples, UniformNegatives, derive_seed
from emu_kernels.trainer import sampling
from emu_kernels.trainer.batches import AlternatingBatches, Batch
from emu_kernels.trainer.config import Config
from emu_kernels.trainer.data import DIRECTIONS, Graph
from emu_kernels.trainer.sampling import ALL, FilteredNegatives

CPU = torch.device("cpu")


def triples(count: int, entities: int = 20, relations: int = 3) -> torch.Tensor:
    draws = torch.Generator().manual_seed(7)
    sizes = (entities, relations, entities)
    return torch.stack([torch.randint(n, (count,), generator=draws) for n in sizes], dim=1)


def columns(batch: Batch) -> torch.Tensor:
    return torch.stack(batch[:3])


def test_seeds_are_distinct_and_in_range():
    seeds = {
        derive_seed(seed, stream, index)
        for seed in (0, 1)
        for stream in ("mask", "epoch")
        for index in range(1000)
    }
    assert len(seeds) == 4000
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_derived_seed_known_answer():
    """If it changed, no recorded run could be repeated."""
    assert derive_seed(0, "mask", 0) == 3009415005049374825


@pytest.mark.parametrize("batch_size", [1, 7, 10, 25])  # below, across, at and above an epoch
def test_every_epoch_holds_every_triple_once(batch_size):
    data = torch.arange(30).reshape(10, 3)
    batches = AlternatingBatches(data, batch_size, seed=1)
    steps = -(-50 // batch_size)
    stream = torch.cat([columns(batches(step)) for step in range(steps)], dim=1)
    assert stream.shape == (3, steps * batch_size)
    orders = [stream[:, start : start + 10] for start in range(0, 50, 10)]
    for order in orders:
        assert torch.equal(order[:, order[0].argsort()], data.T)
    assert not torch.equal(orders[0], orders[1])


def test_batches_are_a_function_of_seed_and_step():
    data = triples(100)
    straight = AlternatingBatches(data, 30, seed=1)
    expected = [columns(straight(step)) for step in range(20)]
    assert torch.equal(columns(AlternatingBatches(data, 30, seed=1)(13)), expected[13])
    assert not torch.equal(columns(AlternatingBatches(data, 30, seed=2)(13)), expected[13])


def test_tails_and_heads_are_predicted_in_turn():
    batches = AlternatingBatches(triples(100), 30, seed=1)
    for step in range(6):
        batch = batches(step)
        assert batch.direction == ("tail", "head")[step % 2]
        given, positive = (batch.head, batch.tail) if step % 2 == 0 else (batch.tail, batch.head)
        assert batch.given is given
        assert batch.positive is positive


def test_negatives_are_a_function_of_seed_and_step(monkeypatch):
    monkeypatch.setattr(negatives, "_BLOCK_IDS", 5 * 4 * 3)  # three steps a block
    straight = UniformNegatives(50, 5, 4, seed=1, device=CPU)
    expected = [straight(step).clone() for step in range(10)]
    assert torch.equal(UniformNegatives(50, 5, 4, seed=1, device=CPU)(7), expected[7])
    assert not torch.equal(UniformNegatives(50, 5, 4, seed=2, device=CPU)(7), expected[7])
    assert all(not torch.equal(expected[7], other) for other in expected[:7])


def test_negatives_are_uniform():
    sample = UniformNegatives(10, 100, 100, seed=0, device=CPU)
    counts = torch.stack([sample(step) for step in range(20)]).flatten().bincount()
    assert len(counts) == 10
    assert ((counts - 20_000).abs() < 5 * 20_000**0.5).all()


@pytest.mark.parametrize("prefilter", [True, False])  # as on a CPU, and as on other devices
def test_known_triples_become_padding(prefilter):
    data = triples(600)
    known = KnownTriples(data, num_entities=20, num_relations=3)
    if not prefilter:
        known._maybe = {}
    truth = {tuple(triple) for triple in data.tolist()}
    given, relation = triples(50)[:, :2].T
    negative = torch.arange(20).expand(50, 20)
    for direction in DIRECTIONS:
        found = known.remove(given, relation, negative, direction)
        for g, r, row in zip(given.tolist(), relation.tolist(), found.tolist(), strict=True):
            for candidate, kept in enumerate(row):
                triple = (g, r, candidate) if direction == "tail" else (candidate, r, g)
                assert kept == (-1 if triple in truth else candidate)
    assert negative.min() == 0  # the input is left as it was


def test_lists_of_known_answers():
    data = triples(600)
    known = KnownTriples(data, num_entities=20, num_relations=3)
    given, relation = torch.cat([triples(50)[:, :2], torch.tensor([[19, 2]])]).T
    for direction in DIRECTIONS:
        offsets, ids = known.lists(given, relation, direction)
        found = known.remove(given, relation, torch.arange(20).expand(51, 20), direction)
        assert offsets[-1] == len(ids)
        for row, (start, end) in enumerate(itertools.pairwise(offsets)):
            wanted = (found[row] == -1).nonzero()[:, 0]
            assert ids[start:end].unique().tolist() == wanted.tolist()


@pytest.mark.parametrize("settings", [{"loss": "onevsall"}, {"loss": "uls", "negatives": ALL}])
def test_known_answers_are_left_out_of_all(settings):
    config = Config(data="-", filter_negatives=True, **settings)
    data = triples(600)
    graph = Graph(
        [*"abcdefghijklmnopqrst"], [*"abc"], {"train": data, "valid": data[:0], "test": data[:0]}
    )
    assert sampling.known_answers(config, graph, data) is not None
    assert sampling.known_answers(replace(config, filter_negatives=False), graph, data) is None


@pytest.mark.parametrize("sets", [1, 4, 12])  # one for the batch, for each block of rows, a row
def test_filtered_negatives_are_false_for_every_row_that_uses_them(sets):
    data = triples(600)
    truth = {tuple(triple) for triple in data.tolist()}
    uniform = UniformNegatives(20, sets, 50, seed=3, device=CPU)
    sampler = FilteredNegatives(uniform, KnownTriples(data, num_entities=20, num_relations=3))
    for direction in DIRECTIONS:
        head, relation, tail = data[:12].T
        batch = Batch(head, relation, tail, direction)
        before = uniform(0, batch).tolist()
        after = sampler(0, batch)
        assert after.shape == (sets, 50)
        block = 12 // sets
        for i, (drawn, kept) in enumerate(zip(before, after.tolist(), strict=True)):
            rows = range(i * block, (i + 1) * block)
            for candidate, result in zip(drawn, kept, strict=True):
                known = any(
                    (int(head[b]), int(relation[b]), candidate) in truth
                    if direction == "tail"
                    else (candidate, int(relation[b]), int(tail[b])) in truth
                    for b in rows
                )
                assert result == (-1 if known else candidate)


def test_filtered_negatives_stay_uniform_over_what_is_false():
    data = torch.tensor([[0, 0, 1], [0, 0, 2]])
    sampler = FilteredNegatives(
        UniformNegatives(10, 2, 50_000, seed=0, device=CPU), KnownTriples(data, 10, 1)
    )
    head, relation, tail = data.T
    drawn = sampler(0, Batch(head, relation, tail, "tail"))
    counts = drawn[drawn >= 0].bincount(minlength=10)
    assert counts[1] == counts[2] == 0
    false = counts[[0, *range(3, 10)]]
    assert ((false - 10_000).abs() < 5 * 10_000**0.5).all()
