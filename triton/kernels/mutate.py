"""Mutation alone, of (B, K, D) tensors."""

from __future__ import annotations

import triton.language as tl

import triton
from emu_kernels.triton.kinds import SIZES
from emu_kernels.triton.tiles import (
    components,
    draw,
    give,
    keep,
    load_bounds,
    load_parts,
    mix_parts,
    of_parts,
    over_rows,
    spread,
    store_parts,
    zeros,
)


@triton.jit(do_not_specialize=SIZES)
def mutate_forward(
    inputs, kind: tl.constexpr, B, K, R, N, row_offset, threshold,
    positive,  # (B, D)
    negative,  # (B, K, D), as out
    out,
):  # fmt: skip
    """One program: ROWS negatives of a row, for a chunk of components."""
    T: tl.constexpr = negative.dtype.element_ty
    pid = tl.program_id(0)
    first = (pid % kind.CHUNKS) * kind.WIDTH
    blocks = tl.cdiv(K, kind.ROWS)
    k = (pid // kind.CHUNKS % blocks) * kind.ROWS + tl.arange(0, kind.ROWS)
    b = (pid // kind.CHUNKS // blocks).to(tl.int64)
    j = components(first, kind.WIDTH)
    inside = spread(k < K) & (j < kind.W)
    base = spread((b * K + k) * kind.D)
    z = load_parts(positive, b * kind.D, j, j < kind.W, kind, T)
    c = load_parts(negative, base, j, inside, kind, T)
    bounds = load_bounds(inputs.thresholds, threshold, first, kind)
    drawn = draw(tl.load(inputs.seed), bounds, k, row_offset + b, first, kind, T)
    store_parts(out, base, j, inside, mix_parts(z, c, drawn, kind), kind)


@triton.jit(do_not_specialize=SIZES)
def mutate_backward(
    inputs, kind: tl.constexpr, B, K, R, N, row_offset, threshold,
    grad,  # (B, K, D)
    grad_positive,  # (B, D)
    grad_negative,  # (B, K, D)
):  # fmt: skip
    """One program: a row, for a chunk of components."""
    T: tl.constexpr = grad.dtype.element_ty
    REAL: tl.constexpr = tl.float64 if tl.float64 == T else tl.float32
    first = (tl.program_id(0) % kind.CHUNKS) * kind.WIDTH
    b = (tl.program_id(0) // kind.CHUNKS).to(tl.int64)
    j = components(first, kind.WIDTH)
    zero = spread(zeros(kind, REAL)) + components(0, kind.WIDTH).to(REAL) * 0
    total = of_parts(zero, kind)
    bounds = load_bounds(inputs.thresholds, threshold, first, kind)
    seed = tl.load(inputs.seed)
    for start in range(0, K, kind.ROWS):
        k = start + tl.arange(0, kind.ROWS)
        inside = spread(k < K) & (j < kind.W)
        base = spread((b * K + k) * kind.D)
        g = load_parts(grad, base, j, inside, kind, T)
        drawn = draw(seed, bounds, k, row_offset + b, first, kind, T)
        total = _add_given(total, g, drawn, kind)
        store_parts(grad_negative, base, j, inside, _kept(g, drawn, kind), kind)
    store_parts(grad_positive, b * kind.D, j, j < kind.W, over_rows(total), kind)


@triton.jit
def _add_given(total, g, drawn, kind: tl.constexpr):
    return [total[i] + give(drawn[i], g[i].to(total[i].dtype), kind) for i in (0, 1)[: kind.PARTS]]


@triton.jit
def _kept(g, drawn, kind: tl.constexpr):
    return [keep(drawn[i], g[i], kind) for i in (0, 1)[: kind.PARTS]]
