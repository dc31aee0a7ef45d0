"""Mutation alone, of (B, K, D) tensors."""

from __future__ import annotations

import triton.language as tl

import triton
from emu_kernels.triton.tiles import (
    components,
    draw,
    load_bounds,
    load_parts,
    over_rows,
    spread,
    store_parts,
)

VARYING = ["K", "row_offset", "threshold"]


@triton.jit(do_not_specialize=VARYING)
def mutate_forward(
    positive,
    negative,
    seed,
    thresholds,
    out,
    K,
    row_offset,
    threshold,
    D: tl.constexpr,
    PARTS: tl.constexpr,
    MUTATION: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One program: ROWS negatives of a row, a chunk of components."""
    W: tl.constexpr = D // PARTS
    CHUNKS: tl.constexpr = (W + WIDTH - 1) // WIDTH
    T: tl.constexpr = negative.dtype.element_ty
    pid = tl.program_id(0)
    first = (pid % CHUNKS) * WIDTH
    blocks = tl.cdiv(K, ROWS)
    k = (pid // CHUNKS % blocks) * ROWS + tl.arange(0, ROWS)
    b = (pid // CHUNKS // blocks).to(tl.int64)
    j = components(first, WIDTH)
    inside = spread(k < K) & (j < W)
    base = spread((b * K + k) * D)
    z0, z1 = load_parts(positive, b * D, j, j < W, W, PARTS, T)
    c0, c1 = load_parts(negative, base, j, inside, W, PARTS, T)
    row = row_offset + b + tl.zeros((ROWS,), tl.int64)
    bound0, bound1 = load_bounds(thresholds, threshold, first, W, PARTS, MUTATION, WIDTH)
    l0, l1 = draw(
        tl.load(seed), bound0, bound1, k, row, first,
        W, PARTS, MUTATION, 1, ROWS, WIDTH, T,
    )  # fmt: skip
    x0 = tl.where(l0, z0, c0)
    x1 = tl.where(l1, z1, c1)
    store_parts(out, base, j, inside, x0, x1, W, PARTS)


@triton.jit(do_not_specialize=VARYING)
def mutate_backward(
    grad,
    seed,
    thresholds,
    grad_positive,
    grad_negative,
    K,
    row_offset,
    threshold,
    D: tl.constexpr,
    PARTS: tl.constexpr,
    MUTATION: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One program: a row, a chunk of components."""
    W: tl.constexpr = D // PARTS
    CHUNKS: tl.constexpr = (W + WIDTH - 1) // WIDTH
    T: tl.constexpr = grad.dtype.element_ty
    REAL: tl.constexpr = tl.float64 if tl.float64 == T else tl.float32
    first = (tl.program_id(0) % CHUNKS) * WIDTH
    b = (tl.program_id(0) // CHUNKS).to(tl.int64)
    j = components(first, WIDTH)
    sum0 = tl.zeros((4, ROWS, WIDTH // 16, 4), REAL)
    sum1 = sum0
    row = row_offset + b + tl.zeros((ROWS,), tl.int64)
    bound0, bound1 = load_bounds(thresholds, threshold, first, W, PARTS, MUTATION, WIDTH)
    seed_value = tl.load(seed)
    for start in range(0, K, ROWS):
        k = start + tl.arange(0, ROWS)
        inside = spread(k < K) & (j < W)
        base = spread((b * K + k) * D)
        g0, g1 = load_parts(grad, base, j, inside, W, PARTS, T)
        l0, l1 = draw(
            seed_value, bound0, bound1, k, row, first,
            W, PARTS, MUTATION, 1, ROWS, WIDTH, T,
        )  # fmt: skip
        sum0 += tl.where(l0, g0.to(REAL), 0.0)
        sum1 += tl.where(l1, g1.to(REAL), 0.0)
        store_parts(
            grad_negative, base, j, inside, tl.where(l0, 0.0, g0), tl.where(l1, 0.0, g1), W, PARTS
        )
    total0 = over_rows(sum0)
    total1 = over_rows(sum1)
    store_parts(grad_positive, b * D, j, j < W, total0, total1, W, PARTS)
