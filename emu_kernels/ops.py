"""The operator boundary: private torch operators with fake kernels, called from autograd Functions.

The operators carry no autograd of their own. Each public function has one Function whose backward
goes through a second one that refuses to be differentiated again: a second derivative raises an
error instead of being dropped silently. autograd passes arguments by position, so ``_apply`` passes
their names too, and every Function looks its arguments up by name.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from emu_kernels import products
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
    TableStep,
    new_loss_state,
    new_scores,
    new_scores_gradient,
)
from emu_kernels.library import (
    FirstOrder,
    Function,
    Values,
    arguments,
    build,
    define,
    differentiable,
    flatten,
    refuse_forward_mode,
    tensors,
)
from emu_kernels.request import Draws, LossRequest, Request

_KERNELS: dict[str, Kernels] = {}  # by the value of the operators' argument ``backend``
_WITH_GRADIENT = differentiable(Request)

_REQUEST = f"{arguments(Request)}, str backend"
_SCORE_WEIGHTS = ", ".join(f"Tensor {name}" for name in ScoreWeights._fields)
_SUM_WEIGHTS = ", ".join(f"Tensor {name}" for name in SumWeights._fields)
_DRAWS = f"{arguments(Draws)}, str backend"


def register(kernels: Kernels) -> None:
    """Let the operators find a backend by its name."""
    _KERNELS[kernels.name] = kernels


def _checked(values: Values) -> Kernels:
    """The backend of a call, after it has checked the ids."""
    kernels = _KERNELS[values["backend"]]
    rows = values["table"].shape[0]
    kernels.check_ids("positive", values["positive"], rows=rows, lowest=0)
    kernels.check_ids("negative", values["negative"], rows=rows, lowest=-1)
    return kernels


def _unchecked(values: Values) -> Kernels:
    """The backend of a call whose ids are checked already."""
    return _KERNELS[values["backend"]]


def _score_weights(values: Values) -> ScoreWeights:
    return ScoreWeights(**{name: values[name] for name in ScoreWeights._fields})


def _sum_weights(values: Values) -> SumWeights:
    return SumWeights(**{name: values[name] for name in SumWeights._fields})


loss_forward = define(
    "loss_forward",
    f"{arguments(LossRequest)}, str backend, bool need_grad) -> {tensors(len(LossState._fields))}",
    lambda x: _checked(x).loss_forward(build(LossRequest, x), need_grad=x["need_grad"]),
    lambda x: new_loss_state(build(LossRequest, x), need_grad=x["need_grad"]),
)

scores_forward = define(
    "scores_forward",
    f"{_REQUEST}) -> {tensors(len(Scores._fields))}",
    lambda x: _checked(x).scores_forward(build(Request, x)),
    lambda x: new_scores(build(Request, x)),
)

query_gradient = define(
    "query_gradient",
    f"{_REQUEST}, {_SCORE_WEIGHTS}) -> {tensors(len(ScoresGradient._fields))}",
    lambda x: _unchecked(x).query_gradient(build(Request, x), _score_weights(x)),
    lambda x: new_scores_gradient(build(Request, x)),
)

table_gradient = define(
    "table_gradient",
    f"{_REQUEST}, {_SUM_WEIGHTS}) -> Tensor",
    lambda x: _unchecked(x).table_gradient(build(Request, x), _sum_weights(x)),
    lambda x: x["table"].new_empty(x["table"].shape),
)


def _table_gradient_sparse_fake(values: Values) -> SparseRows:
    touched = torch.library.get_ctx().new_dynamic_size()
    table: Tensor = values["table"]
    ids = values["positive"].new_empty((touched,))
    return SparseRows(ids, table.new_empty((touched, table.shape[1])))


table_gradient_sparse = define(
    "table_gradient_sparse",
    f"{_REQUEST}, {_SUM_WEIGHTS}) -> {tensors(len(SparseRows._fields))}",
    lambda x: _unchecked(x).table_gradient_sparse(build(Request, x), _sum_weights(x)),
    _table_gradient_sparse_fake,
)

mutate_forward = define(
    "mutate_forward",
    f"Tensor positive, Tensor negative, {_DRAWS}) -> Tensor",
    lambda x: _unchecked(x).mutate_forward(x["positive"], x["negative"], build(Draws, x)),
    lambda x: x["negative"].new_empty(x["negative"].shape),
)


def _mutate_backward_fake(values: Values) -> MutateGradient:
    grad: Tensor = values["grad"]
    rows, _, dim = grad.shape
    return MutateGradient(grad.new_empty((rows, dim)), grad.new_empty(grad.shape))


mutate_backward = define(
    "mutate_backward",
    f"Tensor grad, {_DRAWS}) -> {tensors(len(MutateGradient._fields))}",
    lambda x: _unchecked(x).mutate_backward(x["grad"], build(Draws, x)),
    _mutate_backward_fake,
)


# --- autograd -------------------------------------------------------------------------------------


def _apply(function: type[Function], values: Values) -> Any:
    """Apply a Function to named values: its ``forward`` gets first the names, then the values."""
    if torch.compiler.is_compiling():
        inputs = (value for value in values.values() if isinstance(value, Tensor))
        if not (torch.is_grad_enabled() and any(x.requires_grad for x in inputs)):
            # torch.compile does so itself, but not if forward takes a variable number of arguments.
            return function.forward(tuple(values), *values.values())
    return function.apply(tuple(values), *values.values())


def _save(ctx: Any, values: Values) -> None:
    """Keep named values for the backward pass, tensors by ``save_for_backward``."""
    held = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    ctx.save_for_backward(*held.values())
    ctx.held_names = tuple(held)
    ctx.others = {name: value for name, value in values.items() if name not in held}


def _saved(ctx: Any) -> Values:
    return {**ctx.others, **dict(zip(ctx.held_names, ctx.saved_tensors, strict=True))}


def _needed(ctx: Any) -> tuple[str, ...]:
    """The arguments of :func:`_apply` that need a gradient."""
    needs = zip(ctx.names, ctx.needs_input_grad[1:], strict=True)
    return tuple(name for name, need in needs if need)


def _by_name(ctx: Any, gradients: Mapping[str, Tensor | None]) -> tuple[Tensor | None, ...]:
    """What ``backward`` returns: None for the names, then each argument's gradient."""
    return (None, *(gradients.get(name) for name in ctx.names))


