"""Filtered ranking in both directions (Bordes et al., 2013), as the field reports it.

For each triple the true tail is ranked among all entities by φ of (h, r, ?), then the true head by
φ of (?, r, t). Other entities that are known to be true, in any split, are left out. Ties count as
the mean of the optimistic and the pessimistic rank, so a model that scores all alike gains nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from .data import DIRECTIONS, SPLITS, Direction, Graph, split_triples
from .errors import TrainingError
from .models import Score, Scorer

_CHUNK_BYTES = 8 << 20  # scores of one chunk: small enough to stay in a CPU's cache


@dataclass(frozen=True)
class Metrics:
    """Means over the ranks of one split; `mr` is the mean rank."""

    mrr: float
    hits_at_1: float
    hits_at_3: float
    hits_at_10: float
    mr: float

    @classmethod
    def from_ranks(cls, ranks: Tensor) -> Metrics:
        """Args: ranks: (Q,) float64, from 1; Q > 0."""

        def hits(k: int) -> float:
            return float((ranks <= k).double().mean())

        return cls(
            float(ranks.reciprocal().mean()), hits(1), hits(3), hits(10), float(ranks.mean())
        )


# Names of the metrics; the mean rank alone is better when smaller.
METRICS = tuple(field.name for field in fields(Metrics))


def is_better(metric: str, value: float, than: float) -> bool:
    return value < than if metric == "mr" else value > than


class _Truth:
    """For one direction, the entities known to complete each (given, relation)."""

    def __init__(self, graph: Graph, direction: Direction, device: torch.device) -> None:
        self._entities, self._relations = graph.num_entities, graph.num_relations
        triples = torch.cat([graph.triples[split] for split in SPLITS]).to(device)
        given, relation, target = split_triples(triples, direction)
        self._keys = (self._first_key(given, relation) + target).unique()  # sorted

    def answers(self, given: Tensor, relation: Tensor) -> tuple[Tensor, Tensor]:
        """(query, entity), each (P,): every known answer of each of the (Q,) queries."""
        first = self._first_key(given, relation)
        start, end = torch.searchsorted(self._keys, torch.stack([first, first + self._entities]))
        count = end - start
        query = torch.repeat_interleave(count)
        rank = torch.arange(len(query), device=query.device) - (count.cumsum(0) - count)[query]
        return query, self._keys[start[query] + rank] % self._entities

    def _first_key(self, given: Tensor, relation: Tensor) -> Tensor:
        """A triple's key is this plus its target, so a query's answers have adjacent keys."""
        return (given * self._relations + relation) * self._entities


class Stopped(Exception):
    """The evaluation was asked to stop."""


class Evaluator:
    """Ranks triples of a graph; keeps the filter, so make one and use it often."""

    def __init__(self, graph: Graph, device: torch.device | None = None) -> None:
        self._graph = graph
        self._device = device or torch.device("cpu")
        self._truth = {d: _Truth(graph, d, self._device) for d in DIRECTIONS}
        second = graph.inductive
        self._inductive = None if second is None else Evaluator(second, self._device)

    def evaluate(
        self, model: Scorer, split: str, stop: Callable[[], bool] = lambda: False
    ) -> Metrics:
        """Both directions over a split; the test split of the graph to test on, if there is one.

        Args:
            stop: asked between chunks whether to give up.

        Raises:
            Stopped: it said so.
            TrainingError: the model holds a value that is not finite; its ranks would mean nothing.
        """
        if split == "test" and self._inductive is not None:
            return self._inductive.evaluate(model, split, stop)
        triples = self._graph.triples[split].to(self._device)
        return Metrics.from_ranks(
            torch.cat([self.ranks(model, triples, direction, stop) for direction in DIRECTIONS])
        )

    @torch.no_grad()
    def ranks(
        self,
        model: Scorer,
        triples: Tensor,
        direction: Direction,
        stop: Callable[[], bool] = lambda: False,
    ) -> Tensor:
        """(M,) float64: the filtered rank of each triple's true entity.

        Memory is bounded by a chunk of scores, whatever the number of triples.
        """
        for name, parameter in model.named_parameters():
            if not parameter.isfinite().all():
                raise TrainingError(f"the model's {name} values are not all finite")
        score = model.scorer(self._graph)
        chunk = max(1, _CHUNK_BYTES // (4 * self._graph.num_entities))
        ranks = []
        for part in triples.split(chunk):
            if stop():
                raise Stopped
            ranks.append(self._rank_chunk(score, part, direction))
        return torch.cat(ranks)

    def _rank_chunk(self, score: Score, triples: Tensor, direction: Direction) -> Tensor:
        given, relation, target = split_triples(triples, direction)
        scores = score(given, relation, direction)  # (C, N)
        true = scores.gather(1, target.unsqueeze(1))  # (C, 1)
        row, answer = self._truth[direction].answers(given, relation)
        known = scores[row, answer]  # (P,)

        # Count all entities that score at least as well, then subtract the known ones. Comparing
        # into the scores' own type keeps this vectorised; it is exact up to 2²⁴ entities.
        count = torch.empty_like(scores)
        better = torch.gt(scores, true, out=count).sum(1)
        as_good = torch.ge(scores, true, out=count).sum(1)
        zero = torch.zeros_like(better)
        better -= zero.index_add(0, row, (known > true[row, 0]).to(better.dtype))
        as_good -= zero.index_add(0, row, (known >= true[row, 0]).to(better.dtype))

        # Optimistic rank 1 + better; pessimistic rank 1 + as_good, as the true entity is known.
        return 1.0 + (better.double() + as_good.double()) / 2.0
