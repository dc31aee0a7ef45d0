"""What a step is given: a shape, and random tensors of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """One training step. The default is the paper's setting on FB15k-237."""

    batch: int = 1000  # B
    negatives: int = 256  # K
    dim: int = 100  # D
    entities: int = 14541  # N
    similarity: str = "dot"

    def __str__(self) -> str:
        sizes = f"B={self.batch}, K={self.negatives}, D={self.dim}, N={self.entities}"
        return f"{self.similarity}, {sizes}"


TINY = Shape(batch=8, negatives=5, dim=20, entities=50)
"""For tests, and to warm up what a process does only once."""


@dataclass(frozen=True)
class Inputs:
    """Tensors of one step; gradients flow to ``query`` and ``table``."""

    query: Tensor  # (B, D) fp32
    table: Tensor  # (N, D) fp32
    positive: Tensor  # (B,) int64
    negative: Tensor  # (B, K) int64
    similarity: str = "dot"


def make(shape: Shape, seed: int = 0) -> Inputs:
    """Uniform negatives, scores of order 1."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(shape.entities, shape.dim, generator=generator) / shape.dim**0.5
    return Inputs(
        query=torch.randn(shape.batch, shape.dim, generator=generator).requires_grad_(),
        table=table.requires_grad_(),
        positive=torch.randint(shape.entities, (shape.batch,), generator=generator),
        negative=torch.randint(shape.entities, (shape.batch, shape.negatives), generator=generator),
        similarity=shape.similarity,
    )
