"""Entity-major: the gradient of the table from sorted ids, each touched row written once; and an
alternative, query-major with atomic additions."""

from __future__ import annotations

import triton.language as tl

import triton
from emu_kernels.triton.forward import scale_parts
from emu_kernels.triton.kinds import SIZES, Sizes
from emu_kernels.triton.tiles import (
    components,
    draw,
    keep,
    keep_terms,
    load_bounds,
    load_parts,
    load_rates,
    load_scale,
    load_sums,
    minus,
    mix_parts,
    no_tile,
    over_rows,
    spread,
    store_parts,
    terms,
    zeros,
)

VARYING = [name for name in SIZES if name != "R"]
"""Not R, which is specialized: if it is 1 (a set of negatives for each row), divisions vanish."""


@triton.jit
def _load_weights(pointer, rows, k, sizes, valid, factor, kind: tl.constexpr):
    """Tiles of each sum's weights, times a factor of each row."""
    each = sizes.B.to(tl.int64) * sizes.K
    weights = load_sums(pointer, rows * sizes.K + k, each, valid, kind)
    return [spread(w * factor) for w in weights]


@triton.jit
def contributions(
    inputs,
    sizes,
    row_scale,
    weight,
    mutated_weight,
    variance_weight,
    seed,
    bounds,
    rows,  # (ROWS,) b
    k,  # (ROWS,)
    valid,  # (ROWS,)
    c,  # candidates, broadcastable to the tile
    first,
    kind: tl.constexpr,
):
    """Tiles of each part: the gradients of candidates k of rows b, 0 where not valid."""
    REAL: tl.constexpr = inputs.query.dtype.element_ty
    j = components(first, kind.WIDTH)
    inside = spread(valid) & (j < kind.W)
    b = spread(rows)
    factor = tl.load(row_scale + rows, mask=valid, other=0.0)
    w = _load_weights(weight, rows, k, sizes, valid, factor, kind)
    h = w
    if kind.MUTATED:
        h = _load_weights(mutated_weight, rows, k, sizes, valid, factor, kind)
    q = load_parts(inputs.query, b * kind.D, j, inside, kind, REAL)
    a = load_scale(inputs.scale, b, j, inside, q[0], kind, REAL)
    if not kind.MUTATED:
        _, d = terms(q, a, c, kind)
        x = [w[i % kind.SUMS] for i in (0, 1)[: kind.PARTS]]
        g = _by_candidate(x, q, d, kind)
    elif kind.MOMENTS:
        v = _load_weights(variance_weight, rows, k, sizes, valid, factor, kind)
        rates = load_rates(inputs.rate, b, j, inside, kind, REAL)
        p, _ = terms(q, a, _load_positive(inputs, rows, sizes.N, j, valid, kind, REAL), kind)
        t, d = terms(q, a, c, kind)
        x = keep_terms(w, h, v, minus(t, p, kind), rates, kind)
        g = _by_candidate([x[i % kind.SUMS] for i in (0, 1)[: kind.PARTS]], q, d, kind)
    else:
        drawn = draw(seed, bounds, k, sizes.row_offset + rows, first, kind, REAL)
        if (kind.COUPLED or kind.SHARED) and (not kind.BILINEAR):
            # The terms' derivatives at ẑ are neither the candidate's nor the positive's.
            z = _load_positive(inputs, rows, sizes.N, j, valid, kind, REAL)
            _, d = terms(q, a, c, kind)
            _, e = terms(q, a, mix_parts(z, c, drawn, kind), kind)
            g = _of_both(w, d, h, e, drawn, kind)
        else:
            _, d = terms(q, a, c, kind)
            g = _by_candidate(_kept(w, h, drawn, kind), q, d, kind)
    return scale_parts(a, g, kind)


@triton.jit
def _load_positive(inputs, rows, N, j, valid, kind: tl.constexpr, REAL: tl.constexpr):
    own = spread(tl.load(inputs.positive + rows, mask=valid, other=0))
    own = tl.where((own >= 0) & (own < N), own, 0)
    inside = spread(valid) & (j < kind.W)
    return load_parts(inputs.table, own * kind.STRIDE, j, inside, kind, REAL)


@triton.jit
def _kept(w, h, drawn, kind: tl.constexpr):
    return [w[i % kind.SUMS] + keep(drawn[i], h[i % kind.SUMS], kind) for i in (0, 1)[: kind.PARTS]]


@triton.jit
def _by_candidate(x, q, d, kind: tl.constexpr):
    """x times the terms' derivatives by the candidate, except for the scale."""
    if kind.BILINEAR:
        return [x[i] * q[i] for i in (0, 1)[: kind.PARTS]]
    else:
        return [-x[i] * d[i] for i in (0, 1)[: kind.PARTS]]


@triton.jit
def _of_both(w, d, h, e, drawn, kind: tl.constexpr):
    return [
        -tl.fma(w[i % kind.SUMS], d[i], keep(drawn[i], h[i % kind.SUMS] * e[i], kind))
        for i in (0, 1)[: kind.PARTS]
    ]


