"""What a backend is, and what one with kernels implements.

Requests arrive validated, except for ids (see :meth:`Kernels.check_ids`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple, Protocol

from torch import Tensor

from emu_kernels.request import Draws, LossRequest, Request
from emu_kernels.similarity import SIMILARITIES


class Loss(NamedTuple):
    loss: Tensor  # () or, for reduction "none", (B,)
    terms: Tensor  # (2,) weighted means of L_emu and L_van, not differentiable


class Scores(NamedTuple):
    positive: Tensor  # (B,)
    negative: Tensor  # (B, K), −inf at padding
    mutated: Tensor  # (B, K), −inf at padding; (0,) without mutation
    cumulant: Tensor  # (B, K), −inf at padding; (0,) except for a rule of moments


class Backend(Protocol):
    """One implementation of the public functions, differentiable by autograd."""

    @property
    def name(self) -> str: ...

    @property
    def device_types(self) -> tuple[str, ...]:
        """Types of the devices whose tensors it takes; empty for every device."""

    @property
    def measured(self) -> bool:
        """Whether it has run on the hardware that it is for. See :attr:`Kernels.measured`."""

    def unavailable(self) -> str | None:
        """Why this backend cannot run here, or None if it can."""

    def loss(self, request: LossRequest) -> Loss: ...

    def scores(self, request: Request) -> Scores: ...

    def mutate(self, positive: Tensor, negative: Tensor, draws: Draws) -> Tensor:
        """(B, D) and (B, K, D) of one dtype -> ẑ (B, K, D)."""


class ScoreWeights(NamedTuple):
    """Upstream gradients of the scores."""

    positive_weight: Tensor  # (B,)
    weight: Tensor  # (B, K)
    mutated_weight: Tensor  # (B, K), of any shape without mutation
    cumulant_weight: Tensor  # (B, K), of any shape except for a rule of moments


class ScoresGradient(NamedTuple):
    """Gradients of a weighted sum of scores by all but the table, and the weights of its sums.

    A similarity is a function of S sums over components (:mod:`emu_kernels.similarity`). A sum's
    weight is the derivative by that sum; for a sum of squares under a root, minus the derivative by
    half of it. With a rule of moments the sums of ẑ are means M, and each also has a variance V.
    """

    grad_query: Tensor  # (B, D)
    grad_positive: Tensor  # (B, D), by z⁺
    grad_scale: Tensor  # (B, D or D/2), (0,) without a scale
    grad_weights: Tensor  # (B, W), (0,) without weights
    weight: Tensor  # (S, B, K), of the sums of z⁻
    mutated_weight: Tensor  # (S, B, K), of the sums of ẑ; (0,) without mutation
    variance_weight: Tensor  # (S, B, K), of V/2; (0,) except for a rule of moments
    grad_rate: Tensor  # (B, U), by each row's rates; (0,) unless they are learned


class LossState(NamedTuple):
    """The loss and what its backward pass needs: the fields of :class:`ScoresGradient` for each
    row's loss, without the factor ``row_scale`` (of shape (0,) if no gradient is needed)."""

    loss: Tensor  # () or, for reduction "none", (B,)
    terms: Tensor  # (2,)
    row_scale: Tensor  # (B,) d loss / d row, or d loss_b / d row_b
    grad_query: Tensor
    grad_positive: Tensor
    grad_scale: Tensor
    grad_weights: Tensor
    weight: Tensor
    mutated_weight: Tensor
    variance_weight: Tensor
    grad_rate: Tensor


class SumWeights(NamedTuple):
    """What the gradient of the table is computed from."""

    row_scale: Tensor  # (B,), multiplies all that row b contributes
    weight: Tensor  # (S, B, K), as in ScoresGradient
    mutated_weight: Tensor  # (S, B, K) or (0,)
    variance_weight: Tensor  # (S, B, K) or (0,)
    grad_positive: Tensor  # (B, D)


class SparseRows(NamedTuple):
    ids: Tensor  # (M,) int64, ascending
    values: Tensor  # (M, D)


class TableStep(NamedTuple):
    """An optimizer's step of a table's touched rows, with gradients to add to some of them."""

    optimizer: str  # "sgd", "adagrad" or "rowwise_adagrad"
    lr: float
    eps: float
    sums: Tensor | None  # Adagrad's state: (N, D), or (N, 1) row-wise
    ids: Tensor  # (M,) int64, repeats allowed
    rows: Tensor  # (M, D), gradients to add to those of rows ``ids``


