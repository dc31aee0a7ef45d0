"""PyKEEN's negative triples, as sets of candidates for a query.

PyKEEN's samplers return whole triples. The replaced entity may be the head in one triple and the
tail in the next, even among the negatives of one positive (``bernoulli``, ``pseudotyped``). A
softmax is over the candidates of one query, so a positive whose negatives are of both kinds becomes
two rows: one for (h, r, ?) and one for (?, r, t).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

SideName = Literal["head", "tail"]


class Side(NamedTuple):
    """The rows of a batch in which one side was corrupted."""

    name: SideName
    row: Tensor  # (B',) int64, the positive's row in the batch
    positive: Tensor  # (B',) int64, the entity to predict
    negative: Tensor  # (B', K) int64, −1 is padding
    weight: Tensor  # (B',) fp64, of the row's loss

    def to(self, device: torch.device) -> Side:
        return Side(self.name, *(x.to(device, non_blocking=True) for x in self[1:]))


def split_sides(
    positives: Tensor, negatives: Tensor, masks: Tensor | None, weights: Tensor | None
) -> list[Side]:
    """Sort a batch's negatives by the entity that was replaced.

    Negatives that the sampler's filter masks, or that equal the positive, become padding. A
    positive's weight is divided among its two rows in proportion to their numbers of negatives.

    Args:
        positives: (B, 3) triples.
        negatives: (B, K, 3) triples on the same device.
        masks: (B, K) bool, False where a negative is left out.
        weights: (B,) of the positives; None is ones.

    Returns:
        Tails, then heads.

    Raises:
        ValueError: a negative differs from its positive in the relation, or in both entities; or
            masks or weights have another shape or dtype.
    """
    if masks is not None and (masks.dtype != torch.bool or masks.shape != negatives.shape[:2]):
        raise ValueError(
            f"masks: expected bool of shape {tuple(negatives.shape[:2])}, one for each negative, "
            f"got {masks.dtype} of {tuple(masks.shape)}"
        )
    if weights is not None and weights.shape != positives.shape[:1]:
        raise ValueError(
            f"weights: expected shape ({len(positives)},), one for each positive, "
            f"got {tuple(weights.shape)}"
        )
    changed = negatives != positives[:, None, :]
    if changed[..., 1].any():
        raise ValueError(
            "negatives: expected triples whose head or tail was replaced, got one with another "
            "relation, which EMU does not mutate; give the negative sampler "
            "corruption_scheme=('head', 'tail')"
        )
    head, tail = changed[..., 0], changed[..., 2]
    if (head & tail).any():
        raise ValueError(
            "negatives: expected triples whose head or tail was replaced, got one with both: that "
            "is a candidate of no query that EMU could mutate"
        )
    if masks is not None:
        head, tail = head & masks, tail & masks
    share = (head.sum(dim=1) + tail.sum(dim=1)).clamp(min=1).double().reciprocal()
    if weights is not None:
        share = share * weights
    return [
        _side("tail", positives[:, 2], negatives[..., 2], tail, share),
        _side("head", positives[:, 0], negatives[..., 0], head, share),
    ]


def _side(
    name: SideName, positive: Tensor, negative: Tensor, corrupted: Tensor, share: Tensor
) -> Side:
    row = corrupted.any(dim=1).nonzero()[:, 0]
    corrupted = corrupted[row]
    return Side(
        name=name,
        row=row,
        positive=positive[row],
        negative=torch.where(corrupted, negative[row], -1),
        weight=share[row] * corrupted.sum(dim=1),
    )
