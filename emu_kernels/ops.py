"""The operator boundary: private torch operators with fake kernels, under one autograd Function a
call.

The operators carry no autograd of their own. Each public function has one Function whose backward
goes
through a second one that refuses to be differentiated again: a second derivative raises instead of
being dropped in silence.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from emu_kernels import backends
from emu_kernels.backends.base import Backend, Batch, LossState
from emu_kernels.validate import check_ids, coefficient

_LIB = torch.library.Library("emu_kernels", "DEF")
_BATCH = (
    "Tensor query, Tensor table, Tensor positive, Tensor negative, Tensor seed, "
    "SymInt row_offset, SymInt? threshold, str similarity, str backend"
)


def _define(name: str, arguments: str, returns: str, run: Any, fake: Any) -> None:
    _LIB.define(f"{name}({arguments}) -> {returns}", tags=(torch.Tag.pt2_compliant_tag,))
    _LIB.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"emu_kernels::{name}", fake, lib=_LIB)


def _batch(*arguments: Any) -> tuple[Batch, Backend]:
    batch = Batch(*arguments[:-1])
    return batch, backends.get(arguments[-1])


def _checked_batch(*arguments: Any) -> tuple[Batch, Backend]:
    batch, backend = _batch(*arguments)
    if batch.table.device.type == "cpu":
        rows = batch.table.shape[0]
        check_ids("positive", batch.positive, rows=rows, lowest=0)
        check_ids("negative", batch.negative, rows=rows, lowest=-1)
    return batch, backend


# --- loss -----------------------------------------------------------------------------------------


def _loss_forward(*arguments: Any) -> LossState:
    *common, beta, alpha, coefficients, sample_weight, reduction, need_grad = arguments
    batch, backend = _checked_batch(*common)
    return LossState(
        *backend.loss_forward(
            batch,
            beta=beta,
            alpha=alpha,
            coefficients=coefficients,
            sample_weight=sample_weight,
            reduction=reduction,
            need_grad=need_grad,
        )
    )


def _loss_forward_fake(*arguments: Any) -> LossState:
    *common, _beta, _alpha, _coefficients, _sample_weight, reduction, need_grad = arguments
    batch = Batch(*common[:-1])
    rows, dim = batch.query.shape
    count = batch.negative.shape[1]
    new = batch.query.new_empty
    return LossState(
        loss=new((rows,) if reduction == "none" else ()),
        terms=new((2,)),
        row_scale=new((rows,)),
        weight=new((rows, count) if need_grad else (0,)),
        mutated_weight=new((rows, count) if need_grad and batch.threshold is not None else (0,)),
        grad_query=new((rows, dim) if need_grad else (0,)),
        grad_positive=new((rows, dim) if need_grad else (0,)),
    )


_define(
    "loss_forward",
    f"{_BATCH}, float beta, float alpha, Tensor? coefficients, Tensor? sample_weight, "
    "str reduction, bool need_grad",
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _loss_forward,
    _loss_forward_fake,
)


# --- scores ---------------------------------------------------------------------------------------


def _scores_forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    batch, backend = _checked_batch(*arguments)
    return backend.scores_forward(batch)


def _scores_forward_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    batch = Batch(*arguments[:-1])
    rows, count = batch.query.shape[0], batch.negative.shape[1]
    new = batch.query.new_empty
    return new((rows,)), new((rows, count)), new((rows, count))


_define("scores_forward", _BATCH, "(Tensor, Tensor, Tensor)", _scores_forward, _scores_forward_fake)


def _query_gradient(*arguments: Any) -> tuple[Tensor, Tensor]:
    batch, backend = _batch(*arguments[:-3])
    return backend.query_gradient(batch, *arguments[-3:])


def _query_gradient_fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    query = arguments[0]
    return query.new_empty(query.shape), query.new_empty(query.shape)


_define(
    "query_gradient",
    f"{_BATCH}, Tensor positive_weight, Tensor weight, Tensor mutated_weight",
    "(Tensor, Tensor)",
    _query_gradient,
    _query_gradient_fake,
)


# --- gradient of the table ------------------------------------------------------------------------

_TABLE_GRADIENT = (
    f"{_BATCH}, Tensor row_scale, Tensor weight, Tensor mutated_weight, Tensor grad_positive"
)


def _table_gradient(*arguments: Any) -> Tensor:
    batch, backend = _batch(*arguments[:-4])
    return backend.table_gradient(batch, *arguments[-4:])


def _table_gradient_fake(*arguments: Any) -> Tensor:
    table = arguments[1]
    return table.new_empty(table.shape)


_define("table_gradient", _TABLE_GRADIENT, "Tensor", _table_gradient, _table_gradient_fake)


def _table_gradient_sparse(*arguments: Any) -> tuple[Tensor, Tensor]:
    batch, backend = _batch(*arguments[:-4])
    return backend.table_gradient_sparse(batch, *arguments[-4:])


def _table_gradient_sparse_fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    table, positive = arguments[1], arguments[2]
    touched = torch.library.get_ctx().new_dynamic_size()
    return positive.new_empty((touched,)), table.new_empty((touched, table.shape[1]))


_define(
    "table_gradient_sparse",
    _TABLE_GRADIENT,
    "(Tensor, Tensor)",
    _table_gradient_sparse,
    _table_gradient_sparse_fake,
)


# --- mutation alone -------------------------------------------------------------------------------


def _mutate_forward(
    positive: Tensor, negative: Tensor, seed: Tensor, row_offset: int, threshold: int, backend: str
) -> Tensor:
    return backends.get(backend).mutate_forward(positive, negative, seed, row_offset, threshold)


def _mutate_forward_fake(
    positive: Tensor, negative: Tensor, seed: Tensor, row_offset: int, threshold: int, backend: str
) -> Tensor:
    return negative.new_empty(negative.shape)


_define(
    "mutate_forward",
    "Tensor positive, Tensor negative, Tensor seed, SymInt row_offset, SymInt threshold, "
    "str backend",
    "Tensor",
    _mutate_forward,
    _mutate_forward_fake,
)


def _mutate_backward(
    grad: Tensor, seed: Tensor, row_offset: int, threshold: int, backend: str
) -> tuple[Tensor, Tensor]:
    return backends.get(backend).mutate_backward(grad, seed, row_offset, threshold)


def _mutate_backward_fake(
    grad: Tensor, seed: Tensor, row_offset: int, threshold: int, backend: str
) -> tuple[Tensor, Tensor]:
    return grad.new_empty((grad.shape[0], grad.shape[2])), grad.new_empty(grad.shape)


_define(
    "mutate_backward",
    "Tensor grad, Tensor seed, SymInt row_offset, SymInt threshold, str backend",
    "(Tensor, Tensor)",
    _mutate_backward,
    _mutate_backward_fake,
)


# --- values that only reading tells, for the reference --------------------------------------------


def _checked_ids(ids: Tensor, rows: int, lowest: int, name: str) -> Tensor:
    check_ids(name, ids, rows=rows, lowest=lowest)
    return ids.clone()


def _checked_ids_fake(ids: Tensor, rows: int, lowest: int, name: str) -> Tensor:
    return ids.new_empty(ids.shape)


_define(
    "checked_ids",
    "Tensor ids, SymInt rows, SymInt lowest, str name",
    "Tensor",
    _checked_ids,
    _checked_ids_fake,
)


def _checked_coefficient(value: Tensor, name: str) -> Tensor:
    coefficient(name, value.item())
    return value.clone()


def _checked_coefficient_fake(value: Tensor, name: str) -> Tensor:
    return value.new_empty(value.shape)


_define(
    "checked_coefficient",
    "Tensor value, str name",
    "Tensor",
    _checked_coefficient,
    _checked_coefficient_fake,
)

OPS = torch.ops.emu_kernels


# --- autograd -------------------------------------------------------------------------------------


def _refuse(name: str) -> RuntimeError:
    return RuntimeError(
        f"{name} has no second derivative: its gradient was asked to be differentiated "
        "(create_graph=True). backend='reference' has one."
    )


def _table_grad(sparse: bool, *arguments: Any) -> Tensor:
    if not sparse:
        grad: Tensor = OPS.table_gradient(*arguments)
        return grad
    if torch.compiler.is_compiling():
        raise RuntimeError("sparse_grad=True is eager-only: it cannot be traced by torch.compile")
    ids, values = OPS.table_gradient_sparse(*arguments)
    shape = arguments[1].shape
    return torch.sparse_coo_tensor(
        ids[None], values, shape, is_coalesced=True, check_invariants=False
    )


class _LossGradient(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        grad: Tensor,
        query: Tensor,
        table: Tensor,
        positive: Tensor,
        negative: Tensor,
        seed: Tensor,
        row_scale: Tensor,
        weight: Tensor,
        mutated_weight: Tensor,
        grad_query: Tensor,
        grad_positive: Tensor,
        need_query: bool,
        need_table: bool,
        sparse: bool,
        *rest: Any,  # row_offset, threshold, similarity, backend
    ) -> tuple[Tensor | None, Tensor | None]:
        scale = grad * row_scale
        grad_table = None
        if need_table:
            common = (query, table, positive, negative, seed, *rest)
            grad_table = _table_grad(sparse, *common, scale, weight, mutated_weight, grad_positive)
        return grad_query * scale[:, None] if need_query else None, grad_table

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise _refuse("the fused loss")


class Loss(torch.autograd.Function):
    """(loss, terms) of one call; differentiable in query and table."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        table: Tensor,
        positive: Tensor,
        negative: Tensor,
        seed: Tensor,
        row_offset: int,
        threshold: int | None,
        similarity: str,
        backend: str,
        sparse: bool,
        *extra: Any,  # beta, alpha, coefficients, sample_weight, reduction
    ) -> tuple[Tensor, Tensor]:
        rest = (row_offset, threshold, similarity, backend)
        loss, terms, *saved = OPS.loss_forward(
            query, table, positive, negative, seed, *rest, *extra, True
        )
        ctx.save_for_backward(query, table, positive, negative, seed, *saved)
        ctx.rest, ctx.sparse, ctx.inputs = rest, sparse, 10 + len(extra)
        ctx.mark_non_differentiable(terms)
        return loss, terms

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _terms: Tensor) -> tuple[Any, ...]:
        need_query, need_table = ctx.needs_input_grad[:2]
        grads = _LossGradient.apply(
            grad, *ctx.saved_tensors, need_query, need_table, ctx.sparse, *ctx.rest
        )
        return (*grads, *[None] * (ctx.inputs - 2))


