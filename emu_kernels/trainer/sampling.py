"""Samplers: the batches of triples that a step trains on, and negatives for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import pooch
import torch
from torch import Tensor

from emu_kernels.negatives import KnownTriples, UniformNegatives, generator

from .batches import AlternatingBatches, Batch, BatchSampler, InverseBatches
from .data import Graph, with_inverses
from .frequency import BernoulliBatches
from .neighbourhood import StructureAwareNegatives, cached_neighbourhoods
from .settings import AT_LEAST_0, AT_LEAST_1, Choice, Limit, setting

if TYPE_CHECKING:
    from .config import Config

T = TypeVar("T")

ALL = -1
"""The number of negatives that means all entities."""

NegativeSampler = Callable[[int, Batch], Tensor]
"""Draws negatives for a step and its batch: a pure function of both (and of a seed held inside).

Returns (G, K) int64 ids on the batch's device, G dividing B: a set for each block of B/G rows, with
−1 for padding. The next call may overwrite them.
"""


class FilteredNegatives:
    """Another sampler's negatives; those that make a known triple become padding (−1).

    See :meth:`KnownTriples.remove`.
    """

    def __init__(self, sampler: NegativeSampler, known: KnownTriples) -> None:
        self._sampler = sampler
        self._known = known

    def __call__(self, step: int, batch: Batch) -> Tensor:
        negative = self._sampler(step, batch)
        return self._known.remove(batch.given, batch.relation, negative, batch.direction)


class StrictNegatives:
    """K negatives, uniform among the entities that make no known triple, without padding.

    As NBFNet's authors draw them. If all entities are known answers of a row, it gets −1.

    Args:
        num_entities: N.
        negatives: K.
    """

    def __init__(self, known: KnownTriples, num_entities: int, negatives: int, seed: int) -> None:
        self._known = known
        self._num_entities = num_entities
        self._negatives = negatives
        self._seed = seed

    def __call__(self, step: int, batch: Batch) -> Tensor:
        rows, device = len(batch.given), batch.given.device
        offsets, ids = self._known.lists(batch.given, batch.relation, batch.direction)
        counts = offsets.diff()
        row = torch.repeat_interleave(counts)
        place = torch.arange(len(ids), device=device) - offsets[row]
        others = (self._num_entities - counts)[:, None]
        draws = generator(device, self._seed, "strict negatives", step)
        size = (rows, self._negatives)
        share = torch.rand(size, dtype=torch.float64, generator=draws, device=device)
        drawn = (share * others).long()  # n: take the n-th, from 0, of the row's other entities
        # id − place of the others precede a known answer: it precedes the n-th if they are ≤ n.
        stride = self._num_entities + 1
        first = torch.arange(rows, device=device)[:, None] * stride
        before = torch.searchsorted(row * stride + ids - place, first + drawn, right=True)
        drawn += before - offsets[:-1, None]
        return torch.where(others > 0, drawn, -1)


def _known(config: Config, graph: Graph, train: Tensor) -> KnownTriples:
    """The training triples, with their inverses if batches have inverse relations."""
    relations = graph.num_relations
    if CORRUPTIONS[config.corruption].inverse:
        train, relations = with_inverses(train, relations), 2 * relations
    return KnownTriples(train, graph.num_entities, relations)


def _strict(config: Config, graph: Graph, train: Tensor) -> NegativeSampler:
    known = _known(config, graph, train)
    return StrictNegatives(known, graph.num_entities, config.negatives, config.seed)


def _structure_aware(config: Config, graph: Graph, train: Tensor) -> NegativeSampler:
    neighbourhoods = cached_neighbourhoods(
        train,
        graph.num_entities,
        hops=config.hops,
        walks=config.walks,
        seed=config.seed,
        folder=Path(pooch.os_cache("emu-kernels")) / "neighbourhoods",
    )
    return StructureAwareNegatives(neighbourhoods, config.negatives, config.seed, train.device)


@dataclass(frozen=True)
class Sampler(Choice, Generic[T]):
    """Makes a :class:`BatchSampler` or a :class:`NegativeSampler`."""

    # Given the training triples (M, 3), on the device; for batches also (M, 4), see Batch.place.
    make: Callable[[Config, Graph, Tensor], T]
    shares_sets: bool = False  # supports rows_per_set
    inverse: bool = False  # its batches have inverse relations


CORRUPTIONS: dict[str, Sampler[BatchSampler]] = {
    "alternate": Sampler(
        "tails and heads in turn",
        (),
        lambda config, graph, train: AlternatingBatches(train, config.batch_size, config.seed),
    ),
    "bernoulli": Sampler(
        "by the relation's Bernoulli probability",
        (),
        lambda config, graph, train: BernoulliBatches(
            train, graph.num_relations, config.batch_size, config.seed
        ),
    ),
    "both": Sampler(
        "half of each batch tails, half heads, as tails of inverse relations",
        (),
        lambda config, graph, train: InverseBatches(
            train, graph.num_relations, config.batch_size, config.seed
        ),
        inverse=True,
    ),
}

SAMPLERS: dict[str, Sampler[NegativeSampler]] = {
    "uniform": Sampler(
        "all entities",
        (),
        lambda config, graph, train: UniformNegatives(
            graph.num_entities,
            config.batch_size // config.rows_per_set,
            config.negatives,
            config.seed,
            train.device,
        ),
        shares_sets=True,
    ),
    "strict": Sampler("all entities but those true in training", (), _strict),
    "structure-aware": Sampler(
        "the given entity's neighbourhood, SAN", ("hops", "walks"), _structure_aware
    ),
}


@dataclass(frozen=True)
class SamplingOptions:
    """negatives and batches"""

    batch_size: int = setting(1000, "triples per step", limit=AT_LEAST_1)
    corruption: str = setting("alternate", "which entity to predict", choices=CORRUPTIONS)
    subsampling: bool = setting(False, "weight triples by 1/√frequency, as RotatE's trainer does")
    negatives: int = setting(
        256,
        "negatives per triple, or all: every entity except the answer (1-vs-all)",
        limit=Limit("at least 1, or all", lambda number: number >= 1 or number == ALL),
        words={"all": ALL},
        show=lambda number, _: "all" if number == ALL else f"{number}",
    )
    sampler: str = setting("uniform", "where negatives are drawn from", choices=SAMPLERS)
    hops: int = setting(3, "of the neighbourhood", limit=AT_LEAST_1)
    walks: int = setting(
        1000,
        "random walks from each entity to find its neighbourhood; 0 for all of it",
        limit=AT_LEAST_0,
    )
    rows_per_set: int = setting(
        1, "consecutive triples that share one set of negatives", limit=AT_LEAST_1
    )
    filter_negatives: bool = setting(
        False, "leave out negatives that are training triples; advised with structure-aware"
    )


def rows_per_set(settings: dict[str, Any], processes: int) -> int:
    """The default number of triples that share a set of negatives on several processes.

    As many as possible, as negatives are fetched over the network, but at most 125, and so few that
    each process has a set.
    """
    batch_size = settings.get("batch_size", SamplingOptions.batch_size)
    if not SAMPLERS[settings.get("sampler", SamplingOptions.sampler)].shares_sets:
        return 1
    most = min(125, max(1, batch_size // processes))
    return max(rows for rows in range(1, most + 1) if batch_size % rows == 0)


def new_negatives(config: Config, graph: Graph, train: Tensor) -> NegativeSampler:
    """The sampler that the config names, filtered if the config says so."""
    if config.over_all:
        return lambda step, batch: batch.positive.new_empty((1, 0))
    negatives = SAMPLERS[config.sampler].make(config, graph, train)
    if not config.filter_negatives:
        return negatives
    return FilteredNegatives(negatives, _known(config, graph, train))


def known_answers(config: Config, graph: Graph, train: Tensor) -> KnownTriples | None:
    """Lists a batch's known answers, if negatives are all entities except these; else None."""
    if not (config.filter_negatives and config.over_all):
        return None
    return _known(config, graph, train)
