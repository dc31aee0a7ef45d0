"""Query-major kernels in two passes, for rows of any length: sums of terms, then the weights of
sums, then gradients of the query from these weights, for a chunk of components at a time."""

from __future__ import annotations

import triton.language as tl

import triton
from emu_kernels.triton.similarities import value
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
    tile_terms,
)

VARYING = ["B", "K", "R", "N", "row_offset", "threshold"]
"""Arguments on whose values no code depends."""


@triton.jit
def combine(v0, v1, weights, SIM: tl.constexpr):
    """The score Σ_s w_s v_s."""
    score = v0
    if weights is not None:
        score = v0 * tl.load(weights).to(v0.dtype)
        if SIM == "hake":
            score += v1 * tl.load(weights + 1).to(v0.dtype)
    elif SIM == "hake":
        score = v0 + v1
    return score


@triton.jit(do_not_specialize=VARYING)
def scores(
    query,
    table,
    scale,
    weights,
    positive,
    negative,
    seed,
    thresholds,
    report,
    positive_out,  # (B,) score, or with VALUES (S, B) values v_s
    plain_out,  # (B, K), or (S, B, K)
    mutated_out,
    B,
    K,
    R,
    N,
    row_offset,
    threshold,
    D: tl.constexpr,
    STRIDE: tl.constexpr,
    PARTS: tl.constexpr,
    SIM: tl.constexpr,
    HALF: tl.constexpr,
    MUTATION: tl.constexpr,
    ORDER: tl.constexpr,
    VALUES: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One program: ROWS negatives of a row. Padding scores −inf; a row with a bad id NaN there."""
    W: tl.constexpr = D // PARTS
    SCALED: tl.constexpr = scale is not None
    REAL: tl.constexpr = query.dtype.element_ty
    blocks = tl.maximum(tl.cdiv(K, ROWS), 1)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    k = block * ROWS + tl.arange(0, ROWS)
    valid = k < K
    ids = tl.load(negative + (b // R) * K + k, mask=valid, other=-1)
    good = check_ids(ids, -1, N, report + 1, valid)
    real = good & (ids >= 0)
    own = tl.load(positive + b)
    own_good = check_ids(own, 0, N, report, own == own)
    own = tl.where(own_good, own, 0)  # a row to read: its scores become NaN
    s0 = tl.zeros((ROWS,), REAL)
    s1, m0, m1 = s0, s0, s0
    p0 = tl.zeros((1,), REAL)
    p1 = p0
    row = row_offset + b + tl.zeros((ROWS,), tl.int64)
    seed_value = tl.load(seed)
    for first in range(0, W, WIDTH):
        j = components(first, WIDTH)
        inside = j < W
        q0, q1 = load_parts(query, b * D, j, inside, W, PARTS, REAL)
        a0, a1 = load_scale(scale, b, j, inside, q0, W, PARTS, SIM, REAL)
        z0, z1 = load_parts(table, own * STRIDE, j, inside, W, PARTS, REAL)
        c0, c1 = load_parts(table, spread(ids * STRIDE), j, inside & spread(real), W, PARTS, REAL)
        tz0, tz1, dz0, dz1 = tile_terms(q0, q1, a0, a1, z0, z1, HALF, SCALED, PARTS, SIM)
        t0, t1, d0, d1 = tile_terms(q0, q1, a0, a1, c0, c1, HALF, SCALED, PARTS, SIM)
        more0, more1 = row_sums(t0, t1, PARTS, SIM)
        s0 += more0
        s1 += more1
        more0, more1 = row_sums(tz0, tz1, PARTS, SIM)
        p0 += more0
        p1 += more1
        if MUTATION != "none":
            bound0, bound1 = load_bounds(thresholds, threshold, first, W, PARTS, MUTATION, WIDTH)
            l0, l1 = draw(
                seed_value, bound0, bound1, k, row, first,
                W, PARTS, MUTATION, ORDER, ROWS, WIDTH, REAL,
            )  # fmt: skip
            mt0, mt1, _, _ = mutated_terms(
                q0, q1, a0, a1, c0, c1, z0, z1, tz0, tz1, dz0, dz1, t0, t1, d0, d1, l0, l1,
                HALF, SCALED, PARTS, SIM, MUTATION,
            )  # fmt: skip
            more0, more1 = row_sums(mt0, mt1, PARTS, SIM)
            m0 += more0
            m1 += more1
    nan = float("nan")
    minus_inf = float("-inf")
    p0 = tl.where(own_good, value(p0, False, SIM), nan)
    s0 = tl.where(good & own_good, value(s0, False, SIM), nan)
    p1 = value(p1, True, SIM)
    s1 = value(s1, True, SIM)
    at = b * K + k
    own_at = b + tl.arange(0, 1)
    if not VALUES:
        p0 = combine(p0, p1, weights, SIM)
        s0 = tl.where(ids == -1, minus_inf, combine(s0, s1, weights, SIM))
    if block == 0:
        tl.store(positive_out + own_at, p0)
        if VALUES and (SIM == "hake"):
            tl.store(positive_out + B + own_at, p1)
    tl.store(plain_out + at, s0, mask=valid)
    if VALUES and (SIM == "hake"):
        tl.store(plain_out + B.to(tl.int64) * K + at, s1, mask=valid)
    if MUTATION != "none":
        m0 = tl.where(good & own_good, value(m0, False, SIM), nan)
        m1 = value(m1, True, SIM)
        if not VALUES:
            m0 = tl.where(ids == -1, minus_inf, combine(m0, m1, weights, SIM))
        tl.store(mutated_out + at, m0, mask=valid)
        if VALUES and (SIM == "hake"):
            tl.store(mutated_out + B.to(tl.int64) * K + at, m1, mask=valid)


@triton.jit(do_not_specialize=VARYING)
def query_gradient(
    query,
    table,
    scale,
    positive,
    negative,
    seed,
    thresholds,
    positive_weight,  # (S, B) of sums, as the next two
    weight,  # (S, B, K)
    mutated_weight,
    grad_query,  # (SPLITS, B, D) each
    grad_positive,
    grad_scale,
    B,
    K,
    R,
    N,
    row_offset,
    threshold,
    D: tl.constexpr,
    STRIDE: tl.constexpr,
    PARTS: tl.constexpr,
    SIM: tl.constexpr,
    HALF: tl.constexpr,
    MUTATION: tl.constexpr,
    ORDER: tl.constexpr,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One program: a chunk of components of a row, over one of SPLITS spans of its negatives."""
    W: tl.constexpr = D // PARTS
    SCALED: tl.constexpr = scale is not None
    REAL: tl.constexpr = query.dtype.element_ty
    CHUNKS: tl.constexpr = (W + WIDTH - 1) // WIDTH
    pid = tl.program_id(0)
    first = (pid % CHUNKS) * WIDTH
    split = pid // CHUNKS % SPLITS
    b = (pid // (CHUNKS * SPLITS)).to(tl.int64)
    j = components(first, WIDTH)
    inside = j < W
    own = tl.load(positive + b)
    own = tl.where((own >= 0) & (own < N), own, 0)  # a row to read: its weights are NaN
    q0, q1 = load_parts(query, b * D, j, inside, W, PARTS, REAL)
    a0, a1 = load_scale(scale, b, j, inside, q0, W, PARTS, SIM, REAL)
    z0, z1 = load_parts(table, own * STRIDE, j, inside, W, PARTS, REAL)
    tz0, tz1, dz0, dz1 = tile_terms(q0, q1, a0, a1, z0, z1, HALF, SCALED, PARTS, SIM)
    gq0 = no_tile(table, j, K, REAL, STRIDE, ROWS)
    gq1, gz0, gz1, ga0, ga1 = gq0, gq0, gq0, gq0, gq0
    row = row_offset + b + tl.zeros((ROWS,), tl.int64)
    seed_value = tl.load(seed)
    sums = B.to(tl.int64) * K
    bound0, bound1 = load_bounds(thresholds, threshold, first, W, PARTS, MUTATION, WIDTH)
    span = tl.cdiv(tl.cdiv(K, SPLITS), ROWS) * ROWS
    for start in range(split * span, tl.minimum(split * span + span, K), ROWS):
        k = start + tl.arange(0, ROWS)
        valid = k < K
        ids = tl.load(negative + (b // R) * K + k, mask=valid, other=-1)
        real = (ids >= 0) & (ids < N)
        c0, c1 = load_parts(table, spread(ids * STRIDE), j, inside & spread(real), W, PARTS, REAL)
        t0, t1, d0, d1 = tile_terms(q0, q1, a0, a1, c0, c1, HALF, SCALED, PARTS, SIM)
        at = b * K + k
        w0 = spread(tl.load(weight + at, mask=valid, other=0.0))
        w1 = w0
        if SIM == "hake":
            w1 = spread(tl.load(weight + sums + at, mask=valid, other=0.0))
        gq0 = tl.fma(w0, d0, gq0)
        if PARTS == 2:
            gq1 = tl.fma(w1, d1, gq1)
        if SCALED:
            if SIM != "hake":
                ga0 = tl.fma(-w0 * d0, c0, ga0)
            if PARTS == 2:
                ga1 = tl.fma(-w1 * d1, c1, ga1)
        if MUTATION != "none":
            l0, l1 = draw(
                seed_value, bound0, bound1, k, row, first,
                W, PARTS, MUTATION, ORDER, ROWS, WIDTH, REAL,
            )  # fmt: skip
            _, _, md0, md1 = mutated_terms(
                q0, q1, a0, a1, c0, c1, z0, z1, tz0, tz1, dz0, dz1, t0, t1, d0, d1, l0, l1,
                HALF, SCALED, PARTS, SIM, MUTATION,
            )  # fmt: skip
            h0 = spread(tl.load(mutated_weight + at, mask=valid, other=0.0))
            h1 = h0
            if SIM == "hake":
                h1 = spread(tl.load(mutated_weight + sums + at, mask=valid, other=0.0))
            gq0 = tl.fma(h0, md0, gq0)
            if SIM == "dot":
                gz0 += give(l0, h0, MUTATION)
            else:
                gz0 += give(l0, h0 * md0, MUTATION)
            if PARTS == 2:
                gq1 = tl.fma(h1, md1, gq1)
                if SIM == "dot":
                    gz1 += give(l1, h1, MUTATION)
                else:
                    gz1 += give(l1, h1 * md1, MUTATION)
            if SCALED:
                if SIM != "hake":
                    ga0 = tl.fma(-h0 * md0, mix(z0, c0, l0, MUTATION), ga0)
                if PARTS == 2:
                    ga1 = tl.fma(-h1 * md1, mix(z1, c1, l1, MUTATION), ga1)
    finish_gradient(
        q0, q1, a0, a1, z0, z1, dz0, dz1,
        over_rows(gq0), over_rows(gq1),
        over_rows(gz0), over_rows(gz1),
        over_rows(ga0), over_rows(ga1),
        positive_weight, split == 0, b, split * B.to(tl.int64) + b, B, j, inside,
        grad_query, grad_positive, grad_scale, W, PARTS, SIM,
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
    W: tl.constexpr,
    PARTS: tl.constexpr,
    SIM: tl.constexpr,
):
    w0 = tl.where(own, tl.load(positive_weight + b), 0.0)
    w1 = w0
    if SIM == "hake":
        w1 = tl.where(own, tl.load(positive_weight + B + b), 0.0)
    gq0 += w0 * dz0
    gq1 += w1 * dz1
    if SIM == "dot":
        gz0 = (gz0 + w0) * q0
        gz1 = (gz1 + w1) * q1
    else:
        gz0 = -(gz0 + w0 * dz0)
        gz1 = -(gz1 + w1 * dz1)
    if grad_scale is not None:
        if SIM == "hake":
            tl.store(grad_scale + (row_out * W + j), ga1 - w1 * dz1 * z1, mask=inside)
        else:
            store_parts(
                grad_scale, row_out * (W * PARTS), j, inside,
                ga0 - w0 * dz0 * z0, ga1 - w1 * dz1 * z1, W, PARTS,
            )  # fmt: skip
            gz0 *= a0
        gz1 *= a1
    store_parts(grad_query, row_out * (W * PARTS), j, inside, gq0, gq1, W, PARTS)
    store_parts(grad_positive, row_out * (W * PARTS), j, inside, gz0, gz1, W, PARTS)