class MutateGradient(NamedTuple):
    grad_positive: Tensor  # (B, D)
    grad_negative: Tensor  # (B, K, D)


class Kernels(ABC):
    """What a backend with kernels implements. :class:`emu_kernels.ops.KernelBackend` makes it a
    :class:`Backend`."""

    @property
    @abstractmethod
    def name(self) -> str: ...

    @property
    @abstractmethod
    def device_types(self) -> tuple[str, ...]: ...

    measured: bool = False
    """Whether its tests have passed on the hardware that it is for, and its times are in
    bench/results (``make gpu-check`` does both for a GPU backend). Until then, calls with
    ``backend=None`` warn when they get it."""

    @abstractmethod
    def unavailable(self) -> str | None:
        """Why this backend cannot run here, or None if it can."""

    @abstractmethod
    def check_ids(self, name: str, ids: Tensor, *, rows: int, lowest: int) -> None:
        """Raise IndexError unless ``lowest <= id < rows`` for every id. A GPU backend, which would
        have to wait for the device, may leave that to its kernels (backends/ids.py)."""

    @abstractmethod
    def loss_forward(self, request: LossRequest, *, need_grad: bool) -> LossState: ...

    @abstractmethod
    def scores_forward(self, request: Request) -> Scores: ...

    @abstractmethod
    def query_gradient(self, request: Request, upstream: ScoreWeights) -> ScoresGradient:
        """Padding has no gradient, whatever its upstream weight."""

    @abstractmethod
    def table_gradient(self, request: Request, sums: SumWeights) -> Tensor:
        """(N, D) in the table's dtype: contributions are summed in fp32, then rounded once."""

    @abstractmethod
    def table_gradient_sparse(self, request: Request, sums: SumWeights) -> SparseRows:
        """The touched rows only."""

    def step_table(self, request: Request, sums: SumWeights, step: TableStep) -> bool:
        """Step the table in place, in the pass that computes its gradient. False if the backend
        cannot do so; it then has done nothing."""
        return False

    @abstractmethod
    def mutate_forward(self, positive: Tensor, negative: Tensor, draws: Draws) -> Tensor: ...

    @abstractmethod
    def mutate_backward(self, grad: Tensor, draws: Draws) -> MutateGradient: ...


def units(request: Request) -> int:
    """U: how many rates a row has under a rule of moments."""
    dim = request.query.shape[1]
    return dim // 2 if SIMILARITIES[request.similarity].coupled else dim


def new_scores(request: Request) -> Scores:
    """Uninitialized."""
    rows, count = request.query.shape[0], request.negative.shape[1]
    new = request.query.new_empty
    return Scores(
        positive=new((rows,)),
        negative=new((rows, count)),
        mutated=new((rows, count) if request.mutated else (0,)),
        cumulant=new((rows, count) if request.moments else (0,)),
    )


def new_scores_gradient(request: Request) -> ScoresGradient:
    """Uninitialized."""
    rows, dim = request.query.shape
    new = request.query.new_empty
    weights = (SIMILARITIES[request.similarity].sums, rows, request.negative.shape[1])
    moments = request.moments
    learned = moments is not None and moments.learned
    return ScoresGradient(
        grad_query=new((rows, dim)),
        grad_positive=new((rows, dim)),
        grad_scale=new((0,) if request.scale is None else request.scale.shape),
        grad_weights=new((0,) if request.weights is None else (rows, request.weights.shape[0])),
        weight=new(weights),
        mutated_weight=new(weights if request.mutated else (0,)),
        variance_weight=new(weights if moments else (0,)),
        grad_rate=new((rows, units(request)) if learned else (0,)),
    )


def new_loss_state(request: LossRequest, *, need_grad: bool) -> LossState:
    """Uninitialized."""
    rows = request.query.shape[0]
    new = request.query.new_empty
    if need_grad:
        gradient = new_scores_gradient(request)._asdict()
    else:
        gradient = {name: new((0,)) for name in ScoresGradient._fields}
    return LossState(
        loss=new((rows,) if request.reduction == "none" else ()),
        terms=new((2,)),
        row_scale=new((rows,)),
        **gradient,
    )
