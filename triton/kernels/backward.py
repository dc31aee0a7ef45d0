"""Entity-major: the gradient of the table from sorted ids, each touched row written once; and its
rival, query-major with atomic additions."""

from __future__ import annotations

import triton.language as tl

import triton
from emu_kernels.triton.tiles import (
    components,
    draw,
    keep,
    load_bounds,
    load_parts,
    load_scale,
    mix,
    no_tile,
    over_rows,
    spread,
    store_parts,
    tile_terms,
)

VARYING = ["entries", "B", "K", "N", "negatives", "row_offset", "threshold"]
"""Arguments on whose values no code depends. Where R is 1 nothing is divided by it."""


@triton.jit
def contributions(
    query,
    table,
    scale,
    positive,
    seed_value,
    bound0,
    bound1,
    row_scale,
    weight,
    mutated_weight,
    rows,  # (ROWS,) b
    k,  # (ROWS,)
    valid,  # (ROWS,)
    c0,  # candidates, broadcastable to the tile
    c1,
    first,
    B,
    K,
    N,
    row_offset,
    D: tl.constexpr,
    STRIDE: tl.constexpr,
    PARTS: tl.constexpr,
    SIM: tl.constexpr,
    HALF: tl.constexpr,
    MUTATION: tl.constexpr,
    ORDER: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Tiles of both parts: the gradients of candidates k of rows b, 0 where not valid."""
    W: tl.constexpr = D // PARTS
    SCALED: tl.constexpr = scale is not None
    REAL: tl.constexpr = query.dtype.element_ty
    j = components(first, WIDTH)
    inside = spread(valid) & (j < W)
    b = spread(rows)
    factor = tl.load(row_scale + rows, mask=valid, other=0.0)
    at = rows * K + k
    w0 = spread(tl.load(weight + at, mask=valid, other=0.0) * factor)
    w1 = w0
    sums = B.to(tl.int64) * K
    if SIM == "hake":
        w1 = spread(tl.load(weight + sums + at, mask=valid, other=0.0) * factor)
    h0, h1 = w0, w1
    if MUTATION != "none":
        h0 = spread(tl.load(mutated_weight + at, mask=valid, other=0.0) * factor)
        h1 = h0
        if SIM == "hake":
            h1 = spread(tl.load(mutated_weight + sums + at, mask=valid, other=0.0) * factor)
    q0, q1 = load_parts(query, b * D, j, inside, W, PARTS, REAL)
    a0, a1 = load_scale(scale, b, j, inside, q0, W, PARTS, SIM, REAL)
    if MUTATION != "none":
        l0, l1 = draw(
            seed_value, bound0, bound1, k, row_offset + rows, first,
            W, PARTS, MUTATION, ORDER, ROWS, WIDTH, REAL,
        )  # fmt: skip
    if (SIM == "dot") or (MUTATION == "none"):
        x0, x1 = w0, w1
        if MUTATION != "none":
            x0 = w0 + keep(l0, h0, MUTATION)
            x1 = x0
            if PARTS == 2:
                x1 = w1 + keep(l1, h1, MUTATION)
        if SIM == "dot":
            g0, g1 = x0 * q0, x1 * q1
        else:
            _, _, d0, d1 = tile_terms(q0, q1, a0, a1, c0, c1, HALF, SCALED, PARTS, SIM)
            g0, g1 = -x0 * d0, -x1 * d1
    elif (SIM == "rotate") or (MUTATION == "mixup"):
        own = spread(tl.load(positive + rows, mask=valid, other=0))
        own = tl.where((own >= 0) & (own < N), own, 0)
        z0, z1 = load_parts(table, own * STRIDE, j, inside, W, PARTS, REAL)
        _, _, d0, d1 = tile_terms(q0, q1, a0, a1, c0, c1, HALF, SCALED, PARTS, SIM)
        y0 = mix(z0, c0, l0, MUTATION)
        y1 = y0
        if PARTS == 2:
            y1 = mix(z1, c1, l1, MUTATION)
        _, _, e0, e1 = tile_terms(q0, q1, a0, a1, y0, y1, HALF, SCALED, PARTS, SIM)
        g0 = -tl.fma(w0, d0, keep(l0, h0 * e0, MUTATION))
        g1 = g0
        if PARTS == 2:
            g1 = -tl.fma(w1, d1, keep(l1, h1 * e1, MUTATION))
    else:
        _, _, d0, d1 = tile_terms(q0, q1, a0, a1, c0, c1, HALF, SCALED, PARTS, SIM)
        g0 = -(w0 + keep(l0, h0, MUTATION)) * d0
        g1 = g0
        if PARTS == 2:
            g1 = -(w1 + keep(l1, h1, MUTATION)) * d1
    if SCALED:
        if SIM != "hake":
            g0 *= a0
        g1 *= a1
    return g0, g1


@triton.jit(do_not_specialize=VARYING)
def table_gradient(
    query,
    table,
    scale,
    positive,
    seed,
    thresholds,
    row_scale,
    weight,
    mutated_weight,
    grad_positive,
    keys,  # (entries,) sorted ids, N where padding or bad
    order,  # (entries,) which id each was: of negatives first, then of positives
    slots,  # (entries,) row of `out` for each entry
    out,
    partial,  # (pieces, 2, D): sums of segments that began before and that end after a piece
    entries,
    B,
    K,
    R,  # rows that share a set of negatives
    N,
    negatives,
    row_offset,
    threshold,
    D: tl.constexpr,
    STRIDE: tl.constexpr,
    PARTS: tl.constexpr,
    SIM: tl.constexpr,
    HALF: tl.constexpr,
    MUTATION: tl.constexpr,
    ORDER: tl.constexpr,
    PIECE: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One program: a chunk of components, PIECE entries, segment by segment, in order."""
    W: tl.constexpr = D // PARTS
    REAL: tl.constexpr = query.dtype.element_ty
    CHUNKS: tl.constexpr = (W + WIDTH - 1) // WIDTH
    first = (tl.program_id(0) % CHUNKS) * WIDTH
    piece = (tl.program_id(0) // CHUNKS).to(tl.int64)
    begin = piece * PIECE
    end = tl.minimum(begin + PIECE, entries)
    j = components(first, WIDTH)
    lane = begin + tl.arange(0, PIECE)
    lane_key = tl.load(keys + lane, mask=lane < end, other=-1)
    lane_negative = tl.load(order + lane, mask=lane < end, other=negatives) < negatives
    before = tl.load(keys + begin - 1, mask=begin > 0, other=-1)
    after = tl.load(keys + end, mask=end < entries, other=-1)
    seed_value = tl.load(seed)
    bound0, bound1 = load_bounds(thresholds, threshold, first, W, PARTS, MUTATION, WIDTH)
    entry = begin
    key = tl.load(keys + begin)
    while (entry < end) & (key < N):
        same = lane_key == key
        of_negatives = tl.sum((same & lane_negative).to(tl.int32), 0)
        following = entry + tl.sum(same.to(tl.int32), 0)
        c0, c1 = load_parts(table, key.to(tl.int64) * STRIDE, j, j < W, W, PARTS, REAL)
        sum0 = no_tile(query, j, K, REAL, D, ROWS)
        sum1 = sum0
        for start in range(0, of_negatives * R, ROWS):
            pair = start + tl.arange(0, ROWS)
            valid = pair < of_negatives * R
            # In 32 bits: a division in 64 is a function call.
            origin = tl.load(order + entry + pair // R, mask=valid, other=0).to(tl.int32)
            rows = (origin // K * R + pair % R).to(tl.int64)
            g0, g1 = contributions(
                query, table, scale, positive, seed_value, bound0, bound1, row_scale, weight,
                mutated_weight, rows, origin % K, valid, c0, c1, first, B, K, N, row_offset,
                D, STRIDE, PARTS, SIM, HALF, MUTATION, ORDER, ROWS, WIDTH,
            )  # fmt: skip
            sum0 += g0
            sum1 += g1
        for start in range(entry + of_negatives, following, ROWS):
            at = start + tl.arange(0, ROWS)
            valid = at < following
            rows = tl.load(order + at, mask=valid, other=negatives) - negatives
            factor = spread(tl.load(row_scale + rows, mask=valid, other=0.0))
            g0, g1 = load_parts(
                grad_positive, spread(rows * D), j, spread(valid) & (j < W), W, PARTS, REAL
            )
            sum0 = tl.fma(factor, g0, sum0)
            sum1 = tl.fma(factor, g1, sum1)
        total0 = over_rows(sum0)
        total1 = over_rows(sum1)
        head = (entry == begin) & (before == key)
        tail = (following == end) & (after == key)
        slot = tl.load(slots + entry).to(tl.int64)
        if head | tail:
            row = piece * 2 + tl.where(head, 0, 1)
            store_parts(partial, row * D, j, j < W, total0, total1, W, PARTS)
        else:
            store_parts(out, slot * D, j, j < W, total0, total1, W, PARTS)
        entry = following
        key = tl.load(keys + entry, mask=entry < end, other=N)


@triton.jit(do_not_specialize=["entries", "N"])
def join_segments(
    keys,
    slots,
    partial,
    out,
    entries,
    N,
    D: tl.constexpr,
    PIECE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One program: a chunk of components of the segment, if any, that begins in a piece and goes on
    in the next."""
    CHUNKS: tl.constexpr = (D + WIDTH - 1) // WIDTH
    piece = (tl.program_id(0) // CHUNKS).to(tl.int64)
    j = (tl.program_id(0) % CHUNKS) * WIDTH + tl.arange(0, WIDTH)
    begin = piece * PIECE
    end = begin + PIECE
    key = tl.load(keys + end - 1, mask=end < entries, other=N)
    goes_on = tl.load(keys + end, mask=end < entries, other=N) == key
    began_before = (begin > 0) & (tl.load(keys + begin - 1, mask=begin > 0, other=N) == key)
    if (key < N) & goes_on & ~began_before:
        total = tl.load(partial + (piece * 2 + 1) * D + j, mask=j < D, other=0.0)
        at = piece + 1
        while goes_on:
            total += tl.load(partial + at * 2 * D + j, mask=j < D, other=0.0)
            at += 1
            # Whether piece `at` still begins with the segment.
            goes_on = tl.load(keys + at * PIECE, mask=at * PIECE < entries, other=N) == key
        slot = tl.load(slots + end - 1).to(tl.int64)
        tl.store(out + slot * D + j, total.to(out.dtype.element_ty), mask=j < D)


@triton.jit(do_not_specialize=VARYING)
def scatter(
    query,
    table,
    scale,
    positive,
    negative,
    seed,
    thresholds,
    row_scale,
    weight,
    mutated_weight,
    grad_positive,
    out,  # (N, D) real, zeros
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
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One program: ROWS negatives of a row, a chunk of components; the row's positive with the
    first."""
    W: tl.constexpr = D // PARTS
    REAL: tl.constexpr = query.dtype.element_ty
    CHUNKS: tl.constexpr = (W + WIDTH - 1) // WIDTH
    pid = tl.program_id(0)
    first = (pid % CHUNKS) * WIDTH
    blocks = tl.maximum(tl.cdiv(K, ROWS), 1)
    block = pid // CHUNKS % blocks
    b = (pid // CHUNKS // blocks).to(tl.int64)
    k = block * ROWS + tl.arange(0, ROWS)
    ids = tl.load(negative + (b // R) * K + k, mask=k < K, other=-1)
    real = (ids >= 0) & (ids < N)
    j = components(first, WIDTH)
    inside = spread(real) & (j < W)
    c0, c1 = load_parts(table, spread(ids * STRIDE), j, inside, W, PARTS, REAL)
    rows = b + tl.zeros((ROWS,), tl.int64)
    bound0, bound1 = load_bounds(thresholds, threshold, first, W, PARTS, MUTATION, WIDTH)
    g0, g1 = contributions(
        query, table, scale, positive, tl.load(seed), bound0, bound1, row_scale, weight,
        mutated_weight, rows, k, real, c0, c1, first, B, K, N, row_offset,
        D, STRIDE, PARTS, SIM, HALF, MUTATION, ORDER, ROWS, WIDTH,
    )  # fmt: skip
    at = spread(ids * D) + j
    tl.atomic_add(out + at, g0, mask=inside, sem="relaxed")
    if PARTS == 2:
        tl.atomic_add(out + (at + W), g1, mask=inside, sem="relaxed")
    own = tl.load(positive + b)
    inside = j < tl.where((block == 0) & (own >= 0) & (own < N), W, 0)
    factor = tl.load(row_scale + b)
    z0, z1 = load_parts(grad_positive, b * D, j, inside, W, PARTS, REAL)
    tl.atomic_add(out + (own * D + j), factor * z0, mask=inside, sem="relaxed")
    if PARTS == 2:
        tl.atomic_add(out + (own * D + W + j), factor * z1, mask=inside, sem="relaxed")
