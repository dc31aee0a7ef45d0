"""Batches and negatives, each a pure function of the run's seed and the step.

Nothing here has a state that a checkpoint would have to hold: the order of an epoch, a block of
negatives and a step's mask are each drawn from a generator seeded with (seed, stream, index). So
a resumed run draws what the uninterrupted run would have drawn, wherever it was cut.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

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
        size = self._columns.shape[1]
        epoch, start = divmod(step * self.batch_size, size)
        pieces = [self._epoch(epoch)[:, start : start + self.batch_size]]
        missing = self.batch_size - pieces[0].shape[1]
        while missing > 0:
            epoch += 1
            pieces.append(self._epoch(epoch)[:, :missing])
            missing -= pieces[-1].shape[1]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)

    def _draw_epoch(self, epoch: int) -> Tensor:
        device = self._columns.device
        order = torch.randperm(
            self._columns.shape[1],
            generator=generator(device, self._seed, "epoch", epoch),
            device=device,
        )
        return self._columns[:, order]


class UniformNegatives:
    """Uniform negatives, drawn in bulk: (B, K) int64 ids for each step."""

    def __init__(
        self, num_entities: int, batch_size: int, negatives: int, seed: int, device: torch.device
    ) -> None:
        self._num_entities = num_entities
        self._steps = max(1, _BLOCK_IDS // max(1, batch_size * negatives))
        self._ids = torch.empty(
            (self._steps, batch_size, negatives), dtype=torch.int64, device=device
        )
        self._seed = seed
        self._block = -1

    def __call__(self, step: int) -> Tensor:
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
