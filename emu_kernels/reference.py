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

from emu_kernels.mask import mixup_share, mutation_mask
from emu_kernels.mutation import Component, Mixup
from emu_kernels.prepare import accumulation_dtype
from emu_kernels.request import Draws, LossRequest, Request
from emu_kernels.similarity import SIMILARITIES

# --- similarities: one function each, broadcast over all dimensions but the last ------------------


class Options(NamedTuple):
    """What a similarity may take besides query and candidate."""

    scale: Tensor | None = None  # a
    weights: Tensor | None = None  # w, or None for ones
    phase_scale: float = 1.0  # κ

    def weight(self, index: int) -> Tensor | float:
        return 1.0 if self.weights is None else self.weights[index]


Terms = tuple[Tensor, ...]
"""For each of a similarity's sums its terms, which are added up over the last dimension."""


def _difference(query: Tensor, candidate: Tensor, options: Options) -> Tensor:
    """q − a ⊙ c; the product is rounded before it is subtracted, in every backend."""
    return query - (candidate if options.scale is None else options.scale * candidate)


def _root(x: Tensor) -> Tensor:
    """√x, whose derivative at 0 is taken as 0."""
    return torch.where(x > 0, torch.where(x > 0, x, 1).sqrt(), x)


def _sines(query: Tensor, candidate: Tensor, options: Options) -> Tensor:
    """|sin((q_j − c_j) κ/2)|."""
    half = options.phase_scale / 2
    return (query * half - candidate * half).sin().abs()


def _dot(query: Tensor, candidate: Tensor, options: Options) -> Terms:
    """Σ_j q_j c_j."""
    return (query * candidate,)


def _l1(query: Tensor, candidate: Tensor, options: Options) -> Terms:
    """−Σ_j |q_j − a_j c_j|."""
    return (-_difference(query, candidate, options).abs(),)


def _l2(query: Tensor, candidate: Tensor, options: Options) -> Terms:
    """−‖q − a ⊙ c‖₂."""
    return (_difference(query, candidate, options).square(),)


def _rotate(query: Tensor, candidate: Tensor, options: Options) -> Terms:
    """−Σ_j |q_j − c_j| of complex numbers, re‖im (RotatE, Sun et al., 2019)."""
    parts = torch.stack((query - candidate).chunk(2, dim=-1))
    modulus: Tensor = torch.linalg.vector_norm(parts, dim=0)  # its subgradient at 0 is 0
    return (-modulus,)


def _hake(query: Tensor, candidate: Tensor, options: Options) -> Terms:
    """−w_0 Σ_j |sin((q_j − c_j) κ/2)| of the phases − w_1 ‖q − a ⊙ c‖₂ of the moduli, phase‖modulus
    (HAKE, Zhang et al., 2020)."""
    (q_phase, q_modulus), (c_phase, c_modulus) = query.chunk(2, -1), candidate.chunk(2, -1)
    return (
        -_sines(q_phase, c_phase, options),
        _difference(q_modulus, c_modulus, options).square(),
    )


def _protate(query: Tensor, candidate: Tensor, options: Options) -> Terms:
    """−w_0 Σ_j |sin((q_j − c_j) κ/2)| of phases (pRotatE, Sun et al., 2019)."""
    return (-_sines(query, candidate, options),)


TERMS: dict[str, Callable[[Tensor, Tensor, Options], Terms]] = {
    "dot": _dot,
    "l1": _l1,
    "l2": _l2,
    "rotate": _rotate,
    "hake": _hake,
    "protate": _protate,
}
"""The terms of each of :data:`emu_kernels.similarity.SIMILARITIES`, which says how their sums
become a score."""


def phi(name: str, query: Tensor, candidate: Tensor, options: Options) -> Tensor:
    """φ(query, candidate) = Σ_s w_s v_s(S_s), where v is the sum itself or minus its root."""
    total: Tensor | float = 0.0
    for i, terms in enumerate(TERMS[name](query, candidate, options)):
        value = terms.sum(-1)
        if SIMILARITIES[name].roots[i]:
            value = -_root(value)
        total = total + options.weight(i) * value
    assert isinstance(total, Tensor)
    return total


# --- mutation rules: one function each ------------------------------------------------------------