class _ScoresGradient(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        positive_weight: Tensor,
        weight: Tensor,
        mutated_weight: Tensor,
        query: Tensor,
        table: Tensor,
        positive: Tensor,
        negative: Tensor,
        seed: Tensor,
        need_query: bool,
        need_table: bool,
        sparse: bool,
        *rest: Any,
    ) -> tuple[Tensor | None, Tensor | None]:
        common = (query, table, positive, negative, seed, *rest)
        # Nothing flows into padding, whatever comes from above (its score is -inf).
        groups, count = negative.shape
        real = negative[:, None, :] >= 0
        shape = (groups, -1, count) if weight.numel() else (groups, 0, count)
        weight = torch.where(real, weight.reshape(shape), 0).reshape(weight.shape)
        mutated_weight = torch.where(real, mutated_weight.reshape(shape), 0).reshape(weight.shape)
        weights = (positive_weight.contiguous(), weight.contiguous(), mutated_weight.contiguous())
        grad_query, grad_positive = OPS.query_gradient(*common, *weights)
        grad_table = None
        if need_table:
            scale = query.new_ones(query.shape[0])
            grad_table = _table_grad(sparse, *common, scale, weight, mutated_weight, grad_positive)
        return grad_query if need_query else None, grad_table

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise _refuse("emu_scores")


