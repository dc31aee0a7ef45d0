"""The reference backend: the specification itself, on every device that PyTorch has."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from emu_kernels import reference
from emu_kernels.backends.base import Loss, Scores
from emu_kernels.library import Function
from emu_kernels.request import Draws, LossRequest, Request
from emu_kernels.values import usable_coefficients, usable_ids


class ReferenceBackend:
    """Slow, as it makes (B, K, D) tensors; differentiable any number of times."""

    name = "reference"
    device_types: tuple[str, ...] = ()
    measured = True

    def unavailable(self) -> str | None:
        return None

    def loss(self, request: LossRequest) -> Loss:
        scored, poison = _scores(request)
        beta, alpha = usable_coefficients(request)
        scored = reference.logits(scored, request)
        terms, rows = reference.loss_rows(scored, request.negative, beta=beta, alpha=alpha)
        return reduced(request, terms, rows, poison)

    def scores(self, request: Request) -> Scores:
        scored, poison = _scores(request)
        none = scored.negative.new_empty((0,))
        mutated = none if scored.mutated is None else scored.mutated
        cumulant = scored.cumulant if request.moments and scored.cumulant is not None else none
        if poison is None:
            return Scores(scored.positive, scored.negative, mutated, cumulant)
        column = poison[:, None]
        by_row = (s * column if s.numel() else s for s in (scored.negative, mutated, cumulant))
        return Scores(scored.positive * poison, *by_row)

    def mutate(self, positive: Tensor, negative: Tensor, draws: Draws) -> Tensor:
        return reference.mutate(positive, negative, draws)


def reduced(request: LossRequest, terms: Tensor, rows: Tensor, poison: Tensor | None) -> Loss:
    """The loss from the terms (2, B) and the totals (B,) of rows; ``poison`` is the factor of
    :func:`emu_kernels.values.usable_ids`."""
    if poison is not None:
        rows = rows * poison
    weight = request.sample_weight
    means = [reference.reduce(term, weight, "mean") for term in terms.detach()]
    return Loss(reference.reduce(rows, weight, request.reduction), torch.stack(means))


def _scores(request: Request) -> tuple[reference.Scores, Tensor | None]:
    """The scores, and :func:`emu_kernels.values.usable_ids`' factor."""
    positive, negative, poison = usable_ids(
        request.positive, request.negative, rows=request.table.shape[0]
    )
    table = _Sparse.apply(request.table) if request.sparse_grad else request.table
    return reference.scores(
        replace(request, table=table, positive=positive, negative=negative)
    ), poison


class _Sparse(Function):
    """Identity whose gradient becomes sparse: the rows that are not zero."""

    @staticmethod
    def forward(table: Tensor) -> Tensor:
        return table.view_as(table)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        touched = (grad != 0).any(dim=1).nonzero()[:, 0]
        return torch.sparse_coo_tensor(
            touched[None], grad[touched], grad.shape, is_coalesced=True, check_invariants=False
        )
