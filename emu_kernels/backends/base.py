"""What a kernel backend implements. Arguments arrive checked; ids are not, see each method."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor


class Batch(NamedTuple):
    """The inputs of one call, as the operators hand them to a backend.

    With ``threshold`` None there is no mutation: the vanilla term alone.
    """

    query: Tensor  # (B, D) fp32, or fp64 where table is
    table: Tensor  # (N, D) fp32, bf16, fp16 or fp64
    positive: Tensor  # (B,) int64
    negative: Tensor  # (G, K) int64, G dividing B, -1 is padding
    seed: Tensor  # () int64
    row_offset: int
    threshold: int | None
    similarity: str


class LossState(NamedTuple):
    """A forward pass of the loss with what its backward pass needs (empty if not asked for)."""

    loss: Tensor  # () or, for reduction "none", (B,)
    terms: Tensor  # (2,) weighted means of L_emu and L_van
    row_scale: Tensor  # (B,) d loss / d row, or d loss_b / d row_b
    weight: Tensor  # (B, K) d row / d s⁻
    mutated_weight: Tensor  # (B, K) d row / d ŝ, (0,) without mutation
    grad_query: Tensor  # (B, D) d row / d query
    grad_positive: Tensor  # (B, D) d row / d z⁺


class Backend(Protocol):
    """One implementation of the fused operators."""

    @property
    def name(self) -> str: ...

    @property
    def device_types(self) -> tuple[str, ...]:
        """Types of the devices whose tensors it takes."""

    def unavailable(self) -> str | None:
        """Why this backend cannot run here, or None where it can."""

    def loss_forward(
        self,
        batch: Batch,
        *,
        beta: float,
        alpha: float,
        coefficients: Tensor | None,  # (2,) beta and alpha, instead of the two numbers
        sample_weight: Tensor | None,  # (B,)
        reduction: str,
        need_grad: bool,
    ) -> LossState: ...

    def scores_forward(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Scores (B,), (B, K) and (B, K); −inf where padding."""

    def query_gradient(
        self,
        batch: Batch,
        positive_weight: Tensor,  # (B,)
        weight: Tensor,  # (B, K)
        mutated_weight: Tensor,  # (B, K)
    ) -> tuple[Tensor, Tensor]:
        """Gradients (B, D) of the weighted sum of scores with respect to query and to z⁺."""

    def table_gradient(
        self,
        batch: Batch,
        row_scale: Tensor,  # (B,) factor of all that comes from row b
        weight: Tensor,  # (B, K)
        mutated_weight: Tensor,  # (B, K)
        grad_positive: Tensor,  # (B, D)
    ) -> Tensor:
        """(N, D) in the table's dtype: contributions summed in fp32, then rounded once."""

    def table_gradient_sparse(
        self,
        batch: Batch,
        row_scale: Tensor,
        weight: Tensor,
        mutated_weight: Tensor,
        grad_positive: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """The touched rows only: ids (M,) ascending and values (M, D)."""

    def mutate_forward(
        self, positive: Tensor, negative: Tensor, seed: Tensor, row_offset: int, threshold: int
    ) -> Tensor:
        """(B, D), (B, K, D) -> ẑ (B, K, D)."""

    def mutate_backward(
        self, grad: Tensor, seed: Tensor, row_offset: int, threshold: int
    ) -> tuple[Tensor, Tensor]:
        """(B, K, D) -> gradients of positive (B, D) and negative (B, K, D)."""
