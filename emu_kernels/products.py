"""Losses of the dot product by matrix products, for many queries that share their negatives.

A score is q·z⁻. In closed form (:class:`emu_kernels.mutation.Expected`) the cumulant of a mutated
score is a product as well: with w = ρ (1 − ρ), component by component,

    c_k = Σ_j ρ_j q_j z⁺_j + ½ Σ_j w_j (q_j z⁺_j)²
        + [(1 − ρ) ⊙ q − w ⊙ q² ⊙ z⁺ ‖ ½ w ⊙ q²] · [z⁻_k ‖ z⁻_k²]
    Σ_k m_k = K Σ_j ρ_j q_j z⁺_j + ((1 − ρ) ⊙ q) · Σ_k z⁻_k

So the only computation of size B·K is the logsumexp of a product of inner size D or 2D, done tile
by tile. The rest is on (B, D) tensors and differentiated by autograd. The losses are those of
:mod:`emu_kernels.reference`, up to rounding. Their bits depend on the number of threads, as those
of torch's matrix products do; with ``torch.use_deterministic_algorithms`` kernels are used instead.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from emu_kernels.backends.base import Loss
from emu_kernels.backends.reference import reduced
from emu_kernels.library import FirstOrder, Function
from emu_kernels.request import LossRequest
from emu_kernels.values import usable_coefficients, usable_ids

TILE = 1024
"""Candidates whose scores, (B, TILE), exist at once."""
KEPT = 2**22
"""The most scores of a single tile to keep for the backward pass, which computes others again."""
MIN_SCORES = {"cpu": 2**17}
"""For each backend, the least number of scores of a set of negatives (its rows times its negatives)
from which on products are faster than the kernels, at 100 components. Backends that were not
measured are left out."""
MIN_ROWS = 32
"""The least number of rows of a set, as well: its candidates are copied, (G·K, D)."""


class Known(NamedTuple):
    """Pairs of a row and a candidate that is not a negative of it, sorted by candidate."""

    candidate: Tensor  # (M,) int64
    row: Tensor  # (M,) int64


Tile = tuple[int, int, Tensor | None]
"""Its first candidate, the one after its last, and the flat indices of scores to leave out."""


def tiles(count: int, known: Known | None) -> list[Tile]:
    """The tiles of ``count`` candidates."""
    starts = list(range(0, count, TILE))
    ends = [*starts[1:], count][: len(starts)]
    if known is None:
        return [(start, end, None) for start, end in zip(starts, ends, strict=True)]
    bounds = torch.tensor([*starts, count], device=known.candidate.device)
    cuts = torch.searchsorted(known.candidate, bounds).tolist()
    out: list[Tile] = []
    for i, (start, end) in enumerate(zip(starts, ends, strict=True)):
        here = slice(cuts[i], cuts[i + 1])
        out.append((start, end, known.row[here] * (end - start) + known.candidate[here] - start))
    return out


def _features(rows: Tensor, bias: Tensor | None, like: Tensor) -> Tensor:
    """z, or z ‖ z² if ``like``, the other factor, is twice as wide; then columns of 0 and bias."""
    rows = rows.to(like.dtype)
    parts = [rows] if rows.shape[1] == like.shape[1] else [rows, rows.square()]
    column = rows.new_zeros((rows.shape[0], 1))
    return torch.cat([*parts, column, column if bias is None else bias[:, None]], dim=1)


def _factor(x: Tensor, column: Tensor) -> Tensor:
    """The other factor of :func:`_features`, for x · y + bias, plus ``column`` if their 0 is 1."""
    return torch.cat([x, column[:, None], torch.ones_like(column)[:, None]], dim=1)


def _as_they_are(x: Tensor) -> Any:
    """Products in the tensors' own dtype, whatever autocast says."""
    return torch.autocast(x.device.type, enabled=False)


