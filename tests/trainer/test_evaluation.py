"""Filtered ranks against their definition, and against PyKEEN's evaluator on a trained model."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from emu_kernels.trainer import evaluation
from emu_kernels.trainer.config import Config
from emu_kernels.trainer.data import DIRECTIONS, SPLITS, Direction, Graph
from emu_kernels.trainer.errors import TrainingError
from emu_kernels.trainer.evaluation import EvaluationOptions, Evaluator, Metrics
from emu_kernels.trainer.loop import Trainer
from emu_kernels.trainer.models import MODELS, Model
from emu_kernels.trainer.run import new_model
from tests.trainer.support import embeddings


def rank_by_definition(
    model: Model, graph: Graph, triple: list[int], direction: Direction
) -> float:
    """The mean of the optimistic and the pessimistic rank, one candidate at a time."""
    known = {tuple(other) for split in SPLITS for other in graph.triples[split].tolist()}
    h, r, t = triple
    given, target = (h, t) if direction == "tail" else (t, h)
    query = model.query(model.entity[[given]], model.relation[[r]], direction)
    scores = model.score(query, model.candidates())[0]
    optimistic = pessimistic = 1
    for candidate in range(graph.num_entities):
        completed = (h, r, candidate) if direction == "tail" else (candidate, r, t)
        if candidate == target or completed in known:
            continue
        optimistic += int(scores[candidate] > scores[target])
        pessimistic += int(scores[candidate] >= scores[target])
    return (optimistic + pessimistic) / 2


@pytest.fixture(scope="module")
def config() -> Config:
    return Config(data="-", dim=8)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_ranks_follow_their_definition(graph, config, direction):
    model = embeddings(new_model(config, graph))
    with torch.no_grad():  # few distinct values, so that many scores are equal
        for table in model.parameters():
            table.sign_()
    triples = graph.triples["test"]
    ranks = Evaluator(graph).ranks(model, triples, direction)
    expected = [rank_by_definition(model, graph, triple, direction) for triple in triples.tolist()]
    assert ranks.tolist() == expected
    assert (ranks % 1 != 0).any()  # there were ties


@pytest.mark.parametrize("name", MODELS)
def test_chunks_change_nothing(graph, config, monkeypatch, name):
    model = embeddings(new_model(dataclasses.replace(config, model=name), graph))
    whole = Evaluator(graph).evaluate(model, "valid")
    monkeypatch.setattr(evaluation, "_CHUNK_BYTES", 7 * 4 * 11)  # blocks of 11 entities
    monkeypatch.setattr(evaluation, "_QUERIES", 7)
    chunked = Evaluator(graph).evaluate(model, "valid")
    assert vars(chunked) == pytest.approx(vars(whole), rel=1e-12)


def test_chunks_of_a_large_graph():
    """As many queries as a matrix product needs, unless their scores would be too many."""
    triples = {split: torch.zeros((1, 3), dtype=torch.int64) for split in SPLITS}

    def chunk(entities: int) -> int:
        graph = Graph(range(entities), ["r"], triples)  # type: ignore[arg-type]
        return Evaluator(graph)._chunk()

    assert list(map(chunk, (14_541, 2_500_000, 10**8))) == [144, 32, 1]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_ranks_among_drawn_candidates(graph, config, monkeypatch, name, direction):
    monkeypatch.setattr(evaluation, "_DRAWN", 7 * 40)  # chunks of 7 triples
    model = embeddings(new_model(dataclasses.replace(config, model=name), graph))
    triples = graph.triples["test"][:30]
    evaluator = Evaluator(graph, options=EvaluationOptions(eval_candidates=40), seed=3)
    drawn: list[list[int]] = []
    holds = evaluator._known.holds

    def spy(given: Tensor, relation: Tensor, target: Tensor, to: Direction) -> Tensor:
        drawn.extend(target.tolist())
        return holds(given, relation, target, to)

    monkeypatch.setattr(evaluator._known, "holds", spy)
    ranks = evaluator.ranks(model, triples, direction)
    known = {tuple(other) for split in SPLITS for other in graph.triples[split].tolist()}
    left_out = 0
    for (h, r, t), rank, among in zip(triples.tolist(), ranks.tolist(), drawn, strict=True):
        given, target = (h, t) if direction == "tail" else (t, h)
        query = model.ask(model.entity[[given]], torch.tensor([r]), direction)
        scores = model.score(query, model.candidates())[0]
        false = [c for c in among if ((h, r, c) if direction == "tail" else (c, r, t)) not in known]
        assert target not in false
        left_out += 40 - len(false)
        # One call computes the scores of drawn candidates, another those of all.
        assert (scores[false] - scores[target]).abs().min() > 1e-5
        assert rank == 1 + int((scores[false] > scores[target]).sum())
    assert 0 < left_out < 20 * len(triples)
    assert torch.equal(evaluator.ranks(model, triples, direction), ranks)
    other = Evaluator(graph, options=EvaluationOptions(eval_candidates=40), seed=4)
    assert not torch.equal(other.ranks(model, triples, direction), ranks)


def collapsed(config: Config, graph: Graph, name: str) -> Model:
    """A model with the same vector for all entities."""
    model = embeddings(new_model(dataclasses.replace(config, model=name, dim=36), graph))
    with torch.no_grad():
        model.entity.copy_(model.entity[0].clone())
    return model


@pytest.mark.parametrize("name", MODELS)
def test_drawn_candidates_that_score_alike_share_a_rank(graph, config, name):
    model = collapsed(config, graph, name)
    options = EvaluationOptions(eval_candidates=20)
    ranks = Evaluator(graph, options=options).ranks(model, graph.triples["test"], "tail")
    assert 7 < ranks.mean() < 11  # 1 + half of those of 20 that are not known
    assert ranks.max() <= 11


def test_a_sample_of_triples_is_ranked(graph, config, monkeypatch):
    model = new_model(config, graph)
    whole = Evaluator(graph, options=EvaluationOptions(eval_triples=10**6))
    some = Evaluator(graph, options=EvaluationOptions(eval_triples=20), seed=1)
    ranked: list[Tensor] = []
    ranks = some.ranks

    def spy(model: Model, triples: Tensor, *rest: Any) -> Tensor:
        ranked.append(triples)
        return ranks(model, triples, *rest)

    monkeypatch.setattr(some, "ranks", spy)
    metrics = some.evaluate(model, "valid")
    assert metrics == some.evaluate(model, "valid")
    assert len(ranked[0]) == len(ranked[0].unique(dim=0)) == 20
    assert all(torch.equal(ranked[0], other) for other in ranked)
    valid = set(map(tuple, graph.triples["valid"].tolist()))
    assert set(map(tuple, ranked[0].tolist())) < valid
    assert whole.evaluate(model, "valid") == Evaluator(graph).evaluate(model, "valid")


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_scores_all_alike_gains_nothing(graph, config, name):
    model = collapsed(config, graph, name)
    metrics = Evaluator(graph).evaluate(model, "test")
    assert metrics.hits_at_10 < 0.1
    assert metrics.mr > graph.num_entities / 3


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_ranks_of_every_model(graph, config, name, direction):
    model = embeddings(new_model(dataclasses.replace(config, model=name), graph))
    triples = graph.triples["test"][:30]
    ranks = Evaluator(graph).ranks(model, triples, direction)
    expected = [rank_by_definition(model, graph, triple, direction) for triple in triples.tolist()]
    assert ranks.tolist() == expected


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_triple_given_twice_is_filtered_once(config, direction):
    triple = ("a", "r", "b")
    graph = Graph.from_names(
        {"train": [triple, triple, ("a", "r", "c")], "valid": [triple], "test": []}
    )
    model = embeddings(new_model(config, graph))
    triples = graph.triples["valid"]
    expected = [rank_by_definition(model, graph, triples[0].tolist(), direction)]
    assert Evaluator(graph).ranks(model, triples, direction).tolist() == expected


@pytest.mark.parametrize("options", [{}, {"eval_candidates": 9}])
def test_scores_that_are_no_numbers_have_no_rank(graph, config, options):
    model = embeddings(new_model(config, graph))
    with torch.no_grad():
        model.entity.fill_(1e30)  # products are infinite, and their differences NaN
        model.relation.fill_(1e30)
        model.relation[:, ::2] = -1e30
    evaluator = Evaluator(graph, options=EvaluationOptions(**options))
    with pytest.raises(TrainingError, match="scores of some triples are NaN"):
        evaluator.ranks(model, graph.triples["test"], "tail")


def test_entities_without_a_score_are_not_worse(graph, config, monkeypatch):
    model = embeddings(new_model(config, graph))
    triple = graph.triples["test"][:1]

    def scorer(*_: object) -> Any:
        scores = torch.full((1, graph.num_entities), float("nan"))
        scores[0, triple[0, 2]] = 1.0
        return lambda *_: scores

    monkeypatch.setattr(type(model), "scorer", scorer)
    evaluator = Evaluator(graph)
    known = {tuple(other) for split in SPLITS for other in graph.triples[split].tolist()}
    head, relation, _ = triple[0].tolist()
    answers = sum((head, relation, e) in known for e in range(graph.num_entities))
    rank = evaluator.ranks(model, triple, "tail")
    assert rank.tolist() == [1 + graph.num_entities - answers]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_have_no_rank(graph, config, value):
    model = embeddings(new_model(config, graph))
    with torch.no_grad():
        model.entity[3, 2] = value
    with pytest.raises(TrainingError, match="the model's entity values are not all finite"):
        Evaluator(graph).evaluate(model, "valid")


def test_metrics_of_known_ranks():
    metrics = Metrics.from_ranks(torch.tensor([1.0, 2.5, 3.0, 20.0], dtype=torch.float64))
    assert metrics.mrr == pytest.approx((1 + 1 / 2.5 + 1 / 3 + 1 / 20) / 4)
    assert (metrics.hits_at_1, metrics.hits_at_3, metrics.hits_at_10) == (0.25, 0.75, 0.75)
    assert metrics.mr == pytest.approx(26.5 / 4)


@pytest.mark.parametrize("name", ["DistMult", "ComplEx"])
def test_agrees_with_pykeen_on_a_trained_model(nations, name):
    from pykeen.evaluation import RankBasedEvaluator
    from pykeen.models import ComplEx, DistMult
    from pykeen.triples import CoreTriplesFactory

    config = Config(
        data="-", model=name, dim=16, batch_size=256, negatives=8, steps=120, eval_every=1000
    )
    trainer = Trainer(config, nations)
    assert trainer.train()
    ours = trainer.evaluator.evaluate(trainer.model, "test")
    assert ours.mrr > 0.35  # trained: at random it is about 0.23

    factory = CoreTriplesFactory(
        nations.triples["train"],
        num_entities=nations.num_entities,
        num_relations=nations.num_relations,
    )
    theirs = {"DistMult": DistMult, "ComplEx": ComplEx}[name](
        triples_factory=factory, embedding_dim=16, random_seed=0
    )
    with torch.no_grad():
        for representations, table in (
            (theirs.entity_representations, embeddings(trainer.model).entity),
            (theirs.relation_representations, embeddings(trainer.model).relation),
        ):
            weights = representations[0]._embeddings.weight
            if name == "ComplEx":  # real and imaginary parts side by side
                weights.copy_(torch.stack(table.chunk(2, dim=1), dim=-1).reshape(weights.shape))
            else:
                weights.copy_(table)
    result = RankBasedEvaluator(filtered=True).evaluate(
        theirs,
        mapped_triples=nations.triples["test"],
        additional_filter_triples=[nations.triples["train"], nations.triples["valid"]],
        use_tqdm=False,
    )
    names = {
        "mrr": "inverse_harmonic_mean_rank",
        "hits_at_1": "hits_at_1",
        "hits_at_3": "hits_at_3",
        "hits_at_10": "hits_at_10",
        "mr": "arithmetic_mean_rank",
    }
    expected = {ours: result.get_metric(f"both.realistic.{key}") for ours, key in names.items()}
    assert vars(ours) == pytest.approx(expected, abs=1e-6)
