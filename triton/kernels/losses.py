"""From scores to the loss, and to the weights of the sums that scores are functions of.

All of it is B·K numbers, a D-th of what the scores were made from.
"""

from __future__ import annotations

import triton.language as tl

import triton
from emu_kernels.triton.kinds import SIZES
from emu_kernels.triton.similarities import combine, value_slope
from emu_kernels.triton.tiles import load_sums, store_sums


@triton.jit
def _coefficient(x):
    """NaN where it is out of range: raising would need a synchronisation."""
    return tl.where((x >= 0) & (x < float("inf")), x, float("nan"))


@triton.jit
def _store_weights(pointer, at, each, valid, w, v0, v1, weights, kind: tl.constexpr):
    """Weights of the sums from the weights w of scores."""
    w0 = w * value_slope(v0, kind.ROOT)
    w1 = w * value_slope(v1, kind.SECOND_ROOT)
    if weights is not None:
        w0 *= tl.load(weights)
        if kind.SUMS == 2:
            w1 *= tl.load(weights + 1)
    store_sums(pointer, at, each, valid, w0, w1, kind)


@triton.jit(do_not_specialize=[*SIZES, "beta", "alpha"])
def loss_rows(
    inputs,
    kind: tl.constexpr,
    B,
    K,
    R,
    N,
    row_offset,
    threshold,
    coefficients,  # (2,) β and α, or None: the arguments
    positive_value,  # (S, B) values v_s of z⁺; with SCORES (B,) the scores, as the next two
    plain,  # (S, B, K); replaced by weights
    mutated,
    uls_out,  # (B,)
    vanilla_out,
    positive_weight,  # (S, B), or None: no gradients
    grad_weights,  # (B, S) or None
    statistics,  # (5, B): m, factor of e^(s − m), m̂, factor of e^(ŝ − m̂), label; or None
    beta,
    alpha,
    BLOCK: tl.constexpr,
):
    """One program: a row."""
    b = tl.program_id(0).to(tl.int64)
    REAL: tl.constexpr = plain.dtype.element_ty
    if coefficients is None:
        beta = tl.full((), beta, REAL)
        alpha = tl.full((), alpha, REAL)
    else:
        beta = _coefficient(tl.load(coefficients))
        alpha = _coefficient(tl.load(coefficients + 1))
    sums = B.to(tl.int64) * K
    minus_inf = float("-inf")
    v0 = tl.load(positive_value + b)
    v1 = v0
    if kind.SUMS == 2:
        v1 = tl.load(positive_value + B + b)
    own = combine(v0, v1, inputs.weights, kind)

    top = tl.zeros((BLOCK,), REAL) + own
    mutated_top = top
    zero = tl.zeros((BLOCK,), REAL)
    count = tl.zeros((BLOCK,), REAL)
    for start in range(0, K, BLOCK):
        k = start + tl.arange(0, BLOCK)
        valid = k < K
        real = tl.load(inputs.negative + (b // R) * K + k, mask=valid, other=-1) != -1
        p0, p1 = load_sums(plain, b * K + k, sums, valid, kind)
        s = tl.where(real, combine(p0, p1, inputs.weights, kind), minus_inf)
        top = tl.maximum(top, s)
        zero += tl.where(real, s * 0, 0)
        count += tl.where(real, 1.0, 0.0)
        if kind.MUTATED:
            h0, h1 = load_sums(mutated, b * K + k, sums, valid, kind)
            s = tl.where(real, combine(h0, h1, inputs.weights, kind), minus_inf)
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
        real = tl.load(inputs.negative + (b // R) * K + k, mask=valid, other=-1) != -1
        p0, p1 = load_sums(plain, b * K + k, sums, valid, kind)
        total += tl.where(real, tl.exp(combine(p0, p1, inputs.weights, kind) - m), 0)
        if kind.MUTATED:
            h0, h1 = load_sums(mutated, b * K + k, sums, valid, kind)
            gap = tl.where(real, mutated_m - combine(h0, h1, inputs.weights, kind), 0)
            mutated_total += tl.where(real, tl.exp(-gap), 0)
            gaps += gap
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
        each = inverse + tl.where(number > 0, beta, 0.0)  # (1 + βK)/K
        w += each * (power / mass) - inverse
        mutated_factor = tl.where(finite, each / mass, nan)
        label = tl.where(finite, beta * inverse, nan)
    else:
        tl.store(uls_out + b, tl.where(finite, 0.0, nan))

    if positive_weight is not None:
        w = tl.where(finite, w, nan)
        _store_weights(positive_weight, b, B, b >= 0, w, v0, v1, inputs.weights, kind)
        by0 = tl.zeros((BLOCK,), REAL)
        by1 = by0
        for start in range(0, K, BLOCK):
            k = start + tl.arange(0, BLOCK)
            valid = k < K
            real = tl.load(inputs.negative + (b // R) * K + k, mask=valid, other=-1) != -1
            p0, p1 = load_sums(plain, b * K + k, sums, valid, kind)
            x = tl.where(real, tl.exp(combine(p0, p1, inputs.weights, kind) - m), 0.0) * factor
            _store_weights(plain, b * K + k, sums, valid, x, p0, p1, inputs.weights, kind)
            by0 += tl.where(real, x * p0, 0)
            by1 += tl.where(real, x * p1, 0)
            if kind.MUTATED:
                p0, p1 = load_sums(mutated, b * K + k, sums, valid, kind)
                x = (
                    tl.exp(combine(p0, p1, inputs.weights, kind) - mutated_m) * mutated_factor
                    - label
                )
                x = tl.where(real, x, label * 0)  # NaN where the row is
                _store_weights(mutated, b * K + k, sums, valid, x, p0, p1, inputs.weights, kind)
                by0 += tl.where(real, x * p0, 0)
                by1 += tl.where(real, x * p1, 0)
        if grad_weights is not None:
            if kind.SUMS == 2:
                tl.store(grad_weights + 2 * b, tl.sum(by0, 0) + w * v0)
                tl.store(grad_weights + 2 * b + 1, tl.sum(by1, 0) + w * v1)
            else:
                tl.store(grad_weights + b, tl.sum(by0, 0) + w * v0)
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


@triton.jit(do_not_specialize=SIZES)
def sum_weights(
    inputs,
    kind: tl.constexpr,
    B,
    K,
    R,
    N,
    row_offset,
    threshold,
    positive_value,  # (S, B) values, as the next two; read where they matter
    plain,  # (S, B, K); replaced by weights of sums
    mutated,
    positive_score_weight,  # (B,)
    plain_score_weight,  # (B, K)
    mutated_score_weight,
    positive_weight,  # (S, B)
    grad_weights,
    BLOCK: tl.constexpr,
):
    """One program: a row's weights of sums from weights of scores that came from above."""
    b = tl.program_id(0).to(tl.int64)
    REAL: tl.constexpr = plain.dtype.element_ty
    sums = B.to(tl.int64) * K
    own = tl.load(inputs.positive + b)
    own_good = (own >= 0) & (own < N)
    w = tl.load(positive_score_weight + b)
    v0, v1 = w, w
    if not kind.DIRECT:
        v0 = tl.load(positive_value + b)
        v1 = v0
        if kind.SUMS == 2:
            v1 = tl.load(positive_value + B + b)
    w = tl.where(own_good, w, float("nan"))
    _store_weights(positive_weight, b, B, b >= 0, w, v0, v1, inputs.weights, kind)
    by0 = tl.zeros((BLOCK,), REAL)
    by1 = by0
    for start in range(0, K, BLOCK):
        k = start + tl.arange(0, BLOCK)
        valid = k < K
        at = b * K + k
        ids = tl.load(inputs.negative + (b // R) * K + k, mask=valid, other=-1)
        real = ids != -1
        good = own_good & (ids < N) & (ids >= -1)
        # Nothing flows into padding, whatever comes from above (its score is −inf).
        x = tl.load(plain_score_weight + at, mask=valid, other=0.0)
        x = tl.where(good, tl.where(real, x, 0.0), float("nan"))
        p0, p1 = x, x
        if not kind.DIRECT:
            p0, p1 = load_sums(plain, at, sums, valid, kind)
        _store_weights(plain, at, sums, valid, x, p0, p1, inputs.weights, kind)
        by0 += tl.where(real, x * p0, 0)
        by1 += tl.where(real, x * p1, 0)
        if kind.MUTATED:
            x = tl.load(mutated_score_weight + at, mask=valid, other=0.0)
            x = tl.where(good, tl.where(real, x, 0.0), float("nan"))
            p0, p1 = x, x
            if not kind.DIRECT:
                p0, p1 = load_sums(mutated, at, sums, valid, kind)
            _store_weights(mutated, at, sums, valid, x, p0, p1, inputs.weights, kind)
            by0 += tl.where(real, x * p0, 0)
            by1 += tl.where(real, x * p1, 0)
    if grad_weights is not None:
        if kind.SUMS == 2:
            tl.store(grad_weights + 2 * b, tl.sum(by0, 0) + w * v0)
            tl.store(grad_weights + 2 * b + 1, tl.sum(by1, 0) + w * v1)
        else:
            tl.store(grad_weights + b, tl.sum(by0, 0) + w * v0)
