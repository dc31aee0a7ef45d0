"""Optimizer steps of a large embedding table, which update only the rows that a batch touches.

An optimizer that does not move rows without a gradient needs the gradients of the batch's rows
only. Our CPU kernels sum these row by row and step each row while its sum is in registers, so that
the gradient is never written to memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from emu_kernels import ops, validate, values
from emu_kernels.backends.base import TableStep

_BLOCK = 2**19  # components that a CPU updates at a time, so that they stay in its cache


class RowwiseAdagrad(torch.optim.Optimizer):
    """Adagrad (Duchi et al., 2011) with one sum for each row: of its gradients' mean squares.

    The state of an (N, D) table is (N, 1), whereas Adagrad's is (N, D). This is PyTorch-BigGraph's
    ``RowAdagrad`` (Lerer et al., 2019) and FBGEMM's ``EXACT_ROWWISE_ADAGRAD``. A tensor of one
    dimension has a sum for each component, as in Adagrad.

    Args:
        params: tensors of one or two dimensions; those of two may have sparse gradients.
        lr, eps: as in ``torch.optim.Adagrad``.

    Raises:
        ValueError: a tensor of other dimensions, or ``lr`` or ``eps`` below 0.
        TypeError: a tensor of another dtype than fp32, bf16, fp16 and fp64, or no number.
    """

    def __init__(self, params: Iterable[Tensor], lr: float = 0.01, eps: float = 1e-10) -> None:
        super().__init__(params, {"lr": lr, "eps": eps})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, with settings of their own."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            for name in ("lr", "eps"):
                value = group[name]
                if isinstance(value, Tensor) and value.numel() == 1:
                    value = value.item()
                value = validate.number(name, value)
                if not value >= 0:
                    raise ValueError(f"{name}: expected at least 0, got {value}")
            for parameter in group["params"]:
                validate.floating("params", parameter)
                validate.dims("params", parameter, (1, 2), "(N,) or (N, D)")
        except Exception:
            self.param_groups.pop()  # a caller may go on without it
            raise
        for parameter in group["params"]:
            rows = parameter.new_zeros(len(parameter), *[1] * (parameter.ndim - 1))
            self.state[parameter]["sum"] = rows

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step all parameters by their gradients, a block of rows at a time.

        Returns:
            What ``closure`` returns, if it is given: it is called first, to compute the gradients.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if parameter.grad.is_sparse:
                    if parameter.ndim != 2:
                        raise ValueError(
                            "params: expected shape (N, D) where the gradient is sparse, got "
                            f"{tuple(parameter.shape)}"
                        )
                    nothing = _given(parameter, None, None)
                    name = ROW_OPTIMIZERS[RowwiseAdagrad]  # also of a subclass
                    _step_sparse(parameter, _step_of(name, self, parameter, *nothing))
                    continue
                parts = (parameter, parameter.grad, self.state[parameter]["sum"])
                size = _block(parameter)
                for rows, gradient, sums in zip(*(x.split(size) for x in parts), strict=True):
                    add_squares(sums, gradient)
                    divisor = sums.sqrt().add_(group["eps"])
                    rows.addcdiv_(gradient, divisor, value=-group["lr"])
        return loss


ROW_OPTIMIZERS: dict[type[torch.optim.Optimizer], str] = {
    torch.optim.SGD: "sgd",
    torch.optim.Adagrad: "adagrad",
    RowwiseAdagrad: "rowwise_adagrad",
}
"""The optimizers that do not move rows without a gradient, with the kernels' names for them."""

_OFF = ("momentum", "weight_decay", "lr_decay", "nesterov", "maximize")


