"""Entity-major: the gradient of the table from sorted ids, each touched row written once; and its
rival, query-major with atomic additions."""

from __future__ import annotations

import triton.language as tl

import triton
from emu_kernels.triton.kinds import SIZES, Sizes
from emu_kernels.triton.tiles import (
    components,
    draw,
    keep,
    load_bounds,
    load_parts,
    load_scale,
    load_sums,
    mix,
    no_tile,
    over_rows,
    spread,
    store_parts,
    tile_terms,
)

VARYING = [name for name in SIZES if name != "R"]
"""R is specialised: where it is 1, a set of negatives a row, nothing is divided by it."""


@triton.jit
def contributions(
    inputs,
    sizes,
    row_scale,
    weight,
    mutated_weight,
    seed_value,
    bound0,
    bound1,
    rows,  # (ROWS,) b
    k,  # (ROWS,)
    valid,  # (ROWS,)
    c0,  # candidates, broadcastable to the tile
    c1,
    first,
    kind: tl.constexpr,
):
    """Tiles of both parts: the gradients of candidates k of rows b, 0 where not valid."""
    REAL: tl.constexpr = inputs.query.dtype.element_ty
    j = components(first, kind.WIDTH)
    inside = spread(valid) & (j < kind.W)
    b = spread(rows)
    factor = tl.load(row_scale + rows, mask=valid, other=0.0)
    at = rows * sizes.K + k
    each = sizes.B.to(tl.int64) * sizes.K
    w0, w1 = load_sums(weight, at, each, valid, kind)
    w0, w1 = spread(w0 * factor), spread(w1 * factor)
    h0, h1 = w0, w1
    if kind.MUTATED:
        h0, h1 = load_sums(mutated_weight, at, each, valid, kind)
        h0, h1 = spread(h0 * factor), spread(h1 * factor)
    q0, q1 = load_parts(inputs.query, b * kind.D, j, inside, kind, REAL)
    a0, a1 = load_scale(inputs.scale, b, j, inside, q0, kind, REAL)
    if kind.MUTATED:
        l0, l1 = draw(
            seed_value, bound0, bound1, k, sizes.row_offset + rows, first, kind, REAL,
        )  # fmt: skip
    if kind.BILINEAR or (not kind.MUTATED):
        x0, x1 = w0, w1
        if kind.MUTATED:
            x0 = w0 + keep(l0, h0, kind)
            x1 = x0
            if kind.PARTS == 2:
                x1 = w1 + keep(l1, h1, kind)
        if kind.BILINEAR:
            g0, g1 = x0 * q0, x1 * q1
        else:
            _, _, d0, d1 = tile_terms(q0, q1, a0, a1, c0, c1, kind)
            g0, g1 = -x0 * d0, -x1 * d1
    elif kind.COUPLED or kind.SHARED:
        own = spread(tl.load(inputs.positive + rows, mask=valid, other=0))
        own = tl.where((own >= 0) & (own < sizes.N), own, 0)
        z0, z1 = load_parts(inputs.table, own * kind.STRIDE, j, inside, kind, REAL)
        _, _, d0, d1 = tile_terms(q0, q1, a0, a1, c0, c1, kind)
        y0 = mix(z0, c0, l0, kind)
        y1 = y0
        if kind.PARTS == 2:
            y1 = mix(z1, c1, l1, kind)
        _, _, e0, e1 = tile_terms(q0, q1, a0, a1, y0, y1, kind)
        g0 = -tl.fma(w0, d0, keep(l0, h0 * e0, kind))
        g1 = g0
        if kind.PARTS == 2:
            g1 = -tl.fma(w1, d1, keep(l1, h1 * e1, kind))
    else:
        _, _, d0, d1 = tile_terms(q0, q1, a0, a1, c0, c1, kind)
        g0 = -(w0 + keep(l0, h0, kind)) * d0
        g1 = g0
        if kind.PARTS == 2:
            g1 = -(w1 + keep(l1, h1, kind)) * d1
    if kind.SECOND_SCALED:
        if kind.SCALED:
            g0 *= a0
        g1 *= a1
    return g0, g1


