"""The operator boundary: private torch operators with fake kernels, under one autograd Function a
call.

The operators carry no autograd of their own. Each public function has one Function whose backward
goes through a second one that refuses to be differentiated again: a second derivative raises
instead of being dropped in silence.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from emu_kernels import backends
from emu_kernels.backends.base import (
    Backend,
    Batch,
    LossState,
    MaskSpec,
    ScoresGradient,
    new_loss_state,
    new_scores,
    new_scores_gradient,
)
from emu_kernels.mask import rates_to_thresholds
from emu_kernels.validate import check_ids, check_rates, coefficient

_LIB = torch.library.Library("emu_kernels", "DEF")
_BATCH = (
    "Tensor query, Tensor table, Tensor? scale, Tensor? weights, Tensor positive, Tensor negative, "
    "Tensor seed, Tensor? thresholds, SymInt row_offset, str mutation, SymInt threshold, "
    "str similarity, float phase_scale, str backend"
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
    rows = batch.table.shape[0]
    backend.check_ids("positive", batch.positive, rows=rows, lowest=0)
    backend.check_ids("negative", batch.negative, rows=rows, lowest=-1)
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
    return new_loss_state(batch, reduction, need_grad)


_define(
    "loss_forward",
    f"{_BATCH}, float beta, float alpha, Tensor? coefficients, Tensor? sample_weight, "
    "str reduction, bool need_grad",
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _loss_forward,
    _loss_forward_fake,
)


# --- scores ---------------------------------------------------------------------------------------


def _scores_forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    batch, backend = _checked_batch(*arguments)
    return backend.scores_forward(batch)


def _scores_forward_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    return new_scores(Batch(*arguments[:-1]))


_define("scores_forward", _BATCH, "(Tensor, Tensor, Tensor)", _scores_forward, _scores_forward_fake)


def _query_gradient(*arguments: Any) -> ScoresGradient:
    batch, backend = _batch(*arguments[:-3])
    return ScoresGradient(*backend.query_gradient(batch, *arguments[-3:]))


def _query_gradient_fake(*arguments: Any) -> ScoresGradient:
    return new_scores_gradient(Batch(*arguments[:-4]))


_define(
    "query_gradient",
    f"{_BATCH}, Tensor positive_weight, Tensor weight, Tensor mutated_weight",
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _query_gradient,
    _query_gradient_fake,
)


def _scale_rows(rows: Tensor, scale: Tensor, backend: str) -> Tensor:
    return backends.get(backend).scale_rows(rows, scale)


def _scale_rows_fake(rows: Tensor, scale: Tensor, backend: str) -> Tensor:
    return rows.new_empty(rows.shape)


_define(
    "scale_rows",
    "Tensor rows, Tensor scale, str backend",
    "Tensor",
    _scale_rows,
    _scale_rows_fake,
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
    table, positive = arguments[1], arguments[4]
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


_MASK = (
    "Tensor seed, Tensor? thresholds, SymInt row_offset, str mutation, SymInt threshold, "
    "str backend"
)


def _mutate_forward(positive: Tensor, negative: Tensor, *rest: Any) -> Tensor:
    return backends.get(rest[-1]).mutate_forward(positive, negative, MaskSpec(*rest[:-1]))


def _mutate_forward_fake(positive: Tensor, negative: Tensor, *rest: Any) -> Tensor:
    return negative.new_empty(negative.shape)


_define(
    "mutate_forward",
    f"Tensor positive, Tensor negative, {_MASK}",
    "Tensor",
    _mutate_forward,
    _mutate_forward_fake,
)


def _mutate_backward(grad: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return backends.get(rest[-1]).mutate_backward(grad, MaskSpec(*rest[:-1]))


def _mutate_backward_fake(grad: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return grad.new_empty((grad.shape[0], grad.shape[2])), grad.new_empty(grad.shape)


_define(
    "mutate_backward",
    f"Tensor grad, {_MASK}",
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


def _rates_to_thresholds(mutation_rate: Tensor, name: str) -> Tensor:
    if mutation_rate.device.type == "cpu":
        check_rates(name, mutation_rate)
    return rates_to_thresholds(mutation_rate)


def _rates_to_thresholds_fake(mutation_rate: Tensor, name: str) -> Tensor:
    return mutation_rate.new_empty(mutation_rate.shape, dtype=torch.int16)


_define(
    "rates_to_thresholds",
    "Tensor mutation_rate, str name",
    "Tensor",
    _rates_to_thresholds,
    _rates_to_thresholds_fake,
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
        row_scale: Tensor,
        weight: Tensor,
        mutated_weight: Tensor,
        grad_query: Tensor,
        grad_positive: Tensor,
        grad_scale: Tensor,
        grad_weights: Tensor,
        need_query: bool,
        need_table: bool,
        need_scale: bool,
        need_weights: bool,
        sparse: bool,
        *common: Any,  # the operators' common arguments
    ) -> tuple[Tensor | None, ...]:
        scale = grad * row_scale
        grad_table = None
        if need_table:
            grad_table = _table_grad(sparse, *common, scale, weight, mutated_weight, grad_positive)
        return (
            OPS.scale_rows(grad_query, scale, common[-1]) if need_query else None,
            grad_table,
            OPS.scale_rows(grad_scale, scale, common[-1]) if need_scale else None,
            (grad_weights * scale[:, None]).sum(dim=0) if need_weights else None,
        )

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise _refuse("the fused loss")


class Loss(torch.autograd.Function):
    """(loss, terms) of one call; differentiable in query, table, scale and weights."""

    @staticmethod
    def forward(ctx: Any, sparse: bool, count: int, *arguments: Any) -> tuple[Tensor, Tensor]:
        """``arguments``: the operators' common ones, ``count`` of them, then the loss's own."""
        loss, terms, *saved = OPS.loss_forward(*arguments, True)
        _save(ctx, arguments[:count], *saved)
        ctx.sparse, ctx.inputs = sparse, 2 + len(arguments)
        ctx.mark_non_differentiable(terms)
        return loss, terms

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _terms: Tensor) -> tuple[Any, ...]:
        common, saved = _saved(ctx)
        need = ctx.needs_input_grad[2:6]
        grads = _LossGradient.apply(grad, *saved, *need, ctx.sparse, *common)
        return (None, None, *grads, *[None] * (ctx.inputs - 6))


class _ScoresGradient(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        positive_weight: Tensor,
        weight: Tensor,
        mutated_weight: Tensor,
        need_query: bool,
        need_table: bool,
        need_scale: bool,
        need_weights: bool,
        sparse: bool,
        *common: Any,
    ) -> tuple[Tensor | None, ...]:
        weights = (positive_weight.contiguous(), weight.contiguous(), mutated_weight.contiguous())
        state = ScoresGradient(*OPS.query_gradient(*common, *weights))
        grad_table = None
        if need_table:
            ones = positive_weight.new_ones(positive_weight.shape[0])
            grad_table = _table_grad(
                sparse, *common, ones, state.weight, state.mutated_weight, state.grad_positive
            )
        return (
            state.grad_query if need_query else None,
            grad_table,
            state.grad_scale if need_scale else None,
            state.grad_weights.sum(dim=0) if need_weights else None,
        )

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise _refuse("emu_scores")


class Scores(torch.autograd.Function):
    """The three scores of one call; differentiable in query, table, scale and weights."""

    @staticmethod
    def forward(ctx: Any, sparse: bool, *common: Any) -> tuple[Tensor, Tensor, Tensor]:
        _save(ctx, common)
        ctx.sparse, ctx.inputs = sparse, 1 + len(common)
        scored: tuple[Tensor, Tensor, Tensor] = OPS.scores_forward(*common)
        return scored

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        common, _ = _saved(ctx)
        need = ctx.needs_input_grad[1:5]
        out = _ScoresGradient.apply(*grads, *need, ctx.sparse, *common)
        return (None, *out, *[None] * (ctx.inputs - 5))


def _save(ctx: Any, common: tuple[Any, ...], *tensors: Tensor) -> None:
    """Keep an operator's common arguments, tensors as autograd wants them, and more tensors."""
    kept = [value if isinstance(value, Tensor) else None for value in common]
    ctx.save_for_backward(*kept, *tensors)
    ctx.others = tuple(None if isinstance(value, Tensor) else value for value in common)


