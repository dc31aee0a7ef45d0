"""Query-major kernels in two passes, for rows of any length: the first makes sums of terms; from
these follow the weights of sums (losses.py), and from these the second makes the gradients of the
query, for a chunk of components at a time."""

from __future__ import annotations

import triton.language as tl

import triton
from emu_kernels.triton.kinds import SIZES
from emu_kernels.triton.similarities import combine, cumulant, moments, values
from emu_kernels.triton.tiles import (
    add_by_scale,
    add_kept,
    add_moments,
    add_products,
    add_row_sums,
    components,
    draw,
    finish_moments,
    give,
    keep_terms,
    load_bounds,
    load_candidates,
    load_query,
    load_rates,
    load_sums,
    minus,
    mutate,
    negative_ids,
    no_moments,
    no_tile,
    of_parts,
    over_rows,
    positive_id,
    pull,
    scale_places,
    spread,
    spread_sums,
    store_parts,
    store_sums,
    zeros,
)


@triton.jit
def store_scores(
    out, at, each, valid, sums, good, padding, weights, VALUES: tl.constexpr, kind: tl.constexpr
):
    """Stores the values of sums, or the scores, −inf at padding. NaN where not good."""
    v = values(sums, good, kind)
    if VALUES:
        store_sums(out, at, each, valid, v, kind)
    else:
        tl.store(out + at, tl.where(padding, float("-inf"), combine(v, weights, kind)), mask=valid)


@triton.jit
def store_moments(
    mean_out, out, at, each, valid, means, variances, good, padding, weights,
    VALUES: tl.constexpr, kind: tl.constexpr,
):  # fmt: skip
    """Likewise the means and variances of sums, or the scores' means and cumulants."""
    nan = float("nan")
    means = [tl.where(good, x, nan) for x in means]
    if VALUES:
        store_sums(mean_out, at, each, valid, means, kind)
        store_sums(out, at, each, valid, variances, kind)
    else:
        m, v = moments(means, variances, kind)
        mean = combine(m, weights, kind)
        both = cumulant(mean, v, weights, kind)
        tl.store(mean_out + at, tl.where(padding, float("-inf"), mean), mask=valid)
        tl.store(out + at, tl.where(padding, float("-inf"), both), mask=valid)


@triton.jit(do_not_specialize=SIZES)
def scores(
    inputs, kind: tl.constexpr, B, K, R, N, row_offset, threshold,
    positive_out,  # (B,) score, or with VALUES (S, B) values v_s
    plain_out,  # (B, K), or (S, B, K)
    mutated_out,  # with a rule of moments the means, or M with VALUES
    variance_out,  # with such a rule (B, K) cumulants, or (S, B, K) V with VALUES
    VALUES: tl.constexpr,
):  # fmt: skip
    """One program: ROWS negatives of a row."""
    REAL: tl.constexpr = inputs.query.dtype.element_ty
    blocks = tl.maximum(tl.cdiv(K, kind.ROWS), 1)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    k = block * kind.ROWS + tl.arange(0, kind.ROWS)
    ids, valid, good = negative_ids(inputs, b, k, K, R, N)
    own, own_good = positive_id(inputs, b, N)
    plain = [zeros(kind, REAL) for s in (0, 1)[: kind.SUMS]]
    mutated = plain
    mean, variance = plain, plain
    if kind.MOMENTS:
        mean = no_moments(kind, REAL)
        variance = mean
    positive = [tl.zeros((1,), REAL) for s in (0, 1)[: kind.SUMS]]
    seed = tl.load(inputs.seed)
    for first in range(0, kind.W, kind.WIDTH):
        j = components(first, kind.WIDTH)
        inside = j < kind.W
        query = load_query(inputs, b, own, j, inside, kind, REAL)
        tile = load_candidates(inputs, query, ids, good & (ids >= 0), j, inside, kind, REAL)
        plain = add_row_sums(plain, tile.t, kind)
        positive = add_row_sums(positive, query.t, kind)
        if kind.MOMENTS:
            # A whole tile, as Triton would give one row's layout to the candidates' terms too.
            row = b + spread(zeros(kind, tl.int64))
            rates = load_rates(inputs.rate, row, j, inside, kind, REAL)
            mean = add_kept(mean, query.t, rates, kind)
            mean, variance = add_moments(mean, variance, query.t, tile.t, rates, kind)
        elif kind.MUTATED:
            bounds = load_bounds(inputs.thresholds, threshold, first, kind)
            drawn = draw(seed, bounds, k, row_offset + b, first, kind, REAL)
            mutated = add_row_sums(mutated, mutate(query, tile, drawn, kind).t, kind)
    good = good & own_good
    padding = ids == -1
    at = b * K + k
    each = B.to(tl.int64) * K
    if block == 0:
        own_at = b + tl.arange(0, 1)
        store_scores(
            positive_out, own_at, B, own_at >= 0, positive, own_good, own_at < 0,
            inputs.weights, VALUES, kind,
        )  # fmt: skip
    store_scores(plain_out, at, each, valid, plain, good, padding, inputs.weights, VALUES, kind)
    if kind.MOMENTS:
        mean, variance = finish_moments(mean, variance, positive, plain, inputs.rate, kind)
        store_moments(
            mutated_out, variance_out, at, each, valid, mean, variance, good, padding,
            inputs.weights, VALUES, kind,
        )  # fmt: skip
    elif kind.MUTATED:
        store_scores(
            mutated_out, at, each, valid, mutated, good, padding, inputs.weights, VALUES, kind
        )


