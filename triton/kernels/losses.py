"""From scores to the loss, and to the weights of the sums that scores are functions of.

All this works on B·K numbers, a D-th of what the scores were computed from.
"""

from __future__ import annotations

import triton.language as tl

import triton
from emu_kernels.triton.kinds import SIZES
from emu_kernels.triton.similarities import (
    combine,
    cumulant,
    moment_slopes,
    moments,
    slopes,
    weighed,
)
from emu_kernels.triton.tiles import load_sums, logit, store_sums


@triton.jit
def _coefficient(x):
    """The coefficient, NaN if it is out of range: raising an error would need a synchronisation."""
    return tl.where((x >= 0) & (x < float("inf")), x, float("nan"))


@triton.jit
def _store_weights(pointer, at, each, valid, w, v, weights, kind: tl.constexpr):
    """Weights of the sums from the weights w of scores."""
    of_sums = [w * x for x in slopes(v, weights, kind)]
    store_sums(pointer, at, each, valid, of_sums, kind)


@triton.jit
def _mutated_logits(mutated, variance, at, id_at, each, valid, inputs, kind: tl.constexpr):
    """A mutated score minus log q, twice; with a rule of moments its mean and its cumulant."""
    weights = inputs.weights
    log_q = inputs.negative_log_q
    x = load_sums(mutated, at, each, valid, kind)
    if kind.MOMENTS:
        m, v = moments(x, load_sums(variance, at, each, valid, kind), kind)
        mean = combine(m, weights, kind)
        both = cumulant(mean, v, weights, kind)
        return logit(mean, log_q, id_at, valid), logit(both, log_q, id_at, valid)
    else:
        s = logit(combine(x, weights, kind), log_q, id_at, valid)
        return s, s


@triton.jit
def _store_moment_weights(
    mutated, variance, at, each, valid, a, b, m, v, weights, kind: tl.constexpr
):
    """Weights of the sums' means and variances from a and b, those of the score's mean and of half
    its variance."""
    by_mean, by_variance = moment_slopes(a, b, m, v, weights, kind)
    store_sums(mutated, at, each, valid, by_mean, kind)
    store_sums(variance, at, each, valid, by_variance, kind)


@triton.jit
def _add_moments_by_weights(by, real, a, b, means, variances, weights, kind: tl.constexpr):
    m, v = moments(means, variances, kind)
    x = [a * m[s] + weighed(b * v[s], weights, s) for s in (0, 1)[: kind.SUMS]]
    return [by[s] + tl.where(real, x[s], 0) for s in (0, 1)[: kind.SUMS]]


@triton.jit
def _add_by_weights(by, real, x, v, kind: tl.constexpr):
    """Adds to the gradients by the similarity's weights, for one score in each lane."""
    return [by[s] + tl.where(real, x * v[s], 0) for s in (0, 1)[: kind.SUMS]]


@triton.jit
def _store_by_weights(grad_weights, b, by, w, v, kind: tl.constexpr):
    """Adds the positive's own part, of weight w, and stores."""
    SUMS: tl.constexpr = kind.SUMS
    for s in tl.static_range(SUMS):
        tl.store(grad_weights + kind.SUMS * b + s, tl.sum(by[s], 0) + w * v[s])


