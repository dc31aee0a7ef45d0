"""A tile of candidates against a query: loads, masks, terms and sums, for every similarity.

A row of D components is one part of W = D, or two halves of W = D/2 each, where the similarity has
two or a mask's unit is the pair. The second part's variables end in 1, and are the first's where
there is only one.

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
from emu_kernels.triton.similarities import coupled_terms, terms


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
    W: tl.constexpr,
    PARTS: tl.constexpr,
    REAL: tl.constexpr,
):
    first = tl.load(pointer + (base + j), mask=inside, other=0.0).to(REAL)
    second = first
    if PARTS == 2:
        second = tl.load(pointer + (base + (W + j)), mask=inside, other=0.0).to(REAL)
    return first, second


@triton.jit
def no_tile(pointer, j, K, REAL: tl.constexpr, STRIDE: tl.constexpr, ROWS: tl.constexpr):
    """Zeros in the layout that tiles are loaded in. Sums that start from them keep it; else Triton
    holds those that no candidate enters, and the masks they are made from, in another one too.
    Nothing is read: K is not negative."""
    row = spread(tl.arange(0, ROWS).to(tl.int64))
    return tl.load(pointer + (row * STRIDE + j), mask=j < tl.minimum(K, 0), other=0.0).to(REAL)


@triton.jit
def store_parts(pointer, base, j, inside, first, second, W: tl.constexpr, PARTS: tl.constexpr):
    element: tl.constexpr = pointer.dtype.element_ty
    tl.store(pointer + (base + j), first.to(element), mask=inside)
    if PARTS == 2:
        tl.store(pointer + (base + (W + j)), second.to(element), mask=inside)


@triton.jit
def load_scale(
    scale,
    row,  # broadcastable to the tile
    j,
    inside,
    unused,
    W: tl.constexpr,
    PARTS: tl.constexpr,
    SIM: tl.constexpr,
    REAL: tl.constexpr,
):
    """a of both parts; `unused` stands for what is not there."""
    first = unused
    second = unused
    if scale is not None:
        if SIM == "hake":  # of the second half alone
            second = tl.load(scale + (row * W + j), mask=inside, other=0.0).to(REAL)
        else:
            first, second = load_parts(scale, row * (W * PARTS), j, inside, W, PARTS, REAL)
    return first, second


@triton.jit
def tile_terms(
    q0,
    q1,
    a0,
    a1,
    c0,
    c1,
    HALF: tl.constexpr,
    SCALED: tl.constexpr,
    PARTS: tl.constexpr,
    SIM: tl.constexpr,
):
    """Terms t0, t1 and their derivatives d0, d1 by the query; a coupled term is all in t0."""
    if SIM == "rotate":
        t0, d0, d1 = coupled_terms(q0, c0, q1, c1, SIM)
        t1 = t0
    else:
        t0, d0 = terms(q0, a0, c0, HALF, SCALED, False, SIM)
        t1, d1 = t0, d0
        if PARTS == 2:
            t1, d1 = terms(q1, a1, c1, HALF, SCALED, True, SIM)
    return t0, t1, d0, d1


@triton.jit
def row_sums(t0, t1, PARTS: tl.constexpr, SIM: tl.constexpr):
    """(ROWS,) sums of the terms; the second is hake's alone."""
    if SIM == "hake":
        return over_components(t0), over_components(t1)
    elif (PARTS == 2) and (SIM != "rotate"):
        total = over_components(t0 + t1)
        return total, total
    else:
        total = over_components(t0)
        return total, total


@triton.jit
def load_bounds(
    thresholds,
    threshold,
    first,  # component within a part
    W: tl.constexpr,
    PARTS: tl.constexpr,
    MUTATION: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The thresholds of both parts' components, or the one of all."""
    bound0, bound1 = threshold, threshold
    if thresholds is not None:
        j = components(first, WIDTH)
        bound0 = tl.load(thresholds + j, mask=j < W, other=0).to(tl.int32)
        bound1 = bound0
        if (PARTS == 2) and (MUTATION == "component"):
            bound1 = tl.load(thresholds + (W + j), mask=j < W, other=0).to(tl.int32)
    return bound0, bound1


@triton.jit
def draw(
    seed,
    bound0,
    bound1,
    column,  # (ROWS,) k
    row,  # (ROWS,) row_offset + b
    first,  # component within a part, a multiple of 16
    W: tl.constexpr,
    PARTS: tl.constexpr,
    MUTATION: tl.constexpr,
    ORDER: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    REAL: tl.constexpr,
):
    """What of each component comes from the positive: the masks of both parts, bools, or for
    Mixup the shares that negatives keep, twice."""
    column = column.to(tl.uint32)
    row = row.to(tl.uint32)
    if MUTATION == "mixup":
        first_part = spread(shares(seed, column, row, ORDER).to(REAL))
        second_part = first_part
    else:
        first_part = below(draws(seed, column, row, first, 0, ROWS, WIDTH), bound0)
        second_part = first_part
        if (PARTS == 2) and (MUTATION == "component"):
            SHIFT: tl.constexpr = W % 16
            second_part = below(draws(seed, column, row, W + first, SHIFT, ROWS, WIDTH), bound1)
    return first_part, second_part


@triton.jit
def mix(positive, candidate, drawn, MUTATION: tl.constexpr):
    """ẑ of a part."""
    if MUTATION == "mixup":
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
    HALF: tl.constexpr,
    SCALED: tl.constexpr,
    PARTS: tl.constexpr,
    SIM: tl.constexpr,
    MUTATION: tl.constexpr,
):
    """:func:`tile_terms` of ẑ. A masked term of one component is the positive's or the candidate's:
    nothing has to be computed again."""
    if (SIM == "rotate") or (MUTATION == "mixup"):
        x0 = mix(z0, c0, m0, MUTATION)
        x1 = x0
        if PARTS == 2:
            x1 = mix(z1, c1, m1, MUTATION)
        return tile_terms(q0, q1, a0, a1, x0, x1, HALF, SCALED, PARTS, SIM)
    else:
        mt0 = tl.where(m0, tz0, t0)
        md0 = tl.where(m0, dz0, d0)
        mt1, md1 = mt0, md0
        if PARTS == 2:
            mt1 = tl.where(m1, tz1, t1)
            md1 = tl.where(m1, dz1, d1)
        return mt0, mt1, md0, md1


@triton.jit
def keep(drawn, x, MUTATION: tl.constexpr):
    """The negative's share of x: x where the mask is 0, or μ x."""
    if MUTATION == "mixup":
        return x * drawn
    else:
        return tl.where(drawn, 0.0, x)


@triton.jit
def give(drawn, x, MUTATION: tl.constexpr):
    """The positive's share of x."""
    if MUTATION == "mixup":
        return x * (1.0 - drawn)
    else:
        return tl.where(drawn, x, 0.0)


@triton.jit
def check_ids(ids, lowest, N, report, valid):
    """Whether ids are in range; one that is not is stored for the host (backends/ids.py)."""
    good = (ids >= lowest) & (ids < N)
    tl.store(report + ids * 0, ids, mask=valid & ~good)
    return good
