"""A tile of candidates against a query: loads, masks, terms and sums, for every similarity.

A row is one part or two (kinds.Kind), and what belongs to its parts is a tuple: in
``[... for i in (0, 1)[: kind.PARTS]]`` i is the part, and ``w[i % kind.SUMS]`` is that of its sum.

A tile of ROWS candidates and WIDTH components of a part is (4, ROWS, WIDTH / 16, 4): word, row,
block of sixteen components, byte. The words and bytes are those of the blocks' Philox calls, so
that a thread which holds a block's words also holds its components and nothing is exchanged; the
four components of a word are a load of 16 bytes. Tiles of one query are (4, 1, WIDTH / 16, 4).
"""

from __future__ import annotations

import triton.language as tl

import triton
from emu_kernels.triton.kinds import Candidates, Query
from emu_kernels.triton.masks import below, draws, shares


@triton.jit
def components(first, WIDTH: tl.constexpr):
    """(4, 1, WIDTH / 16, 4): the indices of a tile's components in a part."""
    word = tl.arange(0, 4)[:, None, None, None]
    block = tl.arange(0, WIDTH // 16)[None, None, :, None]
    byte = tl.arange(0, 4)[None, None, None, :]
    return first + 16 * block + 4 * word + byte


@triton.jit
def spread(x):
    """(ROWS,) as (1, ROWS, 1, 1), a number for each row of a tile."""
    return x[None, :, None, None]


@triton.jit
def over_components(x):
    """(ROWS,) sums."""
    return tl.sum(tl.sum(tl.sum(x, 3), 0), 1)


@triton.jit
def over_rows(parts):
    return [tl.sum(x, 1, keep_dims=True) for x in parts]


@triton.jit
def zeros(kind: tl.constexpr, REAL: tl.constexpr):
    """(ROWS,)"""
    ROWS: tl.constexpr = kind.ROWS  # in 3.6 a field is no constexpr until it is called one
    return tl.zeros((ROWS,), REAL)


@triton.jit
def of_parts(x, kind: tl.constexpr):
    """The same for every part."""
    return [x for i in (0, 1)[: kind.PARTS]]


# --- memory ---------------------------------------------------------------------------------------


@triton.jit
def load_parts(pointer, base, j, inside, kind: tl.constexpr, REAL: tl.constexpr):
    """Components j of each part of the rows that begin at ``base``, broadcastable to a tile."""
    return [
        tl.load(pointer + (base + (i * kind.W + j)), mask=inside, other=0.0).to(REAL)
        for i in (0, 1)[: kind.PARTS]
    ]


@triton.jit
def store_parts(pointer, base, j, inside, parts, kind: tl.constexpr):
    element: tl.constexpr = pointer.dtype.element_ty
    PARTS: tl.constexpr = kind.PARTS
    for i in tl.static_range(PARTS):
        tl.store(pointer + (base + (i * kind.W + j)), parts[i].to(element), mask=inside)


@triton.jit
def no_tile(pointer, stride: tl.constexpr, j, K, kind: tl.constexpr, REAL: tl.constexpr):
    """Zeros for each part, in the layout in which tiles are loaded. Sums that start from them keep
    it; otherwise Triton would use another layout for sums without candidates, and hold the masks
    that these are computed from in both. Nothing is read, as K is not negative."""
    row = spread(tl.arange(0, kind.ROWS).to(tl.int64))
    zero = tl.load(pointer + (row * stride + j), mask=j < tl.minimum(K, 0), other=0.0).to(REAL)
    return of_parts(zero, kind)


@triton.jit
def scale_places(row, j, i: tl.constexpr, kind: tl.constexpr):
    """The places of components j of part i in the scale, which has only the last parts."""
    return row * kind.SCALE_D + (i * kind.W - (kind.D - kind.SCALE_D) + j)


@triton.jit
def load_scale(scale, row, j, inside, absent, kind: tl.constexpr, REAL: tl.constexpr):
    """a of each part; ``absent`` if it has none."""
    return [
        tl.load(scale + scale_places(row, j, i, kind), mask=inside, other=0.0).to(REAL)
        if kind.SCALED[i]
        else absent
        for i in (0, 1)[: kind.PARTS]
    ]


@triton.jit
def load_rates(rate, row, j, inside, kind: tl.constexpr, REAL: tl.constexpr):
    """ρ of components j of each sum, or the one for all."""
    if kind.ONE_RATE:
        one = tl.load(rate).to(REAL)
        return [one for s in (0, 1)[: kind.SUMS]]
    else:
        return [
            tl.load(rate + (row * kind.RATE_ROW + (s * kind.W + j)), mask=inside, other=0.0).to(
                REAL
            )
            for s in (0, 1)[: kind.SUMS]
        ]


@triton.jit
def load_query(inputs, b, own, j, inside, kind: tl.constexpr, REAL: tl.constexpr):
    """The query of row b, and row ``own`` of the table as its positive."""
    q = load_parts(inputs.query, b * kind.D, j, inside, kind, REAL)
    a = load_scale(inputs.scale, b, j, inside, q[0], kind, REAL)
    z = load_parts(inputs.table, own * kind.STRIDE, j, inside, kind, REAL)
    t, d = terms(q, a, z, kind)
    return Query(q, a, z, t, d)


@triton.jit
def load_candidates(inputs, query, ids, real, j, inside, kind: tl.constexpr, REAL: tl.constexpr):
    """(ROWS,) rows of the table, zeros where not real."""
    base = spread(ids * kind.STRIDE)
    c = load_parts(inputs.table, base, j, inside & spread(real), kind, REAL)
    t, d = terms(query.q, query.a, c, kind)
    return Candidates(c, t, d)


@triton.jit
def load_sums(pointer, at, each, valid, kind: tl.constexpr):
    """Numbers of each sum; those of the second sum come ``each`` after those of the first."""
    return [tl.load(pointer + (s * each + at), mask=valid, other=0.0) for s in (0, 1)[: kind.SUMS]]


@triton.jit
def store_sums(pointer, at, each, valid, sums, kind: tl.constexpr):
    SUMS: tl.constexpr = kind.SUMS
    for s in tl.static_range(SUMS):
        tl.store(pointer + (s * each + at), sums[s], mask=valid)


@triton.jit
def spread_sums(sums):
    return [spread(x) for x in sums]


@triton.jit
def check_ids(ids, lowest, N, report, valid):
    """Whether ids are in range; one that is not is stored for the host (backends/ids.py)."""
    good = (ids >= lowest) & (ids < N)
    tl.store(report + ids * 0, ids, mask=valid & ~good)
    return good


@triton.jit
def positive_id(inputs, b, N):
    """Row b's positive, and whether it is in range; if not, 0 to read a row: scores become NaN."""
    own = tl.load(inputs.positive + b)
    good = check_ids(own, 0, N, inputs.report, own == own)
    return tl.where(good, own, 0), good


@triton.jit
def negative_ids(inputs, b, k, K, R, N):
    """(ROWS,) row b's negatives k, whether k is one, and whether the id is in range or padding."""
    valid = k < K
    ids = tl.load(inputs.negative + (b // R) * K + k, mask=valid, other=-1)
    return ids, valid, check_ids(ids, -1, N, inputs.report + 1, valid)


@triton.jit
def logit(score, log_q, at, valid):
    """A candidate's score minus its log q, if there is any."""
    if log_q is None:
        return score
    else:
        return score - tl.load(log_q + at, mask=valid, other=0.0)


# --- terms and sums -------------------------------------------------------------------------------


@triton.jit
def terms(q, a, c, kind: tl.constexpr):
    """Terms and their derivatives by the query."""
    if kind.COUPLED:
        t, d0, d1 = kind.TERMS[0](q[0], c[0], q[1], c[1])
        return (t,), (d0, d1)
    else:
        both = [
            kind.TERMS[i](q[i], a[i], c[i], kind.HALF, kind.SCALED[i]) for i in (0, 1)[: kind.PARTS]
        ]
        return [x[0] for x in both], [x[1] for x in both]


@triton.jit
def row_sums(t, kind: tl.constexpr):
    """(ROWS,) of each sum, from its terms."""
    if (kind.PARTS > kind.SUMS) and (not kind.COUPLED):
        return (over_components(t[0] + t[1]),)
    else:
        return [over_components(x) for x in t]


@triton.jit
def add_row_sums(totals, t, kind: tl.constexpr):
    more = row_sums(t, kind)
    return [totals[s] + more[s] for s in (0, 1)[: kind.SUMS]]


@triton.jit
def no_moments(kind: tl.constexpr, REAL: tl.constexpr):
    """Zeros for each sum, for add_moments to begin with."""
    zero = tl.zeros((4, kind.ROWS, kind.WIDTH // 16), REAL)
    return [zero for s in (0, 1)[: kind.SUMS]]


@triton.jit
def add_moments(means, variances, own, t, rates, kind: tl.constexpr):
    """Adds Σ (1 − ρ) t to means and Σ ρ (1 − ρ) (t − p)² to variances, each word by itself. Except
    for Σ ρ p, these are the moments of a tile's sums if each term is the positive's p with
    probability ρ. With one rate Σ (t − p)² is enough."""
    u = minus(t, own, kind)
    if kind.ONE_RATE:
        return means, [_add_dot(variances[s], u[s], u[s]) for s in (0, 1)[: kind.SUMS]]
    else:
        y = [rates[s] * (1.0 - rates[s]) * u[s] for s in (0, 1)[: kind.SUMS]]
        m = [_add_dot(means[s], 1.0 - rates[s], t[s]) for s in (0, 1)[: kind.SUMS]]
        return m, [_add_dot(variances[s], y[s], u[s]) for s in (0, 1)[: kind.SUMS]]


@triton.jit
def add_kept(means, own, rates, kind: tl.constexpr):
    """Adds Σ ρ p, likewise."""
    if kind.ONE_RATE:
        return means
    else:
        return [_add_dot(means[s], rates[s], own[s]) for s in (0, 1)[: kind.SUMS]]


@triton.jit
def finish_moments(means, variances, own, plain, rate, kind: tl.constexpr):
    """(ROWS,) means and variances of each sum; own and plain are the positive's and negatives'."""
    variances = [tl.sum(tl.sum(x, 0), 1) for x in variances]
    if kind.ONE_RATE:
        p = tl.load(rate).to(plain[0].dtype)
        m = [p * own[s] + (1.0 - p) * plain[s] for s in (0, 1)[: kind.SUMS]]
        return m, [p * (1.0 - p) * x for x in variances]
    else:
        return [tl.sum(tl.sum(x, 0), 1) for x in means], variances


@triton.jit
def _add_dot(total, x, y):
    """total + Σ x y over the bytes of words, with one instruction per component instead of two for
    a product and a sum."""
    x = _bytes(x)
    y = _bytes(y)
    for i in tl.static_range(4):
        total = tl.fma(x[i], y[i], total)
    return total


@triton.jit
def _bytes(x):
    """The components that belong to each of the four bytes."""
    even, odd = tl.split(tl.reshape(x, (x.shape[0], x.shape[1], x.shape[2], 2, 2)))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
def minus(t, own, kind: tl.constexpr):
    """t − p for each sum's terms."""
    return [t[s] - own[s] for s in (0, 1)[: kind.SUMS]]


@triton.jit
def pull(h, v, u, rates, kind: tl.constexpr):
    """g = h − (1 − ρ) v (t − p), h and v being weights of the mean and of half the variance. The
    gradient of a negative's moments by its own terms is h − ρ g, by the positive's ρ g."""
    return [tl.fma(rates[s] - 1.0, v[s] * u[s], h[s]) for s in (0, 1)[: kind.SUMS]]


@triton.jit
def keep_terms(w, h, v, u, rates, kind: tl.constexpr):
    """The weights of a negative's own terms, w being that of its plain sum."""
    if kind.ONE_RATE:  # the same, with less to do for each component
        p = rates[0]
        return [
            tl.fma(p * (1.0 - p) * v[s], u[s], tl.fma(1.0 - p, h[s], w[s]))
            for s in (0, 1)[: kind.SUMS]
        ]
    else:
        g = pull(h, v, u, rates, kind)
        return [tl.fma(-rates[s], g[s], w[s] + h[s]) for s in (0, 1)[: kind.SUMS]]


@triton.jit
def add_products(total, shrink, w, x, kind: tl.constexpr):
    """shrink · total + w x for each part; w has one entry for each sum."""
    return [tl.fma(w[i % kind.SUMS], x[i], total[i] * shrink) for i in (0, 1)[: kind.PARTS]]


@triton.jit
def add_by_scale(total, shrink, w, tile, kind: tl.constexpr):
    """The same with the terms' derivative by the scale, −d c, for the parts that have one."""
    return [
        tl.fma(-w[i % kind.SUMS] * tile.d[i], tile.c[i], total[i] * shrink)
        if kind.SCALED[i]
        else total[i]
        for i in (0, 1)[: kind.PARTS]
    ]


# --- mutation -------------------------------------------------------------------------------------


@triton.jit
def load_bounds(thresholds, threshold, first, kind: tl.constexpr):
    """The thresholds of each part's components from ``first`` on, or the one for all."""
    if thresholds is None:
        return of_parts(threshold, kind)
    else:
        j = components(first, kind.WIDTH)
        UNIT: tl.constexpr = 0 if kind.PAIRS else kind.W
        return [
            tl.load(thresholds + (i * UNIT + j), mask=j < kind.W, other=0).to(tl.int32)
            for i in (0, 1)[: kind.PARTS]
        ]


@triton.jit
def draw(
    seed,
    bounds,
    column,  # (ROWS,) k
    row,  # (ROWS,) or one for all, row_offset + b
    first,  # component within a part, a multiple of 16
    kind: tl.constexpr,
    REAL: tl.constexpr,
):
    """For each part the mask, true where a component comes from the positive; or the shares of
    themselves that negatives keep."""
    row = (row + column * 0).to(tl.uint32)
    column = column.to(tl.uint32)
    if kind.SHARED:
        return of_parts(spread(shares(seed, column, row, kind).to(REAL)), kind)
    elif kind.PAIRS:
        drawn = draws(seed, column, row, first, 0, kind.ROWS, kind.WIDTH)
        return of_parts(below(drawn, bounds[0]), kind)
    else:
        return [
            below(
                draws(
                    seed, column, row, i * kind.W + first, i * kind.W % 16, kind.ROWS, kind.WIDTH
                ),
                bounds[i],
            )
            for i in (0, 1)[: kind.PARTS]
        ]


@triton.jit
def mix(positive, candidate, drawn, kind: tl.constexpr):
    """ẑ of a part."""
    if kind.SHARED:
        return positive + drawn * (candidate - positive)
    else:
        return tl.where(drawn, positive, candidate)


@triton.jit
def keep(drawn, x, kind: tl.constexpr):
    """The negative's share of x: x where the mask is 0, or μ x."""
    if kind.SHARED:
        return x * drawn
    else:
        return tl.where(drawn, 0.0, x)


@triton.jit
def give(drawn, x, kind: tl.constexpr):
    """The positive's share of x."""
    if kind.SHARED:
        return x * (1.0 - drawn)
    else:
        return tl.where(drawn, x, 0.0)


@triton.jit
def mix_parts(z, c, drawn, kind: tl.constexpr):
    return [mix(z[i], c[i], drawn[i], kind) for i in (0, 1)[: kind.PARTS]]


@triton.jit
def mutate(query, tile, drawn, kind: tl.constexpr):
    """The mutated candidates. A masked term of one component is the positive's or the candidate's,
    so that nothing has to be computed again."""
    mixed = mix_parts(query.z, tile.c, drawn, kind)
    if kind.COUPLED or kind.SHARED:
        t, d = terms(query.q, query.a, mixed, kind)
    else:
        t = mix_parts(query.t, tile.t, drawn, kind)
        d = mix_parts(query.d, tile.d, drawn, kind)
    return Candidates(mixed, t, d)
