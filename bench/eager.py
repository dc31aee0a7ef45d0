"""The two losses as one writes them in PyTorch, at the fastest of the usual spellings.

``embedding`` and ``bmm`` are what took the least time, forward and backward, of {``table[ids]``,
``embedding``, ``index_select``} and {product and sum, ``einsum``, ``bmm``}.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def _scores(query: Tensor, candidates: Tensor) -> Tensor:
    """(B, D), (B, K, D) -> (B, K)."""
    return torch.bmm(candidates, query[:, :, None])[:, :, 0]


def _softmax_loss(logits: Tensor) -> Tensor:
    return functional.cross_entropy(logits, logits.new_zeros(len(logits), dtype=torch.int64))


def softmax_loss(
    query: Tensor,  # (B, D)
    table: Tensor,  # (N, D)
    positive: Tensor,  # (B,)
    negative: Tensor,  # (B, K)
) -> Tensor:
    """Sampled-softmax cross-entropy, the mean over the batch."""
    candidates = functional.embedding(torch.cat([positive[:, None], negative], dim=1), table)
    return _softmax_loss(_scores(query, candidates))


def emu_loss(
    query: Tensor,  # (B, D)
    table: Tensor,  # (N, D)
    positive: Tensor,  # (B,)
    negative: Tensor,  # (B, K)
    *,
    mutation_rate: float,
    beta: float,
    alpha: float,
    mask: Tensor | None = None,  # (B, K, D) bool, drawn where None
) -> Tensor:
    """L_emu + α · L_van with masks from ``torch.rand``, the mean over the batch."""
    z_pos = functional.embedding(positive, table)  # (B, D)
    z_neg = functional.embedding(negative, table)  # (B, K, D)
    if mask is None:
        mask = torch.rand(z_neg.shape, device=z_neg.device) < mutation_rate
    mutated = torch.where(mask, z_pos[:, None, :], z_neg)
    s_pos = (query * z_pos).sum(dim=1, keepdim=True)
    vanilla = _softmax_loss(torch.cat([s_pos, _scores(query, z_neg)], dim=1))
    logits = torch.cat([s_pos, _scores(query, mutated)], dim=1)
    labels = torch.full_like(logits, beta)
    labels[:, 0] = 1
    # Labels as class probabilities need not sum to one: −Σ_k label_k log p_k.
    uls = functional.cross_entropy(logits, labels) / negative.shape[1]
    return uls + alpha * vanilla
