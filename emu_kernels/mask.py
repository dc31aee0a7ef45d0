"""The mask contract: which components of which negative are mutated, bit for bit.

Every backend draws the same masks from the same seed, whatever its tiling, thread count or
sharding. Philox-4x32 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11) with 7
rounds; key = (seed low 32, seed high 32), counter = (j div 16, k, row_offset + b, stream 0). The
four little-endian words of one call are sixteen bytes, one for each of the components 16 * (j div
16) + 0..15. Component j of negative k of row b is taken from the positive exactly when its byte is
below the threshold round(256 * mutation_rate). The rate, and so the threshold, may differ from
component to component. Where a mask's unit is the pair, component j < D/2 (a complex number's real
part) decides for component D/2 + j (its imaginary part) too.

Mixup draws from the same generator, counter = (0, k, row_offset + b, stream 1): negative k of row b
keeps the share max(first ``order`` words div 2^8) / 2^24 of itself, which is distributed as
Beta(order, 1).

This module is the readable form of the contract, in PyTorch integer arithmetic. The generator's C++
twin is csrc/common/philox.h.
"""

from __future__ import annotations

import torch
from torch import Tensor

CONTRACT_VERSION = 1
"""Changes whenever the same seed would draw another mask. A run's config records it."""

ROUNDS = 7
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
COMPONENTS_PER_CALL = 16
MASK_STREAM, MIXUP_STREAM = 0, 1
MAX_MIXUP_ORDER = 4  # the words that one call of the generator gives
_LOW = 0xFFFFFFFF


def rate_to_threshold(mutation_rate: float) -> int:
    """Bytes below this value mutate: ``round(256 * mutation_rate)``, half to even, in 0..256."""
    return round(256 * mutation_rate)


def effective_rate(mutation_rate: float) -> float:
    """The rate that masks really have: ``mutation_rate`` rounded to the nearest 1/256."""
    return rate_to_threshold(mutation_rate) / 256


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> Tensor:
    """Philox-4x32-7 of broadcastable int64 tensors that hold unsigned 32-bit words.

    Returns an int64 tensor of the broadcast shape with a last dimension of 4, the output words.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for r in range(ROUNDS):
        # The product may pass 2^63 and wrap; its 64 bits are right all the same.
        p0 = c0 * MULTIPLIERS[0]
        p1 = c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _LOW) ^ c1 ^ ((k0 + r * WEYL[0]) & _LOW),
            p1 & _LOW,
            ((p0 >> 32) & _LOW) ^ c3 ^ ((k1 + r * WEYL[1]) & _LOW),
            p0 & _LOW,
        )
    return torch.stack(torch.broadcast_tensors(c0, c1, c2, c3), dim=-1)


def rates_to_thresholds(mutation_rate: Tensor) -> Tensor:
    """:func:`rate_to_threshold` of each element, as int16."""
    return (mutation_rate.to(torch.float64) * 256).round().to(torch.int16)


def mutation_mask(
    batch: int,
    count: int,
    dim: int,
    *,
    seed: Tensor,
    row_offset: int,
    threshold: int | Tensor,
    pairs: bool = False,
) -> Tensor:
    """The mask λ of ẑ = λ ⊙ z⁺ + (1 − λ) ⊙ z⁻.

    Args:
        batch, count, dim: B, K, D.
        seed: one-element int64 tensor; its device is the mask's.
        row_offset: global index of row 0.
        threshold: 0..256, see :func:`rate_to_threshold`; a tensor holds one for each component, or
            for each pair.
        pairs: whether components j and D/2 + j share a bit.

    Returns:
        (B, K, D) bool, True where the component comes from the positive.
    """
    if pairs:
        half = mutation_mask(
            batch, count, dim // 2, seed=seed, row_offset=row_offset, threshold=threshold
        )
        return torch.cat([half, half], dim=-1)
    blocks = -(-dim // COMPONENTS_PER_CALL)
    words = _words(batch, count, blocks, seed, row_offset, MASK_STREAM)
    shifts = torch.arange(0, 32, 8, device=seed.device)
    draws = (words[..., None] >> shifts) & 0xFF  # (B, K, blocks, 4, 4)
    return draws.reshape(batch, count, blocks * COMPONENTS_PER_CALL)[..., :dim] < threshold


def mixup_share(batch: int, count: int, *, seed: Tensor, row_offset: int, order: int) -> Tensor:
    """(B, K) fp32 in [0, 1): the share μ ~ Beta(order, 1) of itself that each negative keeps."""
    words = _words(batch, count, 1, seed, row_offset, MIXUP_STREAM)[:, :, 0, :order]
    return (words >> 8).amax(dim=-1).to(torch.float32) * 2.0**-24


def _words(
    batch: int, count: int, blocks: int, seed: Tensor, row_offset: int, stream: int
) -> Tensor:
    """(B, K, blocks, 4): the output words of counter (block, k, row_offset + b, stream)."""
    device = seed.device
    seed = seed.reshape(())
    row = torch.arange(batch, device=device, dtype=torch.int64)[:, None, None] + row_offset
    column = torch.arange(count, device=device, dtype=torch.int64)[None, :, None]
    block = torch.arange(blocks, device=device, dtype=torch.int64)[None, None, :]
    return philox4x32(
        (block, column, row, torch.full_like(block, stream)), (seed & _LOW, (seed >> 32) & _LOW)
    )
