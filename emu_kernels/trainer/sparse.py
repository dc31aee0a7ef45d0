"""Adagrad for large tables: by rows that a step touches, or with one number of state a row."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

_BLOCK = 2**19  # components that a CPU updates at a time, so that they stay in its cache


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


class RowwiseAdagrad(torch.optim.Optimizer):
    """Adagrad (Duchi et al., 2011) with one sum a row: of the mean square of the row's gradient.

    The state of a table (N, D) is (N, 1), where Adagrad's is (N, D). It is PyTorch-BigGraph's
    ``RowAdagrad`` (Lerer et al., 2019) and FBGEMM's ``EXACT_ROWWISE_ADAGRAD``. A tensor of one
    dimension has a sum for each component, as in Adagrad.

    Args:
        params: tensors of one or two dimensions.
        lr, eps: as of ``torch.optim.Adagrad``.
    """

    def __init__(self, params: Iterable[Tensor], lr: float = 0.01, eps: float = 1e-10) -> None:
        super().__init__(params, {"lr": lr, "eps": eps})
        for group in self.param_groups:
            for parameter in group["params"]:
                rows = parameter.new_zeros(len(parameter), *[1] * (parameter.ndim - 1))
                self.state[parameter]["sum"] = rows

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Step all parameters by their gradients, a block of rows at a time."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                parts = (parameter, parameter.grad, self.state[parameter]["sum"])
                size = _block(parameter)
                for rows, gradient, sums in zip(*(x.split(size) for x in parts), strict=True):
                    add_squares(sums, gradient)
                    divisor = sums.sqrt().add_(group["eps"])
                    rows.addcdiv_(gradient, divisor, value=-group["lr"])


def add_squares(sums: Tensor, gradient: Tensor) -> Tensor:
    """Add a gradient's squares to Adagrad's sums (R, D), or their means to those of rows (R, 1)."""
    if sums.shape == gradient.shape:
        return sums.addcmul_(gradient, gradient)
    return sums.add_(gradient.square().mean(dim=1, keepdim=True))


def _block(table: Tensor) -> int:
    """How many rows to update at a time."""
    if table.device.type != "cpu":
        return len(table)
    return max(1, _BLOCK * len(table) // table.numel())


@torch.no_grad()
def adagrad_step(
    optimizer: torch.optim.Optimizer, table: Tensor, ids: Tensor, rows: Tensor
) -> None:
    """Step one table by its sparse gradient plus the gradient `rows` of its rows `ids`.

    The numbers are those of ``optimizer.step()`` with the dense gradient, which does not move rows
    whose gradient is 0. Adagrad's own step for sparse gradients sorts and sums the rows once more.
    The table's gradient is None afterwards, so that ``optimizer.step()`` leaves it alone.

    Args:
        optimizer: a ``torch.optim.Adagrad`` without decay, or a :class:`RowwiseAdagrad`, which has
            `table` as a parameter.
        table: (N, D); its gradient is coalesced.
        ids: (B,), repeats allowed.
        rows: (B, D).
    """
    gradient = table.grad
    assert gradient is not None
    others = add_rows(gradient, ids, rows)
    (group,) = (g for g in optimizer.param_groups if any(p is table for p in g["params"]))
    state = optimizer.state[table]
    if "step" in state:
        state["step"] += 1
    block = _block(table)
    for ids, rows in ((gradient._indices()[0], gradient._values()), others):
        for at, values in zip(ids.split(block), rows.split(block), strict=True):
            sums = add_squares(state["sum"].index_select(0, at), values)
            state["sum"].index_copy_(0, at, sums)
            moved = table.index_select(0, at)
            moved.addcdiv_(values, sums.sqrt_().add_(group["eps"]), value=-group["lr"])
            table.index_copy_(0, at, moved)
    table.grad = None
