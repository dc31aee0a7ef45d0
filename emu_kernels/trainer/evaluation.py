"""Filtered ranking in both directions (Bordes et al., 2013), as the field reports it.

For each triple the true tail is ranked among all entities by φ of (h, r, ?), then the true head by
φ of (?, r, t). Other entities that are known to be true, in any split, are left out. Ties count as
the mean of the optimistic and the pessimistic rank, so that equal scores for all gain nothing.

For large graphs a sample of the triples can be ranked, or each triple among candidates drawn for
it, as in ogbl-wikikg2 (Hu et al., 2020). Such ranks compare only with ranks among as many.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from tqdm import tqdm

from emu_kernels import emu_scores
from emu_kernels.negatives import KnownTriples, generator

from .data import DIRECTIONS, SPLITS, Direction, Graph, split_triples
from .errors import TrainingError
from .models import Model, Score, Scorer, is_finite
from .settings import AT_LEAST_1, setting

_CHUNK_BYTES = 8 << 20  # scores of one chunk: small enough to stay in a CPU's cache
_QUERIES = 32  # of one chunk, at least, even so: with fewer, matrix products are slower
_MOST_BYTES = 512 << 20  # of scores of one chunk, whatever the number of entities
_DRAWN = 1 << 20  # candidates of one chunk, if they are drawn


Ranks = dict[Direction, Tensor]
"""For each direction, (M,) the rank of each triple's true entity."""


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

    @classmethod
    def of(cls, ranks: Ranks) -> Metrics:
        """The metrics of both directions together."""
        return cls.from_ranks(torch.cat(list(ranks.values())))


METRICS = tuple(field.name for field in fields(Metrics))


@dataclass(frozen=True)
class EvaluationOptions:
    """evaluation"""

    metric: str = setting(
        "mrr",
        "the validation metric that decides which model is best",
        choices=METRICS,
    )
    eval_triples: int | None = setting(
        None,
        "rank a sample of so many triples in validation, and in the test (default all)",
        limit=AT_LEAST_1,
    )
    eval_candidates: int | None = setting(
        None,
        "rank each triple among so many entities, drawn for each side without those known to be "
        "true, as OGB does (default among all)",
        limit=AT_LEAST_1,
    )

    @property
    def ranked(self) -> str:
        """What is ranked, in words that begin with a comma; empty for all."""
        triples = f", a sample of {self.eval_triples:,} triples" if self.eval_triples else ""
        among = f", among {self.eval_candidates:,} drawn entities" if self.eval_candidates else ""
        return triples + among


def is_better(metric: str, value: float, than: float) -> bool:
    """The mean rank alone is better when smaller."""
    return value < than if metric == "mr" else value > than


def _check_numbers(scores: Tensor) -> None:
    if scores.isnan().any():
        raise TrainingError(
            "the model's scores of some triples are NaN, so their ranks would mean nothing: try a "
            "smaller lr"
        )


class Stopped(Exception):
    """The evaluation was asked to stop."""


