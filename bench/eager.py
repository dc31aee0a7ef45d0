"""The two losses in plain PyTorch, in the usual spellings.

On a CPU in fp32 the first spelling of a similarity is the fastest measured, forward and backward:
for dot of {product and sum, ``einsum``, ``bmm``}; for l1 and l2 of {difference and sum,
``vector_norm``, ``cdist``}; for rotate of {``vector_norm`` of the stacked parts, root of the sum of
squares, ``hypot``, complex ``abs``}; for the rows of {``table[ids]``, ``embedding``,
``index_select``}. A similarity's last spelling consists of pointwise operations and sums, supports
every dtype and can be fused.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, embedding

Scores = Callable[[Tensor, Tensor], Tensor]  # (B, D), (B, K, D) -> (B, K)


def _cdist(p: float) -> Scores:
    mode = "donot_use_mm_for_euclid_dist"
    return lambda q, c: -torch.cdist(q[:, None], c, p=p, compute_mode=mode)[:, 0]


def _l2(query: Tensor, candidates: Tensor) -> Tensor:
    return -torch.linalg.vector_norm(query[:, None] - candidates, dim=-1)


def _rotate(query: Tensor, candidates: Tensor) -> Tensor:
    re, im = (query[:, None] - candidates).chunk(2, dim=-1)
    return -(re * re + im * im).sqrt().sum(-1)


def _sines(query: Tensor, candidates: Tensor) -> Tensor:
    return -((query[:, None] - candidates) / 2).sin().abs().sum(-1)


def _hake(moduli: Scores) -> Scores:
    def scores(query: Tensor, candidates: Tensor) -> Tensor:
        (q_phase, q_modulus), (c_phase, c_modulus) = query.chunk(2, -1), candidates.chunk(2, -1)
        return _sines(q_phase, c_phase) + moduli(q_modulus, c_modulus)

    return scores


SPELLINGS: dict[str, tuple[Scores, ...]] = {
    "dot": (
        lambda q, c: torch.bmm(c, q[:, :, None])[:, :, 0],
        lambda q, c: (q[:, None] * c).sum(-1),
    ),
    "l1": (_cdist(1), lambda q, c: -(q[:, None] - c).abs().sum(-1)),
    "l2": (_cdist(2), _l2),
    "rotate": (lambda q, c: -torch.hypot(*(q[:, None] - c).chunk(2, dim=-1)).sum(-1), _rotate),
    "hake": (_hake(_cdist(2)), _hake(_l2)),
    "protate": (_sines,),
}


def first_class(logits: Tensor) -> Tensor:
    """Cross-entropy with the first class as the right one."""
    return cross_entropy(logits, logits.new_zeros(len(logits), dtype=torch.int64))


def softmax_loss(
    query: Tensor, table: Tensor, positive: Tensor, negative: Tensor, *,
    scores: Scores, sparse: bool = False,
) -> Tensor:  # fmt: skip
    """Sampled-softmax cross-entropy, the mean over the batch."""
    ids = torch.cat([positive[:, None], negative], dim=1)
    return first_class(scores(query, embedding(ids, table, sparse=sparse)))


def shared_softmax_loss(query: Tensor, table: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    """The same with the first row's negatives for all rows, by a matrix product."""
    rows = embedding(torch.cat([negative[0], positive]), table)
    others, own = rows.split([negative.shape[1], len(positive)])
    return first_class(torch.cat([(query * own).sum(1, keepdim=True), query @ others.T], dim=1))


def emu_loss(
    query: Tensor, table: Tensor, positive: Tensor, negative: Tensor, *,
    mutation_rate: float, beta: float, alpha: float,
    scores: Scores, sparse: bool = False, mask: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """L_emu + α · L_van, the mean over the batch; a mask is drawn if none is given."""
    z_pos = embedding(positive, table, sparse=sparse)  # (B, D)
    z_neg = embedding(negative, table, sparse=sparse)  # (B, K, D)
    if mask is None:
        mask = torch.rand(z_neg.shape, device=z_neg.device) < mutation_rate
    mutated = torch.where(mask, z_pos[:, None, :], z_neg)
    s_pos = scores(query, z_pos[:, None])
    vanilla = first_class(torch.cat([s_pos, scores(query, z_neg)], dim=1))
    logits = torch.cat([s_pos, scores(query, mutated)], dim=1)
    labels = torch.full_like(logits, beta)
    labels[:, 0] = 1
    # Labels as class probabilities need not sum to one: −Σ_k label_k log p_k.
    return cross_entropy(logits, labels) / negative.shape[1] + alpha * vanilla