@triton.jit
def _add_parts(x, y, kind: tl.constexpr):
    return [x[i] + y[i] for i in (0, 1)[: kind.PARTS]]


@triton.jit(do_not_specialize=[*VARYING, "entries", "negatives"])
def table_gradient(
    inputs, kind: tl.constexpr, B, K, R, N, row_offset, threshold,
    row_scale,
    weight,
    mutated_weight,
    variance_weight,
    grad_positive,
    keys,  # (entries,) sorted ids, N for padding and bad ids
    order,  # (entries,) the index of each before sorting: negatives first, then positives
    slots,  # (entries,) row of `out` for each entry
    out,
    partial,  # (pieces, 2, D): sums of segments that begin before a piece, or end after it
    entries,
    negatives,
    PIECE: tl.constexpr,
):  # fmt: skip
    """One program: PIECE entries, segment by segment in order, for a chunk of components."""
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
    seed = tl.load(inputs.seed)
    sizes = Sizes(B, K, R, N, row_offset, threshold)
    bounds = load_bounds(inputs.thresholds, threshold, first, kind)
    entry = begin
    key = tl.load(keys + begin)
    while (entry < end) & (key < N):
        same = lane_key == key
        of_negatives = tl.sum((same & lane_negative).to(tl.int32), 0)
        following = entry + tl.sum(same.to(tl.int32), 0)
        c = load_parts(inputs.table, key.to(tl.int64) * kind.STRIDE, j, j < kind.W, kind, REAL)
        total = no_tile(inputs.query, kind.D, j, K, kind, REAL)
        for start in range(0, of_negatives * R, kind.ROWS):
            pair = start + tl.arange(0, kind.ROWS)
            valid = pair < of_negatives * R
            # In 32 bits, as a division in 64 bits is a function call.
            origin = tl.load(order + entry + pair // R, mask=valid, other=0).to(tl.int32)
            rows = (origin // K * R + pair % R).to(tl.int64)
            g = contributions(
                inputs, sizes, row_scale, weight, mutated_weight, variance_weight, seed, bounds,
                rows, origin % K, valid, c, first, kind,
            )  # fmt: skip
            total = _add_parts(total, g, kind)
        for start in range(entry + of_negatives, following, kind.ROWS):
            at = start + tl.arange(0, kind.ROWS)
            valid = at < following
            rows = tl.load(order + at, mask=valid, other=negatives) - negatives
            factor = spread(tl.load(row_scale + rows, mask=valid, other=0.0))
            inside = spread(valid) & (j < kind.W)
            g = load_parts(grad_positive, spread(rows * kind.D), j, inside, kind, REAL)
            total = [tl.fma(factor, g[i], total[i]) for i in (0, 1)[: kind.PARTS]]
        total = over_rows(total)
        head = (entry == begin) & (before == key)
        tail = (following == end) & (after == key)
        slot = tl.load(slots + entry).to(tl.int64)
        if head | tail:
            row = piece * 2 + tl.where(head, 0, 1)
            store_parts(partial, row * kind.D, j, j < kind.W, total, kind)
        else:
            store_parts(out, slot * kind.D, j, j < kind.W, total, kind)
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
    """One program: a chunk of components of the segment, if there is one, that begins in a piece
    and goes on in the next."""
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


@triton.jit
def _atomic_add(pointer, base, j, inside, parts, kind: tl.constexpr):
    PARTS: tl.constexpr = kind.PARTS
    for i in tl.static_range(PARTS):
        tl.atomic_add(pointer + (base + (i * kind.W + j)), parts[i], mask=inside, sem="relaxed")


@triton.jit(do_not_specialize=VARYING)
def scatter(
    inputs, kind: tl.constexpr, B, K, R, N, row_offset, threshold,
    row_scale,
    weight,
    mutated_weight,
    variance_weight,
    grad_positive,
    out,  # (N, D) real, zeros
):  # fmt: skip
    """One program: ROWS negatives of a row, and with the first ones its positive, for a chunk of
    components."""
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
    c = load_parts(inputs.table, spread(ids * kind.STRIDE), j, inside, kind, REAL)
    rows = b + zeros(kind, tl.int64)
    g = contributions(
        inputs, Sizes(B, K, R, N, row_offset, threshold), row_scale, weight, mutated_weight,
        variance_weight, tl.load(inputs.seed),
        load_bounds(inputs.thresholds, threshold, first, kind), rows, k, real, c, first, kind,
    )  # fmt: skip
    _atomic_add(out, spread(ids * kind.D), j, inside, g, kind)
    own = tl.load(inputs.positive + b)
    inside = j < tl.where((block == 0) & (own >= 0) & (own < N), kind.W, 0)
    factor = tl.load(row_scale + b)
    g = load_parts(grad_positive, b * kind.D, j, inside, kind, REAL)
    _atomic_add(out, own * kind.D, j, inside, [factor * x for x in g], kind)
