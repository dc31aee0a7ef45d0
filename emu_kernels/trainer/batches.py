"""Seeds, and the batches of training triples.

Each is a pure function of the run's seed and the step, so a checkpoint holds no sampler state: the
order of an epoch, a block of negatives and a step's mask are each drawn from a generator seeded
with (seed, stream, index). A resumed run draws what the uninterrupted run would have drawn.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from emu_kernels.negatives import generator

from .data import DIRECTIONS, Direction


class Batch(NamedTuple):
    """The triples of a step, all predicted in one direction."""

    head: Tensor  # (B,)
    relation: Tensor  # (B,)
    tail: Tensor  # (B,)
    direction: Direction  # which entity is predicted, and so corrupted
    place: Tensor | None = None  # (B,) indices among the training triples, if these have weights

    @property
    def given(self) -> Tensor:
        """(B,): the entity that the query is made of."""
        return self.head if self.direction == "tail" else self.tail

    @property
    def positive(self) -> Tensor:
        """(B,): the entity to predict."""
        return self.tail if self.direction == "tail" else self.head


BatchSampler = Callable[[int], Batch]
"""Draws the batch of a step: a pure function of the step (and of a seed held inside)."""


class AlternatingBatches:
    """Training triples, each epoch in its own order; batches for tails and heads alternate.

    Epochs follow each other without a gap: a batch may end one epoch and begin the next, so every
    batch is full and every triple is seen once an epoch.

    Args:
        triples: (M, 3) on the device to train on, M > 0, or (M, 4) with ``place`` as a column.
        batch_size: B.
    """

    def __init__(self, triples: Tensor, batch_size: int, seed: int) -> None:
        self._columns = triples.T.contiguous()  # (3, M), or (4, M)
        self._batch_size = batch_size
        self._seed = seed
        # A batch has triples of two epochs at a border, or of more if it is larger than the graph.
        self._epoch = lru_cache(maxsize=2)(self._draw_epoch)

    def __call__(self, step: int) -> Batch:
        head, relation, tail, *place = stream_columns(
            self._epoch, self._columns.shape[1], step * self._batch_size, self._batch_size
        )
        return Batch(head, relation, tail, DIRECTIONS[step % 2], *place)

    def _draw_epoch(self, epoch: int) -> Tensor:
        device = self._columns.device
        order = torch.randperm(
            self._columns.shape[1],
            generator=generator(device, self._seed, "epoch", epoch),
            device=device,
        )
        return self._columns[:, order]


class InverseBatches:
    """Training triples; a batch's first half predicts tails, its second half heads.

    Heads are predicted as tails of the inverse relation, whose id is higher by R, so that all rows
    have one direction, as in the batches of NBFNet's authors.

    Args:
        triples: (M, 3) on the device to train on, M > 0, or (M, 4) with ``place`` as a column.
        batch_size: B.
    """

    def __init__(self, triples: Tensor, num_relations: int, batch_size: int, seed: int) -> None:
        self._triples = AlternatingBatches(triples, batch_size, seed)
        self._num_relations = num_relations

    def __call__(self, step: int) -> Batch:
        head, relation, tail, _, place = self._triples(step)
        half = (len(head) + step % 2) // 2  # of an odd number, the larger part by turns
        return Batch(
            torch.cat([head[:half], tail[half:]]),
            torch.cat([relation[:half], relation[half:] + self._num_relations]),
            torch.cat([tail[:half], head[half:]]),
            "tail",
            place,
        )


def stream_columns(epoch: Callable[[int], Tensor], size: int, start: int, count: int) -> Tensor:
    """(C, count) columns, from column ``start`` on, of epoch(0), epoch(1), ... concatenated.

    Each epoch is (C, size), size > 0.
    """
    end = start + count
    pieces = [
        epoch(i)[:, max(0, start - i * size) : end - i * size]
        for i in range(start // size, (end - 1) // size + 1)
    ]
    return torch.cat(pieces, dim=1)
