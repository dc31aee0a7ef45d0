"""The operator boundary: private torch operators with fake kernels, under one autograd Function a
call.

The operators carry no autograd of their own. Each public function has one Function whose backward
goes through a second one that refuses to be differentiated again: a second derivative raises
instead of being dropped in silence. autograd passes arguments by position: ``_apply`` sends their
names along, and every Function takes them apart by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from emu_kernels.backends.base import (
    Kernels,
    Loss,
    LossState,
    MutateGradient,
    Scores,
    ScoresGradient,
    ScoreWeights,
    SparseRows,
    SumWeights,
    new_loss_state,
    new_scores,
    new_scores_gradient,
)
from emu_kernels.library import (
    arguments,
    build,
    define,
    differentiable,
    flatten,
    part,
    tensors,
)
from emu_kernels.request import Draws, LossRequest, Request

_KERNELS: dict[str, Kernels] = {}
_WITH_GRADIENT = differentiable(Request)

_REQUEST = f"{arguments(Request)}, str backend"
_SCORE_WEIGHTS = ", ".join(f"Tensor {name}" for name in ScoreWeights._fields)
_SUM_WEIGHTS = ", ".join(f"Tensor {name}" for name in SumWeights._fields)
_DRAWS = f"{arguments(Draws)}, str backend"


def _checked(values: Mapping[str, Any]) -> Kernels:
    """The backend of a call, once it has checked the ids."""
    kernels = _KERNELS[values["backend"]]
    rows = values["table"].shape[0]
    kernels.check_ids("positive", values["positive"], rows=rows, lowest=0)
    kernels.check_ids("negative", values["negative"], rows=rows, lowest=-1)
    return kernels


def _loss_forward(*, need_grad: bool, **values: Any) -> LossState:
    kernels = _checked(values)
    return kernels.loss_forward(build(LossRequest, values), need_grad=need_grad)


def _loss_forward_fake(*, need_grad: bool, **values: Any) -> LossState:
    return new_loss_state(build(LossRequest, values), need_grad=need_grad)


loss_forward = define(
    "loss_forward",
    f"{arguments(LossRequest)}, str backend, bool need_grad) -> {tensors(len(LossState._fields))}",
    _loss_forward,
    _loss_forward_fake,
)


def _scores_forward(**values: Any) -> Scores:
    return _checked(values).scores_forward(build(Request, values))


scores_forward = define(
    "scores_forward",
    f"{_REQUEST}) -> {tensors(len(Scores._fields))}",
    _scores_forward,
    lambda **values: new_scores(build(Request, values)),
)


def _query_gradient(**values: Any) -> ScoresGradient:
    upstream = ScoreWeights(**{name: values[name] for name in ScoreWeights._fields})
    return _KERNELS[values["backend"]].query_gradient(build(Request, values), upstream)


query_gradient = define(
    "query_gradient",
    f"{_REQUEST}, {_SCORE_WEIGHTS}) -> {tensors(len(ScoresGradient._fields))}",
    _query_gradient,
    lambda **values: new_scores_gradient(build(Request, values)),
)


def _sum_weights(values: Mapping[str, Any]) -> SumWeights:
    return SumWeights(**{name: values[name] for name in SumWeights._fields})


def _table_gradient(**values: Any) -> Tensor:
    kernels = _KERNELS[values["backend"]]
    return kernels.table_gradient(build(Request, values), _sum_weights(values))


table_gradient = define(
    "table_gradient",
    f"{_REQUEST}, {_SUM_WEIGHTS}) -> Tensor",
    _table_gradient,
    lambda *, table, **_values: table.new_empty(table.shape),
)


def _table_gradient_sparse(**values: Any) -> SparseRows:
    kernels = _KERNELS[values["backend"]]
    return kernels.table_gradient_sparse(build(Request, values), _sum_weights(values))


def _table_gradient_sparse_fake(*, table: Tensor, positive: Tensor, **_values: Any) -> SparseRows:
    touched = torch.library.get_ctx().new_dynamic_size()
    return SparseRows(positive.new_empty((touched,)), table.new_empty((touched, table.shape[1])))


table_gradient_sparse = define(
    "table_gradient_sparse",
    f"{_REQUEST}, {_SUM_WEIGHTS}) -> {tensors(len(SparseRows._fields))}",
    _table_gradient_sparse,
    _table_gradient_sparse_fake,
)


def _mutate_forward(*, positive: Tensor, negative: Tensor, **values: Any) -> Tensor:
    return _KERNELS[values["backend"]].mutate_forward(positive, negative, build(Draws, values))


mutate_forward = define(
    "mutate_forward",
    f"Tensor positive, Tensor negative, {_DRAWS}) -> Tensor",
    _mutate_forward,
    lambda *, negative, **_values: negative.new_empty(negative.shape),
)


def _mutate_backward(*, grad: Tensor, **values: Any) -> MutateGradient:
    return _KERNELS[values["backend"]].mutate_backward(grad, build(Draws, values))


mutate_backward = define(
    "mutate_backward",
    f"Tensor grad, {_DRAWS}) -> {tensors(len(MutateGradient._fields))}",
    _mutate_backward,
    lambda *, grad, **_values: MutateGradient(
        grad.new_empty((grad.shape[0], grad.shape[2])), grad.new_empty(grad.shape)
    ),
)


# --- autograd -------------------------------------------------------------------------------------


def _apply(function: type[torch.autograd.Function], **values: Any) -> Any:
    """The Function of named values: its ``forward`` gets their names first, then the values."""
    return function.apply(tuple(values), *values.values())


def _save(ctx: Any, values: Mapping[str, Any]) -> None:
    """Keep named values for the backward pass, tensors as autograd wants them."""
    held = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    ctx.save_for_backward(*held.values())
    ctx.held_names = tuple(held)
    ctx.others = {name: value for name, value in values.items() if name not in held}


def _saved(ctx: Any) -> dict[str, Any]:
    return {**ctx.others, **dict(zip(ctx.held_names, ctx.saved_tensors, strict=True))}


def _needed(ctx: Any) -> tuple[str, ...]:
    """The arguments of :func:`_apply` that need a gradient."""
    return tuple(
        name for name, need in zip(ctx.names, ctx.needs_input_grad[1:], strict=True) if need
    )


def _by_name(ctx: Any, gradients: Mapping[str, Tensor | None]) -> tuple[Tensor | None, ...]:
    """What ``backward`` returns: None for the names, then each argument's gradient."""
    return (None, *(gradients.get(name) for name in ctx.names))