class _Deferred(threading.local):
    """A thread's tables, and the values that wait for each: it runs its CPU backward passes."""

    def __init__(self) -> None:
        self.entries: list[tuple[Tensor, list[Values]]] = []


_DEFERRED = _Deferred()


@contextmanager
def deferred(table: Tensor) -> Iterator[list[Values]]:
    """Backward passes inside do not compute this table's gradients, but keep the values to do so.

    Yields:
        The values, for :func:`step_table` or :func:`table_grad`.
    """
    waiting: list[Values] = []
    _DEFERRED.entries.append((table, waiting))
    try:
        yield waiting
    finally:
        _DEFERRED.entries.pop()


def step_table(values: Values, step: TableStep) -> bool:
    """:meth:`Kernels.step_table` with deferred values."""
    sums = SumWeights(**{name: values[name] for name in SumWeights._fields})
    return _KERNELS[values["backend"]].step_table(build(Request, values), sums, step)


def _table_grad(values: Values) -> Tensor | None:
    """:func:`table_grad`, unless the table's gradients are deferred."""
    if not torch.compiler.is_compiling():
        for table, waiting in _DEFERRED.entries:
            if values["table"] is table:  # not a view of it, from a backward pass inside this one
                waiting.append(values)
                return None
    return table_grad(values)


def table_grad(values: Values) -> Tensor:
    """The gradient by the table, from the values of a request and of :class:`SumWeights`."""
    if not values["sparse_grad"]:
        grad: Tensor = table_gradient(values)
        return grad
    if torch.compiler.is_compiling():
        raise RuntimeError("sparse_grad=True is eager-only: it cannot be traced by torch.compile")
    rows = SparseRows(*table_gradient_sparse(values))
    shape = values["table"].shape
    return torch.sparse_coo_tensor(
        rows.ids[None], rows.values, shape, is_coalesced=True, check_invariants=False
    )


def _rate_grad(rate: Tensor, of_rows: Tensor) -> Tensor:
    """The gradient by the rates, which rows and components may share, from (B, U) for each row."""
    return of_rows.sum_to_size(rate.shape)


class _LossGradient(FirstOrder):
    what = "the fused loss"

    @staticmethod
    def forward(names: tuple[str, ...], *given: Any) -> tuple[Tensor | None, ...]:
        values = dict(zip(names, given, strict=True))
        needed = values["needed"]
        values["row_scale"] = row_scale = values["grad"] * values["row_scale"]
        grads: dict[str, Tensor | None] = {}
        if "query" in needed:
            grads["query"] = values["grad_query"] * row_scale[:, None]
        if "table" in needed:
            grads["table"] = _table_grad(values)
        if "scale" in needed:
            grads["scale"] = values["grad_scale"] * row_scale[:, None]
        if "weights" in needed:
            grads["weights"] = (values["grad_weights"] * row_scale[:, None]).sum(dim=0)
        if "rate" in needed:
            grads["rate"] = _rate_grad(values["rate"], values["grad_rate"] * row_scale[:, None])
        return tuple(grads.get(name) for name in _WITH_GRADIENT)


