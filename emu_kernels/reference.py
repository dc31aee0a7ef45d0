"""The specification: EMU in plain PyTorch, differentiable by autograd.

EMU (Takamoto et al., TMLR 2025, arXiv 2504.03327) written to be read. It allocates (B, K, D)
tensors freely and is slow; every other backend must agree with it in values and in all gradients.
Inputs are validated.

Shapes everywhere: query (B, D), table (N, D), positive (B,), negative (G, K) with G dividing B.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from emu_kernels.mask import mixup_share, mutation_mask

if TYPE_CHECKING:
    from emu_kernels.mutation import Mutation


@dataclass(frozen=True)
class Similarity:
    """φ(query, candidate), written to be read, and what it takes.

    ``phi(query, candidate, options)`` broadcasts over all dimensions but the last, D or, for
    ``options.scale``, ``scale_parts`` · D / ``parts``.
    """

    phi: Callable[[Tensor, Tensor, Options], Tensor]
    parts: int = 1  # 2: a row is two halves of D / 2 (re‖im, phase‖modulus)
    scale_parts: int = 0  # how many of them, the last ones, an optional ``scale`` multiplies
    weights: int = 0  # how many ``similarity_weights`` it takes
    phases: bool = False  # whether it takes a ``phase_scale``
    sums: int = 1  # over components, of which it is a function


class Options(NamedTuple):
    """What a similarity may take beside query and candidate."""

    scale: Tensor | None = None  # a
    weights: Tensor | None = None  # w, or None for ones
    phase_scale: float = 1.0  # κ

    def weight(self, index: int) -> Tensor | float:
        return 1.0 if self.weights is None else self.weights[index]


def _difference(query: Tensor, candidate: Tensor, options: Options) -> Tensor:
    """q − a ⊙ c; the product is rounded before it is subtracted, in every backend."""
    return query - (candidate if options.scale is None else options.scale * candidate)


def _norm(x: Tensor, dim: int = -1) -> Tensor:
    """The 2-norm, whose subgradient at 0 is 0."""
    norm: Tensor = torch.linalg.vector_norm(x, dim=dim)
    return norm


def _sines(query: Tensor, candidate: Tensor, options: Options) -> Tensor:
    """Σ_j |sin((q_j − c_j) κ/2)|."""
    half = options.phase_scale / 2
    return (query * half - candidate * half).sin().abs().sum(-1)


def _dot(query: Tensor, candidate: Tensor, options: Options) -> Tensor:
    """Σ_j q_j c_j."""
    return (query * candidate).sum(-1)


def _l1(query: Tensor, candidate: Tensor, options: Options) -> Tensor:
    """−Σ_j |q_j − a_j c_j|."""
    return -_difference(query, candidate, options).abs().sum(-1)


def _l2(query: Tensor, candidate: Tensor, options: Options) -> Tensor:
    """−‖q − a ⊙ c‖₂."""
    return -_norm(_difference(query, candidate, options))


def _rotate(query: Tensor, candidate: Tensor, options: Options) -> Tensor:
    """−Σ_j |q_j − c_j| of complex numbers, re‖im (RotatE, Sun et al., 2019)."""
    real, imaginary = (query - candidate).chunk(2, dim=-1)
    return -_norm(torch.stack([real, imaginary]), dim=0).sum(-1)


def _hake(query: Tensor, candidate: Tensor, options: Options) -> Tensor:
    """−w_0 Σ_j |sin((q_j − c_j) κ/2)| of the phases − w_1 ‖q − a ⊙ c‖₂ of the moduli, phase‖modulus
    (HAKE, Zhang et al., 2020)."""
    (q_phase, q_modulus), (c_phase, c_modulus) = query.chunk(2, -1), candidate.chunk(2, -1)
    phase = _sines(q_phase, c_phase, options)
    modulus = _norm(_difference(q_modulus, c_modulus, options))
    return -options.weight(0) * phase - options.weight(1) * modulus


def _protate(query: Tensor, candidate: Tensor, options: Options) -> Tensor:
    """−w_0 Σ_j |sin((q_j − c_j) κ/2)| of phases (pRotatE, Sun et al., 2019)."""
    return -options.weight(0) * _sines(query, candidate, options)


SIMILARITIES: dict[str, Similarity] = {
    "dot": Similarity(_dot),
    "l1": Similarity(_l1, scale_parts=1),
    "l2": Similarity(_l2, scale_parts=1),
    "rotate": Similarity(_rotate, parts=2),
    "hake": Similarity(_hake, parts=2, scale_parts=1, weights=2, phases=True, sums=2),
    "protate": Similarity(_protate, weights=1, phases=True),
}
"""The one list of similarities that exist."""


class Scores(NamedTuple):
    """Scores of the positive, of the negatives, and of the mutated negatives."""

    positive: Tensor  # (B,)
    negative: Tensor  # (B, K), −inf where padding
    mutated: Tensor | None  # (B, K), −inf where padding; None without mutation


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Every sum is in fp32, or in fp64 for fp64 tables."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def mutate(
    positive: Tensor, negative: Tensor, mutation: Mutation, *, seed: Tensor, row_offset: int
) -> Tensor:
    """ẑ (B, K, D) of positive z⁺ (B, D) and negative z⁻ (B, K, D): λ ⊙ z⁺ + (1 − λ) ⊙ z⁻, or for
    Mixup z⁺ + μ (z⁻ − z⁺)."""
    batch, count, dim = negative.shape
    positive = positive[:, None, :]
    if mutation.kind == "mixup":
        share = mixup_share(
            batch, count, seed=seed, row_offset=row_offset, order=mutation.threshold
        ).to(negative.dtype)
        return positive + share[..., None] * (negative - positive)
    mask = mutation_mask(
        batch,
        count,
        dim,
        seed=seed,
        row_offset=row_offset,
        threshold=mutation.threshold if mutation.thresholds is None else mutation.thresholds,
        unit=mutation.kind,
    )
    return torch.where(mask, positive, negative)


def scores(
    query: Tensor,
    table: Tensor,
    positive: Tensor,
    negative: Tensor,
    *,
    similarity: str,
    options: Options,
    mutation: Mutation,
    seed: Tensor,
    row_offset: int,
) -> Scores:
    """Score positive, negatives and (unless the mutation is none) mutated negatives."""
    batch = query.shape[0]
    phi = SIMILARITIES[similarity].phi
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
    s_pos = phi(query, z_pos, options)
    query = query[:, None, :]
    if options.scale is not None:
        options = options._replace(scale=options.scale[:, None, :])
    s_neg = phi(query, z_neg, options).masked_fill(~real, minus_inf)
    if mutation.kind == "none":
        return Scores(s_pos, s_neg, None)
    z_mut = mutate(z_pos, z_neg, mutation, seed=seed, row_offset=row_offset)
    z_mut = torch.where(real[..., None], z_mut, 0)
    s_mut = phi(query, z_mut, options).masked_fill(~real, minus_inf)
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
