"""The specification: EMU in plain PyTorch, differentiable by autograd.

EMU (Takamoto et al., TMLR 2025, arXiv 2504.03327) written to be read. It allocates (B, K, D)
tensors freely and is slow; every other backend must agree with it in values and in all gradients.
Inputs are validated.

Shapes everywhere: query (B, D), table (N, D), positive (B,), negative (G, K) with G dividing B.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from emu_kernels.mask import mutation_mask


def _dot(query: Tensor, candidate: Tensor) -> Tensor:
    return (query * candidate).sum(-1)


SIMILARITIES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"dot": _dot}
"""φ(query (..., D), candidate (..., D)) -> (...): the one list of similarities that exist."""


class Scores(NamedTuple):
    """Scores of the positive, of the negatives, and of the mutated negatives."""

    positive: Tensor  # (B,)
    negative: Tensor  # (B, K), −inf where padding
    mutated: Tensor | None  # (B, K), −inf where padding; None without mutation


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Every sum is in fp32, or in fp64 for fp64 tables."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def mutate(positive: Tensor, negative: Tensor, mask: Tensor) -> Tensor:
    """ẑ = λ ⊙ z⁺ + (1 − λ) ⊙ z⁻ for positive (B, D), negative (B, K, D), mask (B, K, D) bool."""
    return torch.where(mask, positive[:, None, :], negative)


def scores(
    query: Tensor,
    table: Tensor,
    positive: Tensor,
    negative: Tensor,
    *,
    similarity: str,
    seed: Tensor | None,
    row_offset: int,
    threshold: int | None,
) -> Scores:
    """Score positive, negatives and (unless ``threshold`` is None) mutated negatives."""
    batch, dim = query.shape
    phi = SIMILARITIES[similarity]
    dtype = accumulation_dtype(table.dtype)
    # Upcast before indexing, so that autograd sums the contributions to a row in fp32.
    wide = table.to(dtype)
    query = query.to(dtype)
    ids = negative.repeat_interleave(batch // max(negative.shape[0], 1), dim=0)  # (B, K)
    ids = ids.reshape(batch, negative.shape[1])
    real = ids >= 0
    z_pos = wide[positive]  # (B, D)
    z_neg = torch.where(real[..., None], wide[ids.clamp(min=0)], 0)  # (B, K, D)
    minus_inf = float("-inf")
    s_pos = phi(query, z_pos)
    s_neg = phi(query[:, None, :], z_neg).masked_fill(~real, minus_inf)
    if threshold is None:
        return Scores(s_pos, s_neg, None)
    assert seed is not None
    mask = mutation_mask(
        batch, ids.shape[1], dim, seed=seed, row_offset=row_offset, threshold=threshold
    )
    z_mut = torch.where(real[..., None], mutate(z_pos, z_neg, mask), 0)
    s_mut = phi(query[:, None, :], z_mut).masked_fill(~real, minus_inf)
    return Scores(s_pos, s_neg, s_mut)


def softmax_rows(positive: Tensor, negative: Tensor) -> Tensor:
    """L_van of each row, (B,): logsumexp(s⁺, s⁻_1..s⁻_K) − s⁺."""
    return torch.logsumexp(torch.cat([positive[:, None], negative], dim=1), dim=1) - positive


def uls_rows(positive: Tensor, negative: Tensor, beta: float | Tensor) -> Tensor:
    """L_emu of each row, (B,): (1/K) [(l̂ − s⁺) + β Σ_k (l̂ − ŝ_k)]; K counts scores above −inf."""
    real = negative != float("-inf")
    count = real.sum(dim=1)
    lse = torch.logsumexp(torch.cat([positive[:, None], negative], dim=1), dim=1)
    gaps = torch.where(real, lse[:, None] - torch.where(real, negative, 0), 0).sum(dim=1)
    return ((lse - positive) + beta * gaps) / count.clamp(min=1)


def loss_rows(
    scored: Scores, negative: Tensor, *, beta: float | Tensor, alpha: float | Tensor
) -> tuple[Tensor, Tensor]:
    """(2, B) terms L_emu, L_van and (B,) total L_emu + α · L_van; NaN where a real score is not
    finite.

    ``scored.mutated`` None means the vanilla term alone.
    """
    batch, count = scored.negative.shape
    real = negative.repeat_interleave(batch // max(negative.shape[0], 1), dim=0) >= 0
    real = real.reshape(batch, count)
    finite = scored.positive.isfinite() & (scored.negative.isfinite() | ~real).all(dim=1)
    vanilla = softmax_rows(scored.positive, scored.negative)
    if scored.mutated is None:
        uls, total = torch.zeros_like(vanilla), vanilla
    else:
        finite = finite & (scored.mutated.isfinite() | ~real).all(dim=1)
        uls = uls_rows(scored.positive, scored.mutated, beta)
        total = uls + alpha * vanilla
    poison = torch.where(finite, 1.0, float("nan")).to(total.dtype)
    return torch.stack([uls, vanilla]) * poison, total * poison


def reduce(rows: Tensor, sample_weight: Tensor | None, reduction: str) -> Tensor:
    """none: weighted rows; sum; mean: sum over the summed weights, 0 where those are 0."""
    weighted = rows if sample_weight is None else rows * sample_weight
    if reduction == "none":
        return weighted
    total = weighted.sum()
    if reduction == "sum":
        return total
    if sample_weight is None:
        return total / max(rows.shape[0], 1)
    weight = sample_weight.sum()
    return torch.where(weight == 0, total * 0, total / torch.where(weight == 0, 1, weight))
