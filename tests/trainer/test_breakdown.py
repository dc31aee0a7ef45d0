"""Metrics by kind of relation, against counts by hand and ranks one by one."""

from __future__ import annotations

import csv

import pytest
import torch

from emu_kernels.trainer.breakdown import by_kind, by_relation
from emu_kernels.trainer.config import Config
from emu_kernels.trainer.data import DIRECTIONS, KINDS, Graph
from emu_kernels.trainer.evaluation import Evaluator, Metrics
from emu_kernels.trainer.loop import Trainer
from emu_kernels.trainer.run import RunFolder, new_model


def test_kinds():
    train = [
        ("a", "one to one", "b"), ("b", "one to one", "c"),
        ("a", "one to many", "b"), ("a", "one to many", "c"), ("b", "one to many", "d"),
        ("a", "many to one", "c"), ("b", "many to one", "c"),
        ("a", "many to many", "b"), ("a", "many to many", "c"), ("b", "many to many", "c"),
    ]  # fmt: skip
    # 1.5 tails a head in "one to many" and 1.5 heads a tail in "many to many", which is many; of
    # the repeated triple once.
    graph = Graph.from_names({"train": train, "valid": train[:1], "test": []})
    kinds = [KINDS[kind] for kind in graph.relation_kinds.tolist()]
    assert dict(zip(graph.relations, kinds, strict=True)) == {
        "many to many": "n-n",
        "many to one": "n-1",
        "one to many": "1-n",
        "one to one": "1-1",
    }


def test_lines_are_means_of_their_triples(graph):
    model = new_model(Config(data="-", dim=8), graph)
    ranks = Evaluator(graph).split_ranks(model, "test")
    relations = graph.triples["test"][:, 1]
    lines = by_relation(graph, graph.triples["test"], ranks)
    assert [line.name for line in lines] == [graph.relations[i] for i in relations.unique()]
    for line in lines:
        mine = relations == graph.relations.index(line.name)
        assert line.triples == int(mine.sum())
        for direction in DIRECTIONS:
            of = ranks[direction][mine]
            assert line.metrics[direction].mrr == pytest.approx(float((1 / of).mean()))
            assert line.metrics[direction].mr == pytest.approx(float(of.mean()))
    (kind,) = by_kind(graph, graph.triples["test"], ranks)  # clusters to clusters, all of them
    assert (kind.name, kind.triples) == ("n-n", len(relations))
    whole = Evaluator(graph).evaluate(model, "test")
    assert Metrics.of(ranks) == whole
    assert torch.tensor([m.mrr for m in kind.metrics.values()]).mean() == pytest.approx(whole.mrr)


def test_a_run_leaves_a_table(graph, tmp_path):
    config = Config(data="-", dim=8, batch_size=64, negatives=8, steps=4, eval_every=2)
    trainer = Trainer(config, graph, RunFolder.create(tmp_path / "run", config, graph))
    assert trainer.train()
    ranks = trainer.finish()
    assert ranks is not None
    with (tmp_path / "run" / "relations.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    lines = by_relation(graph, graph.triples["test"], ranks)
    assert [row["relation"] for row in rows] == [line.name for line in lines]
    assert [float(row["head_mrr"]) for row in rows] == [x.metrics["head"].mrr for x in lines]
    assert [int(row["triples"]) for row in rows] == [line.triples for line in lines]
