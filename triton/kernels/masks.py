"""The mask contract (emu_kernels/mask.py) in Triton: sixteen components per Philox call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton.language as tl

import triton

ROUNDS = tl.constexpr(7)
MASK_STREAM = tl.constexpr(0)
MIXUP_STREAM = tl.constexpr(1)


@triton.jit
def words(seed, block, column, row, stream: tl.constexpr):
    """The four words of one Philox call, of broadcastable uint32 tensors of one rank."""
    zero = block * 0 + column * 0
    return tl.philox(seed, zero + block, zero + column, zero + row, zero + stream, n_rounds=ROUNDS)


@triton.jit
def draws(
    seed,
    column,  # (ROWS,) uint32, k
    row,  # (ROWS,) uint32, row_offset + b
    first,  # component, a multiple of 16 except for SHIFT
    SHIFT: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """(4, ROWS, WIDTH / 16, 4) uint32 for components first + 0..WIDTH − 1, laid out as in tiles.py:
    a component's own byte is the highest, followed by those before it in its Philox word.

    Components that begin SHIFT inside a block of sixteen take bytes of two calls.
    """
    GROUPS: tl.constexpr = WIDTH // 16
    block = (first // 16 + tl.arange(0, GROUPS)).to(tl.uint32)[None, :]
    column = column[:, None]
    row = row[:, None]
    w0, w1, w2, w3 = words(seed, block, column, row, MASK_STREAM)
    if SHIFT != 0:
        w4, w5, w6, w7 = words(seed, block + 1, column, row, MASK_STREAM)
        if SHIFT // 4 == 1:
            w0, w1, w2, w3, w4 = w1, w2, w3, w4, w5
        elif SHIFT // 4 == 2:
            w0, w1, w2, w3, w4 = w2, w3, w4, w5, w6
        elif SHIFT // 4 == 3:
            w0, w1, w2, w3, w4 = w3, w4, w5, w6, w7
        if SHIFT % 4 != 0:
            LOW: tl.constexpr = 8 * (SHIFT % 4)
            w0 = (w0 >> LOW) | (w1 << (32 - LOW))
            w1 = (w1 >> LOW) | (w2 << (32 - LOW))
            w2 = (w2 >> LOW) | (w3 << (32 - LOW))
            w3 = (w3 >> LOW) | (w4 << (32 - LOW))
    joined = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (ROWS, GROUPS, 4))
    joined = tl.permute(joined, (2, 0, 1))[:, :, :, None]
    shift = (24 - tl.arange(0, 4) * 8).to(tl.uint32)[None, None, None, :]
    return joined << shift


@triton.jit
def below(drawn, threshold):
    """Whether the highest byte is below the threshold, 0..256; takes two instructions less than
    extracting the byte."""
    last = ((threshold.to(tl.int32) << 24) - 1).to(tl.uint32)  # 2^32 − 1 for 256, and for 0
    return (drawn <= last) & (threshold > 0)


@triton.jit
def _largest(w0, w1, w2, w3, ORDER: tl.constexpr):
    """Mixup's share: Beta(ORDER, 1), the largest of the first ORDER words."""
    most = w0 >> 8
    if ORDER > 1:
        most = tl.maximum(most, w1 >> 8)
    if ORDER > 2:
        most = tl.maximum(most, w2 >> 8)
    if ORDER > 3:
        most = tl.maximum(most, w3 >> 8)
    return most.to(tl.float32) * 5.9604644775390625e-08  # 2^-24


SHARES: dict[str, Callable[[Any], tuple[Any, int]]] = {
    "mixup": lambda rule: (_largest, rule.order),
}
"""For each mutation rule that draws shares: the function from a Philox call's words to the share of
itself that a negative keeps, fp32, and that function's parameter. To add a rule, add it here; rules
that draw masks need nothing."""


@triton.jit
def shares(seed, column, row, kind: tl.constexpr):
    """The share of itself that a negative keeps, fp32, of (ROWS,) columns and rows."""
    w0, w1, w2, w3 = words(seed, column * 0, column, row, MIXUP_STREAM)
    return kind.SHARE(w0, w1, w2, w3, kind.PARAMETER)