class _Loss(Function):
    """The :class:`LossState` of one call, of which only the loss is differentiable."""

    @staticmethod
    def forward(names: tuple[str, ...], *given: Any) -> tuple[Tensor, ...]:
        values = dict(zip(names, given, strict=True))
        return tuple(loss_forward({**values, "need_grad": True}))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.names, *given = inputs
        kept = LossState(*output)._asdict()
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[1:])
        del kept["loss"], kept["terms"]
        _save(ctx, {**dict(zip(ctx.names, given, strict=True)), **kept})

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:  # nothing depends on the loss
            return _by_name(ctx, {})
        grads = _apply(_LossGradient, {**_saved(ctx), "grad": grad, "needed": _needed(ctx)})
        return _by_name(ctx, dict(zip(_WITH_GRADIENT, grads, strict=True)))


class _ScoresGradient(FirstOrder):
    what = "emu_scores"

    @staticmethod
    def forward(names: tuple[str, ...], *given: Any) -> tuple[Tensor | None, ...]:
        values = dict(zip(names, given, strict=True))
        needed = values["needed"]
        values |= {name: values[name].contiguous() for name in ScoreWeights._fields}
        state = ScoresGradient(*query_gradient(values))
        grads: dict[str, Tensor | None] = {"query": state.grad_query, "scale": state.grad_scale}
        if "table" in needed:
            row_scale = torch.ones_like(values["positive_weight"])
            grads["table"] = _table_grad({**values, **state._asdict(), "row_scale": row_scale})
        if "weights" in needed:
            grads["weights"] = state.grad_weights.sum(dim=0)
        if "rate" in needed:
            grads["rate"] = _rate_grad(values["rate"], state.grad_rate)
        return tuple(grads[name] if name in needed else None for name in _WITH_GRADIENT)


class _Scores(Function):
    """The scores of one call."""

    @staticmethod
    def forward(names: tuple[str, ...], *given: Any) -> tuple[Tensor, ...]:
        return tuple(scores_forward(dict(zip(names, given, strict=True))))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.names, *given = inputs
        _save(ctx, dict(zip(ctx.names, given, strict=True)))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        upstream = ScoreWeights(*grads)._asdict()
        found = _apply(_ScoresGradient, {**_saved(ctx), **upstream, "needed": _needed(ctx)})
        return _by_name(ctx, dict(zip(_WITH_GRADIENT, found, strict=True)))


class _MutateGradient(Function):
    @staticmethod
    def forward(names: tuple[str, ...], *given: Any) -> tuple[Tensor, ...]:
        values = dict(zip(names, given, strict=True))
        return tuple(mutate_backward({**values, "grad": values["grad"].contiguous()}))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.names, *given = inputs
        values = dict(zip(ctx.names, given, strict=True))
        del values["grad"]
        _save(ctx, values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # Mutation is linear: its gradient's adjoint is mutation itself.
        given = MutateGradient(*grads)
        mutated = _apply(
            _Mutate,
            {"positive": given.grad_positive, "negative": given.grad_negative, **_saved(ctx)},
        )
        return _by_name(ctx, {"grad": mutated})


class _Mutate(Function):
    """ẑ of one call; differentiable any number of times in positive and negative."""

    @staticmethod
    def forward(names: tuple[str, ...], *given: Any) -> Tensor:
        values = dict(zip(names, given, strict=True))
        values |= {name: values[name].contiguous() for name in ("positive", "negative")}
        out: Tensor = mutate_forward(values)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.names, *given = inputs
        values = dict(zip(ctx.names, given, strict=True))
        del values["positive"], values["negative"]
        _save(ctx, values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grads = MutateGradient(*_apply(_MutateGradient, {"grad": grad, **_saved(ctx)}))
        return _by_name(ctx, {"positive": grads.grad_positive, "negative": grads.grad_negative})


# --- backends with kernels ------------------------------------------------------------------------


class KernelBackend(Kernels):
    """Makes a :class:`emu_kernels.backends.base.Backend` of :class:`Kernels`, by the operators."""

    def loss(self, request: LossRequest) -> Loss:
        if products.fits(request, self.name):
            return products.loss(request)
        values = {**flatten(request), "backend": self.name}
        if _wants_grad(values):
            loss, terms, *_ = _apply(_Loss, values)
            return Loss(loss, terms)
        state = LossState(*loss_forward({**values, "need_grad": False}))
        return Loss(state.loss, state.terms)

    def scores(self, request: Request) -> Scores:
        values = {**flatten(request), "backend": self.name}
        return Scores(*(_apply(_Scores, values) if _wants_grad(values) else scores_forward(values)))

    def mutate(self, positive: Tensor, negative: Tensor, draws: Draws) -> Tensor:
        refuse_forward_mode(positive, negative)
        values = {**flatten(draws), "backend": self.name}
        out: Tensor = _apply(_Mutate, {"positive": positive, "negative": negative, **values})
        return out


def _wants_grad(values: Values) -> bool:
    """Whether backward mode is wanted; forward mode is refused."""
    inputs = [values[name] for name in _WITH_GRADIENT]
    refuse_forward_mode(*inputs)
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
