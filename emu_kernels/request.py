"""A call as the backends take it: one frozen request, validated, its tensors in canonical form.

The operators' schemas, their fake kernels, and what is saved for the backward pass follow from
these fields (:mod:`emu_kernels.ops`). Sizes in comments: B rows, K negatives a row, G sets of
negatives (G divides B), D components, N rows of the table.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from emu_kernels.mutation import DIFFERENTIABLE, Expected, Mutation


@dataclass(frozen=True, kw_only=True)
class Draws:
    """What determines the masks or shares of a call, except for its shape."""

    mutation: Mutation
    seed: Tensor  # () int64
    row_offset: int  # the global index of row 0


@dataclass(frozen=True, kw_only=True)
class Request(Draws):
    """What every fused function takes. All tensors but the table are contiguous."""

    query: Tensor = field(metadata=DIFFERENTIABLE)  # (B, D) fp32, or fp64 where the table is
    table: Tensor = field(metadata=DIFFERENTIABLE)  # (N, D) fp32, bf16, fp16 or fp64
    scale: Tensor | None = field(metadata=DIFFERENTIABLE)  # (B, D or D/2) of query's dtype
    weights: Tensor | None = field(metadata=DIFFERENTIABLE)  # (W,) of query's dtype
    positive: Tensor  # (B,) int64
    negative: Tensor  # (G, K) int64, −1 is padding
    similarity: str
    phase_scale: float
    sparse_grad: bool

    @property
    def mutated(self) -> bool:
        """Whether there are mutated negatives; otherwise there is only the vanilla term."""
        return self.mutation.draw != "none"

    @property
    def moments(self) -> Expected | None:
        """The rule, if it is the closed form, which uses moments of mutated scores; else None."""
        return self.mutation if isinstance(self.mutation, Expected) else None


@dataclass(frozen=True, kw_only=True)
class LossRequest(Request):
    """What the losses take."""

    beta: float
    alpha: float
    coefficients: Tensor | None  # (2,) β and α of query's dtype, instead of the two numbers
    sample_weight: Tensor | None  # (B,) of query's dtype
    positive_log_q: Tensor | None = None  # (B,) of query's dtype; logits are scores minus these
    negative_log_q: Tensor | None = None  # (G, K), 0 at padding; both or neither
    reduction: str  # "none", "sum" or "mean"