def _masked(positive: Tensor, negative: Tensor, draws: Draws) -> Tensor:
    """ẑ = λ ⊙ z⁺ + (1 − λ) ⊙ z⁻."""
    rule = draws.mutation
    assert isinstance(rule, Component)
    batch, count, dim = negative.shape
    mask = mutation_mask(
        batch,
        count,
        dim,
        seed=draws.seed,
        row_offset=draws.row_offset,
        threshold=rule.threshold if rule.thresholds is None else rule.thresholds,
        pairs=rule.pairs,
    )
    return torch.where(mask, positive, negative)


def _mixup(positive: Tensor, negative: Tensor, draws: Draws) -> Tensor:
    """ẑ = z⁺ + μ (z⁻ − z⁺)."""
    rule = draws.mutation
    assert isinstance(rule, Mixup)
    batch, count, _ = negative.shape
    share = mixup_share(
        batch, count, seed=draws.seed, row_offset=draws.row_offset, order=rule.order
    ).to(negative.dtype)
    return positive + share[..., None] * (negative - positive)


MUTATE: dict[str, Callable[[Tensor, Tensor, Draws], Tensor]] = {
    "none": lambda _positive, negative, _draws: negative,
    "component": _masked,
    "pair": _masked,
    "mixup": _mixup,
}
"""ẑ (B, K, D) of positive (B, 1, D), negative (B, K, D) for each of
:data:`emu_kernels.mutation.RULES` except :class:`emu_kernels.mutation.Expected`."""


def mutate(positive: Tensor, negative: Tensor, draws: Draws) -> Tensor:
    """ẑ (B, K, D) of positive z⁺ (B, D) and negative z⁻ (B, K, D)."""
    return MUTATE[draws.mutation.name](positive[:, None, :], negative, draws)


def expectation(
    name: str, query: Tensor, positive: Tensor, negative: Tensor, rate: Tensor, options: Options
) -> tuple[Tensor, Tensor]:
    """(B, K) means and cumulants of mutated scores: :class:`emu_kernels.mutation.Expected`.

    ``query`` and ``positive`` are (B, 1, D), ``negative`` (B, K, D), ``rate`` (B or 1, U or 1).
    """
    mean: Tensor | float = 0.0
    variance: Tensor | float = 0.0
    kept = TERMS[name](query, positive, options)
    exchanged = TERMS[name](query, negative, options)
    units = sum(terms.shape[-1] for terms in kept)
    rates = rate[:, None, :].expand(-1, -1, units).chunk(len(kept), dim=-1)
    for i, (own, other, p) in enumerate(zip(kept, exchanged, rates, strict=True)):
        m = (p * own + (1 - p) * other).sum(-1)
        v = (p * (1 - p) * (own - other).square()).sum(-1)
        if SIMILARITIES[name].roots[i]:
            inverse = torch.where(m > 0, 1 / _root(torch.where(m > 0, m, 1)), 0)
            m, v = -_root(m) + v * inverse**3 / 8, v * inverse.square() / 4
        mean = mean + options.weight(i) * m
        variance = variance + options.weight(i) ** 2 * v
    assert isinstance(mean, Tensor)
    return mean, mean + variance / 2


# --- scores and losses ----------------------------------------------------------------------------


class Scores(NamedTuple):
    """Scores of the positive, of the negatives, and of the mutated negatives.

    Where masks are drawn, a mutated score is its own mean and its own cumulant.
    """

    positive: Tensor  # (B,)
    negative: Tensor  # (B, K), −inf at padding
    mutated: Tensor | None  # (B, K), −inf at padding; None without mutation
    cumulant: Tensor | None  # likewise


