"""Bernoulli corruption by a relation's cardinality, and subsampling weights."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from emu_kernels import fused_softmax_loss
from emu_kernels.trainer.batches import Batch
from emu_kernels.trainer.data import Direction
from emu_kernels.trainer.frequency import BernoulliBatches, SubsamplingWeights, head_probability

# One head with 30 tails, 20 heads with one tail, and 10 pairs: 1-to-N, N-to-1 and 1-to-1.
TRIPLES = torch.tensor(
    [(0, 0, 10 + i) for i in range(30)]
    + [(10 + i, 1, 3) for i in range(20)]
    + [(10 + i, 2, 30 + i) for i in range(10)]
)
P_HEAD = (30 / 31, 1 / 21, 1 / 2)


def rows(batch: Batch) -> list[tuple[int, ...]]:
    return [tuple(row) for row in torch.stack(batch[:3], dim=1).tolist()]


def batch_of(triples: torch.Tensor, direction: Direction = "tail") -> Batch:
    head, relation, tail = triples.T
    return Batch(head, relation, tail, direction)


def test_head_probability():
    found = head_probability(TRIPLES, num_relations=4)
    assert found.tolist() == pytest.approx([*P_HEAD, 0.5])


def test_head_probability_is_that_of_wang_et_al(graph):
    """tph / (tph + hpt), with tails per head and heads per tail counted by definition."""
    data = graph.triples["train"]
    for relation, found in enumerate(head_probability(data, graph.num_relations).tolist()):
        pairs = [(h, t) for h, r, t in data.tolist() if r == relation]
        tails_per_head = len(pairs) / len({h for h, _ in pairs})
        heads_per_tail = len(pairs) / len({t for _, t in pairs})
        assert found == pytest.approx(tails_per_head / (tails_per_head + heads_per_tail))


def test_directions_follow_the_relation():
    """Over many epochs, each triple's head is corrupted with its relation's probability."""
    epochs = 4000
    batches = BernoulliBatches(TRIPLES, num_relations=3, batch_size=60, seed=0)
    seen: dict[str, Counter[tuple[int, ...]]] = {"head": Counter(), "tail": Counter()}
    for step in range(epochs):
        batch = batches(step)
        seen[batch.direction].update(rows(batch))
    total = sum(P_HEAD[r] for _, r, _ in TRIPLES.tolist())
    for triple in map(tuple, TRIPLES.tolist()):
        heads, tails = (seen[direction][triple] for direction in ("head", "tail"))
        assert abs(heads + tails - epochs) <= 2  # the two streams end their epochs within a batch
        expected = P_HEAD[triple[1]] * int(total) / total
        deviation = (epochs * expected * (1 - expected)) ** 0.5
        assert abs(heads - epochs * expected) < 5 * deviation + 2


@pytest.mark.parametrize("batch_size", [1, 7, 60, 100])  # below, across, at and above an epoch
def test_every_epoch_holds_every_triple_in_one_direction(batch_size):
    batches = BernoulliBatches(TRIPLES, num_relations=3, batch_size=batch_size, seed=1)
    streams: dict[str, list[tuple[int, ...]]] = {"head": [], "tail": []}
    for step in range(-(-60 * 5 // batch_size) + 2):
        batch = batches(step)
        assert len(batch.head) == batch_size
        streams[batch.direction].extend(rows(batch))
    heads = int(sum(P_HEAD[r] for _, r, _ in TRIPLES.tolist()))
    expected = Counter(map(tuple, TRIPLES.tolist()))
    for epoch in range(3):
        head = streams["head"][epoch * heads : (epoch + 1) * heads]
        tail = streams["tail"][epoch * (60 - heads) : (epoch + 1) * (60 - heads)]
        assert Counter(head + tail) == expected


def test_bernoulli_batches_are_a_function_of_seed_and_step():
    def new(seed: int) -> BernoulliBatches:
        return BernoulliBatches(TRIPLES, num_relations=3, batch_size=25, seed=seed)

    straight = new(1)
    expected = [straight(step) for step in range(40)]
    for step in (39, 0, 17):
        cut = new(1)(step)
        assert cut.direction == expected[step].direction
        assert rows(cut) == rows(expected[step])
    assert rows(new(2)(17)) != rows(expected[17])


def test_a_graph_of_one_triple():
    batches = BernoulliBatches(torch.tensor([[0, 0, 1]]), num_relations=1, batch_size=2, seed=0)
    assert [batches(step).direction for step in range(3)] == ["tail"] * 3


def test_public_graph(nations):
    """How often each relation's heads are corrupted on a real graph."""
    data = nations.triples["train"]
    batches = BernoulliBatches(data, nations.num_relations, batch_size=100, seed=0)
    steps = 200 * len(data) // 100
    counts = {d: torch.zeros(nations.num_relations) for d in ("head", "tail")}
    for step in range(steps):
        batch = batches(step)
        counts[batch.direction] += batch.relation.bincount(minlength=nations.num_relations)
    probability = head_probability(data, nations.num_relations)
    total = counts["head"] + counts["tail"]
    deviation = (total * probability * (1 - probability)).sqrt()
    bias = total / len(data)  # from ⌊Σp⌋ instead of Σp
    assert ((counts["head"] - total * probability).abs() < 5 * deviation + bias + 100).all()


def test_subsampling_weights_are_the_reference_trainers():
    data = torch.tensor([(0, 0, 1), (0, 0, 2), (3, 0, 1), (0, 1, 1), (4, 1, 5), (4, 1, 5)])
    count: dict[tuple[int, int], int] = {}
    for head, relation, tail in data.tolist():
        for pair in ((head, relation), (tail, -relation - 1)):
            count[pair] = count[pair] + 1 if pair in count else 4
    expected = [(count[h, r] + count[t, -r - 1]) ** -0.5 for h, r, t in data.tolist()]
    weights = SubsamplingWeights(data, num_relations=2)
    found = weights(batch_of(data))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.tensor(expected))
    back = weights(batch_of(data.flip(0), "head"))  # the direction does not matter
    assert torch.equal(back, found.flip(0))


def test_the_losses_take_the_weights():
    weight = SubsamplingWeights(TRIPLES, num_relations=3)(batch_of(TRIPLES))
    draws = torch.Generator().manual_seed(0)
    query, table = (torch.randn(n, 8, generator=draws) for n in (60, 60))
    negative = torch.randint(60, (60, 5), generator=draws)
    arguments = (query, table, TRIPLES[:, 2], negative)
    each = fused_softmax_loss(*arguments, reduction="none", backend="reference")
    mean = fused_softmax_loss(*arguments, sample_weight=weight, backend="reference")
    torch.testing.assert_close(mean, (each * weight).sum() / weight.sum())
