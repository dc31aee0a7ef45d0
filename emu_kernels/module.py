"""EMU as a loss module."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from emu_kernels import backends, prepare, validate
from emu_kernels.mutation import MutationRate


class EMULoss(nn.Module):
    """:func:`emu_kernels.fused_emu_loss` as a module that holds the hyper-parameters. Each call
    draws a fresh seed unless it is given one.

    After a call, ``last_terms`` is a detached (2,) tensor with the batch's (weighted) means of
    L_emu and L_van, for logging. Converting it to Python numbers waits for a GPU; keeping the
    tensor does not.

    Args:
        mutation_rate, beta, alpha, similarity, phase_scale, mask_unit, reduction, sparse_grad,
            backend: as in :func:`emu_kernels.fused_emu_loss`. May be reassigned between calls
            (schedules).

    Raises:
        TypeError, ValueError: an invalid rate or coefficient; at a call, as
            :func:`emu_kernels.fused_emu_loss`.

    Shapes: as in :func:`emu_kernels.fused_emu_loss`.
    """

    last_terms: Tensor | None

    def __init__(
        self,
        *,
        mutation_rate: MutationRate,
        beta: float | Tensor,
        alpha: float | Tensor,
        similarity: str = "dot",
        phase_scale: float = 1.0,
        mask_unit: str = "component",
        reduction: str = "mean",
        sparse_grad: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        validate.rate_or_rule("mutation_rate", mutation_rate)
        self.mutation_rate = mutation_rate
        self.beta = validate.coefficient("beta", beta)
        self.alpha = validate.coefficient("alpha", alpha)
        self.similarity = similarity
        self.phase_scale = phase_scale
        self.mask_unit = mask_unit
        self.reduction = reduction
        self.sparse_grad = validate.flag("sparse_grad", sparse_grad)
        self.backend = backend
        self.last_terms = None

    def forward(
        self,
        query: Tensor,  # (B, D)
        table: Tensor,  # (N, D)
        positive: Tensor,  # (B,)
        negative: Tensor,  # (G, K) or (K,)
        *,
        scale: Tensor | None = None,  # (B, D), or (B, D/2)
        similarity_weights: Tensor | None = None,
        sample_weight: Tensor | None = None,  # (B,)
        log_q: Tensor | None = None,  # (N,)
        seed: int | Tensor | None = None,
        row_offset: int = 0,
    ) -> Tensor:
        request = prepare.loss(
            prepare.scores(
                query,
                table,
                positive,
                negative,
                similarity=self.similarity,
                mutation=self.mutation_rate,
                mask_unit=self.mask_unit,
                scale=scale,
                similarity_weights=similarity_weights,
                phase_scale=self.phase_scale,
                seed=seed,
                row_offset=row_offset,
                sparse_grad=self.sparse_grad,
            ),
            beta=self.beta,
            alpha=self.alpha,
            sample_weight=sample_weight,
            reduction=self.reduction,
            log_q=log_q,
        )
        loss, terms = backends.resolve(self.backend, table.device).loss(request)
        self.last_terms = terms.detach()
        return loss

    def __getstate__(self) -> dict[str, Any]:
        # torch.func's wrappers and fake tensors cannot be copied.
        return vars(self) | {"last_terms": None}

    def extra_repr(self) -> str:
        return (
            f"similarity={self.similarity!r}, mutation_rate={self.mutation_rate}, "
            f"beta={self.beta}, alpha={self.alpha}, reduction={self.reduction!r}"
        )