def _of_rows(negative: Tensor, batch: int) -> Tensor:
    """(B, K): the ids of each row, from those of its set."""
    groups, count = negative.shape
    return negative.repeat_interleave(batch // max(groups, 1), dim=0).reshape(batch, count)


def scores(request: Request) -> Scores:
    """Score positive, negatives and (unless the mutation is none) mutated negatives."""
    name = request.similarity
    options = Options(request.scale, request.weights, request.phase_scale)
    dtype = accumulation_dtype(request.table.dtype)
    # Upcast before indexing, so that autograd sums the contributions to a row in fp32.
    wide = request.table.to(dtype)
    query = request.query
    ids = _of_rows(request.negative, query.shape[0])  # (B, K)
    real = ids >= 0
    z_pos = wide[request.positive]  # (B, D)
    z_neg = torch.where(real[..., None], wide[ids.clamp(min=0)], 0)  # (B, K, D)
    minus_inf = float("-inf")
    s_pos = phi(name, query, z_pos, options)
    query = query[:, None, :]
    if options.scale is not None:
        options = options._replace(scale=options.scale[:, None, :])
    s_neg = phi(name, query, z_neg, options).masked_fill(~real, minus_inf)
    if not request.mutated:
        return Scores(s_pos, s_neg, None, None)
    if request.moments is not None:
        rate = request.moments.rate
        assert isinstance(rate, Tensor)
        both = expectation(name, query, z_pos[:, None, :], z_neg, rate, options)
        mean, cumulant = (score.masked_fill(~real, minus_inf) for score in both)
        return Scores(s_pos, s_neg, mean, cumulant)
    z_mut = torch.where(real[..., None], mutate(z_pos, z_neg, request), 0)
    s_mut = phi(name, query, z_mut, options).masked_fill(~real, minus_inf)
    return Scores(s_pos, s_neg, s_mut, s_mut)


def logits(scored: Scores, request: LossRequest) -> Scores:
    """Every score minus its candidate's log q; a mutated negative has that of its negative."""
    positive, negative = request.positive_log_q, request.negative_log_q
    if positive is None or negative is None:
        return scored
    of_rows = _of_rows(negative, positive.shape[0])
    return Scores(
        scored.positive - positive,
        scored.negative - of_rows,
        None if scored.mutated is None else scored.mutated - of_rows,
        None if scored.cumulant is None else scored.cumulant - of_rows,
    )


def softmax_rows(positive: Tensor, negative: Tensor) -> Tensor:
    """L_van of each row, (B,): logsumexp(s⁺, s⁻_1..s⁻_K) − s⁺."""
    return torch.logsumexp(torch.cat([positive[:, None], negative], dim=1), dim=1) - positive


def uls_rows(
    positive: Tensor, negative: Tensor, beta: float | Tensor, cumulant: Tensor | None = None
) -> Tensor:
    """L_emu of each row, (B,): (1/K) [(l̂ − s⁺) + β Σ_k (l̂ − ŝ_k)]; K counts scores above −inf.

    In closed form ``negative`` has the means, and l̂ is taken over the cumulants.
    """
    real = negative != float("-inf")
    count = real.sum(dim=1)
    in_lse = negative if cumulant is None else cumulant
    lse = torch.logsumexp(torch.cat([positive[:, None], in_lse], dim=1), dim=1)
    gaps = torch.where(real, lse[:, None] - torch.where(real, negative, 0), 0).sum(dim=1)
    return ((lse - positive) + beta * gaps) / count.clamp(min=1)


def loss_rows(
    scored: Scores, negative: Tensor, *, beta: float | Tensor, alpha: float | Tensor
) -> tuple[Tensor, Tensor]:
    """(2, B) terms L_emu, L_van and (B,) total L_emu + α · L_van; NaN where a real score is not
    finite.

    ``scored.mutated`` None means the vanilla term alone.
    """
    real = _of_rows(negative, scored.negative.shape[0]) >= 0
    finite = scored.positive.isfinite() & (scored.negative.isfinite() | ~real).all(dim=1)
    vanilla = softmax_rows(scored.positive, scored.negative)
    if scored.mutated is None or scored.cumulant is None:
        uls, total = torch.zeros_like(vanilla), vanilla
    else:
        finite = finite & (scored.cumulant.isfinite() | ~real).all(dim=1)
        uls = uls_rows(scored.positive, scored.mutated, beta, scored.cumulant)
        total = uls + alpha * vanilla
    poison = torch.where(finite, 1.0, float("nan")).to(total.dtype)
    return torch.stack([uls, vanilla]) * poison, total * poison


def reduce(rows: Tensor, sample_weight: Tensor | None, reduction: str) -> Tensor:
    """Weighted rows for "none", their sum for "sum"; for "mean" the sum over that of the weights,
    0 if the latter is 0."""
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
