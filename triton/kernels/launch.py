"""From requests to launches: grids, block sizes, scratch memory. Nothing here waits for the device.

Block sizes come from a table keyed by shape, not from timing runs: see :func:`tile`.
"""

from __future__ import annotations

import functools
import hashlib
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from emu_kernels.backends import ids
from emu_kernels.backends.base import (
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
from emu_kernels.backends.triton import interpreted
from emu_kernels.mutation import Component, Mutation, NoMutation
from emu_kernels.request import Draws, LossRequest, Request
from emu_kernels.similarity import SIMILARITIES, Similarity
from emu_kernels.triton import backward, forward, losses, mutate, rows
from emu_kernels.triton.kinds import Inputs, Kind, Sizes
from emu_kernels.triton.masks import SHARES
from emu_kernels.triton.similarities import TERMS

INTERPRETED = interpreted()
"""Whether the kernels run on the CPU, with a NumPy call for each operation (TRITON_INTERPRET=1)."""


def _power_of_2(number: int) -> int:
    """The least power of 2 that is not below the number."""
    return 1 << (number - 1).bit_length()


def _result(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Zeros for a result of the kernels, to be cast to ``like``'s dtype. They have that dtype,
    except for bf16 in the interpreter, which truncates where a GPU rounds: there torch rounds."""
    cut = INTERPRETED and like.dtype == torch.bfloat16
    return like.new_zeros(shape, dtype=torch.float32 if cut else like.dtype)


class Tile(NamedTuple):
    rows: int  # candidates
    width: int  # components of each part
    warps: int


def tile(width: int, count: int) -> Tile:
    """The tile of a kernel that goes over ``count`` candidates with ``width`` components per part.

    A thread has the sixteen components of a Philox call in each part, so a tile has 2048 components
    of a part for four warps, and as many rows as these allow. Wider rows would need sums across
    warps. So there is nothing to search for at run time: no slow first call, and the same sums in
    every run.
    """
    if INTERPRETED:
        # An operation costs the same for one element as for thousands.
        rows, wide = _power_of_2(min(max(count, 1), 64)), min(width, 512)
        return Tile(rows, max(16, _power_of_2(wide)), 1)
    wide = max(16, min(_power_of_2(width), 512))
    rows = max(1, min(2048 // wide, _power_of_2(max(count, 1))))
    return Tile(rows, wide, max(1, rows * wide // 512))


def block(count: int) -> int:
    """The number of lanes that go over ``count`` numbers."""
    return max(16, min(1024, _power_of_2(max(count, 1))))


def _on(tensor: Tensor) -> AbstractContextManager[None]:
    """Lets launches go to the tensor's device, whichever device is current."""
    return nullcontext() if tensor.device.type == "cpu" else torch.cuda.device(tensor.device)


def run(kernel: Any, programs: int, warps: int, **arguments: Any) -> None:
    """Launch in a one-dimensional grid; products and sums are not contracted to fused ones."""
    if programs:
        kernel[(programs,)](**arguments, num_warps=warps, enable_fp_fusion=False)


@functools.cache
def _source(*functions: Any) -> str:
    """:attr:`Kind.SOURCE`. Interpreted functions are not cached, and have no key."""
    keys = "".join(getattr(function, "cache_key", "") for function in functions if function)
    return hashlib.sha256(keys.encode()).hexdigest()[:16]


def _kind(
    dim: int,
    rule: Mutation,
    *,
    stride: int = 0,
    similarity: Similarity = SIMILARITIES["dot"],
    scaled: bool = False,
    phase_scale: float = 1.0,
    rate: Tensor | None = None,
) -> Kind:
    """The Kind except for the tile."""
    parts = 2 if similarity.halves == 2 or rule.pairs else 1
    each = parts // similarity.halves  # parts of a half
    terms = TERMS[similarity.name]
    share, parameter = SHARES[rule.name](rule) if rule.draw == "share" else (None, 0)
    return Kind(
        D=dim,
        STRIDE=stride,
        PARTS=parts,
        W=dim // parts,
        ROWS=0,
        WIDTH=0,
        CHUNKS=0,
        TERMS=terms * each,
        COUPLED=similarity.coupled,
        BILINEAR=similarity.bilinear,
        SUMS=similarity.sums,
        ROOTS=similarity.roots,
        DIRECT=similarity.direct,
        SCALED=tuple(scaled and factor == "scale" for factor in similarity.factors) * each,
        SCALE_D=dim // similarity.halves * similarity.scaled_halves if scaled else 0,
        HALF=phase_scale / 2,
        MUTATED=rule.draw != "none",
        MOMENTS=rule.draw == "moments",
        RATE_ROW=0 if rate is None or rate.shape[0] == 1 else rate.stride(0),
        ONE_RATE=rate is not None and rate.numel() == 1,
        SHARED=rule.draw == "share",
        PAIRS=rule.pairs,
        SHARE=share,
        PARAMETER=parameter,
        SOURCE=_source(*terms, share),
    )


def _with_tile(kind: Kind, at: Tile) -> Kind:
    return kind._replace(ROWS=at.rows, WIDTH=at.width, CHUNKS=-(-kind.W // at.width))


def _thresholds(rule: Mutation) -> tuple[Tensor | None, int]:
    """The thresholds of the mask's units, or else the one for all."""
    return (rule.thresholds, rule.threshold) if isinstance(rule, Component) else (None, 0)


class Problem:
    """A request in the kernels' terms."""

    def __init__(self, request: Request) -> None:
        self.request = request
        table = request.table
        if table.stride(-1) != 1 and table.shape[1] > 1:
            table = table.contiguous()
        self.rows, self.dim = request.query.shape
        groups, self.count = request.negative.shape
        thresholds, threshold = _thresholds(request.mutation)
        rate = None if request.moments is None else request.moments.rate
        assert rate is None or isinstance(rate, Tensor)
        kind = _kind(
            self.dim,
            request.mutation,
            stride=table.stride(0) if table.shape[0] > 1 else self.dim,
            similarity=SIMILARITIES[request.similarity],
            scaled=request.scale is not None,
            phase_scale=request.phase_scale,
            rate=rate,
        )
        self.tile = tile(kind.W, self.count)
        self.kind = _with_tile(kind, self.tile)
        self.inputs = Inputs(
            query=request.query,
            table=table,
            scale=request.scale,
            weights=request.weights,
            positive=request.positive,
            negative=request.negative,
            seed=request.seed,
            thresholds=thresholds,
            rate=rate,
            report=ids.report(table.device),
        )
        self.sizes = Sizes(
            B=self.rows,
            K=self.count,
            R=max(self.rows // max(groups, 1), 1),
            N=table.shape[0],
            row_offset=request.row_offset,
            threshold=threshold,
        )

    @property
    def blocks(self) -> int:
        """The number of tiles that cover a row's candidates; at least one, for the positive."""
        return max(1, -(-self.count // self.tile.rows))

    def new(self, *shape: int) -> Tensor:
        return self.request.query.new_empty(shape)

    def run(self, kernel: Any, programs: int, warps: int | None = None, **own: Any) -> None:
        """Launch with what every kernel takes, and with the kernel's ``own`` arguments."""
        given = {"inputs": self.inputs, "kind": self.kind, **self.sizes._asdict(), **own}
        run(kernel, programs, warps or self.tile.warps, **given)


def _optional(tensor: Tensor) -> Tensor | None:
    return tensor if tensor.numel() else None


def _scores(
    p: Problem,
    positive: Tensor,
    plain: Tensor,
    mutated: Tensor,
    variance: Tensor,
    *,
    values: bool,
) -> None:
    out: dict[str, Any] = {
        "positive_out": positive,
        "plain_out": plain,
        "mutated_out": mutated,
        "variance_out": variance,
    }
    if not p.kind.MOMENTS:
        p.run(forward.scores, p.rows * p.blocks, **out, VALUES=values)
        return
    # A thread has 32 components, of two candidates, so that it computes the query's part once.
    warps = max(1, p.tile.warps * p.kind.PARTS // 2)
    if p.kind.CHUNKS > 1:
        p.run(forward.scores, p.rows * p.blocks, warps, **out, VALUES=values)
    else:
        splits = _splits(p, p.rows)
        p.run(rows.moments, p.rows * splits, warps, **out, VALUES=values, SPLITS=splits)


def scores_forward(request: Request) -> Scores:
    with _on(request.table):
        out = new_scores(request)
        _scores(Problem(request), *out, values=False)
        return out


def _splits(p: Problem, programs: int) -> int:
    """Over how many programs to split each row's negatives, if there are too few rows."""
    wanted = 1 if INTERPRETED else max(1, 1024 // max(programs, 1))
    return min(_power_of_2(wanted), max(1, p.count // (4 * p.tile.rows)))


def _query_gradient(p: Problem, positive_weight: Tensor, state: LossState | ScoresGradient) -> None:
    splits = _splits(p, p.rows * p.kind.CHUNKS)
    out = [state.grad_query, state.grad_positive, state.grad_scale, state.grad_rate]
    partial = out if splits == 1 else [t.new_empty((splits, *t.shape)) for t in out]
    grad_query, grad_positive, grad_scale, grad_rate = partial
    p.run(
        forward.query_gradient,
        p.rows * p.kind.CHUNKS * splits,
        # With fewer warps a second part's moments would be spilled.
        p.tile.warps * p.kind.PARTS if p.kind.MOMENTS else None,
        positive_weight=positive_weight,
        weight=state.weight,
        mutated_weight=state.mutated_weight,
        variance_weight=state.variance_weight,
        grad_query=grad_query,
        grad_positive=grad_positive,
        grad_scale=_optional(grad_scale),
        grad_rate=_optional(grad_rate),
        SPLITS=splits,
    )
    if splits > 1:
        for total, parts in zip(out, partial, strict=True):
            torch.sum(parts, 0, out=total)


passes: int | None = None
"""In how many passes over the candidates to compute the loss and its gradients by the query's side:
1, 2, or None to choose. For measurements: set it between calls."""


def _one_pass(p: Problem) -> bool:
    """Whether a row and its sums fit in registers: five sums of sixteen components per thread do,
    besides the tile itself; more, for a scale or a second part, would be spilled (see the
    ahead-of-time tests). If they do not fit, candidates are read twice."""
    if p.kind.CHUNKS > 1 or p.kind.MOMENTS:
        return False
    fits = not p.kind.MUTATED or (p.kind.PARTS == 1 and p.request.scale is None)
    return fits if passes is None else passes == 1


Spans = dict[str, Any]
"""What :func:`_accumulate` computes for the spans of each row's negatives, for rows.merge."""


def _accumulate(p: Problem, positive: Tensor, state: LossState) -> Spans:
    splits = _splits(p, p.rows)
    mutated, scaled = p.kind.MUTATED, p.request.scale is not None
    # One more than the index of the last vector that rows.accumulate stores.
    vectors = 8 if mutated and scaled else 6 if scaled else 5 if mutated else 1
    spans: Spans = {
        "maxima": p.new(2, p.rows, splits),
        "sums": p.new(vectors, p.rows, splits, p.dim),
        "SPLITS": splits,
    }
    p.run(
        rows.accumulate,
        p.rows * splits,
        positive_out=positive,
        plain_out=state.weight,
        mutated_out=state.mutated_weight,
        **spans,
    )
    return spans


def _merge(
    p: Problem, positive_weight: Tensor, state: LossState, statistics: Tensor, spans: Spans
) -> None:
    p.run(
        rows.merge,
        p.rows * p.kind.CHUNKS,
        warps=1,
        statistics=statistics,
        positive_weight=positive_weight,
        grad_query=state.grad_query,
        grad_positive=state.grad_positive,
        grad_scale=_optional(state.grad_scale),
        **spans,
    )


def loss_forward(request: LossRequest, *, need_grad: bool) -> LossState:
    with _on(request.table):
        p = Problem(request)
        p.inputs = p.inputs._replace(
            positive_log_q=request.positive_log_q, negative_log_q=request.negative_log_q
        )
        state = new_loss_state(request, need_grad=need_grad)
        coefficients = request.coefficients
        if coefficients is None and request.query.dtype == torch.float64:
            # Triton would pass a number in fp32.
            new = request.query.new_full  # not new_tensor, which would wait for the device
            coefficients = torch.stack([new((), request.beta), new((), request.alpha)])
        uls, vanilla = p.new(p.rows), p.new(p.rows)
        spans = statistics = positive_weight = None
        if need_grad:
            positive, positive_weight = p.new(2, p.kind.SUMS, p.rows)
            plain, mutated, variance = state.weight, state.mutated_weight, state.variance_weight
        elif p.kind.MOMENTS:
            positive = p.new(p.kind.SUMS, p.rows)
            plain, mutated, variance = p.new(3, p.kind.SUMS, p.rows, p.count)
        else:
            positive, plain, mutated, variance = new_scores(request)
        values = need_grad or p.kind.MOMENTS
        if need_grad and _one_pass(p):
            spans, statistics = _accumulate(p, positive, state), p.new(5, p.rows)
        else:
            _scores(p, positive, plain, mutated, variance, values=values)
        p.run(
            losses.loss_rows,
            p.rows,
            warps=4,
            coefficients=coefficients,
            positive_value=positive,
            plain=plain,
            mutated=mutated,
            variance=variance,
            uls_out=uls,
            vanilla_out=vanilla,
            positive_weight=positive_weight,
            grad_weights=_optional(state.grad_weights),
            statistics=statistics,
            beta=request.beta,
            alpha=request.alpha,
            BLOCK=block(p.count),
            **_of_sums(p, scored=not values),
        )
        if positive_weight is not None and statistics is not None and spans is not None:
            _merge(p, positive_weight, state, statistics, spans)
        elif positive_weight is not None:
            _query_gradient(p, positive_weight, state)
        run(
            losses.reduce_rows,
            1,
            4,
            coefficients=coefficients,
            uls=uls,
            vanilla=vanilla,
            sample_weight=request.sample_weight,
            loss=state.loss,
            terms=state.terms,
            row_scale=state.row_scale,
            B=p.rows,
            alpha=request.alpha,
            REDUCTION=request.reduction,
            MUTATED=p.kind.MUTATED,
            BLOCK=block(p.rows),
        )
        return state


NO_ROWS = _kind(0, NoMutation())._replace(TERMS=(), SOURCE="")


def _of_sums(p: Problem, *, scored: bool = False) -> dict[str, Any]:
    """Common arguments of the kernels that compute weights from sums. They say nothing about rows
    and how these are mutated, so that one compilation serves all. ``scored``: sums are scores."""
    kind = NO_ROWS._replace(MUTATED=p.kind.MUTATED, MOMENTS=p.kind.MOMENTS)
    inputs = Inputs(
        positive=p.inputs.positive,
        negative=p.inputs.negative,
        positive_log_q=p.inputs.positive_log_q,
        negative_log_q=p.inputs.negative_log_q,
    )
    if not scored:
        kind = kind._replace(SUMS=p.kind.SUMS, ROOTS=p.kind.ROOTS, DIRECT=p.kind.DIRECT)
        inputs = inputs._replace(weights=p.inputs.weights)
    return {"kind": kind, "inputs": inputs}


def query_gradient(request: Request, upstream: ScoreWeights) -> ScoresGradient:
    with _on(request.table):
        p = Problem(request)
        state = new_scores_gradient(request)
        values, of_sums = p.new(p.kind.SUMS, p.rows), p.new(p.kind.SUMS, p.rows)
        if not p.kind.DIRECT:
            sums = state.weight, state.mutated_weight, state.variance_weight
            _scores(p, values, *sums, values=True)
        p.run(
            losses.sum_weights,
            p.rows,
            warps=4,
            positive_value=values,
            plain=state.weight,
            mutated=state.mutated_weight,
            variance=state.variance_weight,
            positive_score_weight=upstream.positive_weight,
            plain_score_weight=upstream.weight,
            mutated_score_weight=upstream.mutated_weight,
            cumulant_score_weight=upstream.cumulant_weight,
            positive_weight=of_sums,
            grad_weights=_optional(state.grad_weights),
            BLOCK=block(p.count),
            **_of_sums(p),
        )
        _query_gradient(p, of_sums, state)
        return state


# --- gradient of the table ------------------------------------------------------------------------


class Segments:
    """The ids of a batch, sorted, and each one's index before; padding and bad ids last, as N."""

    def __init__(self, request: Request) -> None:
        rows = request.table.shape[0]
        found = torch.cat([request.negative.flatten(), request.positive])
        if found.numel() >= 2**31:
            raise RuntimeError(f"negative: expected fewer than 2^31 ids, got {found.numel()}")
        if rows < 2**31 - 1:
            found = found.clamp(-1, rows).to(torch.int32)
        found = torch.where((found < 0) | (found >= rows), rows, found)
        self.keys, self.order = torch.sort(found, stable=True)

    def touched(self, rows: int) -> tuple[Tensor, Tensor]:
        """(M,) ascending ids and (entries,) the index of each entry's id in them. Synchronises."""
        first = torch.ones_like(self.keys, dtype=torch.bool)
        torch.ne(self.keys[1:], self.keys[:-1], out=first[1:])
        return self.keys[first & (self.keys < rows)], first.cumsum(0) - 1


def _table_gradient(
    p: Problem, segments: Segments, sums: SumWeights, slots: Tensor, out: Tensor
) -> None:
    piece, at = backward_tile(p)
    entries = segments.keys.numel()
    pieces = -(-entries // piece)
    partial = p.new(pieces, 2, p.dim)
    kind = _with_tile(p.kind, at)
    p.run(
        backward.table_gradient,
        pieces * kind.CHUNKS,
        warps=at.warps,
        kind=kind,
        **_contiguous(sums),
        keys=segments.keys,
        order=segments.order,
        slots=slots,
        out=out,
        partial=partial,
        entries=entries,
        negatives=p.request.negative.numel(),
        PIECE=piece,
    )
    wide = block(p.dim)
    run(
        backward.join_segments,
        pieces * -(-p.dim // wide),
        1,
        keys=segments.keys,
        slots=slots,
        partial=partial,
        out=out,
        entries=entries,
        N=p.sizes.N,
        D=p.dim,
        PIECE=piece,
        WIDTH=wide,
    )


def backward_tile(p: Problem) -> tuple[int, Tile]:
    """The number of sorted entries per program, and its tile.

    It has one warp: a program works on one entity at a time, for which several would wait.
    """
    if INTERPRETED:
        return 256, p.tile
    wide = max(16, min(_power_of_2(p.kind.W), 256 // p.kind.PARTS))
    entities = min(p.sizes.N, p.request.negative.numel())
    pairs = p.rows * p.count / max(entities, 1)  # per entity, if all are drawn equally often
    piece = max(1, min(32, 2048 // p.sizes.R))
    return _power_of_2(piece), Tile(4 if pairs >= 3 else 1, wide, 1)


def table_gradient(request: Request, sums: SumWeights, *, atomic: bool) -> Tensor:
    with _on(request.table):
        p = Problem(request)
        shape = request.table.shape
        if atomic:
            summed = request.query.new_zeros(shape)
            programs = p.rows * p.blocks * p.kind.CHUNKS
            p.run(backward.scatter, programs, **_contiguous(sums), out=summed)
            return summed.to(request.table.dtype)
        out = _result(request.table, shape)
        if p.rows:
            segments = Segments(request)
            _table_gradient(p, segments, sums, segments.keys, out)
        return out.to(request.table.dtype)


def table_gradient_sparse(request: Request, sums: SumWeights) -> SparseRows:
    with _on(request.table):
        p = Problem(request)
        segments = Segments(request)
        touched, slots = segments.touched(request.table.shape[0])
        out = _result(request.table, (touched.numel(), p.dim))
        if p.rows:
            _table_gradient(p, segments, sums, slots, out)
        return SparseRows(touched.to(torch.int64), out.to(request.table.dtype))


def _contiguous(sums: SumWeights) -> dict[str, Any]:
    return {name: tensor.contiguous() for name, tensor in sums._asdict().items()}


# --- mutation alone -------------------------------------------------------------------------------


def _mutate(kernel: Any, like: Tensor, draws: Draws, *, whole: bool, **own: Any) -> None:
    """Launch for tensors (B, K, D): a program takes a tile of a row's negatives, or all of them."""
    batch, count, dim = like.shape
    kind = _kind(dim, draws.mutation)
    at = tile(kind.W, count)
    kind = _with_tile(kind, at)
    thresholds, threshold = _thresholds(draws.mutation)
    sizes = Sizes(batch, count, 1, 0, draws.row_offset, threshold)
    blocks = 1 if whole else -(-count // at.rows)
    inputs = Inputs(seed=draws.seed, thresholds=thresholds)
    programs = batch * blocks * kind.CHUNKS
    run(kernel, programs, at.warps, inputs=inputs, kind=kind, **sizes._asdict(), **own)


def mutate_forward(positive: Tensor, negative: Tensor, draws: Draws) -> Tensor:
    with _on(negative):
        out = torch.empty_like(negative)
        own = {"positive": positive, "negative": negative, "out": out}
        _mutate(mutate.mutate_forward, negative, draws, whole=False, **own)
        return out


def mutate_backward(grad: Tensor, draws: Draws) -> MutateGradient:
    with _on(grad):
        by_positive = _result(grad, (grad.shape[0], grad.shape[2]))
        by_negative = torch.empty_like(grad)
        own = {"grad": grad, "grad_positive": by_positive, "grad_negative": by_negative}
        _mutate(mutate.mutate_backward, grad, draws, whole=True, **own)
        return MutateGradient(by_positive.to(grad.dtype), by_negative)