class Evaluator:
    """Ranks triples of a graph. It keeps the filter of known triples, so use one for all calls.

    Args:
        options: what is ranked, and among what.
        seed: of the sample and of the candidates, which are the same at each call.
    """

    def __init__(
        self,
        graph: Graph,
        device: torch.device | None = None,
        options: EvaluationOptions | None = None,
        seed: int = 0,
    ) -> None:
        self._graph = graph
        self._options = options or EvaluationOptions()
        self._seed = seed
        self._device = device or torch.device("cpu")
        every = torch.cat([graph.triples[split] for split in SPLITS]).to(self._device)
        self._known = KnownTriples(every, graph.num_entities, graph.num_relations)
        second = graph.inductive
        self._inductive = None if second is None else Evaluator(second, self._device, options, seed)

    def evaluate(
        self, model: Scorer, split: str, stop: Callable[[], bool] = lambda: False
    ) -> Metrics:
        """The metrics of a split, in both directions; "test" is that of the graph to test on, if
        there is one.

        Args:
            stop: asked between chunks whether to stop.

        Raises:
            Stopped: ``stop`` said so.
            TrainingError: the model holds a value that is not finite; its ranks would mean nothing.
        """
        return Metrics.of(self.split_ranks(model, split, stop))

    def ranked(self, split: str) -> Tensor:
        """(M, 3) the triples of a split that are ranked: all, or a sample."""
        if split == "test" and self._inductive is not None:
            return self._inductive.ranked(split)
        triples = self._graph.triples[split]
        count = self._options.eval_triples
        if count is not None and count < len(triples):
            draws = generator(torch.device("cpu"), self._seed, f"ranked {split}")
            triples = triples[torch.randperm(len(triples), generator=draws)[:count]]
        return triples

    def split_ranks(
        self, model: Scorer, split: str, stop: Callable[[], bool] = lambda: False
    ) -> Ranks:
        """The ranks that :meth:`evaluate` takes the means of."""
        if split == "test" and self._inductive is not None:
            return self._inductive.split_ranks(model, split, stop)
        triples = self.ranked(split).to(self._device)
        return {d: self.ranks(model, triples, d, stop) for d in DIRECTIONS}

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

        Raises:
            TrainingError: a value of the model is not finite, or the score of a triple is NaN.
        """
        for name, parameter in model.named_parameters():
            if not is_finite(parameter):
                raise TrainingError(f"the model's {name} values are not all finite")
        score = model.scorer(self._graph)
        candidates = model.candidates() if isinstance(model, Model) else None
        ranks = []
        with tqdm(
            total=len(triples), desc=f"ranking {direction}s", leave=False, disable=None, delay=1
        ) as bar:
            for index, part in enumerate(triples.split(self._chunk())):
                if stop():
                    raise Stopped
                if count := self._options.eval_candidates:
                    draws = generator(self._device, self._seed, f"candidate {direction}s", index)
                    shape = (len(part), count)
                    drawn = torch.randint(
                        self._graph.num_entities, shape, generator=draws, device=self._device
                    )
                    ranks.append(self._rank_drawn(model, candidates, score, part, direction, drawn))
                else:
                    ranks.append(self._rank_chunk(score, part, direction))
                bar.update(len(part))
        return torch.cat(ranks)

    def _chunk(self) -> int:
        """How many triples are ranked at once."""
        if self._options.eval_candidates is not None:
            return max(1, _DRAWN // self._options.eval_candidates)
        row = 4 * self._graph.num_entities
        return max(1, min(max(_CHUNK_BYTES // row, _QUERIES), _MOST_BYTES // row))

    def _rank_drawn(
        self,
        model: Scorer,
        candidates: Tensor | None,
        score: Score,
        triples: Tensor,
        direction: Direction,
        drawn: Tensor,  # (C, K) entities
    ) -> Tensor:
        given, relation, target = split_triples(triples, direction)
        known = self._known.holds(given, relation, drawn, direction)
        drawn[known] = -1  # padding, scored -inf
        if isinstance(model, Model):
            assert candidates is not None
            rows, table, target, drawn = self._fetch(model, candidates, given, target, drawn)
            query = model.ask(rows, relation, direction)
            scores = emu_scores(
                query.vector, table, target, drawn, mutation_rate=None, **model.phi(query)
            )
            true, others = scores.positive.unsqueeze(1), scores.negative
        else:
            whole = score(given, relation, direction)
            true = whole.gather(1, target.unsqueeze(1))
            others = whole.gather(1, drawn.clamp(min=0)).masked_fill(drawn < 0, -torch.inf)
        _check_numbers(true)
        # An entity with the score NaN is neither worse nor as good, and so counts as better.
        better, as_good = (~(others <= true)).sum(1), (~(others < true)).sum(1)
        return 1.0 + (better + as_good).double() / 2.0

    def _fetch(
        self, model: Model, candidates: Tensor, given: Tensor, target: Tensor, drawn: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The rows of `given`, the candidates, and the places of `target` and `drawn` in them."""
        return model.entity[given], candidates, target, drawn

    def _rank_chunk(self, score: Score, triples: Tensor, direction: Direction) -> Tensor:
        given, relation, target = split_triples(triples, direction)
        scores = score(given, relation, direction)  # (C, N)
        true = scores.gather(1, target.unsqueeze(1))  # (C, 1)
        _check_numbers(true)
        offsets, answer = self._known.lists(given, relation, direction)
        row = torch.repeat_interleave(offsets.diff())
        known = scores[row, answer]  # (P,)

        # Count all entities except those that score worse (also NaN, therefore), then subtract the
        # known ones. Comparisons are written as the scores' dtype, which keeps this vectorized;
        # blocks stay in the cache, and their sums are exact.
        zero = torch.zeros(len(scores), dtype=torch.float64, device=scores.device)
        better, as_good = zero + scores.shape[1], zero + scores.shape[1]
        for block in scores.split(max(1, _CHUNK_BYTES // (4 * len(scores))), dim=1):
            count = torch.empty_like(block)
            better -= torch.le(block, true, out=count).sum(1)
            as_good -= torch.lt(block, true, out=count).sum(1)
        better -= zero.index_add(0, row, (~(known <= true[row, 0])).to(better.dtype))
        as_good -= zero.index_add(0, row, (~(known < true[row, 0])).to(better.dtype))

        # Optimistic rank 1 + better; pessimistic rank 1 + as_good, as the true entity is known.
        return 1.0 + (better + as_good) / 2.0
