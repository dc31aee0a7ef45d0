"""Batches and negatives, each a pure function of the run's seed and the step.

Nothing here has a state that a checkpoint would have to hold: the order of an epoch, a block of
negatives and a step's mask are each drawn from a generator seeded with (seed, stream, index). So
a resumed run draws what the uninterrupted run would have drawn, wherever it was cut.

Two small protocols make the samplers interchangeable, whatever they draw and on whatever device:

==========================  ==================================================================
:class:`BatchSampler`       step -> the triples of a step and the entity to predict
  AlternatingBatches        tails and heads in turn
  frequency.BernoulliBatches  heads or tails by the relation's cardinality (Wang et al., 2014)
:class:`NegativeSampler`    step and batch -> ids of negatives, (G, K)
  UniformNegatives          from all entities; a set for each row, or for each block of rows
  neighbourhood.StructureAwareNegatives  from the given entity's neighbourhood (SAN)
  FilteredNegatives         another sampler's, without those that are true in training
==========================  ==================================================================
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .data import DIRECTIONS, Direction, split_triples

_BLOCK_IDS = 1 << 22  # negatives drawn at once: 32 MiB of ids


def derive_seed(seed: int, stream: str, index: int) -> int:
    """An int in [0, 2⁶³) for item `index` of a named stream of a run's randomness."""
    digest = hashlib.blake2b(f"{seed}/{stream}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(device: torch.device, seed: int, stream: str, index: int = 0) -> torch.Generator:
    return torch.Generator(device).manual_seed(derive_seed(seed, stream, index))


class Batch(NamedTuple):
    """The triples of a step, all to be predicted in one direction."""

    head: Tensor  # (B,)
    relation: Tensor  # (B,)
    tail: Tensor  # (B,)
    direction: Direction  # which entity is predicted, and so corrupted

    @property
    def given(self) -> Tensor:
        """(B,): the entity that the query is made of."""
        return self.head if self.direction == "tail" else self.tail

    @property
    def positive(self) -> Tensor:
        """(B,): the entity to predict."""
        return self.tail if self.direction == "tail" else self.head


class BatchSampler(Protocol):
    """Draws the batch of a step: a pure function of the step (and of a seed held inside)."""

    def __call__(self, step: int) -> Batch: ...


class NegativeSampler(Protocol):
    """Draws negatives for a step's batch: a pure function of the two (and of a seed held inside).

    Returns:
        (G, K) int64 ids on the batch's device, G dividing B: a set for each block of B/G rows.
        −1 is padding. To be used before the next call, which may overwrite it.
    """

    def __call__(self, step: int, batch: Batch) -> Tensor: ...


class Batches:
    """Training triples, epoch after epoch, each epoch in an order of its own.

    Epochs follow each other without a gap: a batch that crosses the border takes its rest from
    the next one, so every batch is full and every triple is seen once an epoch.

    Args:
        triples: (M, 3) on the device to train on, M > 0.
        batch_size: B.
    """

    def __init__(self, triples: Tensor, batch_size: int, seed: int) -> None:
        self._columns = triples.T.contiguous()  # (3, M)
        self.batch_size = batch_size
        self._seed = seed
        # A batch touches two epochs at a border, or more where it is larger than the graph.
        self._epoch = lru_cache(maxsize=2)(self._draw_epoch)

    def __call__(self, step: int) -> Tensor:
        """(3, B): heads, relations and tails of a step's batch."""
        return stream_columns(
            self._epoch, self._columns.shape[1], step * self.batch_size, self.batch_size
        )

    def _draw_epoch(self, epoch: int) -> Tensor:
        device = self._columns.device
        order = torch.randperm(
            self._columns.shape[1],
            generator=generator(device, self._seed, "epoch", epoch),
            device=device,
        )
        return self._columns[:, order]


def stream_columns(epoch: Callable[[int], Tensor], size: int, start: int, count: int) -> Tensor:
    """(C, count): columns of the endless row epoch(0), epoch(1), ..., each (C, size), size > 0."""
    index, start = divmod(start, size)
    pieces = [epoch(index)[:, start : start + count]]
    missing = count - pieces[0].shape[1]
    while missing > 0:
        index += 1
        pieces.append(epoch(index)[:, :missing])
        missing -= pieces[-1].shape[1]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)


class AlternatingBatches:
    """The triples of :class:`Batches`, with tails and heads predicted in turn."""

    def __init__(self, triples: Tensor, batch_size: int, seed: int) -> None:
        self._batches = Batches(triples, batch_size, seed)

    def __call__(self, step: int) -> Batch:
        head, relation, tail = self._batches(step)
        return Batch(head, relation, tail, DIRECTIONS[step % 2])


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
    """Tells which negatives are true: turns those that make a known triple into padding (−1).

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
        # On a CPU a table of bits, hashed by the pair, spares most candidates the binary search:
        # a row's candidates all fall into one stretch of it, which stays in the cache.
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
        if not self._maybe:  # no way to pick out the suspects without waiting for the device
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

    A row may so keep fewer than K negatives; one that keeps none has loss 0 and teaches nothing.
    A negative that a block of rows shares goes if it is true for any of them: no row ever sees a
    known triple as a negative, at the price of some that would have been right for other rows.
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