def _refuse(name: str) -> RuntimeError:
    return RuntimeError(
        f"{name} has no second derivative: its gradient was asked to be differentiated "
        "(create_graph=True). backend='reference' has one."
    )


def _table_grad(request: Mapping[str, Any], backend: str, sums: SumWeights) -> Tensor:
    given = {**request, "backend": backend, **sums._asdict()}
    if not request["sparse_grad"]:
        grad: Tensor = table_gradient(**given)
        return grad
    if torch.compiler.is_compiling():
        raise RuntimeError("sparse_grad=True is eager-only: it cannot be traced by torch.compile")
    rows = SparseRows(*table_gradient_sparse(**given))
    shape = request["table"].shape
    return torch.sparse_coo_tensor(
        rows.ids[None], rows.values, shape, is_coalesced=True, check_invariants=False
    )


class _LossGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, names: tuple[str, ...], *given: Any) -> tuple[Tensor | None, ...]:
        values = dict(zip(names, given, strict=True))
        needed = values["needed"]
        row_scale = values["grad"] * values["row_scale"]
        grads: dict[str, Tensor] = {}
        if "query" in needed:
            grads["query"] = values["grad_query"] * row_scale[:, None]
        if "table" in needed:
            sums = SumWeights(
                row_scale, values["weight"], values["mutated_weight"], values["grad_positive"]
            )
            grads["table"] = _table_grad(part(Request, values), values["backend"], sums)
        if "scale" in needed:
            grads["scale"] = values["grad_scale"] * row_scale[:, None]
        if "weights" in needed:
            grads["weights"] = (values["grad_weights"] * row_scale[:, None]).sum(dim=0)
        return tuple(grads.get(name) for name in _WITH_GRADIENT)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise _refuse("the fused loss")


class _Loss(torch.autograd.Function):
    """(loss, terms) of one call."""

    @staticmethod
    def forward(ctx: Any, names: tuple[str, ...], *given: Any) -> tuple[Tensor, Tensor]:
        values = dict(zip(names, given, strict=True))
        state = LossState(*loss_forward(**values, need_grad=True))
        kept = state._asdict()
        loss, terms = kept.pop("loss"), kept.pop("terms")
        ctx.names = names
        _save(ctx, {**values, **kept})
        ctx.mark_non_differentiable(terms)
        return loss, terms

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _terms: Tensor) -> tuple[Tensor | None, ...]:
        grads = _apply(_LossGradient, grad=grad, needed=_needed(ctx), **_saved(ctx))
        return _by_name(ctx, dict(zip(_WITH_GRADIENT, grads, strict=True)))


