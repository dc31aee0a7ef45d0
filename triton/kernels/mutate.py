"""Mutation alone, of (B, K, D) tensors."""

from __future__ import annotations

import triton.language as tl

import triton
from emu_kernels.triton.kinds import SIZES
from emu_kernels.triton.tiles import (
    components,
    draw,
    load_bounds,
    load_parts,
    over_rows,
    spread,
    store_parts,
)


@triton.jit(do_not_specialize=SIZES)
def mutate_forward(
    inputs,
    kind: tl.constexpr,
    B,
    K,
    R,
    N,
    row_offset,
    threshold,
    positive,  # (B, D)
    negative,  # (B, K, D), as out
    out,
):
    """One program: ROWS negatives of a row, a chunk of components."""
    T: tl.constexpr = negative.dtype.element_ty
    pid = tl.program_id(0)
    first = (pid % kind.CHUNKS) * kind.WIDTH
    blocks = tl.cdiv(K, kind.ROWS)
    k = (pid // kind.CHUNKS % blocks) * kind.ROWS + tl.arange(0, kind.ROWS)
    b = (pid // kind.CHUNKS // blocks).to(tl.int64)
    j = components(first, kind.WIDTH)
    inside = spread(k < K) & (j < kind.W)
    base = spread((b * K + k) * kind.D)
    z0, z1 = load_parts(positive, b * kind.D, j, j < kind.W, kind, T)
    c0, c1 = load_parts(negative, base, j, inside, kind, T)
    row = row_offset + b + tl.zeros((kind.ROWS,), tl.int64)
    bound0, bound1 = load_bounds(inputs.thresholds, threshold, first, kind)
    l0, l1 = draw(
        tl.load(inputs.seed), bound0, bound1, k, row, first, kind, T,
    )  # fmt: skip
    x0 = tl.where(l0, z0, c0)
    x1 = tl.where(l1, z1, c1)
    store_parts(out, base, j, inside, x0, x1, kind)


@triton.jit(do_not_specialize=SIZES)
def mutate_backward(
    inputs,
    kind: tl.constexpr,
    B,
    K,
    R,
    N,
    row_offset,
    threshold,
    grad,  # (B, K, D)
    grad_positive,  # (B, D)
    grad_negative,  # (B, K, D)
):
    """One program: a row, a chunk of components."""
    T: tl.constexpr = grad.dtype.element_ty
    REAL: tl.constexpr = tl.float64 if tl.float64 == T else tl.float32
    first = (tl.program_id(0) % kind.CHUNKS) * kind.WIDTH
    b = (tl.program_id(0) // kind.CHUNKS).to(tl.int64)
    j = components(first, kind.WIDTH)
    sum0 = tl.zeros((4, kind.ROWS, kind.WIDTH // 16, 4), REAL)
    sum1 = sum0
    row = row_offset + b + tl.zeros((kind.ROWS,), tl.int64)
    bound0, bound1 = load_bounds(inputs.thresholds, threshold, first, kind)
    seed_value = tl.load(inputs.seed)
    for start in range(0, K, kind.ROWS):
        k = start + tl.arange(0, kind.ROWS)
        inside = spread(k < K) & (j < kind.W)
        base = spread((b * K + k) * kind.D)
        g0, g1 = load_parts(grad, base, j, inside, kind, T)
        l0, l1 = draw(
            seed_value, bound0, bound1, k, row, first, kind, T,
        )  # fmt: skip
        sum0 += tl.where(l0, g0.to(REAL), 0.0)
        sum1 += tl.where(l1, g1.to(REAL), 0.0)
        store_parts(
            grad_negative, base, j, inside, tl.where(l0, 0.0, g0), tl.where(l1, 0.0, g1), kind
        )
    total0 = over_rows(sum0)
    total1 = over_rows(sum1)
    store_parts(grad_positive, b * kind.D, j, j < kind.W, total0, total1, kind)