def backward_and_step(
    loss: Tensor,
    optimizer: torch.optim.Optimizer,
    table: Tensor,  # (N, D)
    ids: Tensor | None = None,  # (B,)
    rows: Tensor | None = None,  # (B, D)
) -> None:
    """``loss.backward()``, and the optimizer's step of one table, that of the loss's candidates.

    Call it between ``optimizer.zero_grad()`` and ``optimizer.step()``, which steps the other
    parameters. The numbers are those of ``loss.backward(); optimizer.step()``::

        rows = entity.detach()[head].requires_grad_()
        loss = fused_emu_loss(rows * relation[r], entity, tail, negative, ...)
        backward_and_step(loss, optimizer, entity, head, rows)
        optimizer.step()

    If the loss is one call of this package on the CPU, with `table` in fp32 or fp64, the table's
    gradient is never written: each touched row is stepped as soon as its gradient is summed, and
    ``table.grad`` is None afterwards. Otherwise (another backend, a 16-bit table, a second term
    with the same table, shared negatives that are scored by matrix products) the gradient is
    computed as usual, and ``table.grad`` is the part that ``optimizer.step()`` has yet to apply.

    The bits do not depend on the number of threads. Those of SGD and Adagrad are the bits of a
    ``fused=True`` step by the dense gradient, where torch uses fused multiply-add as we do (x86-64
    with AVX2). Elsewhere, and with RowwiseAdagrad, the last place may differ.

    Args:
        loss: a scalar. Its graph is freed, as by ``loss.backward()``.
        optimizer: a ``torch.optim.SGD`` without momentum, a ``torch.optim.Adagrad`` or a
            :class:`RowwiseAdagrad`, without decay; others move rows that have no gradient. `table`
            is among its parameters.
        table: a leaf, the same tensor that the loss was given. Hooks on its gradient do not run.
        ids: integer ids of the rows of `table` that the query was made from, repeats allowed; None
            if there are none.
        rows: a leaf with those rows, ``table.detach()[ids].requires_grad_()``, so that their
            gradient has the batch's size.

    Raises:
        TypeError, ValueError: an argument that does not fit.
        IndexError: an id out of range.
    """
    validate.any_tensor("loss", loss)
    if loss.numel() != 1 or not loss.requires_grad:
        raise ValueError(
            f"loss: expected a scalar that requires a gradient, got shape {tuple(loss.shape)}, "
            f"requires_grad {loss.requires_grad}"
        )
    step = _table_step(optimizer, table, *_given(table, ids, rows))
    with ops.deferred(table) as waiting:
        loss.backward()
    if rows is not None and rows.grad is not None:
        step = step._replace(rows=rows.grad)
    else:
        step = step._replace(ids=step.ids[:0], rows=step.rows[:0])
    if len(waiting) == 1 and table.grad is None and ops.step_table(waiting[0], step):
        _count(optimizer, table)
        return
    for each in waiting:
        gradient = ops.table_grad(each)
        # One may be sparse: torch adds that to a dense one, but not a dense one to it.
        if table.grad is None:
            table.grad = gradient
        else:
            table.grad = gradient + table.grad if table.grad.is_sparse else table.grad + gradient
    if table.grad is None:
        table.grad = torch.zeros_like(table)
    if not table.grad.is_sparse:
        table.grad.index_add_(0, step.ids, step.rows)
    elif step.sums is None:
        more = torch.sparse_coo_tensor(
            step.ids[None], step.rows, table.shape, check_invariants=False
        )
        table.grad = table.grad + more
    else:
        _step_sparse(table, step)
        _count(optimizer, table)
        table.grad = None


