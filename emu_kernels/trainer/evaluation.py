"""Filtered ranking in both directions (Bordes et al., 2013), as the field reports it.

For each triple the true tail is ranked among all entities by φ of (h, r, ?), then the true head by
φ of (?, r, t). Other entities that are known to be true, in any split, are left out. Ties count as
the mean of the optimistic and the pessimistic rank, so a model that scores all alike gains nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .data import DIRECTIONS, SPLITS, Direction, Graph, split_triples
from .errors import TrainingError
from .models import Model

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


class _Truth:
    """For one direction, the entities known to complete each (given, relation).

    Sorted lists one after the other, without duplicates: list i is
    ``candidates[start[i]:start[i + 1]]`` and belongs to ``keys[i]``.
    """

    def __init__(self, graph: Graph, direction: Direction, device: torch.device) -> None:
        triples = torch.cat([graph.triples[split] for split in SPLITS]).to(device)
        given, relation, target = split_triples(triples, direction)
        self._num_relations = graph.num_relations
        pair = given * graph.num_relations + relation
        known = (pair * graph.num_entities + target).unique()
        pair, self._candidates = known // graph.num_entities, known % graph.num_entities
        self._keys, counts = pair.unique_consecutive(return_counts=True)
        self._start = torch.nn.functional.pad(counts.cumsum(0), (1, 0))

    def lists(self, given: Tensor, relation: Tensor) -> tuple[Tensor, Tensor]:
        """(start, length), each (Q,), of the queries' lists; a pair never seen has length 0."""
        pair = given * self._num_relations + relation
        place = torch.searchsorted(self._keys, pair).clamp_(max=len(self._keys) - 1)
        start, end = self._start[place], self._start[place + 1]
        return start, torch.where(self._keys[place] == pair, end - start, 0)

    def gather(self, start: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
        """(row, candidate) of every known pair of a chunk of queries, each (P,)."""
        row = torch.repeat_interleave(length)
        first = length.cumsum(0) - length
        place = torch.arange(len(row), device=row.device) + (start - first)[row]
        return row, self._candidates[place]


class Evaluator:
    """Ranks triples of a graph; keeps the filter, so make one and use it often."""

    def __init__(self, graph: Graph, device: torch.device | None = None) -> None:
        self._graph = graph
        self._device = device or torch.device("cpu")
        self._truth = {d: _Truth(graph, d, self._device) for d in DIRECTIONS}

    def evaluate(self, model: Model, split: str) -> Metrics:
        """Both directions over a split.

        Raises:
            TrainingError: the model holds a value that is not finite; its ranks would mean nothing.
        """
        triples = self._graph.triples[split].to(self._device)
        return Metrics.from_ranks(
            torch.cat([self.ranks(model, triples, direction) for direction in DIRECTIONS])
        )

    @torch.no_grad()
    def ranks(self, model: Model, triples: Tensor, direction: Direction) -> Tensor:
        """(M,) float64: the filtered rank of each triple's true entity.

        Memory is bounded by a chunk of scores, whatever the number of triples.
        """
        for name, parameter in model.named_parameters():
            if not parameter.isfinite().all():
                raise TrainingError(f"the model's {name} values are not all finite")
        given, relation, target = split_triples(triples, direction)
        start, length = self._truth[direction].lists(given, relation)
        candidates = model.candidates()
        chunk = max(1, _CHUNK_BYTES // (4 * self._graph.num_entities))
        return torch.cat(
            [
                self._rank_chunk(model, candidates, direction, *columns)
                for columns in zip(
                    *(x.split(chunk) for x in (given, relation, target, start, length)),
                    strict=True,
                )
            ]
        )

    def _rank_chunk(
        self,
        model: Model,
        candidates: Tensor,  # (N, D)
        direction: Direction,
        given: Tensor,  # (C,) and so are those that follow
        relation: Tensor,
        target: Tensor,
        start: Tensor,
        length: Tensor,
    ) -> Tensor:
        query = model.query(model.entity[given], model.relation[relation], direction)
        scores = model.score(query, candidates)  # (C, N)
        true = scores.gather(1, target.unsqueeze(1))  # (C, 1)
        row, candidate = self._truth[direction].gather(start, length)
        known = scores[row, candidate]  # (P,)

        # Count all that do at least as well, then take away those that are known. Counting in the
        # scores' own type keeps the comparison vectorised; it is exact up to 2²⁴ entities.
        count = torch.empty_like(scores)
        better = torch.gt(scores, true, out=count).sum(1)
        as_good = torch.ge(scores, true, out=count).sum(1)
        zero = torch.zeros_like(better)
        better -= zero.index_add(0, row, (known > true[row, 0]).to(better.dtype))
        as_good -= zero.index_add(0, row, (known >= true[row, 0]).to(better.dtype))

        # Optimistic 1 + better; pessimistic 1 + as_good, the true entity itself being known.
        return 1.0 + (better.double() + as_good.double()) / 2.0