def _saved(ctx: Any) -> tuple[tuple[Any, ...], tuple[Tensor, ...]]:
    count = len(ctx.others)
    kept, tensors = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
    common = tuple(
        other if tensor is None else tensor for tensor, other in zip(kept, ctx.others, strict=True)
    )
    return common, tensors


class _MutateGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grad: Tensor, *mask: Any) -> tuple[Tensor, Tensor]:
        _save(ctx, mask)
        grads: tuple[Tensor, Tensor] = OPS.mutate_backward(grad.contiguous(), *mask)
        return grads

    @staticmethod
    def backward(ctx: Any, grad_positive: Tensor, grad_negative: Tensor) -> tuple[Any, ...]:
        # Mutation is linear: its gradient's adjoint is mutation itself.
        mask, _ = _saved(ctx)
        return (Mutate.apply(grad_positive, grad_negative, *mask), *[None] * len(mask))


class Mutate(torch.autograd.Function):
    """ẑ of one call; differentiable any number of times in positive and negative."""

    @staticmethod
    def forward(ctx: Any, positive: Tensor, negative: Tensor, *mask: Any) -> Tensor:
        _save(ctx, mask)
        out: Tensor = OPS.mutate_forward(positive.contiguous(), negative.contiguous(), *mask)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        mask, _ = _saved(ctx)
        return (*_MutateGradient.apply(grad, *mask), *[None] * len(mask))
