"""The side of a triple to corrupt, and its weight, by how often its parts occur in training."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from emu_kernels.negatives import generator

from .batches import Batch, stream_columns
from .data import Direction

_FRACTION_BITS = 32  # of a fixed-point probability


def head_probability(triples: Tensor, num_relations: int) -> Tensor:
    """(R,) fp64 in (0, 1): how often to corrupt the head of a relation's triples.

    tph / (tph + hpt), with tph the mean number of tails per head and hpt of heads per tail (Wang
    et al., "Knowledge Graph Embedding by Translating on Hyperplanes", AAAI 2014): the side with
    fewer right answers is corrupted more often, so that fewer negatives are true. Both means have
    the relation's number of triples as numerator, so this is tails / (heads + tails), each counted
    once. A relation without triples gets 1/2.

    Args:
        triples: (M, 3).
    """
    head, relation, tail = triples.T
    heads, tails = (
        (entity * num_relations + relation)
        .unique()
        .remainder(num_relations)
        .bincount(minlength=num_relations)
        for entity in (head, tail)
    )
    return torch.where(heads > 0, tails.double() / (heads + tails), 0.5)


class BernoulliBatches:
    """Training triples; the head is predicted with the relation's Bernoulli probability.

    The published method chooses a side for each triple. Here all rows of a batch have one
    direction, so each epoch is split: a triple joins the epoch's head part with probability p of
    its relation (:func:`head_probability`), else its tail part. Each part is a stream of batches of
    its own. Head and tail steps alternate in proportion to the sizes of the parts, so that both
    streams end an epoch together (to within a batch).

    The parts have fixed sizes, ⌊Σp⌋ and the rest, so a step's place in its stream follows from the
    step alone. Randomised systematic sampling draws the head part: put the triples of length p
    each on a line, in the epoch's random order, and take those that a grid of unit spacing with a
    random offset hits. Hence

    - each triple is seen once an epoch, in one direction;
    - the head is corrupted with probability p · ⌊Σp⌋/Σp, which is p up to the rounding of one
      triple in the whole graph (a graph so small that Σp < 1 has tail steps only);
    - the order within each part is uniformly random, and epochs are independent.

    Args:
        triples: (M, 3) on the device to train on, M > 0, or (M, 4) with ``Batch.place``.
        batch_size: B.
    """

    def __init__(self, triples: Tensor, num_relations: int, batch_size: int, seed: int) -> None:
        self._columns = triples.T.contiguous()  # (3, M)
        self._batch_size = batch_size
        self._seed = seed
        by_relation = head_probability(triples[:, :3].cpu(), num_relations)
        probability = by_relation[triples[:, 1].cpu()]  # (M,)
        total = float(probability.sum())
        self._heads = int(total)
        # In fixed point: on a GPU a cumulative sum of floats is not the same at each call.
        scale = self._heads / total * (1 << _FRACTION_BITS)
        self._lengths = (probability * scale).long().to(triples.device)
        # Both streams are in the same epoch, or one of them has begun the next.
        self._epoch = lru_cache(maxsize=2)(self._draw_epoch)

    def __call__(self, step: int) -> Batch:
        size = self._columns.shape[1]
        head_steps = step * self._heads // size  # before this one
        is_head = (step + 1) * self._heads // size > head_steps
        direction: Direction = "head" if is_head else "tail"
        index = head_steps if is_head else step - head_steps
        head, relation, tail, *place = stream_columns(
            lambda epoch: self._epoch(epoch)[direction],
            self._heads if is_head else size - self._heads,
            index * self._batch_size,
            self._batch_size,
        )
        return Batch(head, relation, tail, direction, *place)

    def _draw_epoch(self, epoch: int) -> dict[Direction, Tensor]:
        """(C, ⌊Σp⌋) and (C, M − ⌊Σp⌋), C columns: the triples of an epoch by direction."""
        device = self._columns.device
        draws = generator(device, self._seed, "bernoulli epoch", epoch)
        order = torch.randperm(self._columns.shape[1], generator=draws, device=device)
        comb = torch.randint(1 << _FRACTION_BITS, (1,), generator=draws, device=device)
        ends = self._lengths[order].cumsum(0)
        ends[-1:] = self._heads << _FRACTION_BITS  # the lengths were rounded down
        hits = (ends + comb) >> _FRACTION_BITS
        missed = hits.diff(prepend=torch.zeros_like(hits[:1])) == 0
        # Sorted, the head part first: selecting by a mask would wait for the device.
        order = order[missed.to(torch.uint8).argsort(stable=True)]
        columns = self._columns[:, order]
        return {"head": columns[:, : self._heads], "tail": columns[:, self._heads :]}


class SubsamplingWeights:
    """Weights that count frequent triples less, like word2vec's subsampling in expectation.

    A triple's weight is 1 / √(c(h, r) + c(r, t)), with c the number of training triples that share
    the pair, plus 3: the counts of RotatE's reference trainer (Sun et al., ICLR 2019). Pass them to
    a fused loss as `sample_weight`: like that trainer, it divides by the weights' sum.

    Args:
        triples: (M, 3), the training triples, on the device to train on.
    """

    def __init__(self, triples: Tensor, num_relations: int) -> None:
        self._num_relations = num_relations
        self._counts = [pair.unique(return_counts=True) for pair in self._pairs(*triples.T)]

    def __call__(self, batch: Batch) -> Tensor:
        """(B,) fp32. The triples must be training triples: others have no count."""
        pairs = self._pairs(batch.head, batch.relation, batch.tail)
        of_head, of_tail = (
            counts[torch.searchsorted(known, pair)]
            for pair, (known, counts) in zip(pairs, self._counts, strict=True)
        )
        return (of_head + of_tail + 6).float().rsqrt()

    def _pairs(self, head: Tensor, relation: Tensor, tail: Tensor) -> tuple[Tensor, Tensor]:
        """A number for each (head, relation), and one for each (relation, tail)."""
        return head * self._num_relations + relation, tail * self._num_relations + relation