@triton.jit(do_not_specialize=[*VARYING, "entries", "negatives"])
def table_gradient(
    inputs,
    kind: tl.constexpr,
    B,
    K,
    R,
    N,
    row_offset,
    threshold,
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
    negatives,
    PIECE: tl.constexpr,
):
    """One program: a chunk of components, PIECE entries, segment by segment, in order."""
    REAL: tl.constexpr = inputs.query.dtype.element_ty
    first = (tl.program_id(0) % kind.CHUNKS) * kind.WIDTH
    piece = (tl.program_id(0) // kind.CHUNKS).to(tl.int64)
    begin = piece * PIECE
    end = tl.minimum(begin + PIECE, entries)
    j = components(first, kind.WIDTH)
    lane = begin + tl.arange(0, PIECE)
    lane_key = tl.load(keys + lane, mask=lane < end, other=-1)
    lane_negative = tl.load(order + lane, mask=lane < end, other=negatives) < negatives
    before = tl.load(keys + begin - 1, mask=begin > 0, other=-1)
    after = tl.load(keys + end, mask=end < entries, other=-1)
    seed_value = tl.load(inputs.seed)
    sizes = Sizes(B, K, R, N, row_offset, threshold)
    bound0, bound1 = load_bounds(inputs.thresholds, threshold, first, kind)
    entry = begin
    key = tl.load(keys + begin)
    while (entry < end) & (key < N):
        same = lane_key == key
        of_negatives = tl.sum((same & lane_negative).to(tl.int32), 0)
        following = entry + tl.sum(same.to(tl.int32), 0)
        c0, c1 = load_parts(inputs.table, key.to(tl.int64) * kind.STRIDE, j, j < kind.W, kind, REAL)
        sum0 = no_tile(inputs.query, kind.D, j, K, kind, REAL)
        sum1 = sum0
        for start in range(0, of_negatives * R, kind.ROWS):
            pair = start + tl.arange(0, kind.ROWS)
            valid = pair < of_negatives * R
            # In 32 bits: a division in 64 is a function call.
            origin = tl.load(order + entry + pair // R, mask=valid, other=0).to(tl.int32)
            rows = (origin // K * R + pair % R).to(tl.int64)
            g0, g1 = contributions(
                inputs, sizes, row_scale, weight, mutated_weight, seed_value, bound0, bound1,
                rows, origin % K, valid, c0, c1, first, kind,
            )  # fmt: skip
            sum0 += g0
            sum1 += g1
        for start in range(entry + of_negatives, following, kind.ROWS):
            at = start + tl.arange(0, kind.ROWS)
            valid = at < following
            rows = tl.load(order + at, mask=valid, other=negatives) - negatives
            factor = spread(tl.load(row_scale + rows, mask=valid, other=0.0))
            g0, g1 = load_parts(
                grad_positive, spread(rows * kind.D), j, spread(valid) & (j < kind.W), kind, REAL
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
            store_parts(partial, row * kind.D, j, j < kind.W, total0, total1, kind)
        else:
            store_parts(out, slot * kind.D, j, j < kind.W, total0, total1, kind)
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
    inputs,
    kind: tl.constexpr,
    B,
    K,
    R,
    N,
    row_offset,
    threshold,
    row_scale,
    weight,
    mutated_weight,
    grad_positive,
    out,  # (N, D) real, zeros
):
    """One program: ROWS negatives of a row, a chunk of components; the row's positive with the
    first."""
    REAL: tl.constexpr = inputs.query.dtype.element_ty
    pid = tl.program_id(0)
    first = (pid % kind.CHUNKS) * kind.WIDTH
    blocks = tl.maximum(tl.cdiv(K, kind.ROWS), 1)
    block = pid // kind.CHUNKS % blocks
    b = (pid // kind.CHUNKS // blocks).to(tl.int64)
    k = block * kind.ROWS + tl.arange(0, kind.ROWS)
    ids = tl.load(inputs.negative + (b // R) * K + k, mask=k < K, other=-1)
    real = (ids >= 0) & (ids < N)
    j = components(first, kind.WIDTH)
    inside = spread(real) & (j < kind.W)
    c0, c1 = load_parts(inputs.table, spread(ids * kind.STRIDE), j, inside, kind, REAL)
    rows = b + tl.zeros((kind.ROWS,), tl.int64)
    sizes = Sizes(B, K, R, N, row_offset, threshold)
    bound0, bound1 = load_bounds(inputs.thresholds, threshold, first, kind)
    g0, g1 = contributions(
        inputs, sizes, row_scale, weight, mutated_weight, tl.load(inputs.seed), bound0, bound1,
        rows, k, real, c0, c1, first, kind,
    )  # fmt: skip
    at = spread(ids * kind.D) + j
    tl.atomic_add(out + at, g0, mask=inside, sem="relaxed")
    if kind.PARTS == 2:
        tl.atomic_add(out + (at + kind.W), g1, mask=inside, sem="relaxed")
    own = tl.load(inputs.positive + b)
    inside = j < tl.where((block == 0) & (own >= 0) & (own < N), kind.W, 0)
    factor = tl.load(row_scale + b)
    z0, z1 = load_parts(grad_positive, b * kind.D, j, inside, kind, REAL)
    tl.atomic_add(out + (own * kind.D + j), factor * z0, mask=inside, sem="relaxed")
    if kind.PARTS == 2:
        tl.atomic_add(out + (own * kind.D + kind.W + j), factor * z1, mask=inside, sem="relaxed")
