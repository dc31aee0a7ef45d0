"""Messages along a graph's edges, aggregated at nodes, and the gradients: relational_spmm.

A program has a block of lanes of one row of the result, that of a node or of a piece of a
relation's edges; it goes over the row's edges, ROWS at a time, and writes the row once. A lane is a
component of one query or, for complex numbers, a pair of components (part 0 and 1). Tiles are
(ROWS, WIDTH), with all rows of a lane in one thread if there are enough lanes, so that nothing is
exchanged within the loop.

A tile has zeros for an edge that is left out: its message is 0.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton.language as tl

import triton
from emu_kernels.triton.tiles import load_parts, store_parts


class Graph(NamedTuple):
    """Pointers, None where absent; the edges are as in :class:`emu_kernels.relational._Sorted`."""

    nodes: Any  # (N, B, D)
    relations: Any  # (R, D) or (R, B, D)
    own: Any  # (N, B, D)
    weight: Any  # (E,)
    keep: Any  # (E,) bytes
    start: Any  # where the edges of a program's row begin
    other: Any  # (E,) sources, for the result; targets, for gradients
    relation: Any  # (E,), or (P,) for pieces
    edge: Any  # (E,)
    source: Any  # (E,), for the gradient of relations


class MessageKind(NamedTuple):
    """Compile-time constants."""

    D: int
    PARTS: int  # 2 for complex numbers, else 1
    W: int  # components of a part
    ROWS: int  # of a tile: edges
    WIDTH: int  # of a tile: lanes
    SHARED: bool  # all queries have the same relations
    MESSAGE: str
    AGGREGATE: str
    SECTIONS: int  # rows of the result for each query
    EPSILON: float


@triton.jit
def _place(B, kind: tl.constexpr):
    """The program's row; its lanes, (1, WIDTH), and whether they exist.

    Blocks of lanes are processed one after the other, each for all rows: what is gathered for one
    block, WIDTH numbers of each node, may fit in a GPU's cache, from which each edge reads it.
    """
    W: tl.constexpr = kind.W
    WIDTH: tl.constexpr = kind.WIDTH
    rows = tl.num_programs(0) // tl.cdiv(B * W, WIDTH)
    lane = (tl.program_id(0) // rows) * WIDTH + tl.arange(0, WIDTH)[None, :]
    return (tl.program_id(0) % rows).to(tl.int64), lane, lane < B * W


@triton.jit
def _places(lane, EACH: tl.constexpr, kind: tl.constexpr):
    """The places of lanes in a row that has EACH numbers per query; 0: one row for all queries."""
    if EACH == kind.W:
        return lane
    else:
        return lane // kind.W * EACH + lane % kind.W


@triton.jit
def _edges(inputs, start, end, kind: tl.constexpr, REAL: tl.constexpr):
    """(ROWS, 1): places of the edges from ``start`` on, which of them count, and their weights."""
    ROWS: tl.constexpr = kind.ROWS
    i = start + tl.arange(0, ROWS)[:, None]
    valid = i < end
    if (inputs.keep is not None) or (inputs.weight is not None):
        edge = tl.load(inputs.edge + i, mask=valid, other=0)
    if inputs.keep is not None:
        valid = valid & (tl.load(inputs.keep + edge, mask=valid, other=0) != 0)
    w = tl.full((1, 1), 1.0, REAL)
    if inputs.weight is not None:
        w = tl.load(inputs.weight + edge, mask=valid, other=0.0)
    return i, valid, w


@triton.jit
def _messages(x, r, w, kind: tl.constexpr):
    """Both passes compute messages here: the second needs the same bits to find the extremes."""
    if kind.MESSAGE == "rotate":
        return [w * (x[0] * r[0] - x[1] * r[1]), w * (x[0] * r[1] + x[1] * r[0])]
    elif kind.MESSAGE == "transe":
        return [w * (x[0] + r[0])]
    else:
        return [w * (x[0] * r[0])]


@triton.jit
def _smaller(x, y, kind: tl.constexpr):
    """NaN if one of them is."""
    return [tl.minimum(x[i], y[i], propagate_nan=tl.PropagateNan.ALL) for i in (0, 1)[: kind.PARTS]]


@triton.jit
def _larger(x, y, kind: tl.constexpr):
    return [tl.maximum(x[i], y[i], propagate_nan=tl.PropagateNan.ALL) for i in (0, 1)[: kind.PARTS]]


@triton.jit
def _or_nan(found, x):
    """(1, WIDTH) found, or NaN if any x (ROWS, WIDTH) of its column is."""
    return tl.where(tl.max((x != x).to(tl.int32), 0, keep_dims=True) > 0, float("nan"), found)


@triton.jit
def _least(parts, kind: tl.constexpr):
    """(1, WIDTH) the minima over rows."""
    inf = float("inf")
    return [_or_nan(tl.min(tl.where(x == x, x, inf), 0, keep_dims=True), x) for x in parts]


@triton.jit
def _largest(parts, kind: tl.constexpr):
    inf = float("inf")
    return [_or_nan(tl.max(tl.where(x == x, x, -inf), 0, keep_dims=True), x) for x in parts]


@triton.jit
def _total(parts):
    return [tl.sum(x, 0, keep_dims=True) for x in parts]


@triton.jit
def _filled(value, kind: tl.constexpr, REAL: tl.constexpr):
    ROWS: tl.constexpr = kind.ROWS
    WIDTH: tl.constexpr = kind.WIDTH
    return [tl.full((ROWS, WIDTH), value, REAL) for i in (0, 1)[: kind.PARTS]]


@triton.jit
def _where(valid, parts, other):
    return [tl.where(valid, x, other) for x in parts]


@triton.jit
def _with(x, y, kind: tl.constexpr):
    return [x[i] + y[i] for i in (0, 1)[: kind.PARTS]]


@triton.jit
def _squares(parts):
    return [x * x for x in parts]


@triton.jit
def _deviation(square, mean, EPSILON: tl.constexpr):
    """Exactly ε^½ where the variance is too small, by which the backward pass recognizes it."""
    variance = square - mean * mean
    least = tl.full((), EPSILON, square.dtype)
    root = tl.full((), EPSILON**0.5, square.dtype)
    return tl.where(variance <= least, root, tl.sqrt(variance))


@triton.jit(do_not_specialize=["B"])
def aggregate(
    inputs, kind: tl.constexpr, B,
    out,  # (N, B, SECTIONS, D)
):  # fmt: skip
    """One program: a block of lanes of a node; its edges are those that end there."""
    REAL: tl.constexpr = out.dtype.element_ty
    ALL: tl.constexpr = kind.AGGREGATE == "pna"
    SUM: tl.constexpr = ALL or kind.AGGREGATE == "sum" or kind.AGGREGATE == "mean"
    LOW: tl.constexpr = ALL or kind.AGGREGATE == "min"
    HIGH: tl.constexpr = ALL or kind.AGGREGATE == "max"
    v, lane, inside = _place(B, kind)
    at = _places(lane, kind.D, kind)
    of_relation = _places(lane, 0 if kind.SHARED else kind.D, kind)
    row = B.to(tl.int64) * kind.D
    relation_row = kind.D if kind.SHARED else row
    total = _filled(0.0, kind, REAL)
    square = total
    low = _filled(float("inf"), kind, REAL)
    high = _filled(float("-inf"), kind, REAL)
    ROWS: tl.constexpr = kind.ROWS
    count = tl.zeros((ROWS, 1), tl.int32)
    end = tl.load(inputs.start + v + 1)
    for start in range(tl.load(inputs.start + v), end, ROWS):
        i, valid, w = _edges(inputs, start, end, kind, REAL)
        source = tl.load(inputs.other + i, mask=valid, other=0)
        r = tl.load(inputs.relation + i, mask=valid, other=0)
        here = valid & inside
        x = load_parts(inputs.nodes, source * row, at, here, kind, REAL)
        y = load_parts(inputs.relations, r * relation_row, of_relation, here, kind, REAL)
        m = _messages(x, y, w, kind)
        count += valid.to(tl.int32)
        if SUM:
            total = _with(total, m, kind)
        if ALL:
            square = _with(square, _squares(m), kind)
        if LOW:
            low = _smaller(low, _where(valid, m, float("inf")), kind)
        if HIGH:
            high = _larger(high, _where(valid, m, float("-inf")), kind)

    number = tl.sum(count, 0, keep_dims=True)  # (1, 1)
    if inputs.own is not None:
        number += 1
        m = load_parts(inputs.own, v * row, at, inside, kind, REAL)
    base = v * row * kind.SECTIONS
    j = _places(lane, kind.SECTIONS * kind.D, kind)
    if SUM:
        total = _total(total)
        if inputs.own is not None:
            total = _with(total, m, kind)
        if kind.AGGREGATE != "sum":
            each = tl.maximum(number, 1).to(REAL)
            total = [x / each for x in total]
        store_parts(out, base, j, inside, total, kind)
    if LOW:
        low = _least(low, kind)
        if inputs.own is not None:
            low = _smaller(low, m, kind)
        low = _where(number > 0, low, 0.0)
        store_parts(out, base + (kind.D if ALL else 0), j, inside, low, kind)
    if HIGH:
        high = _largest(high, kind)
        if inputs.own is not None:
            high = _larger(high, m, kind)
        high = _where(number > 0, high, 0.0)
        store_parts(out, base + (2 * kind.D if ALL else 0), j, inside, high, kind)
    if ALL:
        square = _total(square)
        if inputs.own is not None:
            square = _with(square, _squares(m), kind)
        deviation = [
            _deviation(square[i] / each, total[i], kind.EPSILON) for i in (0, 1)[: kind.PARTS]
        ]
        deviation = _where(number > 0, deviation, 0.0)
        store_parts(out, base + 3 * kind.D, j, inside, deviation, kind)


@triton.jit
def _where_equal(m, extreme, g, kind: tl.constexpr):
    return [tl.where(m[i] == extreme[i], g[i], 0.0) for i in (0, 1)[: kind.PARTS]]


@triton.jit
def _pull(m, grad, result, base, j, inside, valid, kind: tl.constexpr, REAL: tl.constexpr):
    """The gradient by messages m: linear + square · m, plus that of an extreme if m is one."""
    g = load_parts(grad, base, j, inside, kind, REAL)
    if kind.AGGREGATE == "min" or kind.AGGREGATE == "max":
        g = _where_equal(m, load_parts(result, base, j, inside, kind, REAL), g, kind)
    elif kind.AGGREGATE == "pna":
        D: tl.constexpr = kind.D
        square = load_parts(grad, base + 3 * D, j, inside, kind, REAL)
        g = [g[i] + square[i] * m[i] for i in (0, 1)[: kind.PARTS]]
        for section in tl.static_range(1, 3):
            extreme = load_parts(result, base + section * D, j, inside, kind, REAL)
            h = load_parts(grad, base + section * D, j, inside, kind, REAL)
            g = _with(g, _where_equal(m, extreme, h, kind), kind)
        g = _where(valid, g, 0.0)  # 0 · m is not 0 for every m
    return g


@triton.jit(do_not_specialize=["B"])
def message_gradient(
    inputs, kind: tl.constexpr, B,
    grad,  # (N, B, SECTIONS, D), as relational._pulls returns it
    result,  # (N, B, SECTIONS, D)
    out,  # (N, B, D), or of pieces (P, B, D)
    OF_NODES: tl.constexpr,
):  # fmt: skip
    """One program: a block of lanes of a node, whose edges are those that begin there, or of a
    piece of a relation's edges."""
    REAL: tl.constexpr = out.dtype.element_ty
    own, lane, inside = _place(B, kind)
    at = _places(lane, kind.D, kind)
    of_relation = _places(lane, 0 if kind.SHARED else kind.D, kind)
    j = _places(lane, kind.SECTIONS * kind.D, kind)
    row = B.to(tl.int64) * kind.D
    relation_row = kind.D if kind.SHARED else row
    if OF_NODES:
        x = load_parts(inputs.nodes, own * row, at, inside, kind, REAL)
    else:
        r = tl.load(inputs.relation + own)
        y = load_parts(inputs.relations, r * relation_row, of_relation, inside, kind, REAL)
    total = _filled(0.0, kind, REAL)
    ROWS: tl.constexpr = kind.ROWS
    end = tl.load(inputs.start + own + 1)
    for start in range(tl.load(inputs.start + own), end, ROWS):
        i, valid, w = _edges(inputs, start, end, kind, REAL)
        target = tl.load(inputs.other + i, mask=valid, other=0)
        here = valid & inside
        if OF_NODES:
            r = tl.load(inputs.relation + i, mask=valid, other=0)
            other = load_parts(inputs.relations, r * relation_row, of_relation, here, kind, REAL)
            m = _messages(x, other, w, kind)
        else:
            source = tl.load(inputs.source + i, mask=valid, other=0)
            other = load_parts(inputs.nodes, source * row, at, here, kind, REAL)
            m = _messages(other, y, w, kind)
        base = target * (row * kind.SECTIONS)
        g = _pull(m, grad, result, base, j, here, valid, kind, REAL)
        g = [w * z for z in g]
        if kind.MESSAGE == "rotate":
            # The product with the conjugate of the other factor.
            real = g[0] * other[0] + g[1] * other[1]
            imaginary = g[1] * other[0] - g[0] * other[1]
            total = [total[0] + real, total[1] + imaginary]
        elif kind.MESSAGE == "transe":
            total = _with(total, g, kind)
        else:
            total = [total[0] + g[0] * other[0]]
    store_parts(out, own * row, at, inside, _total(total), kind)


@triton.jit(do_not_specialize=["B"])
def join_pieces(
    kind: tl.constexpr, B,
    first,  # (R + 1,) where a relation's pieces begin
    partial,  # (P, B, D)
    out,  # (R, B, D)
):  # fmt: skip
    """One program: sums a relation's pieces in order, for a block of lanes."""
    REAL: tl.constexpr = out.dtype.element_ty
    WIDTH: tl.constexpr = kind.WIDTH
    r, lane, inside = _place(B, kind)
    at = _places(lane, kind.D, kind)
    row = B.to(tl.int64) * kind.D
    total = [tl.zeros((1, WIDTH), REAL) for i in (0, 1)[: kind.PARTS]]
    for piece in range(tl.load(first + r), tl.load(first + r + 1)):
        more = load_parts(partial, piece * row, at, inside, kind, REAL)
        total = _with(total, more, kind)
    store_parts(out, r * row, at, inside, total, kind)