class Scores(torch.autograd.Function):
    """The three scores of one call; differentiable in query and table."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        table: Tensor,
        positive: Tensor,
        negative: Tensor,
        seed: Tensor,
        row_offset: int,
        threshold: int,
        similarity: str,
        backend: str,
        sparse: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(query, table, positive, negative, seed)
        ctx.rest, ctx.sparse = (row_offset, threshold, similarity, backend), sparse
        scored: tuple[Tensor, Tensor, Tensor] = OPS.scores_forward(
            query, table, positive, negative, seed, *ctx.rest
        )
        return scored

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        need_query, need_table = ctx.needs_input_grad[:2]
        out = _ScoresGradient.apply(
            *grads, *ctx.saved_tensors, need_query, need_table, ctx.sparse, *ctx.rest
        )
        return (*out, *[None] * 8)


class _MutateGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grad: Tensor, seed: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(seed)
        ctx.rest = rest
        grads: tuple[Tensor, Tensor] = OPS.mutate_backward(grad.contiguous(), seed, *rest)
        return grads

    @staticmethod
    def backward(ctx: Any, grad_positive: Tensor, grad_negative: Tensor) -> tuple[Any, ...]:
        # Mutation is linear: its gradient's adjoint is mutation itself.
        (seed,) = ctx.saved_tensors
        out = Mutate.apply(grad_positive, grad_negative, seed, *ctx.rest)
        return (out, None, *[None] * len(ctx.rest))


class Mutate(torch.autograd.Function):
    """ẑ of one call; differentiable any number of times in positive and negative."""

    @staticmethod
    def forward(ctx: Any, positive: Tensor, negative: Tensor, seed: Tensor, *rest: Any) -> Tensor:
        ctx.save_for_backward(seed)
        ctx.rest = rest  # row_offset, threshold, backend
        out: Tensor = OPS.mutate_forward(positive.contiguous(), negative.contiguous(), seed, *rest)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        (seed,) = ctx.saved_tensors
        grads = _MutateGradient.apply(grad, seed, *ctx.rest)
        return (*grads, None, *[None] * len(ctx.rest))