class _LogSumExp(Function):
    """(B,) log (e^own + Σ_k e^(x · y_k + bias_k)) of own (B,), x (B, E) and the features y of rows
    (K, D); also the log-softmax of the tile, if there is only one and it is small enough to keep.

    The sum so far is put before the candidates of each tile, so that a tile takes only a product
    and one log-softmax.
    """

    @staticmethod
    def forward(
        own: Tensor, x: Tensor, rows: Tensor, bias: Tensor | None, every: list[Tile]
    ) -> tuple[Tensor, Tensor | None]:
        lse, shares = own, None
        for start, end, without in every:
            features = _features(rows[start:end], None if bias is None else bias[start:end], x)
            first = torch.zeros_like(features[:1])
            first[:, -2] = 1
            with _as_they_are(x):
                scores = _factor(x, lse) @ torch.cat([first, features]).T
            if without is not None:
                row = without.div(end - start, rounding_mode="floor")
                scores.view(-1).index_fill_(0, without + row + 1, float("-inf"))
            shares = scores.log_softmax(dim=1)
            lse = lse - shares[:, 0]
        if len(every) != 1 or (shares is not None and shares.numel() > KEPT):
            shares = None
        return lse.clone() if lse is own else lse, shares

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        *given, ctx.tiles = inputs
        lse, shares = output
        ctx.save_for_backward(*given, lse, shares)
        ctx.set_materialize_grads(False)
        if shares is not None:
            ctx.mark_non_differentiable(shares)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _of_shares: None) -> tuple[Tensor | None, ...]:
        return *_LogSumExpGradient.apply(grad, ctx.tiles, *ctx.saved_tensors), None, None


