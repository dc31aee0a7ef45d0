"""Query-major kernels in two passes, for rows of any length: sums of terms, then the weights of
sums, then gradients of the query from these weights, for a chunk of components at a time."""

from __future__ import annotations

import triton.language as tl

import triton
from emu_kernels.triton.kinds import SIZES
from emu_kernels.triton.similarities import combine, value
from emu_kernels.triton.tiles import (
    check_ids,
    components,
    draw,
    give,
    load_bounds,
    load_parts,
    load_scale,
    load_sums,
    mix,
    mutated_terms,
    no_tile,
    over_rows,
    row_sums,
    spread,
    store_parts,
    tile_terms,
)


@triton.jit(do_not_specialize=SIZES)
def scores(
    inputs,
    kind: tl.constexpr,
    B,
    K,
    R,
    N,
    row_offset,
    threshold,
    positive_out,  # (B,) score, or with VALUES (S, B) values v_s
    plain_out,  # (B, K), or (S, B, K)
    mutated_out,
    VALUES: tl.constexpr,
):
    """One program: ROWS negatives of a row. Padding scores −inf; a row with a bad id NaN there."""
    REAL: tl.constexpr = inputs.query.dtype.element_ty
    blocks = tl.maximum(tl.cdiv(K, kind.ROWS), 1)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    k = block * kind.ROWS + tl.arange(0, kind.ROWS)
    valid = k < K
    ids = tl.load(inputs.negative + (b // R) * K + k, mask=valid, other=-1)
    good = check_ids(ids, -1, N, inputs.report + 1, valid)
    real = good & (ids >= 0)
    own = tl.load(inputs.positive + b)
    own_good = check_ids(own, 0, N, inputs.report, own == own)
    own = tl.where(own_good, own, 0)  # a row to read: its scores become NaN
    s0 = tl.zeros((kind.ROWS,), REAL)
    s1, m0, m1 = s0, s0, s0
    p0 = tl.zeros((1,), REAL)
    p1 = p0
    row = row_offset + b + tl.zeros((kind.ROWS,), tl.int64)
    seed_value = tl.load(inputs.seed)
    for first in range(0, kind.W, kind.WIDTH):
        j = components(first, kind.WIDTH)
        inside = j < kind.W
        q0, q1 = load_parts(inputs.query, b * kind.D, j, inside, kind, REAL)
        a0, a1 = load_scale(inputs.scale, b, j, inside, q0, kind, REAL)
        z0, z1 = load_parts(inputs.table, own * kind.STRIDE, j, inside, kind, REAL)
        c0, c1 = load_parts(
            inputs.table, spread(ids * kind.STRIDE), j, inside & spread(real), kind, REAL
        )
        tz0, tz1, dz0, dz1 = tile_terms(q0, q1, a0, a1, z0, z1, kind)
        t0, t1, d0, d1 = tile_terms(q0, q1, a0, a1, c0, c1, kind)
        more0, more1 = row_sums(t0, t1, kind)
        s0 += more0
        s1 += more1
        more0, more1 = row_sums(tz0, tz1, kind)
        p0 += more0
        p1 += more1
        if kind.MUTATED:
            bound0, bound1 = load_bounds(inputs.thresholds, threshold, first, kind)
            l0, l1 = draw(
                seed_value, bound0, bound1, k, row, first, kind, REAL,
            )  # fmt: skip
            mt0, mt1, _, _ = mutated_terms(
                q0, q1, a0, a1, c0, c1, z0, z1, tz0, tz1, dz0, dz1, t0, t1, d0, d1, l0, l1,
                kind,
            )  # fmt: skip
            more0, more1 = row_sums(mt0, mt1, kind)
            m0 += more0
            m1 += more1
    nan = float("nan")
    minus_inf = float("-inf")
    p0 = tl.where(own_good, value(p0, kind.ROOT), nan)
    s0 = tl.where(good & own_good, value(s0, kind.ROOT), nan)
    p1 = value(p1, kind.SECOND_ROOT)
    s1 = value(s1, kind.SECOND_ROOT)
    at = b * K + k
    own_at = b + tl.arange(0, 1)
    if not VALUES:
        p0 = combine(p0, p1, inputs.weights, kind)
        s0 = tl.where(ids == -1, minus_inf, combine(s0, s1, inputs.weights, kind))
    if block == 0:
        tl.store(positive_out + own_at, p0)
        if VALUES and (kind.SUMS == 2):
            tl.store(positive_out + B + own_at, p1)
    tl.store(plain_out + at, s0, mask=valid)
    each = B.to(tl.int64) * K
    if VALUES and (kind.SUMS == 2):
        tl.store(plain_out + each + at, s1, mask=valid)
    if kind.MUTATED:
        m0 = tl.where(good & own_good, value(m0, kind.ROOT), nan)
        m1 = value(m1, kind.SECOND_ROOT)
        if not VALUES:
            m0 = tl.where(ids == -1, minus_inf, combine(m0, m1, inputs.weights, kind))
        tl.store(mutated_out + at, m0, mask=valid)
        if VALUES and (kind.SUMS == 2):
            tl.store(mutated_out + each + at, m1, mask=valid)


@triton.jit(do_not_specialize=SIZES)
def query_gradient(
    inputs,
    kind: tl.constexpr,
    B,
    K,
    R,
    N,
    row_offset,
    threshold,
    positive_weight,  # (S, B) of sums, as the next two
    weight,  # (S, B, K)
    mutated_weight,
    grad_query,  # (SPLITS, B, D) each
    grad_positive,
    grad_scale,
    SPLITS: tl.constexpr,
):
    """One program: a chunk of components of a row, over one of SPLITS spans of its negatives."""
    REAL: tl.constexpr = inputs.query.dtype.element_ty
    pid = tl.program_id(0)
    first = (pid % kind.CHUNKS) * kind.WIDTH
    split = pid // kind.CHUNKS % SPLITS
    b = (pid // (kind.CHUNKS * SPLITS)).to(tl.int64)
    j = components(first, kind.WIDTH)
    inside = j < kind.W
    own = tl.load(inputs.positive + b)
    own = tl.where((own >= 0) & (own < N), own, 0)  # a row to read: its weights are NaN
    q0, q1 = load_parts(inputs.query, b * kind.D, j, inside, kind, REAL)
    a0, a1 = load_scale(inputs.scale, b, j, inside, q0, kind, REAL)
    z0, z1 = load_parts(inputs.table, own * kind.STRIDE, j, inside, kind, REAL)
    tz0, tz1, dz0, dz1 = tile_terms(q0, q1, a0, a1, z0, z1, kind)
    gq0 = no_tile(inputs.table, kind.STRIDE, j, K, kind, REAL)
    gq1, gz0, gz1, ga0, ga1 = gq0, gq0, gq0, gq0, gq0
    row = row_offset + b + tl.zeros((kind.ROWS,), tl.int64)
    seed_value = tl.load(inputs.seed)
    sums = B.to(tl.int64) * K
    bound0, bound1 = load_bounds(inputs.thresholds, threshold, first, kind)
    span = tl.cdiv(tl.cdiv(K, SPLITS), kind.ROWS) * kind.ROWS
    for start in range(split * span, tl.minimum(split * span + span, K), kind.ROWS):
        k = start + tl.arange(0, kind.ROWS)
        valid = k < K
        ids = tl.load(inputs.negative + (b // R) * K + k, mask=valid, other=-1)
        real = (ids >= 0) & (ids < N)
        c0, c1 = load_parts(
            inputs.table, spread(ids * kind.STRIDE), j, inside & spread(real), kind, REAL
        )
        t0, t1, d0, d1 = tile_terms(q0, q1, a0, a1, c0, c1, kind)
        at = b * K + k
        w0, w1 = load_sums(weight, at, sums, valid, kind)
        w0, w1 = spread(w0), spread(w1)
        gq0 = tl.fma(w0, d0, gq0)
        if kind.PARTS == 2:
            gq1 = tl.fma(w1, d1, gq1)
        if kind.SECOND_SCALED:
            if kind.SCALED:
                ga0 = tl.fma(-w0 * d0, c0, ga0)
            if kind.PARTS == 2:
                ga1 = tl.fma(-w1 * d1, c1, ga1)
        if kind.MUTATED:
            l0, l1 = draw(
                seed_value, bound0, bound1, k, row, first, kind, REAL,
            )  # fmt: skip
            _, _, md0, md1 = mutated_terms(
                q0, q1, a0, a1, c0, c1, z0, z1, tz0, tz1, dz0, dz1, t0, t1, d0, d1, l0, l1,
                kind,
            )  # fmt: skip
            h0, h1 = load_sums(mutated_weight, at, sums, valid, kind)
            h0, h1 = spread(h0), spread(h1)
            gq0 = tl.fma(h0, md0, gq0)
            if kind.BILINEAR:
                gz0 += give(l0, h0, kind)
            else:
                gz0 += give(l0, h0 * md0, kind)
            if kind.PARTS == 2:
                gq1 = tl.fma(h1, md1, gq1)
                if kind.BILINEAR:
                    gz1 += give(l1, h1, kind)
                else:
                    gz1 += give(l1, h1 * md1, kind)
            if kind.SECOND_SCALED:
                if kind.SCALED:
                    ga0 = tl.fma(-h0 * md0, mix(z0, c0, l0, kind), ga0)
                if kind.PARTS == 2:
                    ga1 = tl.fma(-h1 * md1, mix(z1, c1, l1, kind), ga1)
    finish_gradient(
        q0, q1, a0, a1, z0, z1, dz0, dz1,
        over_rows(gq0), over_rows(gq1),
        over_rows(gz0), over_rows(gz1),
        over_rows(ga0), over_rows(ga1),
        positive_weight, split == 0, b, split * B.to(tl.int64) + b, B, j, inside,
        grad_query, grad_positive, grad_scale, kind,
    )  # fmt: skip


@triton.jit
def finish_gradient(
    q0,
    q1,
    a0,
    a1,
    z0,
    z1,
    dz0,
    dz1,
    gq0,  # (1, WIDTH), of all negatives, as the next
    gq1,
    gz0,  # by the positive, but for a factor that all share
    gz1,
    ga0,
    ga1,
    positive_weight,
    own,  # whether to add the positive's own part
    b,
    row_out,
    B,
    j,
    inside,
    grad_query,
    grad_positive,
    grad_scale,
    kind: tl.constexpr,
):
    w0 = tl.where(own, tl.load(positive_weight + b), 0.0)
    w1 = w0
    if kind.SUMS == 2:
        w1 = tl.where(own, tl.load(positive_weight + B + b), 0.0)
    gq0 += w0 * dz0
    gq1 += w1 * dz1
    if kind.BILINEAR:
        gz0 = (gz0 + w0) * q0
        gz1 = (gz1 + w1) * q1
    else:
        gz0 = -(gz0 + w0 * dz0)
        gz1 = -(gz1 + w1 * dz1)
    if grad_scale is not None:
        if not kind.SCALED:
            tl.store(grad_scale + (row_out * kind.W + j), ga1 - w1 * dz1 * z1, mask=inside)
        else:
            store_parts(
                grad_scale, row_out * (kind.D), j, inside,
                ga0 - w0 * dz0 * z0, ga1 - w1 * dz1 * z1, kind,
            )  # fmt: skip
            gz0 *= a0
        gz1 *= a1
    store_parts(grad_query, row_out * (kind.D), j, inside, gq0, gq1, kind)
    store_parts(grad_positive, row_out * (kind.D), j, inside, gz0, gz1, kind)
