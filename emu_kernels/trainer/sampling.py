"""Samplers: the batches of triples that a step trains on, and negatives for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

import pooch
import torch
from torch import Tensor

from .batches import AlternatingBatches, Batch, BatchSampler, generator
from .data import DIRECTIONS, Direction, Graph, split_triples
from .frequency import BernoulliBatches
from .neighbourhood import StructureAwareNegatives, cached_neighbourhoods
from .settings import AT_LEAST_0, AT_LEAST_1, Choice, Limit, setting

if TYPE_CHECKING:
    from .config import Config

T = TypeVar("T")

ALL = -1
"""The number of negatives that stands for every entity."""

_BLOCK_IDS = 1 << 22  # negatives drawn at once: 32 MiB of ids


NegativeSampler = Callable[[int, Batch], Tensor]
"""Draws negatives for a step and its batch: a pure function of both (and of a seed held inside).

Returns (G, K) int64 ids on the batch's device, G dividing B: a set for each block of B/G rows, with
−1 for padding. The next call may overwrite them.
"""


class UniformNegatives:
    """Uniform negatives, drawn in bulk: (G, K) int64 ids for each step.

    Args:
        sets: G. The batch size B for a set of negatives a row; a divisor of it for chunk-shared
            negatives, where each block of B/G consecutive rows shares one set, as large-scale
            trainers do (PyTorch-BigGraph, Lerer et al., 2019; DGL-KE, Zheng et al., 2020).
        negatives: K.
    """

    def __init__(
        self, num_entities: int, sets: int, negatives: int, seed: int, device: torch.device
    ) -> None:
        self._num_entities = num_entities
        self._steps = max(1, _BLOCK_IDS // max(1, sets * negatives))
        self._ids = torch.empty((self._steps, sets, negatives), dtype=torch.int64, device=device)
        self._seed = seed
        self._block = -1

    def __call__(self, step: int, batch: Batch | None = None) -> Tensor:
        block, offset = divmod(step, self._steps)
        if block != self._block:
            draws = generator(self._ids.device, self._seed, "negatives", block)
            self._ids.random_(0, self._num_entities, generator=draws)
            self._block = block
        return self._ids[offset]


class KnownTriples:
    """Turns negatives that make a known triple into padding (−1).

    Args:
        triples: (M, 3), the triples to know (those of the training split).
    """

    _BUCKETS_PER_TRIPLE = 32
    _SPREAD = 0x1E3779B97F4A7C15  # an odd constant: neighbouring pairs land far apart

    def __init__(self, triples: Tensor, num_entities: int, num_relations: int) -> None:
        if num_entities**2 * num_relations >= 2**63:
            raise ValueError("the graph is too large for a triple's key to fit in 63 bits")
        self._num_entities = num_entities
        self._num_relations = num_relations
        self._keys: dict[Direction, Tensor] = {}
        # On a CPU a table of bits, hashed by the pair, rules out most candidates without a binary
        # search: the bits of a row's candidates are adjacent, so they stay in the cache.
        self._mask = (1 << max(10, (len(triples) * self._BUCKETS_PER_TRIPLE).bit_length())) - 1
        self._maybe: dict[Direction, Tensor] = {}
        for direction in DIRECTIONS:
            given, relation, target = split_triples(triples, direction)
            pair = self._pair(given, relation)
            self._keys[direction] = (pair * num_entities + target).sort().values
            if triples.device.type == "cpu":
                table = torch.zeros(self._mask + 1 + num_entities, dtype=torch.bool)
                table[self._stretch(pair) + target] = True
                self._maybe[direction] = table

    def remove(
        self, given: Tensor, relation: Tensor, negative: Tensor, direction: Direction
    ) -> Tensor:
        """`negative` (B, K) with −1 where (given, relation, negative) is known.

        Args:
            given: (B,) heads where `direction` is "tail", else tails.
            relation: (B,).
        """
        pair = self._pair(given, relation)
        if not self._maybe:  # picking out the suspects would wait for the device
            key = pair.unsqueeze(1) * self._num_entities + negative
            return torch.where(self._contains(key, direction), -1, negative)
        bucket = self._stretch(pair).unsqueeze(1) + negative
        suspect = self._maybe[direction].index_select(0, bucket.flatten()).view_as(bucket)
        row, column = suspect.nonzero(as_tuple=True)
        candidate = negative[row, column]
        known = self._contains(pair[row] * self._num_entities + candidate, direction)
        negative = negative.clone()
        negative[row, column] = torch.where(known, -1, candidate)
        return negative

    def lists(self, given: Tensor, relation: Tensor, direction: Direction) -> tuple[Tensor, Tensor]:
        """Offsets (B + 1,) and ids (M,): those of row b are all known answers of its pair."""
        keys, first = self._keys[direction], self._pair(given, relation) * self._num_entities
        start = torch.searchsorted(keys, first)
        counts = torch.searchsorted(keys, first + self._num_entities) - start
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        places = (start - offsets[:-1]).repeat_interleave(counts)
        places += torch.arange(len(places), device=places.device)
        return offsets, keys[places] % self._num_entities

    def _pair(self, given: Tensor, relation: Tensor) -> Tensor:
        return given * self._num_relations + relation

    def _stretch(self, pair: Tensor) -> Tensor:
        return pair * self._SPREAD & self._mask

    def _contains(self, key: Tensor, direction: Direction) -> Tensor:
        keys = self._keys[direction]
        place = torch.searchsorted(keys, key).clamp_(max=len(keys) - 1)
        return keys[place] == key


class FilteredNegatives:
    """Another sampler's negatives, with those that make a known triple turned into padding (−1).

    A row may keep fewer than K negatives; one that keeps none has loss 0. A negative shared by a
    block of rows is removed if it is true for any of them: no row ever has a known triple as a
    negative, but some rows lose negatives that are false for them.
    """

    def __init__(self, sampler: NegativeSampler, known: KnownTriples) -> None:
        self._sampler = sampler
        self._known = known

    def __call__(self, step: int, batch: Batch) -> Tensor:
        negative = self._sampler(step, batch)
        sets, rows = len(negative), len(batch.given)
        if sets < rows:
            negative = negative.repeat_interleave(rows // sets, dim=0)
        negative = self._known.remove(batch.given, batch.relation, negative, batch.direction)
        if sets < rows:
            negative = negative.view(sets, rows // sets, -1).amin(dim=1)
        return negative


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
        show=lambda number: "all" if number == ALL else f"{number}",
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
    if config.negatives == ALL:
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
