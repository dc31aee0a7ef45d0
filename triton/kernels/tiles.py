"""A tile of candidates against a query: loads, masks, terms and sums, for every similarity.

A row is one part or two (kinds.Kind). The second part's variables end in 1, and are the first's
where there is only one.

A tile of ROWS candidates and WIDTH components of a part is (4, ROWS, WIDTH / 16, 4): word, row,
block of sixteen components, byte. The words and bytes are those of the blocks' Philox calls, so
that a thread which holds a block's words holds its components too and nothing is exchanged; the
four components of a word are a load of 16 bytes. What belongs to one query is
(4, 1, WIDTH / 16, 4).
"""

from __future__ import annotations

import triton.language as tl

import triton
from emu_kernels.triton.masks import below, draws, shares


@triton.jit
def components(first, WIDTH: tl.constexpr):
    """(4, 1, WIDTH / 16, 4): their places in a part."""
    word = tl.arange(0, 4)[:, None, None, None]
    block = tl.arange(0, WIDTH // 16)[None, None, :, None]
    byte = tl.arange(0, 4)[None, None, None, :]
    return first + 16 * block + 4 * word + byte


@triton.jit
def spread(x):
    """(ROWS,) to the rows of a tile."""
    return x[None, :, None, None]


@triton.jit
def over_components(x):
    """(ROWS,) sums."""
    return tl.sum(tl.sum(tl.sum(x, 3), 0), 1)


@triton.jit
def over_rows(x):
    return tl.sum(x, 1, keep_dims=True)


@triton.jit
def load_parts(
    pointer,
    base,  # of the row, broadcastable to the tile
    j,
    inside,
    kind: tl.constexpr,
    REAL: tl.constexpr,
):
    first = tl.load(pointer + (base + j), mask=inside, other=0.0).to(REAL)
    second = first
    if kind.PARTS == 2:
        second = tl.load(pointer + (base + (kind.W + j)), mask=inside, other=0.0).to(REAL)
    return first, second


@triton.jit
def no_tile(pointer, stride: tl.constexpr, j, K, kind: tl.constexpr, REAL: tl.constexpr):
    """Zeros in the layout that tiles are loaded in. Sums that start from them keep it; else Triton
    holds those that no candidate enters, and the masks they are made from, in another one too.
    Nothing is read: K is not negative."""
    row = spread(tl.arange(0, kind.ROWS).to(tl.int64))
    return tl.load(pointer + (row * stride + j), mask=j < tl.minimum(K, 0), other=0.0).to(REAL)


@triton.jit
def store_parts(pointer, base, j, inside, first, second, kind: tl.constexpr):
    element: tl.constexpr = pointer.dtype.element_ty
    tl.store(pointer + (base + j), first.to(element), mask=inside)
    if kind.PARTS == 2:
        tl.store(pointer + (base + (kind.W + j)), second.to(element), mask=inside)


@triton.jit
def load_scale(
    scale,
    row,  # broadcastable to the tile
    j,
    inside,
    absent,  # what a part without a scale gets; nothing is computed from it
    kind: tl.constexpr,
    REAL: tl.constexpr,
):
    """a of both parts."""
    first = absent
    second = absent
    if kind.SCALED:
        first, second = load_parts(scale, row * kind.D, j, inside, kind, REAL)
    elif kind.SECOND_SCALED:
        second = tl.load(scale + (row * kind.W + j), mask=inside, other=0.0).to(REAL)
    return first, second


@triton.jit
def tile_terms(q0, q1, a0, a1, c0, c1, kind: tl.constexpr):
    """Terms t0, t1 and their derivatives d0, d1 by the query; a coupled term is all in t0."""
    if kind.COUPLED:
        t0, d0, d1 = kind.TERMS(q0, c0, q1, c1)
        t1 = t0
    else:
        t0, d0 = kind.TERMS(q0, a0, c0, kind.HALF, kind.SCALED)
        t1, d1 = t0, d0
        if kind.PARTS == 2:
            t1, d1 = kind.SECOND_TERMS(q1, a1, c1, kind.HALF, kind.SECOND_SCALED)
    return t0, t1, d0, d1


@triton.jit
def row_sums(t0, t1, kind: tl.constexpr):
    """(ROWS,) of each sum; twice the first where there is one."""
    if kind.SUMS == 2:
        return over_components(t0), over_components(t1)
    elif (kind.PARTS == 2) and (not kind.COUPLED):
        total = over_components(t0 + t1)
        return total, total
    else:
        total = over_components(t0)
        return total, total


@triton.jit
def load_sums(pointer, at, each, valid, kind: tl.constexpr):
    """The numbers of both sums; those of the second come ``each`` after those of the first."""
    v0 = tl.load(pointer + at, mask=valid, other=0.0)
    v1 = v0
    if kind.SUMS == 2:
        v1 = tl.load(pointer + each + at, mask=valid, other=0.0)
    return v0, v1


@triton.jit
def store_sums(pointer, at, each, valid, v0, v1, kind: tl.constexpr):
    tl.store(pointer + at, v0, mask=valid)
    if kind.SUMS == 2:
        tl.store(pointer + each + at, v1, mask=valid)


@triton.jit
def load_bounds(thresholds, threshold, first, kind: tl.constexpr):
    """The thresholds of both parts' components from ``first`` on, or the one of all."""
    bound0, bound1 = threshold, threshold
    if thresholds is not None:
        j = components(first, kind.WIDTH)
        bound0 = tl.load(thresholds + j, mask=j < kind.W, other=0).to(tl.int32)
        bound1 = bound0
        if (kind.PARTS == 2) and (not kind.PAIRS):
            bound1 = tl.load(thresholds + (kind.W + j), mask=j < kind.W, other=0).to(tl.int32)
    return bound0, bound1


@triton.jit
def draw(
    seed,
    bound0,
    bound1,
    column,  # (ROWS,) k
    row,  # (ROWS,) row_offset + b
    first,  # component within a part, a multiple of 16
    kind: tl.constexpr,
    REAL: tl.constexpr,
):
    """What of each component comes from the positive: the masks of both parts, bools; or the shares
    that negatives keep, twice."""
    column = column.to(tl.uint32)
    row = row.to(tl.uint32)
    if kind.SHARED:
        first_part = spread(shares(seed, column, row, kind).to(REAL))
        second_part = first_part
    else:
        first_part = below(draws(seed, column, row, first, 0, kind.ROWS, kind.WIDTH), bound0)
        second_part = first_part
        if (kind.PARTS == 2) and (not kind.PAIRS):
            SHIFT: tl.constexpr = kind.W % 16
            drawn = draws(seed, column, row, kind.W + first, SHIFT, kind.ROWS, kind.WIDTH)
            second_part = below(drawn, bound1)
    return first_part, second_part


@triton.jit
def mix(positive, candidate, drawn, kind: tl.constexpr):
    """ẑ of a part."""
    if kind.SHARED:
        return positive + drawn * (candidate - positive)
    else:
        return tl.where(drawn, positive, candidate)


@triton.jit
def mutated_terms(
    q0,
    q1,
    a0,
    a1,
    c0,
    c1,
    z0,  # of the positive, as the next
    z1,
    tz0,
    tz1,
    dz0,
    dz1,
    t0,  # of the candidates, as the next
    t1,
    d0,
    d1,
    m0,  # drawn
    m1,
    kind: tl.constexpr,
):
    """:func:`tile_terms` of ẑ. A masked term of one component is the positive's or the candidate's:
    nothing has to be computed again."""
    if kind.COUPLED or kind.SHARED:
        x0 = mix(z0, c0, m0, kind)
        x1 = x0
        if kind.PARTS == 2:
            x1 = mix(z1, c1, m1, kind)
        return tile_terms(q0, q1, a0, a1, x0, x1, kind)
    else:
        mt0 = tl.where(m0, tz0, t0)
        md0 = tl.where(m0, dz0, d0)
        mt1, md1 = mt0, md0
        if kind.PARTS == 2:
            mt1 = tl.where(m1, tz1, t1)
            md1 = tl.where(m1, dz1, d1)
        return mt0, mt1, md0, md1


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
def check_ids(ids, lowest, N, report, valid):
    """Whether ids are in range; one that is not is stored for the host (backends/ids.py)."""
    good = (ids >= lowest) & (ids < N)
    tl.store(report + ids * 0, ids, mask=valid & ~good)
    return good
