"""The shape of a training step, and random tensors of that shape."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple

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
        """The columns of a row of results."""
        fields = {name: name for name in CHOICES} | SIZES
        return {name: getattr(self, field) for name, field in fields.items()}

    def replace(self, **changes: Any) -> Any:
        return dataclasses.replace(self, **changes)

    def tiny(self) -> Any:
        """For tests, and to warm up before memory is measured: no size is larger than these."""
        largest = {"batch": 8, "negatives": 5, "dim": 20, "entities": 50}
        return self.replace(**{name: min(getattr(self, name), n) for name, n in largest.items()})

    def load(self) -> tuple[Any, Any]:
        """The shape, and the data that its steps need."""
        return self, make(self)

    @property
    def sparse(self) -> bool:
        return self.gradient == "sparse"


class Inputs(NamedTuple):
    """Tensors of one step; gradients flow to ``query`` and ``table``."""

    query: Tensor  # (B, D)
    table: Tensor  # (N, D)
    positive: Tensor  # (B,) int64
    negative: Tensor  # (B, K) int64


def make(shape: Shape) -> Inputs:
    """Uniform negatives, scores of order 1."""
    device = shape.device
    like: Any = {"generator": torch.Generator(device).manual_seed(0), "device": device}

    def normal(rows: int) -> Tensor:
        size = (min(rows, DISTINCT_ROWS), shape.dim)
        values = torch.randn(size, dtype=DTYPES[shape.dtype], **like)
        return values[torch.arange(rows, device=device) % DISTINCT_ROWS]

    def ids(*size: int) -> Tensor:
        return torch.randint(shape.entities, size, **like)

    table = normal(shape.entities).mul_(shape.dim**-0.5).requires_grad_()
    query = normal(shape.batch).requires_grad_()
    return Inputs(query, table, ids(shape.batch), ids(shape.batch, shape.negatives))
