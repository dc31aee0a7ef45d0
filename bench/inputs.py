"""What a step is given: a shape, and random tensors of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

DTYPES = {str(t).removeprefix("torch."): t for t in (torch.float32, torch.bfloat16, torch.float16)}
GRADIENTS = ("dense", "sparse")

DISTINCT_ROWS = 1 << 16
"""Of a table; more of them repeat, since drawing 10⁹ numbers takes longer than what is measured."""


@dataclass(frozen=True)
class Shape:
    """One training step. The default is the paper's setting on FB15k-237."""

    batch: int = 1000  # B
    negatives: int = 256  # K
    dim: int = 100  # D
    entities: int = 14541  # N
    similarity: str = "dot"
    dtype: str = "float32"  # of query and table
    gradient: str = "dense"  # of the table
    device: str = "cpu"

    def __str__(self) -> str:
        sizes = f"B={self.batch}, K={self.negatives}, D={self.dim}, N={self.entities}"
        return f"{self.similarity}, {sizes}, {self.dtype}, {self.gradient} gradient"

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype].itemsize

    @property
    def table_bytes(self) -> int:
        return self.entities * self.dim * self.itemsize


TINY = Shape(batch=8, negatives=5, dim=20, entities=50)
"""For tests, and to warm up what a process does only once."""


@dataclass(frozen=True)
class Inputs:
    """Tensors of one step; gradients flow to ``query`` and ``table``."""

    shape: Shape
    query: Tensor  # (B, D)
    table: Tensor  # (N, D)
    positive: Tensor  # (B,) int64
    negative: Tensor  # (B, K) int64

    @property
    def similarity(self) -> str:
        return self.shape.similarity

    @property
    def sparse(self) -> bool:
        return self.shape.gradient == "sparse"


def make(shape: Shape, seed: int = 0) -> Inputs:
    """Uniform negatives, scores of order 1."""
    generator = torch.Generator(shape.device).manual_seed(seed)
    dtype = DTYPES[shape.dtype]

    def normal(rows: int) -> Tensor:
        values = torch.empty(rows, shape.dim, device=shape.device, dtype=dtype)
        first = values[:DISTINCT_ROWS].normal_(generator=generator)
        for block in values[DISTINCT_ROWS:].split(DISTINCT_ROWS):
            block.copy_(first[: len(block)])
        return values

    def ids(*size: int) -> Tensor:
        return torch.randint(shape.entities, size, generator=generator, device=shape.device)

    return Inputs(
        shape=shape,
        table=normal(shape.entities).mul_(shape.dim**-0.5).requires_grad_(),
        query=normal(shape.batch).requires_grad_(),
        positive=ids(shape.batch),
        negative=ids(shape.batch, shape.negatives),
    )
