"""Samplers: the batches of triples that a step trains on, and negatives for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

import pooch
from torch import Tensor

from emu_kernels.negatives import KnownTriples, UniformNegatives

from .batches import AlternatingBatches, Batch, BatchSampler
from .data import Graph
from .frequency import BernoulliBatches
from .neighbourhood import StructureAwareNegatives, cached_neighbourhoods
from .settings import AT_LEAST_0, AT_LEAST_1, Choice, Limit, setting

if TYPE_CHECKING:
    from .config import Config

T = TypeVar("T")

ALL = -1
"""The number of negatives that stands for every entity."""

NegativeSampler = Callable[[int, Batch], Tensor]
"""Draws negatives for a step and its batch: a pure function of both (and of a seed held inside).

Returns (G, K) int64 ids on the batch's device, G dividing B: a set for each block of B/G rows, with
−1 for padding. The next call may overwrite them.
"""


class FilteredNegatives:
    """Another sampler's negatives, with those that make a known triple turned into padding (−1).

    See :meth:`KnownTriples.remove`.
    """

    def __init__(self, sampler: NegativeSampler, known: KnownTriples) -> None:
        self._sampler = sampler
        self._known = known

    def __call__(self, step: int, batch: Batch) -> Tensor:
        negative = self._sampler(step, batch)
        return self._known.remove(batch.given, batch.relation, negative, batch.direction)


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

    make: Callable[[Config, Graph, Tensor], T]  # of the training triples (M, 3), on the device
    shares_sets: bool = False  # supports rows_per_set


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
    "structure-aware": Sampler(
        "the given entity's neighbourhood, SAN", ("hops", "walks"), _structure_aware
    ),
}


@dataclass(frozen=True)
class SamplingOptions:
    """negatives and batches"""

    batch_size: int = setting(1000, "triples a step", limit=AT_LEAST_1)
    corruption: str = setting("alternate", "which entity to predict", choices=CORRUPTIONS)
    subsampling: bool = setting(False, "weight triples by 1/√frequency, as RotatE's trainer does")
    negatives: int = setting(
        256,
        "negatives a triple, or all: every entity but the answer (1-vs-all)",
        limit=Limit("at least 1, or all", lambda number: number >= 1 or number == ALL),
        words={"all": ALL},
        show=lambda number, _: "all" if number == ALL else f"{number}",
    )
    sampler: str = setting("uniform", "where negatives are drawn from", choices=SAMPLERS)
    hops: int = setting(3, "of the neighbourhood", limit=AT_LEAST_1)
    walks: int = setting(
        1000,
        "random walks an entity that find its neighbourhood; 0 for all of it",
        limit=AT_LEAST_0,
    )
    rows_per_set: int = setting(
        1, "consecutive triples that share one set of negatives", limit=AT_LEAST_1
    )
    filter_negatives: bool = setting(
        False, "leave out negatives true in training; advised with structure-aware"
    )


def new_negatives(config: Config, graph: Graph, train: Tensor) -> NegativeSampler:
    """The sampler that the config names, filtered if it says so."""
    if config.over_all:
        return lambda step, batch: batch.positive.new_empty((1, 0))
    negatives = SAMPLERS[config.sampler].make(config, graph, train)
    if not config.filter_negatives:
        return negatives
    known = KnownTriples(train, graph.num_entities, graph.num_relations)
    return FilteredNegatives(negatives, known)


def known_answers(config: Config, graph: Graph, train: Tensor) -> KnownTriples | None:
    """What makes the lists of a batch's known answers, where they are no negatives of all."""
    if not (config.filter_negatives and config.over_all):
        return None
    return KnownTriples(train, graph.num_entities, graph.num_relations)