class _ScoresGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, names: tuple[str, ...], *given: Any) -> tuple[Tensor | None, ...]:
        values = dict(zip(names, given, strict=True))
        needed, backend = values["needed"], values["backend"]
        request = part(Request, values)
        upstream = {name: values[name].contiguous() for name in ScoreWeights._fields}
        state = ScoresGradient(*query_gradient(**request, backend=backend, **upstream))
        grads = {"query": state.grad_query, "scale": state.grad_scale}
        if "table" in needed:
            ones = torch.ones_like(upstream["positive_weight"])
            sums = SumWeights(ones, state.weight, state.mutated_weight, state.grad_positive)
            grads["table"] = _table_grad(request, backend, sums)
        if "weights" in needed:
            grads["weights"] = state.grad_weights.sum(dim=0)
        return tuple(grads[name] if name in needed else None for name in _WITH_GRADIENT)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise _refuse("emu_scores")


class _Scores(torch.autograd.Function):
    """The three scores of one call."""

    @staticmethod
    def forward(ctx: Any, names: tuple[str, ...], *given: Any) -> tuple[Tensor, Tensor, Tensor]:
        values = dict(zip(names, given, strict=True))
        ctx.names = names
        _save(ctx, values)
        positive, negative, mutated = scores_forward(**values)
        return positive, negative, mutated

    @staticmethod
    def backward(
        ctx: Any, positive_weight: Tensor, weight: Tensor, mutated_weight: Tensor
    ) -> tuple[Tensor | None, ...]:
        grads = _apply(
            _ScoresGradient,
            positive_weight=positive_weight,
            weight=weight,
            mutated_weight=mutated_weight,
            needed=_needed(ctx),
            **_saved(ctx),
        )
        return _by_name(ctx, dict(zip(_WITH_GRADIENT, grads, strict=True)))


class _MutateGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, names: tuple[str, ...], *given: Any) -> tuple[Tensor, Tensor]:
        values = dict(zip(names, given, strict=True))
        grad = values.pop("grad")
        ctx.names = names
        _save(ctx, values)
        grads = MutateGradient(*mutate_backward(grad=grad.contiguous(), **values))
        return grads.grad_positive, grads.grad_negative

    @staticmethod
    def backward(
        ctx: Any, grad_positive: Tensor, grad_negative: Tensor
    ) -> tuple[Tensor | None, ...]:
        # Mutation is linear: its gradient's adjoint is mutation itself.
        mutated = _apply(_Mutate, positive=grad_positive, negative=grad_negative, **_saved(ctx))
        return _by_name(ctx, {"grad": mutated})


class _Mutate(torch.autograd.Function):
    """ẑ of one call; differentiable any number of times in positive and negative."""

    @staticmethod
    def forward(ctx: Any, names: tuple[str, ...], *given: Any) -> Tensor:
        values = dict(zip(names, given, strict=True))
        positive, negative = values.pop("positive"), values.pop("negative")
        ctx.names = names
        _save(ctx, values)
        out: Tensor = mutate_forward(
            positive=positive.contiguous(), negative=negative.contiguous(), **values
        )
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_positive, grad_negative = _apply(_MutateGradient, grad=grad, **_saved(ctx))
        return _by_name(ctx, {"positive": grad_positive, "negative": grad_negative})


# --- backends with kernels ------------------------------------------------------------------------


class KernelBackend(Kernels):
    """A :class:`emu_kernels.backends.base.Backend` of :class:`Kernels`, through the operators."""

    def __init__(self) -> None:
        _KERNELS[self.name] = self

    def loss(self, request: LossRequest) -> Loss:
        values = {**flatten(request), "backend": self.name}
        if _wants_grad(values):
            return Loss(*_apply(_Loss, **values))
        state = LossState(*loss_forward(**values, need_grad=False))
        return Loss(state.loss, state.terms)

    def scores(self, request: Request) -> Scores:
        values = {**flatten(request), "backend": self.name}
        if _wants_grad(values):
            return Scores(*_apply(_Scores, **values))
        return Scores(*scores_forward(**values))

    def mutate(self, positive: Tensor, negative: Tensor, draws: Draws) -> Tensor:
        out: Tensor = _apply(
            _Mutate, positive=positive, negative=negative, **flatten(draws), backend=self.name
        )
        return out


def _wants_grad(values: Mapping[str, Any]) -> bool:
    tensors = (values[name] for name in _WITH_GRADIENT)
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
