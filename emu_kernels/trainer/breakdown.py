"""Ranks by relation and by kind of relation, for each direction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from .data import KINDS, Direction, Graph
from .evaluation import Metrics, Ranks


class Line(NamedTuple):
    """The metrics of some of the ranked triples."""

    name: str  # of a relation, or of a kind of relations
    kind: str
    triples: int  # how many
    metrics: dict[Direction, Metrics]  # of predicting tails, and heads


def by_relation(graph: Graph, triples: Tensor, ranks: Ranks) -> list[Line]:
    """A line for each relation of the ranked triples (M, 3)."""
    kinds = [KINDS[kind] for kind in graph.relation_kinds.tolist()]
    return _lines(triples[:, 1], graph.relations, kinds, ranks)


def by_kind(graph: Graph, triples: Tensor, ranks: Ranks) -> list[Line]:
    """A line for each kind of relation of the ranked triples (M, 3)."""
    kinds = graph.relation_kinds[triples[:, 1]]
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
