"""Query-major in one pass, for rows short enough to be held in registers while they are used.

Scores and the sums that all gradients by the query's side are made of, over one reading of the
candidates. The weights of a softmax are known at the end only, so e^(s − m) stands for them, m
being the largest score so far; each row of a tile has its own m, so that nothing is exchanged
within the loop. From w_k = α p_k and ŵ_k = ((1 + βK) p̂_k − β)/K three sums follow: with e^(s − m),
with e^(ŝ − m̂), and plain.
"""

from __future__ import annotations

import triton.language as tl

import triton
from emu_kernels.triton.forward import finish_gradient
from emu_kernels.triton.kinds import SIZES
from emu_kernels.triton.similarities import combine, value, value_slope
from emu_kernels.triton.tiles import (
    check_ids,
    components,
    draw,
    give,
    load_bounds,
    load_parts,
    load_scale,
    mix,
    mutated_terms,
    no_tile,
    over_rows,
    row_sums,
    spread,
    store_parts,
    store_sums,
    tile_terms,
)


@triton.jit
def _slopes(v0, v1, weights, kind: tl.constexpr):
    """∂score/∂S of the sums of both parts."""
    r0 = value_slope(v0, kind.ROOT)
    if weights is not None:
        r0 *= tl.load(weights).to(r0.dtype)
    r1 = r0
    if kind.SUMS == 2:
        r1 = value_slope(v1, kind.SECOND_ROOT)
        if weights is not None:
            r1 *= tl.load(weights + 1).to(r1.dtype)
    return r0, r1


@triton.jit
def _store_vectors(pointer, at, j, factor, x0, x1, kind: tl.constexpr):
    x0, x1 = over_rows(x0 * factor), over_rows(x1 * factor)
    store_parts(pointer, at * kind.D, j, j < kind.W, x0, x1, kind)