class _LogSumExpGradient(FirstOrder):
    what = "the fused loss"

    @staticmethod
    def forward(
        grad: Tensor,
        every: list[Tile],
        own: Tensor,
        x: Tensor,
        rows: Tensor,
        bias: Tensor | None,
        lse: Tensor,
        shares: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        by_x, by_rows = torch.zeros_like(x), torch.empty_like(rows)
        width, dim = x.shape[1], rows.shape[1]
        weighed = grad[:, None] * x
        for start, end, without in every:
            features = _features(rows[start:end], None if bias is None else bias[start:end], x)
            if shares is None:
                features[:, -2] = 1
                with _as_they_are(x):
                    share = (_factor(x, -lse) @ features.T).exp_()
                if without is not None:
                    share.view(-1).index_fill_(0, without, 0.0)
            else:
                share = shares[:, 1:].exp()
            with _as_they_are(x):
                by_x.addmm_(share, features[:, :width])
                by_features = share.T @ weighed
            of_rows = by_features[:, :dim]
            if width > dim:
                of_rows = torch.addcmul(of_rows, features[:, :dim], by_features[:, dim:], value=2)
            by_rows[start:end] = of_rows
        return grad * (own - lse).exp(), by_x * grad[:, None], by_rows


class Batch(NamedTuple):
    """Rows that share their candidates."""

    query: Tensor  # (B, D)
    positive: Tensor  # (B, D), z⁺
    candidates: Tensor  # (K, D), zeros at padding
    bias: Tensor | None  # (K,), −inf at padding, else 0
    known: Known | None  # candidates that are not negatives of some rows
    real: Tensor  # (B,), or () for all rows: how many negatives there are
    total: Tensor  # (B, D), or (D,) for all rows: their sum
    log_q: Tensor | None = None  # (B,) of the positives; the candidates' is in the bias, negated
    log_q_total: Tensor | float = 0.0  # the sum over the negatives


def loss_rows(batch: Batch, request: LossRequest, rate: Tensor | None) -> tuple[Tensor, Tensor]:
    """L_emu and L_van of each row, (B,) both, as :func:`emu_kernels.reference.loss_rows`; ``rate``
    (1 or B, 1 or D) is that of the closed form, None for L_van alone."""
    q, z = batch.query, batch.positive
    beta, _ = usable_coefficients(request)
    given = (batch.candidates, batch.bias, tiles(batch.candidates.shape[0], batch.known))
    score = (q * z).sum(dim=1)
    zero = torch.zeros_like(score)
    largest = torch.zeros_like(zero[:1])
    if batch.candidates.numel():
        low, high = torch.aminmax(batch.candidates.detach())
        largest = torch.maximum(-low, high)
    bound = q.detach().abs().sum(dim=1) * largest  # no score is larger in absolute value
    if rate is not None:
        bound = bound + q.detach().square().sum(dim=1) * largest * largest
    if batch.log_q is not None:
        score = score - batch.log_q
    finite = (bound + score.detach() + batch.log_q_total).isfinite()
    poison = torch.where(finite, 1.0, float("nan")).to(score.dtype)

    vanilla = _LogSumExp.apply(score, q, *given)[0] - score
    if rate is None:
        return zero * poison, vanilla * poison
    keep, product = 1 - rate, q * z
    spread = rate * keep
    taken = (rate * product).sum(dim=1)
    half = spread * q.square() / 2
    x = torch.cat([keep * q - 2 * half * z, half], dim=1)
    constant = taken + (half * z.square()).sum(dim=1)
    lse = constant + _LogSumExp.apply(score - constant, x, *given)[0]
    means = batch.real * taken + (keep * q * batch.total).sum(dim=1) - batch.log_q_total
    uls = (lse - score) + beta * (batch.real * lse - means)
    uls = torch.where(batch.real > 0, uls / batch.real.clamp(min=1), 0)
    return uls * poison, vanilla * poison


# --- sampled negatives in sets --------------------------------------------------------------------


def fits(request: LossRequest, backend: str) -> bool:
    """Whether a loss is computed by products: each set of negatives has many rows, no masks are
    drawn, and torch was not asked for deterministic algorithms."""
    groups, count = request.negative.shape
    rows = request.query.shape[0]
    scores = rows * count
    return (
        backend in MIN_SCORES
        and request.similarity == "dot"
        and request.mutation.draw in ("none", "moments")
        and 0 < groups * MIN_SCORES[backend] <= scores
        and rows >= MIN_ROWS * groups
        and not torch.are_deterministic_algorithms_enabled()
    )


class Gather(Function):
    """Rows of a table, as ``dtype``; contributions to a row's gradient are summed, then rounded."""

    @staticmethod
    def forward(table: Tensor, ids: Tensor, dtype: torch.dtype, sparse: bool) -> Tensor:
        return table[ids].to(dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        table, ids, _, ctx.sparse = inputs
        ctx.save_for_backward(ids)
        ctx.shape, ctx.dtype = table.shape, table.dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (ids,) = ctx.saved_tensors
        return _Scatter.apply(grad, ids, ctx.shape, ctx.dtype, ctx.sparse), None, None, None


class _Scatter(FirstOrder):
    what = "the fused loss"

    @staticmethod
    def forward(
        grad: Tensor, ids: Tensor, shape: torch.Size, dtype: torch.dtype, sparse: bool
    ) -> Tensor:
        if not sparse:
            return grad.new_zeros(shape).index_add_(0, ids, grad).to(dtype)
        touched, place = ids.unique(return_inverse=True)
        rows = grad.new_zeros((touched.shape[0], shape[1])).index_add_(0, place, grad)
        return torch.sparse_coo_tensor(
            touched[None], rows.to(dtype), shape, is_coalesced=True, check_invariants=False
        )


def loss(request: LossRequest) -> Loss:
    """The loss of a request that :func:`fits`."""
    if request.sparse_grad and torch.compiler.is_compiling():
        raise RuntimeError("sparse_grad=True is eager-only: it cannot be traced by torch.compile")
    positive, negative, poison = usable_ids(
        request.positive, request.negative, rows=request.table.shape[0]
    )
    groups, count = negative.shape
    rows = request.query.shape[0] // max(groups, 1)
    # Padding reads the first positive, so that it touches no other row.
    negative_or_own = torch.where(negative >= 0, negative, positive[:1])
    ids = torch.cat([negative_or_own.flatten(), positive])
    gathered = Gather.apply(request.table, ids, request.query.dtype, request.sparse_grad)
    candidates, own = gathered.split([groups * count, gathered.shape[0] - groups * count])
    rates = None if request.moments is None else request.moments.rate
    terms: list[tuple[Tensor, Tensor]] = []
    for g in range(groups):
        here = slice(g * rows, (g + 1) * rows)
        real = negative[g] >= 0
        of_set = torch.where(real[:, None], candidates[g * count : (g + 1) * count], 0)
        bias = torch.where(real, 0.0, float("-inf")).to(own.dtype)
        of_negatives = request.negative_log_q
        batch = Batch(
            query=request.query[here],
            positive=own[here],
            candidates=of_set,
            bias=bias if of_negatives is None else bias - of_negatives[g],
            known=None,
            real=real.sum(),
            total=of_set.sum(dim=0),
            log_q=None if request.positive_log_q is None else request.positive_log_q[here],
            log_q_total=0.0 if of_negatives is None else of_negatives[g].sum(),
        )
        rate = rates[here] if isinstance(rates, Tensor) and rates.shape[0] > 1 else rates
        assert not isinstance(rate, float)
        terms.append(loss_rows(batch, request, rate))
    uls, vanilla = (torch.cat(of_sets) for of_sets in zip(*terms, strict=True))
    return combined(request, uls, vanilla, poison)


def combined(request: LossRequest, uls: Tensor, vanilla: Tensor, poison: Tensor | None) -> Loss:
    """The loss from L_emu and L_van of each row."""
    _, alpha = usable_coefficients(request)
    rows = uls + alpha * vanilla if request.mutated else vanilla
    return reduced(request, torch.stack([uls, vanilla]), rows, poison)
