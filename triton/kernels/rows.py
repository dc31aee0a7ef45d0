"""Query-major in one pass, for rows short enough to be held in registers while they are used.

Computes scores, and the sums from which all gradients by the query's side follow, while reading the
candidates once. The weights of a softmax are known only at the end, so sums are weighted by
e^(s − m), m being the largest logit so far; each row of a tile has its own m, so that nothing is
exchanged within the loop. As w_k = α p_k and ŵ_k = ((1 + βK) p̂_k − β)/K, three sums are needed:
weighted by e^(s − m), weighted by e^(ŝ − m̂), and plain.
"""

from __future__ import annotations

import triton.language as tl

import triton
from emu_kernels.triton.forward import finish_gradient, store_moments, store_scores
from emu_kernels.triton.kinds import SIZES
from emu_kernels.triton.similarities import combine, slopes, values
from emu_kernels.triton.tiles import (
    add_by_scale,
    add_kept,
    add_moments,
    add_products,
    components,
    draw,
    finish_moments,
    give,
    load_bounds,
    load_candidates,
    load_parts,
    load_query,
    load_rates,
    logit,
    mutate,
    negative_ids,
    no_moments,
    no_tile,
    of_parts,
    over_rows,
    positive_id,
    row_sums,
    spread,
    spread_sums,
    store_parts,
    store_sums,
    zeros,
)


@triton.jit
def _score(m, t, good, padding, inputs, id_at, out, at, each, valid, kind: tl.constexpr):
    """Stores the values of a tile's sums. Returns each row's new maximum, the factor by which its
    sums shrink, and the slopes ∂score/∂S with and without e^(s − m), 0 at padding."""
    v = values(row_sums(t, kind), good, kind)
    store_sums(out, at, each, valid, v, kind)
    s = logit(combine(v, inputs.weights, kind), inputs.negative_log_q, id_at, valid)
    s = tl.where(padding, float("-inf"), s)
    top = tl.maximum(m, s)
    e = tl.exp(s - top)
    r = [tl.where(padding, 0.0, x) for x in slopes(v, inputs.weights, kind)]
    return top, spread(tl.exp(m - top)), spread_sums([e * x for x in r]), spread_sums(r)


@triton.jit
def _add_given(total, shrink, w, drawn, d, kind: tl.constexpr):
    """shrink · total plus the positive's part of a tile's gradient, as in forward.py."""
    if kind.BILINEAR:
        return [
            tl.fma(total[i], shrink, give(drawn[i], w[i % kind.SUMS], kind))
            for i in (0, 1)[: kind.PARTS]
        ]
    else:
        return add_products(total, shrink, w, _give_parts(drawn, d, kind), kind)


@triton.jit
def _give_parts(drawn, x, kind: tl.constexpr):
    return [give(drawn[i], x[i], kind) for i in (0, 1)[: kind.PARTS]]


@triton.jit
def _store_vectors(pointer, at, j, factor, parts, kind: tl.constexpr):
    total = over_rows([x * factor for x in parts])
    store_parts(pointer, at * kind.D, j, j < kind.W, total, kind)