@triton.jit(do_not_specialize=SIZES)
def accumulate(
    inputs,
    kind: tl.constexpr,
    B,
    K,
    R,
    N,
    row_offset,
    threshold,
    positive_out,  # (S, B) values v_s
    plain_out,  # (S, B, K)
    mutated_out,
    maxima,  # (2, B, SPLITS): m and m̂ of each span
    sums,  # (VECTORS, B, SPLITS, D): see merge
    SPLITS: tl.constexpr,
):
    """One program: a row over one of SPLITS spans of its negatives."""
    REAL: tl.constexpr = inputs.query.dtype.element_ty
    split = tl.program_id(0) % SPLITS
    b = (tl.program_id(0) // SPLITS).to(tl.int64)
    j = components(0, kind.WIDTH)
    inside = j < kind.W
    own = tl.load(inputs.positive + b)
    own_good = check_ids(own, 0, N, inputs.report, own == own)
    own = tl.where(own_good, own, 0)  # a row to read: its scores become NaN
    q0, q1 = load_parts(inputs.query, b * kind.D, j, inside, kind, REAL)
    a0, a1 = load_scale(inputs.scale, b, j, inside, q0, kind, REAL)
    z0, z1 = load_parts(inputs.table, own * kind.STRIDE, j, inside, kind, REAL)
    tz0, tz1, dz0, dz1 = tile_terms(q0, q1, a0, a1, z0, z1, kind)
    p0, p1 = row_sums(tz0, tz1, kind)
    nan = float("nan")
    p0 = tl.where(own_good, value(p0, kind.ROOT), nan)
    p1 = value(p1, kind.SECOND_ROOT)
    if split == 0:
        own_at = b + tl.arange(0, 1)
        store_sums(positive_out, own_at, B, own_at >= 0, p0, p1, kind)
    own_score = combine(p0, p1, inputs.weights, kind)
    m = tl.zeros((kind.ROWS,), REAL) + own_score
    mm = m
    zero = no_tile(inputs.table, kind.STRIDE, j, K, kind, REAL)
    # Of e^(s − m), e^(ŝ − m̂) and 1; by the query, the positive, the scale; of both parts.
    qs0, qe0, qu0, ze0, zu0, as0, ae0, au0 = zero, zero, zero, zero, zero, zero, zero, zero
    qs1, qe1, qu1, ze1, zu1, as1, ae1, au1 = zero, zero, zero, zero, zero, zero, zero, zero
    row = row_offset + b + tl.zeros((kind.ROWS,), tl.int64)
    seed_value = tl.load(inputs.seed)
    second = B.to(tl.int64) * K
    bound0, bound1 = load_bounds(inputs.thresholds, threshold, 0, kind)
    span = tl.cdiv(tl.cdiv(K, SPLITS), kind.ROWS) * kind.ROWS
    for start in range(split * span, tl.minimum(split * span + span, K), kind.ROWS):
        k = start + tl.arange(0, kind.ROWS)
        valid = k < K
        ids = tl.load(inputs.negative + (b // R) * K + k, mask=valid, other=-1)
        good = check_ids(ids, -1, N, inputs.report + 1, valid)
        real = good & (ids >= 0)
        c0, c1 = load_parts(
            inputs.table, spread(ids * kind.STRIDE), j, inside & spread(real), kind, REAL
        )
        t0, t1, d0, d1 = tile_terms(q0, q1, a0, a1, c0, c1, kind)
        v0, v1 = row_sums(t0, t1, kind)
        v0 = tl.where(good, value(v0, kind.ROOT), nan)
        v1 = value(v1, kind.SECOND_ROOT)
        at = b * K + k
        store_sums(plain_out, at, second, valid, v0, v1, kind)
        s = tl.where(ids == -1, float("-inf"), combine(v0, v1, inputs.weights, kind))
        r0, r1 = _slopes(v0, v1, inputs.weights, kind)
        top = tl.maximum(m, s)
        shrink = spread(tl.exp(m - top))
        m = top
        e = tl.exp(s - m)
        x0 = spread(e * r0)
        x1 = spread(e * r1)
        qs0 = tl.fma(x0, d0, qs0 * shrink)
        if kind.PARTS == 2:
            qs1 = tl.fma(x1, d1, qs1 * shrink)
        if kind.SECOND_SCALED:
            if kind.SCALED:
                as0 = tl.fma(-x0 * d0, c0, as0 * shrink)
            if kind.PARTS == 2:
                as1 = tl.fma(-x1 * d1, c1, as1 * shrink)
        if kind.MUTATED:
            l0, l1 = draw(
                seed_value, bound0, bound1, k, row, 0, kind, REAL,
            )  # fmt: skip
            mt0, mt1, md0, md1 = mutated_terms(
                q0, q1, a0, a1, c0, c1, z0, z1, tz0, tz1, dz0, dz1, t0, t1, d0, d1, l0, l1,
                kind,
            )  # fmt: skip
            v0, v1 = row_sums(mt0, mt1, kind)
            v0 = tl.where(good, value(v0, kind.ROOT), nan)
            v1 = value(v1, kind.SECOND_ROOT)
            store_sums(mutated_out, at, second, valid, v0, v1, kind)
            s = tl.where(ids == -1, float("-inf"), combine(v0, v1, inputs.weights, kind))
            r0, r1 = _slopes(v0, v1, inputs.weights, kind)
            r0 = tl.where(ids == -1, 0.0, r0)
            r1 = tl.where(ids == -1, 0.0, r1)
            top = tl.maximum(mm, s)
            shrink = spread(tl.exp(mm - top))
            mm = top
            e = tl.exp(s - mm)
            x0 = spread(e * r0)
            x1 = spread(e * r1)
            u0 = spread(r0)
            u1 = spread(r1)
            qe0 = tl.fma(x0, md0, qe0 * shrink)
            qu0 = tl.fma(u0, md0, qu0)
            if kind.BILINEAR:
                ze0 = tl.fma(ze0, shrink, give(l0, x0, kind))
                zu0 += give(l0, u0, kind)
            else:
                given = give(l0, md0, kind)
                ze0 = tl.fma(x0, given, ze0 * shrink)
                zu0 = tl.fma(u0, given, zu0)
            if kind.PARTS == 2:
                qe1 = tl.fma(x1, md1, qe1 * shrink)
                qu1 = tl.fma(u1, md1, qu1)
                if kind.BILINEAR:
                    ze1 = tl.fma(ze1, shrink, give(l1, x1, kind))
                    zu1 += give(l1, u1, kind)
                else:
                    given = give(l1, md1, kind)
                    ze1 = tl.fma(x1, given, ze1 * shrink)
                    zu1 = tl.fma(u1, given, zu1)
            if kind.SECOND_SCALED:
                if kind.SCALED:
                    by = -md0 * mix(z0, c0, l0, kind)
                    ae0 = tl.fma(x0, by, ae0 * shrink)
                    au0 = tl.fma(u0, by, au0)
                if kind.PARTS == 2:
                    by = -md1 * mix(z1, c1, l1, kind)
                    ae1 = tl.fma(x1, by, ae1 * shrink)
                    au1 = tl.fma(u1, by, au1)
    top = tl.max(m, 0)
    shrink = spread(tl.exp(m - top))
    at = b * SPLITS + split
    each = B.to(tl.int64) * SPLITS
    tl.store(maxima + at, top)
    _store_vectors(sums, at, j, shrink, qs0, qs1, kind)
    if kind.MUTATED:
        top = tl.max(mm, 0)
        faded = spread(tl.exp(mm - top))
        tl.store(maxima + each + at, top)
        _store_vectors(sums, at + each, j, faded, qe0, qe1, kind)
        _store_vectors(sums, at + each * 2, j, 1.0, qu0, qu1, kind)
        _store_vectors(sums, at + each * 3, j, faded, ze0, ze1, kind)
        _store_vectors(sums, at + each * 4, j, 1.0, zu0, zu1, kind)
        if kind.SECOND_SCALED:
            _store_vectors(sums, at + each * 6, j, faded, ae0, ae1, kind)
            _store_vectors(sums, at + each * 7, j, 1.0, au0, au1, kind)
    if kind.SECOND_SCALED:
        _store_vectors(sums, at + each * 5, j, shrink, as0, as1, kind)


@triton.jit(do_not_specialize=SIZES)
def merge(
    inputs,
    kind: tl.constexpr,
    B,
    K,
    R,
    N,
    row_offset,
    threshold,
    maxima,
    sums,  # by the query with e^(s − m), e^(ŝ − m̂), 1; the positive with the last two; the scale
    statistics,  # (5, B), of losses.loss_rows
    positive_weight,  # (S, B) of sums
    grad_query,
    grad_positive,
    grad_scale,
    SPLITS: tl.constexpr,
):
    """One program: a chunk of components of a row; the gradients from all spans' sums."""
    REAL: tl.constexpr = inputs.query.dtype.element_ty
    b = (tl.program_id(0) // kind.CHUNKS).to(tl.int64)
    j = components((tl.program_id(0) % kind.CHUNKS) * kind.WIDTH, kind.WIDTH)
    inside = j < kind.W
    own = tl.load(inputs.positive + b)
    own = tl.where((own >= 0) & (own < N), own, 0)
    q0, q1 = load_parts(inputs.query, b * kind.D, j, inside, kind, REAL)
    a0, a1 = load_scale(inputs.scale, b, j, inside, q0, kind, REAL)
    z0, z1 = load_parts(inputs.table, own * kind.STRIDE, j, inside, kind, REAL)
    _, _, dz0, dz1 = tile_terms(q0, q1, a0, a1, z0, z1, kind)
    m = tl.load(statistics + b)
    factor = tl.load(statistics + B + b)
    mm = tl.load(statistics + B * 2 + b)
    mutated_factor = tl.load(statistics + B * 3 + b)
    label = tl.load(statistics + B * 4 + b)
    gq0 = q0 * 0
    gq1, gz0, gz1, ga0, ga1 = gq0, gq0, gq0, gq0, gq0
    each = B.to(tl.int64) * SPLITS
    for split in range(SPLITS):
        at = b * SPLITS + split
        x = factor * tl.exp(tl.load(maxima + at) - m)
        s0, s1 = load_parts(sums, at * kind.D, j, inside, kind, REAL)
        gq0 += x * s0
        gq1 += x * s1
        if kind.SECOND_SCALED:
            s0, s1 = load_parts(sums, (at + each * 5) * kind.D, j, inside, kind, REAL)
            ga0 += x * s0
            ga1 += x * s1
        if kind.MUTATED:
            x = mutated_factor * tl.exp(tl.load(maxima + each + at) - mm)
            s0, s1 = load_parts(sums, (at + each) * kind.D, j, inside, kind, REAL)
            u0, u1 = load_parts(sums, (at + each * 2) * kind.D, j, inside, kind, REAL)
            gq0 += x * s0 - label * u0
            gq1 += x * s1 - label * u1
            s0, s1 = load_parts(sums, (at + each * 3) * kind.D, j, inside, kind, REAL)
            u0, u1 = load_parts(sums, (at + each * 4) * kind.D, j, inside, kind, REAL)
            gz0 += x * s0 - label * u0
            gz1 += x * s1 - label * u1
            if kind.SECOND_SCALED:
                s0, s1 = load_parts(sums, (at + each * 6) * kind.D, j, inside, kind, REAL)
                u0, u1 = load_parts(sums, (at + each * 7) * kind.D, j, inside, kind, REAL)
                ga0 += x * s0 - label * u0
                ga1 += x * s1 - label * u1
    finish_gradient(
        q0, q1, a0, a1, z0, z1, dz0, dz1, gq0, gq1, gz0, gz1, ga0, ga1,
        positive_weight, b == b, b, b, B, j, inside,
        grad_query, grad_positive, grad_scale, kind,
    )  # fmt: skip
