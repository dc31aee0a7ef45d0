"""1-vs-all losses: all entities except known answers are negatives; B·N scores are not stored."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from emu_kernels import backends, prepare, validate, values
from emu_kernels.api import emu_scores
from emu_kernels.library import FirstOrder, Function, refuse_forward_mode
from emu_kernels.mutation import Expected, Mutation, NoMutation
from emu_kernels.products import Batch, Gather, Known, combined, loss_rows, tiles
from emu_kernels.request import LossRequest

CHUNK = 2**16
"""How many known answers' rows are gathered at once."""
MEANS = 2
"""The index of the means among a tile's scores: they are summed, the others go into a logsumexp."""


def one_vs_all_loss(
    query: Tensor,  # (B, D)
    table: Tensor,  # (N, D)
    positive: Tensor,  # (B,)
    *,
    known: tuple[Tensor, Tensor] | None = None,  # (B + 1,), (M,)
    similarity: str = "dot",
    mutation_rate: Expected | None = None,
    beta: float | Tensor = 0.0,
    alpha: float | Tensor = 0.0,
    scale: Tensor | None = None,  # (B, D), or (B, D/2)
    similarity_weights: Tensor | None = None,
    phase_scale: float = 1.0,
    sample_weight: Tensor | None = None,  # (B,)
    mask_unit: str = "component",
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    r"""EMU in closed form, ULS or softmax over all entities (1-vs-all; Lacroix et al., 2018).

    The loss of :func:`emu_kernels.fused_emu_loss` with :class:`Expected`, where the negatives of a
    row are all entities except its positive and those of ``known``; K is their number. The forward
    and the backward pass each go over the entities a tile at a time, so that neither stores B·N
    scores. Dot products are computed by matrix products, distances by the backend's kernels.

    Args:
        known: answers that are known to be true, and so are not negatives: offsets (B + 1,) and
            entity ids (M,), integers; those of row b are ``ids[offsets[b]:offsets[b + 1]]``. The
            positive may be among them.
        mutation_rate: an :class:`Expected`, to be given with ``beta`` and ``alpha`` (its rate 0 is
            ULS without mutation); or None for the softmax alone, L_van, which does not use them.
            Masks cannot be drawn for all entities.

    The other arguments, the result and the errors are those of :func:`emu_kernels.fused_emu_loss`.
    The table's gradient is dense, as every row is touched; for bf16 and fp16 it is a sum of several
    parts, each of which is rounded. First derivatives by backward mode only. Eager only; on a GPU
    it waits to learn the sizes of ``known``.
    """
    rule: Mutation = NoMutation() if mutation_rate is None else mutation_rate
    if not isinstance(rule, (Expected, NoMutation)):
        given = type(mutation_rate).__name__
        raise TypeError(
            f"mutation_rate: expected an Expected or None over all entities, got {given}"
        )
    validate.tensor("positive", positive)
    request = prepare.loss(
        prepare.scores(
            query,
            table,
            positive,
            positive.new_empty((0,)),
            similarity=similarity,
            mutation=rule,
            mask_unit=mask_unit,
            scale=scale,
            similarity_weights=similarity_weights,
            phase_scale=phase_scale,
        ),
        beta=beta,
        alpha=alpha,
        sample_weight=sample_weight,
        reduction=reduction,
    )
    validate.known(known, positive, table.device)
    refuse_forward_mode(query, table, scale, instead="one_vs_all_loss has backward mode only")
    name = backends.resolve(backend, table.device).name
    own, _, poison = values.usable_ids(
        request.positive, request.negative, rows=request.table.shape[0]
    )
    left_out = _left_out(known, own, table.shape[0])
    if similarity == "dot" and not torch.are_deterministic_algorithms_enabled():
        uls, vanilla = _by_products(request, own, left_out)
    else:
        uls, vanilla = _by_kernels(request, own, left_out, mask_unit, name)
    return combined(request, uls, vanilla, poison).loss


def _left_out(known: tuple[Tensor, Tensor] | None, positive: Tensor, entities: int) -> Known:
    """The positives and the known answers, each once."""
    rows = torch.arange(positive.shape[0], device=positive.device)
    row, candidate = rows, positive
    if known is not None:
        offsets, ids = (t.to(torch.int64) for t in known)
        values.check_ids("known", ids, rows=entities, lowest=0)
        row = torch.cat([rows, rows.repeat_interleave(offsets.diff())])
        candidate = torch.cat([positive, ids])
    each = max(positive.shape[0], 1)
    keys = torch.unique(candidate * each + row)
    return Known(candidate=keys // each, row=keys % each)


def _count(left_out: Known, request: LossRequest) -> Tensor:
    """(B,) how many negatives each row has."""
    rows = request.query.shape[0]
    return request.table.shape[0] - torch.bincount(left_out.row, minlength=rows)


# --- the dot product ------------------------------------------------------------------------------


def _by_products(request: LossRequest, positive: Tensor, left_out: Known) -> tuple[Tensor, Tensor]:
    dtype = request.query.dtype
    rate = None if request.moments is None else request.moments.rate
    assert not isinstance(rate, float)
    batch = Batch(
        query=request.query,
        positive=Gather.apply(request.table, positive, dtype, False),
        candidates=request.table,
        bias=None,
        known=left_out,
        real=_count(left_out, request),
        total=_RowSums.apply(request.table, left_out, request.query.shape[0], dtype),
    )
    return loss_rows(batch, request, rate)


class _RowSums(Function):
    """(B, D) for each query the sum of all rows of a table except those that are left out."""

    @staticmethod
    def forward(table: Tensor, left_out: Known, rows: int, dtype: torch.dtype) -> Tensor:
        out = table.sum(dim=0, dtype=dtype).repeat(rows, 1)
        for row, candidate in _chunks(left_out):
            out.index_add_(0, row, table[candidate].to(dtype), alpha=-1)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        table, ctx.left_out, *_ = inputs
        ctx.table_dtype, ctx.shape = table.dtype, table.shape

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        out = grad.sum(dim=0).repeat(ctx.shape[0], 1)
        for row, candidate in _chunks(ctx.left_out):
            out.index_add_(0, candidate, grad[row], alpha=-1)
        return out.to(ctx.table_dtype), None, None, None


def _chunks(left_out: Known) -> list[tuple[Tensor, Tensor]]:
    return list(zip(left_out.row.split(CHUNK), left_out.candidate.split(CHUNK), strict=True))


# --- distances ------------------------------------------------------------------------------------


class _How(NamedTuple):
    """What the scores depend on besides tensors that get a gradient."""

    positive: Tensor
    left_out: Known
    options: dict[str, Any]

    def scores(self, start: int, end: int, given: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
        """(B, end − start) for a tile's entities: scores; with a rate also cumulants and means."""
        query, table, scale, weights, rate = given
        assert query is not None
        assert table is not None
        if rate is not None and rate.shape[0] == 1:
            rate = rate.reshape(()) if rate.numel() == 1 else rate[0]
        found = emu_scores(
            query,
            table,
            self.positive,
            torch.arange(start, end, device=table.device),
            scale=scale,
            similarity_weights=weights,
            mutation_rate=None if rate is None else Expected(rate),
            sparse_grad=True,
            **self.options,
        )
        return found[1:2] if rate is None else (found.negative, found.cumulant, found.mutated)


def _filled(scores: Tensor, places: Tensor, value: float) -> Tensor:
    """Scores with another value at the given flat indices."""
    return scores.reshape(-1).index_fill(0, places, value).view(scores.shape)


class _Statistics(Function):
    """(B,) each, over all negatives of a row: the logsumexp of scores and, with a rate, that of
    cumulants and the sum of means. NaN where a score is not finite.

    The backward pass computes each tile's scores again.
    """

    @staticmethod
    def forward(how: _How, *given: Tensor | None) -> tuple[Tensor, ...]:
        query, table, *_, rate = given
        assert query is not None
        assert table is not None
        rows = (query.shape[0],)
        starts = (-torch.inf,) if rate is None else (-torch.inf, -torch.inf, 0.0)
        totals = [query.new_full(rows, start) for start in starts]
        finite = torch.ones(rows, dtype=torch.bool, device=query.device)
        for start, end, without in tiles(table.shape[0], how.left_out):
            assert without is not None
            for i, scores in enumerate(how.scores(start, end, given)):
                finite &= _filled(scores, without, 0.0).isfinite().all(dim=1)
                left = _filled(scores, without, starts[i])
                if i < MEANS:
                    totals[i] = torch.logaddexp(totals[i], left.logsumexp(dim=1))
                else:
                    totals[i] = totals[i] + left.sum(dim=1)
        totals = [torch.where(finite, total, torch.nan) for total in totals]
        return tuple(totals)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.how, *given = inputs
        ctx.save_for_backward(*given, *output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[1:]
        return None, *_StatisticsGradient.apply(ctx.how, needed, *grads, *ctx.saved_tensors)


class _StatisticsGradient(FirstOrder):
    what = "one_vs_all_loss"

    @staticmethod
    def forward(how: _How, needed: tuple[bool, ...], *values: Tensor) -> tuple[Tensor | None, ...]:
        count = (len(values) - len(needed)) // 2  # of totals, and of their gradients
        grads, given, totals = values[:count], values[count:-count], values[-count:]
        inputs = tuple(
            t if t is None else t.detach().requires_grad_(need)
            for t, need in zip(given, needed, strict=True)
        )
        wanted = [t for t in inputs if t is not None and t.requires_grad]
        found = [torch.zeros_like(t, dtype=totals[0].dtype) for t in wanted]
        for start, end, without in tiles(inputs[1].shape[0], how.left_out):
            assert without is not None
            with torch.enable_grad():
                every = how.scores(start, end, inputs)
            weights = []
            for i, (scores, total, grad) in enumerate(zip(every, totals, grads, strict=True)):
                share = (scores.detach() - total[:, None]).exp_() if i < MEANS else 1.0
                weight = (share * grad[:, None]).expand_as(scores)
                weights.append(_filled(weight, without, 0.0))
            of_scores = torch.autograd.grad(every, wanted, weights)
            for to, of_tile in zip(found, of_scores, strict=True):
                if of_tile.is_sparse:
                    to.index_add_(0, of_tile._indices()[0], of_tile._values().to(to.dtype))
                else:
                    to += of_tile
        grown = iter(total.to(t.dtype) for total, t in zip(found, wanted, strict=True))
        return tuple(next(grown) if need else None for need in needed)


def _by_kernels(
    request: LossRequest, positive: Tensor, left_out: Known, mask_unit: str, backend: str
) -> tuple[Tensor, Tensor]:
    rate = None if request.moments is None else request.moments.rate
    given = (request.query, request.table, request.scale, request.weights, rate)
    options: dict[str, Any] = {
        "similarity": request.similarity,
        "phase_scale": request.phase_scale,
        "mask_unit": mask_unit,
        "backend": backend,
    }
    lse, *of_rule = _Statistics.apply(_How(positive, left_out, options), *given)
    score = emu_scores(
        request.query,
        request.table,
        positive,
        positive.new_empty((0,)),
        mutation_rate=None,
        scale=request.scale,
        similarity_weights=request.weights,
        **options,
    ).positive
    vanilla = torch.logaddexp(score, lse) - score
    if rate is None:
        return torch.zeros_like(vanilla), vanilla
    mutated_lse, means = of_rule
    beta, _ = values.usable_coefficients(request)
    count = _count(left_out, request)
    lse = torch.logaddexp(score, mutated_lse)
    uls = (lse - score) + beta * (count * lse - means)
    return torch.where(count > 0, uls / count.clamp(min=1), 0), vanilla