@triton.jit(do_not_specialize=[*SIZES, "beta", "alpha"])
def loss_rows(
    inputs, kind: tl.constexpr, B, K, R, N, row_offset, threshold,
    coefficients,  # (2,) β and α, or None for the arguments beta and alpha
    positive_value,  # (S, B) values v_s of z⁺
    plain,  # (S, B, K), of the negatives; replaced by weights
    mutated,  # likewise; with a rule of moments it is M, and the next one V
    variance,
    uls_out,  # (B,)
    vanilla_out,
    positive_weight,  # (S, B), or None: no gradients
    grad_weights,  # (B, S) or None
    statistics,  # (5, B): m, factor of e^(s − m), m̂, factor of e^(ŝ − m̂), label; or None
    beta,
    alpha,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: a row."""
    b = tl.program_id(0).to(tl.int64)
    REAL: tl.constexpr = plain.dtype.element_ty
    if coefficients is None:
        beta = tl.full((), beta, REAL)
        alpha = tl.full((), alpha, REAL)
    else:
        beta = _coefficient(tl.load(coefficients))
        alpha = _coefficient(tl.load(coefficients + 1))
    each = B.to(tl.int64) * K
    minus_inf = float("-inf")
    weights = inputs.weights
    v = load_sums(positive_value, b, B, b >= 0, kind)
    log_q = inputs.negative_log_q
    own = logit(combine(v, weights, kind), inputs.positive_log_q, b, b >= 0)

    top = tl.zeros((BLOCK,), REAL) + own
    mutated_top = top
    zero = tl.zeros((BLOCK,), REAL)
    count = tl.zeros((BLOCK,), REAL)
    for start in range(0, K, BLOCK):
        k = start + tl.arange(0, BLOCK)
        valid = k < K
        id_at = (b // R) * K + k
        real = tl.load(inputs.negative + id_at, mask=valid, other=-1) != -1
        s = combine(load_sums(plain, b * K + k, each, valid, kind), weights, kind)
        s = logit(s, log_q, id_at, valid)
        s = tl.where(real, s, minus_inf)
        top = tl.maximum(top, s)
        zero += tl.where(real, s * 0, 0)
        count += tl.where(real, 1.0, 0.0)
        if kind.MUTATED:
            _, s = _mutated_logits(mutated, variance, b * K + k, id_at, each, valid, inputs, kind)
            s = tl.where(real, s, minus_inf)
            mutated_top = tl.maximum(mutated_top, s)
            zero += tl.where(real, s * 0, 0)
    finite = tl.sum(zero, 0) + own * 0 == 0
    m = tl.max(top, 0)
    mutated_m = tl.max(mutated_top, 0)
    number = tl.sum(count, 0)

    total = tl.zeros((BLOCK,), REAL)
    mutated_total = total
    gaps = total
    for start in range(0, K, BLOCK):
        k = start + tl.arange(0, BLOCK)
        valid = k < K
        id_at = (b // R) * K + k
        real = tl.load(inputs.negative + id_at, mask=valid, other=-1) != -1
        s = combine(load_sums(plain, b * K + k, each, valid, kind), weights, kind)
        s = logit(s, log_q, id_at, valid)
        total += tl.where(real, tl.exp(s - m), 0)
        if kind.MUTATED:
            s, c = _mutated_logits(mutated, variance, b * K + k, id_at, each, valid, inputs, kind)
            mutated_total += tl.where(real, tl.exp(c - mutated_m), 0)
            gaps += tl.where(real, mutated_m - s, 0)
    power = tl.exp(own - m)
    mass = tl.sum(total, 0) + power
    nan = float("nan")
    vanilla = (m - own) + tl.log(mass)
    tl.store(vanilla_out + b, tl.where(finite, vanilla, nan))
    factor = tl.where(finite, alpha / mass, nan)
    w = alpha * (power / mass - 1)
    mutated_factor = factor * 0
    label = factor * 0
    if kind.MUTATED:
        inverse = tl.where(number > 0, 1 / tl.where(number > 0, number, 1.0), 0.0)
        power = tl.exp(own - mutated_m)
        mass = tl.sum(mutated_total, 0) + power
        log_mass = tl.log(mass)
        uls = ((mutated_m - own) + log_mass) * inverse + beta * (
            tl.sum(gaps, 0) * inverse + tl.where(number > 0, log_mass, 0.0)
        )
        tl.store(uls_out + b, tl.where(finite, uls, nan))
        every = inverse + tl.where(number > 0, beta, 0.0)  # (1 + βK)/K
        w += every * (power / mass) - inverse
        mutated_factor = tl.where(finite, every / mass, nan)
        label = tl.where(finite, beta * inverse, nan)
    else:
        tl.store(uls_out + b, tl.where(finite, 0.0, nan))

    if positive_weight is not None:
        w = tl.where(finite, w, nan)
        _store_weights(positive_weight, b, B, b >= 0, w, v, weights, kind)
        by = [tl.zeros((BLOCK,), REAL) for s in (0, 1)[: kind.SUMS]]
        for start in range(0, K, BLOCK):
            k = start + tl.arange(0, BLOCK)
            at = b * K + k
            valid = k < K
            id_at = (b // R) * K + k
            real = tl.load(inputs.negative + id_at, mask=valid, other=-1) != -1
            p = load_sums(plain, at, each, valid, kind)
            x = logit(combine(p, weights, kind), log_q, id_at, valid)
            x = tl.where(real, tl.exp(x - m), 0.0) * factor
            _store_weights(plain, at, each, valid, x, p, weights, kind)
            by = _add_by_weights(by, real, x, p, kind)
            if kind.MOMENTS:
                p = load_sums(mutated, at, each, valid, kind)
                q = load_sums(variance, at, each, valid, kind)
                _, x = _mutated_logits(mutated, variance, at, id_at, each, valid, inputs, kind)
                x = tl.exp(x - mutated_m) * mutated_factor
                x = tl.where(real, x, label * 0)  # NaN where the row is
                y = tl.where(real, x - label, label * 0)
                _store_moment_weights(mutated, variance, at, each, valid, y, x, p, q, weights, kind)
                by = _add_moments_by_weights(by, real, y, x, p, q, weights, kind)
            elif kind.MUTATED:
                p = load_sums(mutated, at, each, valid, kind)
                x = logit(combine(p, weights, kind), log_q, id_at, valid)
                x = tl.exp(x - mutated_m) * mutated_factor - label
                x = tl.where(real, x, label * 0)  # NaN where the row is
                _store_weights(mutated, at, each, valid, x, p, weights, kind)
                by = _add_by_weights(by, real, x, p, kind)
        if grad_weights is not None:
            _store_by_weights(grad_weights, b, by, w, v, kind)
        if statistics is not None:
            tl.store(statistics + b, m)
            tl.store(statistics + B + b, factor)
            tl.store(statistics + B * 2 + b, mutated_m)
            tl.store(statistics + B * 3 + b, mutated_factor)
            tl.store(statistics + B * 4 + b, label)


@triton.jit(do_not_specialize=["B", "alpha"])
def reduce_rows(
    uls,  # (B,)
    vanilla,
    sample_weight,  # (B,) or None: ones
    coefficients,
    loss,  # (1,) or (B,)
    terms,  # (2,)
    row_scale,  # (B,)
    B,
    alpha,
    REDUCTION: tl.constexpr,
    MUTATED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program for the batch, in fp64 and in a fixed order."""
    REAL: tl.constexpr = uls.dtype.element_ty
    if coefficients is None:
        alpha = tl.full((), alpha, REAL)
    else:
        alpha = _coefficient(tl.load(coefficients + 1))
    total = tl.zeros((BLOCK,), tl.float64)
    weight = total
    total_uls = total
    total_vanilla = total
    for start in range(0, B, BLOCK):
        b = start + tl.arange(0, BLOCK)
        valid = b < B
        w = tl.where(valid, 1.0, 0.0).to(tl.float64)
        if sample_weight is not None:
            w = tl.load(sample_weight + b, mask=valid, other=0.0).to(tl.float64)
        u = tl.load(uls + b, mask=valid, other=0.0)
        v = tl.load(vanilla + b, mask=valid, other=0.0)
        row = v
        if MUTATED:
            row = u + alpha * v
        weighted = w * row.to(tl.float64)
        if REDUCTION == "none":
            tl.store(loss + b, weighted.to(REAL), mask=valid)
        total += weighted
        weight += w
        total_uls += w * u.to(tl.float64)
        total_vanilla += w * v.to(tl.float64)
    all_weight = tl.sum(weight, 0)
    mean = tl.where(all_weight == 0, 0.0, 1 / tl.where(all_weight == 0, 1.0, all_weight))
    factor = mean
    if REDUCTION != "mean":
        factor = mean * 0 + 1
    if REDUCTION != "none":
        tl.store(loss, (tl.sum(total, 0) * factor).to(REAL))
    tl.store(terms, (tl.sum(total_uls, 0) * mean).to(REAL))
    tl.store(terms + 1, (tl.sum(total_vanilla, 0) * mean).to(REAL))
    for start in range(0, B, BLOCK):
        b = start + tl.arange(0, BLOCK)
        valid = b < B
        w = tl.where(valid, 1.0, 0.0).to(tl.float64)
        if sample_weight is not None:
            w = tl.load(sample_weight + b, mask=valid, other=0.0).to(tl.float64)
        tl.store(row_scale + b, (w * factor).to(REAL), mask=valid)


@triton.jit
def _load_values(pointer, at, each, valid, w, kind: tl.constexpr):
    """The values of sums. If they are the scores, nothing depends on them, and any will do."""
    if kind.DIRECT:
        return (w,)
    else:
        return load_sums(pointer, at, each, valid, kind)


@triton.jit(do_not_specialize=SIZES)
def sum_weights(
    inputs, kind: tl.constexpr, B, K, R, N, row_offset, threshold,
    positive_value,  # (S, B) values, as the next two; not read if DIRECT
    plain,  # (S, B, K); replaced by weights of sums
    mutated,
    variance,  # (S, B, K), with a rule of moments
    positive_score_weight,  # (B,)
    plain_score_weight,  # (B, K)
    mutated_score_weight,
    cumulant_score_weight,
    positive_weight,  # (S, B)
    grad_weights,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: a row's weights of sums from the upstream weights of its scores."""
    b = tl.program_id(0).to(tl.int64)
    REAL: tl.constexpr = plain.dtype.element_ty
    each = B.to(tl.int64) * K
    weights = inputs.weights
    own = tl.load(inputs.positive + b)
    own_good = (own >= 0) & (own < N)
    w = tl.load(positive_score_weight + b)
    v = _load_values(positive_value, b, B, b >= 0, w, kind)
    w = tl.where(own_good, w, float("nan"))
    _store_weights(positive_weight, b, B, b >= 0, w, v, weights, kind)
    by = [tl.zeros((BLOCK,), REAL) for s in (0, 1)[: kind.SUMS]]
    for start in range(0, K, BLOCK):
        k = start + tl.arange(0, BLOCK)
        valid = k < K
        at = b * K + k
        ids = tl.load(inputs.negative + (b // R) * K + k, mask=valid, other=-1)
        real = ids != -1
        good = own_good & (ids < N) & (ids >= -1)
        # Padding has no gradient, whatever its upstream weight (its score is −inf).
        x = tl.load(plain_score_weight + at, mask=valid, other=0.0)
        x = tl.where(good, tl.where(real, x, 0.0), float("nan"))
        p = _load_values(plain, at, each, valid, x, kind)
        _store_weights(plain, at, each, valid, x, p, weights, kind)
        by = _add_by_weights(by, real, x, p, kind)
        if kind.MOMENTS:
            x = tl.load(cumulant_score_weight + at, mask=valid, other=0.0)
            y = tl.load(mutated_score_weight + at, mask=valid, other=0.0) + x
            x = tl.where(good, tl.where(real, x, 0.0), float("nan"))
            y = tl.where(good, tl.where(real, y, 0.0), float("nan"))
            p = _load_values(mutated, at, each, valid, x, kind)
            q = _load_values(variance, at, each, valid, x, kind)
            _store_moment_weights(mutated, variance, at, each, valid, y, x, p, q, weights, kind)
            by = _add_moments_by_weights(by, real, y, x, p, q, weights, kind)
        elif kind.MUTATED:
            x = tl.load(mutated_score_weight + at, mask=valid, other=0.0)
            x = tl.where(good, tl.where(real, x, 0.0), float("nan"))
            p = _load_values(mutated, at, each, valid, x, kind)
            _store_weights(mutated, at, each, valid, x, p, weights, kind)
            by = _add_by_weights(by, real, x, p, kind)
    if grad_weights is not None:
        _store_by_weights(grad_weights, b, by, w, v, kind)