@triton.jit(do_not_specialize=SIZES)
def accumulate(
    inputs, kind: tl.constexpr, B, K, R, N, row_offset, threshold,
    positive_out,  # (S, B) values v_s
    plain_out,  # (S, B, K)
    mutated_out,
    maxima,  # (2, B, SPLITS): m and m̂ of each span
    sums,  # (VECTORS, B, SPLITS, D): see merge
    SPLITS: tl.constexpr,
):  # fmt: skip
    """One program: a row over one of SPLITS spans of its negatives."""
    REAL: tl.constexpr = inputs.query.dtype.element_ty
    split = tl.program_id(0) % SPLITS
    b = (tl.program_id(0) // SPLITS).to(tl.int64)
    j = components(0, kind.WIDTH)
    inside = j < kind.W
    own, own_good = positive_id(inputs, b, N)
    query = load_query(inputs, b, own, j, inside, kind, REAL)
    v = values(row_sums(query.t, kind), own_good, kind)
    if split == 0:
        own_at = b + tl.arange(0, 1)
        store_sums(positive_out, own_at, B, own_at >= 0, v, kind)
    s = logit(combine(v, inputs.weights, kind), inputs.positive_log_q, b, b >= 0)
    m = zeros(kind, REAL) + s
    mutated_m = m
    # By e^(s − m), e^(ŝ − m̂) and 1 (s, e, u); for the query (q), the positive (z), the scale (a).
    qs = no_tile(inputs.table, kind.STRIDE, j, K, kind, REAL)
    qe, qu, ze, zu, as_, ae, au = qs, qs, qs, qs, qs, qs, qs
    seed = tl.load(inputs.seed)
    each = B.to(tl.int64) * K
    bounds = load_bounds(inputs.thresholds, threshold, 0, kind)
    span = tl.cdiv(tl.cdiv(K, SPLITS), kind.ROWS) * kind.ROWS
    for start in range(split * span, tl.minimum(split * span + span, K), kind.ROWS):
        k = start + tl.arange(0, kind.ROWS)
        ids, valid, good = negative_ids(inputs, b, k, K, R, N)
        padding = ids == -1
        tile = load_candidates(inputs, query, ids, good & (ids >= 0), j, inside, kind, REAL)
        at = b * K + k
        id_at = (b // R) * K + k
        m, shrink, x, _ = _score(
            m, tile.t, good, padding, inputs, id_at, plain_out, at, each, valid, kind
        )
        qs = add_products(qs, shrink, x, tile.d, kind)
        as_ = add_by_scale(as_, shrink, x, tile, kind)
        if kind.MUTATED:
            drawn = draw(seed, bounds, k, row_offset + b, 0, kind, REAL)
            mutant = mutate(query, tile, drawn, kind)
            mutated_m, shrink, x, u = _score(
                mutated_m, mutant.t, good, padding, inputs, id_at, mutated_out, at, each, valid,
                kind,
            )  # fmt: skip
            qe = add_products(qe, shrink, x, mutant.d, kind)
            qu = add_products(qu, 1.0, u, mutant.d, kind)
            ze = _add_given(ze, shrink, x, drawn, mutant.d, kind)
            zu = _add_given(zu, 1.0, u, drawn, mutant.d, kind)
            ae = add_by_scale(ae, shrink, x, mutant, kind)
            au = add_by_scale(au, 1.0, u, mutant, kind)
    top = tl.max(m, 0)
    shrink = spread(tl.exp(m - top))
    at = b * SPLITS + split
    each = B.to(tl.int64) * SPLITS
    tl.store(maxima + at, top)
    _store_vectors(sums, at, j, shrink, qs, kind)
    if kind.SCALE_D > 0:
        _store_vectors(sums, at + each * 5, j, shrink, as_, kind)
    if kind.MUTATED:
        top = tl.max(mutated_m, 0)
        shrink = spread(tl.exp(mutated_m - top))
        tl.store(maxima + each + at, top)
        _store_vectors(sums, at + each, j, shrink, qe, kind)
        _store_vectors(sums, at + each * 2, j, 1.0, qu, kind)
        _store_vectors(sums, at + each * 3, j, shrink, ze, kind)
        _store_vectors(sums, at + each * 4, j, 1.0, zu, kind)
        if kind.SCALE_D > 0:
            _store_vectors(sums, at + each * 6, j, shrink, ae, kind)
            _store_vectors(sums, at + each * 7, j, 1.0, au, kind)


@triton.jit(do_not_specialize=SIZES)
def moments(
    inputs, kind: tl.constexpr, B, K, R, N, row_offset, threshold,
    positive_out,  # as in forward.scores
    plain_out,
    mutated_out,
    variance_out,
    VALUES: tl.constexpr,
    SPLITS: tl.constexpr,
):  # fmt: skip
    """One program: a row over one of SPLITS spans of its negatives. Only the scores, with a rule of
    moments: what these need of the row is computed once."""
    REAL: tl.constexpr = inputs.query.dtype.element_ty
    split = tl.program_id(0) % SPLITS
    b = (tl.program_id(0) // SPLITS).to(tl.int64)
    j = components(0, kind.WIDTH)
    inside = j < kind.W
    own, own_good = positive_id(inputs, b, N)
    query = load_query(inputs, b, own, j, inside, kind, REAL)
    rates = load_rates(inputs.rate, b, j, inside, kind, REAL)
    positive = row_sums(query.t, kind)
    if split == 0:
        own_at = b + tl.arange(0, 1)
        store_scores(
            positive_out, own_at, B, own_at >= 0, positive, own_good, own_at < 0, inputs.weights,
            VALUES, kind,
        )  # fmt: skip
    each = B.to(tl.int64) * K
    span = tl.cdiv(tl.cdiv(K, SPLITS), kind.ROWS) * kind.ROWS
    none = no_moments(kind, REAL)
    kept = add_kept(none, query.t, rates, kind)
    for start in range(split * span, tl.minimum(split * span + span, K), kind.ROWS):
        k = start + tl.arange(0, kind.ROWS)
        ids, valid, good = negative_ids(inputs, b, k, K, R, N)
        padding = ids == -1
        tile = load_candidates(inputs, query, ids, good & (ids >= 0), j, inside, kind, REAL)
        mean, variance = add_moments(kept, none, query.t, tile.t, rates, kind)
        plain = row_sums(tile.t, kind)
        mean, variance = finish_moments(mean, variance, positive, plain, inputs.rate, kind)
        good = good & own_good
        at = b * K + k
        store_scores(plain_out, at, each, valid, plain, good, padding, inputs.weights, VALUES, kind)
        store_moments(
            mutated_out, variance_out, at, each, valid, mean, variance, good, padding,
            inputs.weights, VALUES, kind,
        )  # fmt: skip


@triton.jit
def _load_vectors(sums, at, j, kind: tl.constexpr, REAL: tl.constexpr):
    return load_parts(sums, at * kind.D, j, j < kind.W, kind, REAL)


@triton.jit
def _add_weighed(total, x, vectors, kind: tl.constexpr):
    return [total[i] + x * vectors[i] for i in (0, 1)[: kind.PARTS]]


@triton.jit
def _add_mutated(total, x, vectors, label, plain, kind: tl.constexpr):
    return [total[i] + (x * vectors[i] - label * plain[i]) for i in (0, 1)[: kind.PARTS]]


@triton.jit(do_not_specialize=SIZES)
def merge(
    inputs, kind: tl.constexpr, B, K, R, N, row_offset, threshold,
    maxima,
    sums,  # for the query by e^(s − m), e^(ŝ − m̂), 1; the positive by the last two; the scale
    statistics,  # (5, B), of losses.loss_rows
    positive_weight,  # (S, B) of sums
    grad_query,
    grad_positive,
    grad_scale,
    SPLITS: tl.constexpr,
):  # fmt: skip
    """One program: a chunk of components of a row; the gradients from all spans' sums."""
    REAL: tl.constexpr = inputs.query.dtype.element_ty
    b = (tl.program_id(0) // kind.CHUNKS).to(tl.int64)
    j = components((tl.program_id(0) % kind.CHUNKS) * kind.WIDTH, kind.WIDTH)
    inside = j < kind.W
    own = tl.load(inputs.positive + b)
    own = tl.where((own >= 0) & (own < N), own, 0)
    query = load_query(inputs, b, own, j, inside, kind, REAL)
    m = tl.load(statistics + b)
    factor = tl.load(statistics + B + b)
    mutated_m = tl.load(statistics + B * 2 + b)
    mutated_factor = tl.load(statistics + B * 3 + b)
    label = tl.load(statistics + B * 4 + b)
    gq = of_parts(query.q[0] * 0, kind)
    gz, ga = gq, gq
    each = B.to(tl.int64) * SPLITS
    for split in range(SPLITS):
        at = b * SPLITS + split
        x = factor * tl.exp(tl.load(maxima + at) - m)
        gq = _add_weighed(gq, x, _load_vectors(sums, at, j, kind, REAL), kind)
        if kind.SCALE_D > 0:
            ga = _add_weighed(ga, x, _load_vectors(sums, at + each * 5, j, kind, REAL), kind)
        if kind.MUTATED:
            x = mutated_factor * tl.exp(tl.load(maxima + each + at) - mutated_m)
            vectors = _load_vectors(sums, at + each, j, kind, REAL)
            plain = _load_vectors(sums, at + each * 2, j, kind, REAL)
            gq = _add_mutated(gq, x, vectors, label, plain, kind)
            vectors = _load_vectors(sums, at + each * 3, j, kind, REAL)
            plain = _load_vectors(sums, at + each * 4, j, kind, REAL)
            gz = _add_mutated(gz, x, vectors, label, plain, kind)
            if kind.SCALE_D > 0:
                vectors = _load_vectors(sums, at + each * 6, j, kind, REAL)
                plain = _load_vectors(sums, at + each * 7, j, kind, REAL)
                ga = _add_mutated(ga, x, vectors, label, plain, kind)
    finish_gradient(
        query, gq, gz, ga, positive_weight, b == b, b, b, B, j, inside,
        grad_query, grad_positive, grad_scale, kind,
    )  # fmt: skip
