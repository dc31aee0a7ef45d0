"""Adagrad on a sparse gradient of the entity table: a step costs the rows it touches."""

from __future__ import annotations

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


@torch.no_grad()
def adagrad_step(
    optimizer: torch.optim.Optimizer, table: Tensor, ids: Tensor, rows: Tensor
) -> None:
    """Step one table by its sparse gradient plus the gradient `rows` of its rows `ids`.

    The numbers are those of ``optimizer.step()`` with the dense gradient, which does not move rows
    whose gradient is 0. Adagrad's own step for sparse gradients sorts and sums the rows once more.
    The table's gradient is None afterwards, so that ``optimizer.step()`` leaves it alone.

    Args:
        optimizer: a ``torch.optim.Adagrad`` without decay, which has `table` as a parameter.
        table: (N, D); its gradient is coalesced.
        ids: (B,), repeats allowed.
        rows: (B, D).
    """
    gradient = table.grad
    assert gradient is not None
    others = add_rows(gradient, ids, rows)
    (group,) = (g for g in optimizer.param_groups if any(p is table for p in g["params"]))
    state = optimizer.state[table]
    state["step"] += 1
    for ids, rows in ((gradient._indices()[0], gradient._values()), others):
        block = max(1, _BLOCK // table.shape[1] if table.device.type == "cpu" else len(ids))
        for at, values in zip(ids.split(block), rows.split(block), strict=True):
            sums = state["sum"].index_select(0, at).addcmul_(values, values)
            state["sum"].index_copy_(0, at, sums)
            moved = table.index_select(0, at)
            moved.addcdiv_(values, sums.sqrt_().add_(group["eps"]), value=-group["lr"])
            table.index_copy_(0, at, moved)
    table.grad = None
