"""The shape of a training step, and random tensors of that shape."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from emu_kernels.similarity import SIMILARITIES as _SIMILARITIES

SIMILARITIES = tuple(_SIMILARITIES)
DTYPES = {str(t).removeprefix("torch."): t for t in (torch.float32, torch.bfloat16, torch.float16)}
GRADIENTS = ("dense", "sparse")
CHOICES = {"similarity": SIMILARITIES, "dtype": tuple(DTYPES), "gradient": GRADIENTS}
SIZES = {"B": "batch", "K": "negatives", "D": "dim", "N": "entities"}  # column -> field of Shape
DISTINCT_ROWS = 1 << 16  # larger tables repeat their rows: drawing 10⁹ numbers takes too long


def is_gpu(device: str) -> bool:
    return torch.device(device).type == "cuda"


S = TypeVar("S", bound="Shape")


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
        sizes = ", ".join(f"{name}={getattr(self, field)}" for name, field in SIZES.items())
        return f"{self.similarity}, {sizes}, {self.dtype}, {self.gradient} gradient"

    def columns(self) -> dict[str, Any]:
        """Of a row of results."""
        names = {name: name for name in CHOICES} | SIZES
        return {name: getattr(self, field) for name, field in names.items()}

    def replace(self: S, **changes: Any) -> S:
        return dataclasses.replace(self, **changes)

    def tiny(self: S) -> S:
        """For tests, and to warm up before memory is measured."""
        return self.replace(batch=8, negatives=5, dim=20, entities=50)

    def load(self: S) -> tuple[S, Any]:
        """The shape, and what its steps need."""
        return self, make(self)

    @property
    def sparse(self) -> bool:
        return self.gradient == "sparse"

    @property
    def table_bytes(self) -> int:
        return self.entities * self.dim * DTYPES[self.dtype].itemsize


class Inputs(NamedTuple):
    """Tensors of one step; gradients flow to ``query`` and ``table``."""

    query: Tensor  # (B, D)
    table: Tensor  # (N, D)
    positive: Tensor  # (B,) int64
    negative: Tensor  # (B, K) int64


def make(shape: Shape) -> Inputs:
    """Uniform negatives, scores of order 1."""
    generator = torch.Generator(shape.device).manual_seed(0)

    def normal(rows: int) -> Tensor:
        values = torch.empty(rows, shape.dim, device=shape.device, dtype=DTYPES[shape.dtype])
        first = values[:DISTINCT_ROWS].normal_(generator=generator)
        for block in values[DISTINCT_ROWS:].split(DISTINCT_ROWS):
            block.copy_(first[: len(block)])
        return values

    def ids(*size: int) -> Tensor:
        return torch.randint(shape.entities, size, generator=generator, device=shape.device)

    table = normal(shape.entities).mul_(shape.dim**-0.5).requires_grad_()
    query = normal(shape.batch).requires_grad_()
    return Inputs(query, table, ids(shape.batch), ids(shape.batch, shape.negatives))
