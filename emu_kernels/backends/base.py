"""What a kernel backend implements. Arguments arrive checked; ids are not, see each method."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from emu_kernels.reference import SIMILARITIES


class Batch(NamedTuple):
    """The inputs of one call, as the operators hand them to a backend."""

    query: Tensor  # (B, D) fp32, or fp64 where table is
    table: Tensor  # (N, D) fp32, bf16, fp16 or fp64
    scale: Tensor | None  # (B, S) of query's dtype
    weights: Tensor | None  # (W,) of query's dtype
    positive: Tensor  # (B,) int64
    negative: Tensor  # (G, K) int64, G dividing B, -1 is padding
    seed: Tensor  # () int64
    thresholds: Tensor | None  # int16, see emu_kernels.mutation.Mutation
    row_offset: int
    mutation: str  # "none" means the vanilla term alone
    threshold: int
    similarity: str
    phase_scale: float

    @property
    def mutated(self) -> bool:
        return self.mutation != "none"


class MaskSpec(NamedTuple):
    """What determines the masks of emu_mutate."""

    seed: Tensor  # () int64
    thresholds: Tensor | None  # int16
    row_offset: int
    mutation: str  # "component" or "pair"
    threshold: int


class LossState(NamedTuple):
    """A forward pass of the loss with what its backward pass needs (empty if not asked for).

    A similarity is a function of S sums over components (S = 2 for hake, else 1); a sum's weight is
    the derivative that its terms share: by the sum, or, of a sum of squares under a root, by half
    the squares.
    """

    loss: Tensor  # () or, for reduction "none", (B,)
    terms: Tensor  # (2,) weighted means of L_emu and L_van
    row_scale: Tensor  # (B,) d loss / d row, or d loss_b / d row_b
    weight: Tensor  # (S, B, K) d row / d sums of z⁻
    mutated_weight: Tensor  # (S, B, K) d row / d sums of ẑ, (0,) without mutation
    grad_query: Tensor  # (B, D) d row / d query
    grad_positive: Tensor  # (B, D) d row / d z⁺
    grad_scale: Tensor  # (B, S) d row / d scale, (0,) without one
    grad_weights: Tensor  # (B, W) d row / d weights, (0,) without


class ScoresGradient(NamedTuple):
    """Gradients of a weighted sum of scores; the last two are LossState's weights."""

    grad_query: Tensor  # (B, D)
    grad_positive: Tensor  # (B, D)
    grad_scale: Tensor  # (B, S) or (0,)
    grad_weights: Tensor  # (B, W) or (0,)
    weight: Tensor  # (S, B, K)
    mutated_weight: Tensor  # (S, B, K)


def new_scores(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised (B,), (B, K) and (B, K), the last (0,) without mutation."""
    rows, count = batch.query.shape[0], batch.negative.shape[1]
    new = batch.query.new_empty
    return new((rows,)), new((rows, count)), new((rows, count) if batch.mutated else (0,))


def new_scores_gradient(batch: Batch) -> ScoresGradient:
    """Uninitialised."""
    rows, dim = batch.query.shape
    new = batch.query.new_empty
    weights = (SIMILARITIES[batch.similarity].sums, rows, batch.negative.shape[1])
    return ScoresGradient(
        grad_query=new((rows, dim)),
        grad_positive=new((rows, dim)),
        grad_scale=new((0,) if batch.scale is None else batch.scale.shape),
        grad_weights=new((0,) if batch.weights is None else (rows, batch.weights.shape[0])),
        weight=new(weights),
        mutated_weight=new(weights if batch.mutated else (0,)),
    )


def new_loss_state(batch: Batch, reduction: str, need_grad: bool) -> LossState:
    """Uninitialised."""
    rows = batch.query.shape[0]
    new = batch.query.new_empty
    if need_grad:
        state = new_scores_gradient(batch)._asdict()
    else:
        state = {name: new((0,)) for name in ScoresGradient._fields}
    return LossState(
        loss=new((rows,) if reduction == "none" else ()),
        terms=new((2,)),
        row_scale=new((rows,)),
        **state,
    )


class Backend(Protocol):
    """One implementation of the fused operators."""

    @property
    def name(self) -> str: ...

    @property
    def device_types(self) -> tuple[str, ...]:
        """Types of the devices whose tensors it takes."""

    def unavailable(self) -> str | None:
        """Why this backend cannot run here, or None where it can."""

    def check_ids(self, name: str, ids: Tensor, *, rows: int, lowest: int) -> None:
        """Raise IndexError unless ``lowest <= id < rows`` for every id, where that is known at
        once."""

    def scale_rows(self, rows: Tensor, scale: Tensor) -> Tensor:
        """(B, X) times (B,) of one dtype, row by row."""

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
        """Scores (B,), (B, K) and (B, K), the last (0,) without mutation; −inf where padding."""

    def query_gradient(
        self,
        batch: Batch,
        positive_weight: Tensor,  # (B,)
        weight: Tensor,  # (B, K)
        mutated_weight: Tensor,  # (B, K)
    ) -> ScoresGradient:
        """Gradients of the weighted sum of scores; weights of padding count for nothing."""

    def table_gradient(
        self,
        batch: Batch,
        row_scale: Tensor,  # (B,) factor of all that comes from row b
        weight: Tensor,  # (S, B, K)
        mutated_weight: Tensor,  # (S, B, K)
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

    def mutate_forward(self, positive: Tensor, negative: Tensor, mask: MaskSpec) -> Tensor:
        """(B, D), (B, K, D) -> ẑ (B, K, D)."""

    def mutate_backward(self, grad: Tensor, mask: MaskSpec) -> tuple[Tensor, Tensor]:
        """(B, K, D) -> gradients of positive (B, D) and negative (B, K, D)."""