@triton.jit(do_not_specialize=SIZES)
def query_gradient(
    inputs, kind: tl.constexpr, B, K, R, N, row_offset, threshold,
    positive_weight,  # (S, B) of sums, as the next three
    weight,  # (S, B, K)
    mutated_weight,
    variance_weight,
    grad_query,  # (SPLITS, B, D) each
    grad_positive,
    grad_scale,
    grad_rate,  # (SPLITS, B, U), or None
    SPLITS: tl.constexpr,
):  # fmt: skip
    """One program: a chunk of components of a row, over one of SPLITS spans of its negatives."""
    REAL: tl.constexpr = inputs.query.dtype.element_ty
    pid = tl.program_id(0)
    first = (pid % kind.CHUNKS) * kind.WIDTH
    split = pid // kind.CHUNKS % SPLITS
    b = (pid // (kind.CHUNKS * SPLITS)).to(tl.int64)
    j = components(first, kind.WIDTH)
    inside = j < kind.W
    own = tl.load(inputs.positive + b)
    own = tl.where((own >= 0) & (own < N), own, 0)  # any row, if out of range: its weights are NaN
    query = load_query(inputs, b, own, j, inside, kind, REAL)
    gq = no_tile(inputs.table, kind.STRIDE, j, K, kind, REAL)
    gz, ga = gq, gq
    # With a rule of moments, for each sum: Σ_k h, Σ_k v (t − p) (tiles.pull), the rates' gradient.
    given = spread_sums([zeros(kind, REAL) for s in (0, 1)[: kind.SUMS]])
    bent = [gq[s] for s in (0, 1)[: kind.SUMS]]
    by_rate, rates = bent, bent
    if kind.MOMENTS:
        rates = load_rates(inputs.rate, b, j, inside, kind, REAL)
    seed = tl.load(inputs.seed)
    each = B.to(tl.int64) * K
    bounds = load_bounds(inputs.thresholds, threshold, first, kind)
    span = tl.cdiv(tl.cdiv(K, SPLITS), kind.ROWS) * kind.ROWS
    for start in range(split * span, tl.minimum(split * span + span, K), kind.ROWS):
        k = start + tl.arange(0, kind.ROWS)
        valid = k < K
        ids = tl.load(inputs.negative + (b // R) * K + k, mask=valid, other=-1)
        real = (ids >= 0) & (ids < N)
        tile = load_candidates(inputs, query, ids, real, j, inside, kind, REAL)
        at = b * K + k
        w = spread_sums(load_sums(weight, at, each, valid, kind))
        if kind.MOMENTS:
            h = spread_sums(load_sums(mutated_weight, at, each, valid, kind))
            v = spread_sums(load_sums(variance_weight, at, each, valid, kind))
            u = minus(tile.t, query.t, kind)
            given = [given[s] + h[s] for s in (0, 1)[: kind.SUMS]]
            bent = [tl.fma(v[s], u[s], bent[s]) for s in (0, 1)[: kind.SUMS]]
            if grad_rate is not None:
                by_rate = _add_by_rate(by_rate, h, v, u, rates, kind)
            w = keep_terms(w, h, v, u, rates, kind)
        gq = add_products(gq, 1.0, w, tile.d, kind)
        ga = add_by_scale(ga, 1.0, w, tile, kind)
        if kind.MUTATED and (not kind.MOMENTS):
            drawn = draw(seed, bounds, k, row_offset + b, first, kind, REAL)
            mutant = mutate(query, tile, drawn, kind)
            w = spread_sums(load_sums(mutated_weight, at, each, valid, kind))
            gq = add_products(gq, 1.0, w, mutant.d, kind)
            gz = _add_given(gz, w, drawn, mutant.d, kind)
            ga = add_by_scale(ga, 1.0, w, mutant, kind)
    gz = over_rows(gz)
    row_out = split * B.to(tl.int64) + b
    if kind.MOMENTS:
        gz = _of_positive(over_rows(given), over_rows(bent), rates, kind)
        if grad_rate is not None:
            _store_by_rate(grad_rate, row_out, j, inside, over_rows(by_rate), kind)
    finish_gradient(
        query, over_rows(gq), gz, over_rows(ga), positive_weight, split == 0, b,
        row_out, B, j, inside, grad_query, grad_positive, grad_scale, kind,
    )  # fmt: skip


@triton.jit
def _of_positive(given, bent, rates, kind: tl.constexpr):
    """The weights of the positive's terms that come from all negatives' moments."""
    return [rates[s] * (given[s] - (1.0 - rates[s]) * bent[s]) for s in (0, 1)[: kind.SUMS]]


@triton.jit
def _add_by_rate(total, h, v, u, rates, kind: tl.constexpr):
    """Adds (t − p) (h + (ρ − 1/2) v (t − p)): minus the gradient by ρ, for a sum without a root."""
    g = pull(h, v, u, rates, kind)
    half = [tl.fma(0.5, v[s] * u[s], g[s]) for s in (0, 1)[: kind.SUMS]]
    return [tl.fma(u[s], half[s], total[s]) for s in (0, 1)[: kind.SUMS]]


@triton.jit
def _store_by_rate(grad_rate, row, j, inside, total, kind: tl.constexpr):
    # For a sum of squares the weights are derivatives by half of it, negated.
    by = [total[s] * (0.5 if kind.ROOTS[s] else -1.0) for s in (0, 1)[: kind.SUMS]]
    SUMS: tl.constexpr = kind.SUMS
    for s in tl.static_range(SUMS):
        tl.store(grad_rate + ((row * kind.SUMS + s) * kind.W + j), by[s], mask=inside)


@triton.jit
def _add_given(total, w, drawn, d, kind: tl.constexpr):
    """Adds the positive's part of a tile's gradient, without the factor common to all."""
    if kind.BILINEAR:
        return [total[i] + give(drawn[i], w[i % kind.SUMS], kind) for i in (0, 1)[: kind.PARTS]]
    else:
        return [
            total[i] + give(drawn[i], w[i % kind.SUMS] * d[i], kind) for i in (0, 1)[: kind.PARTS]
        ]


@triton.jit
def finish_gradient(
    query,
    gq,  # (1, WIDTH) of each part, the sum over all negatives, as the next two
    gz,  # by the positive, without a factor common to all; with moments the weights of its terms
    ga,
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
    w = [tl.where(own, tl.load(positive_weight + (s * B + b)), 0.0) for s in (0, 1)[: kind.SUMS]]
    if kind.MOMENTS:
        w = [w[s] + gz[s] for s in (0, 1)[: kind.SUMS]]
        gz = of_parts(0.0, kind)
    gq = [gq[i] + w[i % kind.SUMS] * query.d[i] for i in (0, 1)[: kind.PARTS]]
    if kind.BILINEAR:
        gz = [(gz[i] + w[i % kind.SUMS]) * query.q[i] for i in (0, 1)[: kind.PARTS]]
    else:
        gz = [-(gz[i] + w[i % kind.SUMS] * query.d[i]) for i in (0, 1)[: kind.PARTS]]
    PARTS: tl.constexpr = kind.PARTS
    for i in tl.static_range(PARTS):
        if kind.SCALED[i]:
            by = ga[i] - w[i % kind.SUMS] * query.d[i] * query.z[i]
            tl.store(grad_scale + scale_places(row_out, j, i, kind), by, mask=inside)
    gz = scale_parts(query.a, gz, kind)
    store_parts(grad_query, row_out * kind.D, j, inside, gq, kind)
    store_parts(grad_positive, row_out * kind.D, j, inside, gz, kind)


@triton.jit
def scale_parts(a, x, kind: tl.constexpr):
    """a x for the parts that have a scale, x for the others."""
    return [a[i] * x[i] if kind.SCALED[i] else x[i] for i in (0, 1)[: kind.PARTS]]
