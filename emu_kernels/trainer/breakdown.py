"""Ranks by relation, and by kind of relation (Bordes et al., 2013), for each direction.

A relation has many tails ("n" at the right) where a pair of a head and the relation has 1.5 tails
or more on average, over the triples of all splits, and many heads likewise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .data import SPLITS, Direction, Graph
from .evaluation import Metrics, Ranks

KINDS = ("1-1", "1-n", "n-1", "n-n")
MANY = 1.5


class Line(NamedTuple):
    """The metrics of some of the ranked triples."""

    name: str  # of a relation, or of a kind
    kind: str
    triples: int  # how many
    metrics: dict[Direction, Metrics]  # of predicting tails, and heads


def relation_kinds(graph: Graph) -> Tensor:
    """(R,) int64: the place of each relation's kind in :data:`KINDS`; "1-1" without triples."""
    size, count = graph.num_entities, graph.num_relations
    head, relation, tail = torch.cat([graph.triples[split] for split in SPLITS]).T
    triples = ((relation * size + head) * size + tail).unique()  # fits: Graph checks it
    relation, tail = triples // size**2, triples % size
    total = torch.bincount(relation, minlength=count)

    def many(pairs: Tensor) -> Tensor:
        return total >= MANY * torch.bincount(pairs // size, minlength=count).clamp(1)

    heads = (triples // size).unique_consecutive()
    return 2 * many((relation * size + tail).unique()).long() + many(heads).long()


def by_relation(graph: Graph, triples: Tensor, ranks: Ranks) -> list[Line]:
    """A line for each relation of the ranked triples (M, 3)."""
    kinds = [KINDS[kind] for kind in relation_kinds(graph).tolist()]
    return _lines(triples[:, 1], graph.relations, kinds, ranks)


def by_kind(graph: Graph, triples: Tensor, ranks: Ranks) -> list[Line]:
    """A line for each kind of relation of the ranked triples (M, 3)."""
    kinds = relation_kinds(graph)[triples[:, 1]]
    return _lines(kinds, KINDS, KINDS, ranks)


def _lines(
    labels: Tensor,  # (M,), of each triple
    names: Sequence[str],
    kinds: Sequence[str],
    ranks: Ranks,
) -> list[Line]:
    lines = []
    for label in labels.unique().tolist():
        mine = labels == label
        metrics = {d: Metrics.from_ranks(of.cpu()[mine]) for d, of in ranks.items()}
        lines.append(Line(names[label], kinds[label], int(mine.sum()), metrics))
    return lines
