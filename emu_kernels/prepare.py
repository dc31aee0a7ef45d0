"""Makes a request of a public function's arguments: checks them, then brings them into one form.

Errors are those that :func:`emu_kernels.fused_emu_loss` documents.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from emu_kernels import validate, values
from emu_kernels.mutation import RULES, Expected, Mutation, mask_unit, masked
from emu_kernels.request import Draws, LossRequest, Request
from emu_kernels.similarity import SIMILARITIES

_PROCESS = os.getpid()


def alone_after_fork() -> None:
    """Use one thread in a forked child, where torch would wait for threads that do not exist."""
    if torch.compiler.is_compiling() or os.getpid() == _PROCESS:
        return
    if torch.get_num_threads() > 1:
        torch.set_num_threads(1)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Every sum is in fp32, or in fp64 for fp64 tables."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def draws(
    rate: float | Tensor | Mutation,
    unit: str,
    *,
    seed: int | Tensor | None,
    row_offset: int,
    rows: int,
    dim: int,
    device: torch.device,
) -> Draws:
    """The rule that the arguments ``mutation_rate`` and ``mask_unit`` mean, with its seed."""
    seed = validate.seed(seed, device)
    row_offset = validate.row_offset(row_offset, rows)
    rule = _drawn(rate, unit, dim, device)
    if rule.draw in ("none", "moments"):
        seed = 0  # torch's generator is left alone
    return Draws(mutation=rule, seed=_seed_tensor(seed, device), row_offset=row_offset)


def _drawn(rate: float | Tensor | Mutation, unit: str, dim: int, device: torch.device) -> Mutation:
    validate.mask_unit(unit, dim)
    if isinstance(rate, Mutation) and rate.draw != "mask":
        return rate
    if isinstance(rate, Tensor):
        units = dim // 2 if RULES[unit].pairs else dim
        validate.rates("mutation_rate", rate, unit, units, device)
        return masked(unit, values.usable_thresholds("mutation_rate", rate.expand(units)))
    return masked(unit, validate.rate("mutation_rate", rate))


def _expected(rule: Expected, unit: str, query: Tensor, similarity: str) -> Expected:
    """The rule with its rates as a tensor: one for all, (1, 1), one for each unit, (1, U), or one
    for each row and unit, (B, U)."""
    coupled = SIMILARITIES[similarity].coupled
    wanted = mask_unit(pairs=coupled)
    if unit != wanted:
        raise ValueError(
            f"mask_unit: Expected is for {wanted}s where similarity is {similarity!r}: "
            f"expected {wanted!r}, got {unit!r}"
        )
    rows, dim = query.shape
    units = dim // 2 if coupled else dim
    shapes = ((), (units,), (rows, units))
    rate = validate.expected("mutation_rate", rule.rate, unit, shapes, query)
    dtype = accumulation_dtype(query.dtype)
    if not isinstance(rate, Tensor):
        return Expected(torch.full((1, 1), rate, dtype=dtype, device=query.device))
    rate = values.usable_rates("mutation_rate", rate).to(dtype)
    rate = (rate.reshape(1, 1) if rate.ndim == 0 else rate.reshape(-1, units)).contiguous()
    return Expected(rate, learned=rate.requires_grad and torch.is_grad_enabled())


def scores(
    query: Tensor,
    table: Tensor,
    positive: Tensor,
    negative: Tensor,
    *,
    similarity: str,
    mutation: float | Tensor | Mutation,
    mask_unit: str = "component",
    scale: Tensor | None = None,
    similarity_weights: Tensor | None = None,
    phase_scale: float = 1.0,
    seed: int | Tensor | None = None,
    row_offset: int = 0,
    sparse_grad: bool = False,
) -> Request:
    alone_after_fork()
    validate.batch(
        query,
        table,
        positive,
        negative,
        similarity=similarity,
        scale=scale,
        similarity_weights=similarity_weights,
        phase_scale=phase_scale,
    )
    drawn = draws(
        mutation,
        mask_unit,
        seed=seed,
        row_offset=row_offset,
        rows=query.shape[0],
        dim=query.shape[1],
        device=table.device,
    )
    rule = drawn.mutation
    if isinstance(rule, Expected):
        rule = _expected(rule, mask_unit, query, similarity)
    dtype = accumulation_dtype(table.dtype)
    return Request(
        mutation=rule,
        seed=drawn.seed,
        row_offset=drawn.row_offset,
        query=query.to(dtype).contiguous(),
        table=table,
        scale=None if scale is None else scale.to(dtype).contiguous(),
        weights=None if similarity_weights is None else similarity_weights.to(dtype).contiguous(),
        positive=positive.to(torch.int64).contiguous(),
        negative=(negative[None] if negative.ndim == 1 else negative).to(torch.int64).contiguous(),
        similarity=similarity,
        phase_scale=float(phase_scale),
        sparse_grad=validate.flag("sparse_grad", sparse_grad),
    )


def loss(
    request: Request,
    *,
    beta: float | Tensor,
    alpha: float | Tensor,
    sample_weight: Tensor | None,
    reduction: str,
    log_q: Tensor | None = None,
) -> LossRequest:
    validate.sample_weight(sample_weight, request.query)
    validate.log_q(log_q, request.table)
    beta = validate.coefficient("beta", beta)
    alpha = validate.coefficient("alpha", alpha)
    validate.one_of("reduction", reduction, validate.REDUCTIONS)
    like = request.query
    coefficients = None
    if isinstance(beta, Tensor) or isinstance(alpha, Tensor):
        coefficients = torch.stack([coefficient(beta, like), coefficient(alpha, like)])
        beta = alpha = 0.0
    if sample_weight is not None:
        sample_weight = sample_weight.detach().to(like.dtype).contiguous()
    of_positive = of_negative = None
    if log_q is not None:
        of_positive = _of_ids(log_q, request.positive, like.dtype)
        of_negative = _of_ids(log_q, request.negative, like.dtype)
    return LossRequest(
        **vars(request),
        beta=float(beta),
        alpha=float(alpha),
        coefficients=coefficients,
        sample_weight=sample_weight,
        positive_log_q=of_positive,
        negative_log_q=of_negative,
        reduction=reduction,
    )


def _of_ids(log_q: Tensor, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """log q of each id, 0 at padding. A copy, so that the caller may change ``log_q`` before the
    backward pass. Ids out of range, which backends report, get the value of another id here."""
    rows = log_q.shape[0]
    if rows == 0:
        return torch.zeros_like(ids, dtype=dtype)
    return log_q[ids.clamp(0, rows - 1)].to(dtype).masked_fill(ids < 0, 0.0)


def coefficient(value: float | Tensor, like: Tensor) -> Tensor:
    """() of ``like``'s dtype, on its device."""
    if isinstance(value, Tensor):
        return value.to(device=like.device, dtype=like.dtype).reshape(())
    return torch.full((), value, dtype=like.dtype, device=like.device)


def usable_coefficient(name: str, value: object, like: Tensor) -> float | Tensor:
    """A coefficient, checked: a number, or () of ``like``'s dtype, on its device."""
    given = validate.coefficient(name, value)
    if isinstance(given, Tensor):
        return values.usable_coefficient(name, coefficient(given, like))
    return given


def _seed_tensor(seed: int | Tensor | None, device: torch.device) -> Tensor:
    if seed is None:
        return torch.randint(validate.MAX_SEED - 1, (), dtype=torch.int64, device=device)
    if isinstance(seed, Tensor):
        return seed.detach().reshape(())
    return torch.full((), seed, dtype=torch.int64, device=device)