def _given(table: Tensor, ids: Tensor | None, rows: Tensor | None) -> tuple[Tensor, Tensor]:
    """The ids as int64, and the rows, checked; empty tensors for None."""
    table = validate.tensor("table", table)
    validate.dims("table", table, (2,), "(N, D)")
    if not (table.is_leaf and table.requires_grad):
        raise ValueError("table: expected a leaf that requires a gradient, like a parameter")
    if (ids is None) != (rows is None):
        raise ValueError("rows: expected together with ids, or neither")
    if ids is None or rows is None:
        return table.new_empty((0,), dtype=torch.int64), table.new_empty((0, table.shape[1]))
    ids, rows = validate.tensor("ids", ids), validate.tensor("rows", rows)
    validate.dims("ids", ids, (1,), "(B,)")
    validate.integer("ids", ids)
    validate.same_device("table", table, ids=ids, rows=rows)
    if tuple(rows.shape) != (ids.shape[0], table.shape[1]) or rows.dtype != table.dtype:
        raise ValueError(
            f"rows: expected shape ({ids.shape[0]}, {table.shape[1]}) and {table.dtype}, rows of "
            f"table, got {tuple(rows.shape)} and {rows.dtype}"
        )
    if not (rows.is_leaf and rows.requires_grad):
        raise ValueError("rows: expected a leaf: table.detach()[ids].requires_grad_()")
    if ids.device.type == "cpu":  # on a GPU this would wait, and indexing checks ids there
        values.check_ids("ids", ids, rows=table.shape[0], lowest=0)
    return ids.to(torch.int64).contiguous(), rows.detach()


def _table_step(
    optimizer: torch.optim.Optimizer, table: Tensor, ids: Tensor, rows: Tensor
) -> TableStep:
    """The optimizer's step of the table; ``rows`` are a placeholder for their gradient."""
    name = ROW_OPTIMIZERS.get(type(optimizer))
    if name is None:
        listed = ", ".join(each.__name__ for each in ROW_OPTIMIZERS)
        raise TypeError(
            f"optimizer: expected one of {listed}, which leave rows without a gradient where they "
            f"are, got {type(optimizer).__name__}"
        )
    return _step_of(name, optimizer, table, ids, rows)


def _step_of(
    name: str, optimizer: torch.optim.Optimizer, table: Tensor, ids: Tensor, rows: Tensor
) -> TableStep:
    groups = [g for g in optimizer.param_groups if any(p is table for p in g["params"])]
    if not groups:
        raise ValueError("optimizer: expected table among its parameters")
    (group,) = groups
    if on := [option for option in _OFF if group.get(option)]:
        raise ValueError(f"optimizer: expected no {on[0]}, got {group[on[0]]}")
    sums = None if name == "sgd" else optimizer.state[table]["sum"]
    return TableStep(name, float(group["lr"]), float(group.get("eps", 0)), sums, ids, rows)


def _count(optimizer: torch.optim.Optimizer, table: Tensor) -> None:
    state = optimizer.state[table]
    if "step" in state:
        state["step"] += 1


@torch.no_grad()
def _step_sparse(table: Tensor, step: TableStep) -> None:
    """Step a table by its sparse gradient and the step's further rows.

    torch's Adagrad would sort and sum the rows of a sparse gradient once more.
    """
    gradient = table.grad
    assert gradient is not None
    gradient = gradient.coalesce()
    others = add_rows(gradient, step.ids, step.rows)
    block = _block(table)
    for ids, rows in ((gradient._indices()[0], gradient._values()), others):
        for at, some in zip(ids.split(block), rows.split(block), strict=True):
            assert step.sums is not None
            sums = add_squares(step.sums.index_select(0, at), some)
            step.sums.index_copy_(0, at, sums)
            moved = table.index_select(0, at)
            moved.addcdiv_(some, sums.sqrt_().add_(step.eps), value=-step.lr)
            table.index_copy_(0, at, moved)


def add_rows(gradient: Tensor, ids: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Add rows to a table's sparse gradient, in place, where the gradient has the same rows.

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


def add_squares(sums: Tensor, gradient: Tensor) -> Tensor:
    """Add a gradient's squares to Adagrad's sums (R, D), or their row means to sums (R, 1)."""
    if sums.shape == gradient.shape:
        return sums.addcmul_(gradient, gradient)
    return sums.add_(gradient.square().mean(dim=1, keepdim=True))


def _block(table: Tensor) -> int:
    """How many rows to update at a time."""
    on_cpu = table.device.type == "cpu"
    return max(1, _BLOCK * len(table) // max(1, table.numel()) if on_cpu else len(table))
