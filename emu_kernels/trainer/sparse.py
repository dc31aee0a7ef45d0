"""Sparse gradients of the entity table, and Adagrad by rows: a step costs the rows it touches."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

_BLOCK = 2**19
"""Components that a CPU steps at a time, so that intermediate results stay in the cache."""


def add_rows(gradient: Tensor, ids: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Add rows to a table's sparse gradient, in place, where the gradient has them.

    Args:
        gradient: (N, D), coalesced, ids ascending.
        ids: (B,) rows of the table, repeats allowed.
        rows: (B, D) to add to them.

    Returns:
        (R,) the ids that the gradient lacks, each once, and (R, D) the sums of their rows.
    """
    touched, values = gradient._indices()[0], gradient._values()
    ids, place = ids.unique(return_inverse=True)
    rows = rows.new_zeros(len(ids), rows.shape[1]).index_add_(0, place, rows)
    if not len(touched):
        return ids, rows
    at = torch.searchsorted(touched, ids)
    known = touched[at.clamp(max=len(touched) - 1)] == ids
    values.index_add_(0, at[known], rows[known])
    return ids[~known], rows[~known]


class RowwiseAdagrad(torch.optim.Adagrad):
    """torch's Adagrad, but of a sparse gradient it reads and writes only the rows that it has.

    The numbers are those from a dense gradient: rows without one do not move. torch's own takes
    sparse gradients too, and sorts and sums their rows once more. There is no weight decay, which
    would touch every row.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, *, fused: bool | None = None) -> None:
        super().__init__(params, lr=lr, fused=fused)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step. A sparse gradient must have each row once."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        sparse = []
        for group in self.param_groups:
            for parameter in group["params"]:
                gradient = parameter.grad
                if gradient is not None and gradient.is_sparse:
                    self.state[parameter]["step"] += 1
                    self.step_rows(parameter, gradient._indices()[0], gradient._values())
                    sparse.append((parameter, gradient))
                    parameter.grad = None  # torch's step leaves it alone
        super().step()
        for parameter, gradient in sparse:
            parameter.grad = gradient
        return loss

    @torch.no_grad()
    def step_rows(self, parameter: Tensor, ids: Tensor, gradient: Tensor) -> None:
        """Part of a step, before or after the rest: rows that no other part of it has.

        Args:
            parameter: (N, D), one of the optimizer's.
            ids: (R,), each once.
            gradient: (R, D) of those rows.
        """
        (group,) = (g for g in self.param_groups if any(p is parameter for p in g["params"]))
        state = self.state[parameter]
        on_cpu = parameter.device.type == "cpu"
        size = max(1, _BLOCK // parameter.shape[1] if on_cpu else len(ids))
        for at, values in zip(ids.split(size), gradient.split(size), strict=True):
            sums = state["sum"].index_select(0, at).addcmul_(values, values)
            state["sum"].index_copy_(0, at, sums)
            rows = parameter.index_select(0, at)
            rows.addcdiv_(values, sums.sqrt_().add_(group["eps"]), value=-group["lr"])
            parameter.index_copy_(0, at, rows)
