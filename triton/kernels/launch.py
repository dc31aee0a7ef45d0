"""From tensors to launches: grids, block sizes, scratch memory. Nothing here waits for the device.

Block sizes come from a table keyed by shape, not from timing runs: see :func:`tile`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from emu_kernels.backends import ids
from emu_kernels.backends._batch import Batch, MaskSpec
from emu_kernels.backends.base import (
    LossState,
    ScoresGradient,
    new_scores,
    new_scores_gradient,
)
from emu_kernels.backends.triton import interpreted
from emu_kernels.similarity import SIMILARITIES
from emu_kernels.triton import backward, forward, losses, mutate, rows

INTERPRETED = interpreted()
"""Whether the kernels run on the CPU, one NumPy call an operation (TRITON_INTERPRET=1)."""


def _power_of_2(number: int) -> int:
    """The next one, or the number itself."""
    return 1 << (number - 1).bit_length()


def _result(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Zeros for a result of the kernels in ``like``'s dtype, to be cast to it. The interpreter cuts
    bf16 off where a GPU rounds to nearest: there torch rounds."""
    cut = INTERPRETED and like.dtype == torch.bfloat16
    return like.new_zeros(shape, dtype=torch.float32 if cut else like.dtype)


@dataclass(frozen=True)
class Tile:
    rows: int  # candidates
    width: int  # components of each part
    warps: int


def tile(width: int, count: int) -> Tile:
    """The tile of a kernel that walks over ``count`` candidates, ``width`` components a part.

    A Philox call's sixteen components are a thread's, so a tile has 2048 components of a part for
    four warps, and as many rows as that leaves; a second part is a thread's as well. With wider
    rows a warp's sum would become the warps'. So there is nothing to search for at run time: no
    slow first call, the same sums in every run.
    """
    if INTERPRETED:
        # An operation costs the same on one element or thousands.
        rows, wide = _power_of_2(min(max(count, 1), 64)), min(width, 512)
        return Tile(rows, max(16, _power_of_2(wide)), 1)
    wide = max(16, min(_power_of_2(width), 512))
    rows = max(1, min(2048 // wide, _power_of_2(max(count, 1))))
    return Tile(rows, wide, max(1, rows * wide // 512))


def block(count: int) -> int:
    """Lanes that walk over ``count`` numbers."""
    return max(16, min(1024, _power_of_2(max(count, 1))))


@contextmanager
def _on(tensor: Tensor) -> Iterator[None]:
    """Launches go to the tensor's device, whichever is current."""
    if tensor.device.type == "cpu":
        yield
    else:
        with torch.cuda.device(tensor.device):
            yield


def run(kernel: Any, programs: int, warps: int, **arguments: Any) -> None:
    """Launch in a one-dimensional grid, without contraction of products and sums."""
    if programs:
        kernel[(programs,)](**arguments, num_warps=warps, enable_fp_fusion=False)


class Problem:
    """A batch in the kernels' terms."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        table = batch.table
        if table.stride(-1) != 1 and table.shape[1] > 1:
            table = table.contiguous()
        self.similarity = SIMILARITIES[batch.similarity]
        self.rows, self.dim = batch.query.shape
        groups, self.count = batch.negative.shape
        self.parts = 2 if self.similarity.halves == 2 or batch.mutation == "pair" else 1
        self.width = self.dim // self.parts
        self.sums = self.similarity.sums
        self.group_rows = self.rows // max(groups, 1)
        # The three pieces in which the kernels take what is the same for all of them.
        self.shape = {
            "B": self.rows,
            "K": self.count,
            "R": max(self.group_rows, 1),
            "N": table.shape[0],
            "row_offset": batch.row_offset,
            "threshold": batch.threshold,
        }
        self.kind = {
            "D": self.dim,
            "STRIDE": table.stride(0) if table.shape[0] > 1 else self.dim,
            "PARTS": self.parts,
            "SIM": batch.similarity,
            "HALF": batch.phase_scale / 2,
            "MUTATION": batch.mutation,
            "ORDER": batch.threshold if batch.mutation == "mixup" else 1,
        }
        self.inputs = {
            "query": batch.query,
            "table": table,
            "scale": batch.scale,
            "positive": batch.positive,
            "seed": batch.seed,
            "thresholds": batch.thresholds,
        }

    @property
    def tile(self) -> Tile:
        return tile(self.width, self.count)

    def chunks(self, tile: Tile) -> int:
        return -(-self.width // tile.width)

    def new(self, *shape: int) -> Tensor:
        return self.batch.query.new_empty(shape)


def _optional(tensor: Tensor) -> Tensor | None:
    return tensor if tensor.numel() else None


def _scores(p: Problem, positive: Tensor, plain: Tensor, mutated: Tensor, *, values: bool) -> None:
    at = p.tile
    run(
        forward.scores,
        p.rows * max(1, -(-p.count // at.rows)),
        at.warps,
        **p.inputs,
        **p.shape,
        **p.kind,
        weights=p.batch.weights,
        negative=p.batch.negative,
        report=ids.report(p.batch.table.device),
        positive_out=positive,
        plain_out=plain,
        mutated_out=mutated,
        VALUES=values,
        ROWS=at.rows,
        WIDTH=at.width,
    )


def scores_forward(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    with _on(batch.table):
        out = new_scores(batch)
        _scores(Problem(batch), *out, values=False)
        return out


def _splits(p: Problem, programs: int, rows: int) -> int:
    """Over how many programs to split a row's negatives where rows alone are too few."""
    wanted = 1 if INTERPRETED else max(1, 1024 // max(programs, 1))
    return min(_power_of_2(wanted), max(1, p.count // (4 * rows)))


def _query_gradient(p: Problem, positive_weight: Tensor, state: LossState | ScoresGradient) -> None:
    at = p.tile
    splits = _splits(p, p.rows * p.chunks(at), at.rows)
    out = [state.grad_query, state.grad_positive, state.grad_scale]
    partial = out if splits == 1 else [t.new_empty((splits, *t.shape)) for t in out]
    run(
        forward.query_gradient,
        p.rows * p.chunks(at) * splits,
        at.warps,
        **p.inputs,
        **p.shape,
        **p.kind,
        negative=p.batch.negative,
        positive_weight=positive_weight,
        weight=state.weight,
        mutated_weight=state.mutated_weight,
        grad_query=partial[0],
        grad_positive=partial[1],
        grad_scale=_optional(partial[2]),
        SPLITS=splits,
        ROWS=at.rows,
        WIDTH=at.width,
    )
    if splits > 1:
        for total, parts in zip(out, partial, strict=True):
            torch.sum(parts, 0, out=total)


passes: int | None = None
"""In how many passes over the candidates the loss and its gradients by the query's side are made:
1, 2, or None to choose. For measurements: set it between calls."""


def _one_pass(p: Problem) -> bool:
    """Whether a row and its sums fit in registers: five sums of sixteen components a thread do,
    with the tile itself; more, a scale's or a second part's, would be spilled (see the
    ahead-of-time tests). Where they do not fit, candidates are read twice."""
    if p.width > p.tile.width:
        return False
    fits = not p.batch.mutated or (p.parts == 1 and p.batch.scale is None)
    return fits if passes is None else passes == 1


def _accumulate(p: Problem, positive: Tensor, state: LossState) -> tuple[int, Tensor, Tensor]:
    at = p.tile
    splits = _splits(p, p.rows, at.rows)
    vectors = (8 if p.batch.scale is not None else 5) if p.batch.mutated else 1
    vectors = 6 if p.batch.scale is not None and not p.batch.mutated else vectors
    maxima = p.new(2, p.rows, splits)
    sums = p.new(vectors, p.rows, splits, p.dim)
    run(
        rows.accumulate,
        p.rows * splits,
        at.warps,
        **p.inputs,
        **p.shape,
        **p.kind,
        weights=p.batch.weights,
        negative=p.batch.negative,
        report=ids.report(p.batch.table.device),
        positive_out=positive,
        plain_out=state.weight,
        mutated_out=state.mutated_weight,
        maxima=maxima,
        sums=sums,
        SPLITS=splits,
        ROWS=at.rows,
        WIDTH=at.width,
    )
    return splits, maxima, sums


def _merge(
    p: Problem,
    positive_weight: Tensor,
    state: LossState,
    statistics: Tensor,
    splits: int,
    maxima: Tensor,
    sums: Tensor,
) -> None:
    wide = p.tile.width
    inputs = {name: p.inputs[name] for name in ("query", "table", "scale", "positive")}
    kind = {k: v for k, v in p.kind.items() if k != "ORDER"}
    run(
        rows.merge,
        p.rows * -(-p.width // wide),
        1,
        **inputs,
        **kind,
        maxima=maxima,
        sums=sums,
        statistics=statistics,
        positive_weight=positive_weight,
        grad_query=state.grad_query,
        grad_positive=state.grad_positive,
        grad_scale=_optional(state.grad_scale),
        B=p.rows,
        N=p.shape["N"],
        SPLITS=splits,
        WIDTH=wide,
    )


def loss_forward(
    batch: Batch,
    *,
    beta: float,
    alpha: float,
    coefficients: Tensor | None,
    sample_weight: Tensor | None,
    reduction: str,
    need_grad: bool,
    state: LossState,
) -> LossState:
    with _on(batch.table):
        p = Problem(batch)
        if coefficients is None and batch.query.dtype == torch.float64:
            # A number would be passed in fp32.
            new = batch.query.new_full
            coefficients = torch.stack([new((), beta), new((), alpha)])
        uls, vanilla = p.new(p.rows), p.new(p.rows)
        if need_grad:
            positive = p.new(p.sums, p.rows)
            plain, mutated = state.weight, state.mutated_weight
            positive_weight = p.new(p.sums, p.rows)
        else:
            positive, plain, mutated = new_scores(batch)
        one_pass = need_grad and _one_pass(p)
        if one_pass:
            spans = _accumulate(p, positive, state)
        else:
            _scores(p, positive, plain, mutated, values=need_grad)
        statistics = p.new(5, p.rows) if one_pass else None
        common = {"coefficients": coefficients, "alpha": alpha, "B": p.rows}
        run(
            losses.loss_rows,
            p.rows,
            4,
            **common,
            negative=batch.negative,
            weights=batch.weights if need_grad else None,
            positive_value=positive,
            plain=plain,
            mutated=mutated,
            uls_out=uls,
            vanilla_out=vanilla,
            positive_weight=positive_weight if need_grad else None,
            grad_weights=_optional(state.grad_weights),
            statistics=statistics,
            K=p.count,
            R=p.shape["R"],
            beta=beta,
            SIM=batch.similarity if need_grad else "dot",
            MUTATED=batch.mutated,
            BLOCK=block(p.count),
        )
        if statistics is not None:
            _merge(p, positive_weight, state, statistics, *spans)
        elif need_grad:
            _query_gradient(p, positive_weight, state)
        run(
            losses.reduce_rows,
            1,
            4,
            **common,
            uls=uls,
            vanilla=vanilla,
            sample_weight=sample_weight,
            loss=state.loss,
            terms=state.terms,
            row_scale=state.row_scale,
            REDUCTION=reduction,
            MUTATED=batch.mutated,
            BLOCK=block(p.rows),
        )
        return state


def query_gradient(
    batch: Batch, positive_weight: Tensor, weight: Tensor, mutated_weight: Tensor
) -> ScoresGradient:
    with _on(batch.table):
        p = Problem(batch)
        state = new_scores_gradient(batch)
        values, of_sums = p.new(p.sums, p.rows), p.new(p.sums, p.rows)
        if batch.similarity not in ("dot", "l1", "rotate"):  # whose scores are their sums
            _scores(p, values, state.weight, state.mutated_weight, values=True)
        run(
            losses.sum_weights,
            p.rows,
            4,
            positive=batch.positive,
            negative=batch.negative,
            weights=batch.weights,
            positive_value=values,
            plain=state.weight,
            mutated=state.mutated_weight,
            positive_score_weight=positive_weight,
            plain_score_weight=weight,
            mutated_score_weight=mutated_weight,
            positive_weight=of_sums,
            grad_weights=_optional(state.grad_weights),
            B=p.rows,
            K=p.count,
            R=p.shape["R"],
            N=p.shape["N"],
            SIM=batch.similarity,
            MUTATED=batch.mutated,
            BLOCK=block(p.count),
        )
        _query_gradient(p, of_sums, state)
        return state


# --- gradient of the table ------------------------------------------------------------------------


class Segments:
    """The ids of a batch, sorted, with where each came from; padding and bad ids last, as N."""

    def __init__(self, batch: Batch) -> None:
        rows = batch.table.shape[0]
        found = torch.cat([batch.negative.flatten(), batch.positive])
        if found.numel() >= 2**31:
            raise RuntimeError(f"negative: expected fewer than 2^31 ids, got {found.numel()}")
        if rows < 2**31 - 1:
            found = found.clamp(-1, rows).to(torch.int32)
        found = torch.where((found < 0) | (found >= rows), rows, found)
        self.keys, self.order = torch.sort(found, stable=True)

    def touched(self, rows: int) -> tuple[Tensor, Tensor]:
        """(M,) ids ascending and (entries,) the place of each entry's in them. Synchronises."""
        first = torch.ones_like(self.keys, dtype=torch.bool)
        torch.ne(self.keys[1:], self.keys[:-1], out=first[1:])
        return self.keys[first & (self.keys < rows)], first.cumsum(0) - 1


def _table_gradient(
    p: Problem,
    segments: Segments,
    weights: dict[str, Tensor],
    slots: Tensor,
    out: Tensor,
) -> None:
    piece, at = backward_tile(p)
    entries = segments.keys.numel()
    pieces = -(-entries // piece)
    partial = p.new(pieces, 2, p.dim)
    run(
        backward.table_gradient,
        pieces * p.chunks(at),
        at.warps,
        **p.inputs,
        **p.shape,
        **p.kind,
        **weights,
        keys=segments.keys,
        order=segments.order,
        slots=slots,
        out=out,
        partial=partial,
        entries=entries,
        negatives=p.batch.negative.numel(),
        PIECE=piece,
        ROWS=at.rows,
        WIDTH=at.width,
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
        N=p.shape["N"],
        D=p.dim,
        PIECE=piece,
        WIDTH=wide,
    )


def backward_tile(p: Problem) -> tuple[int, Tile]:
    """Sorted entries a program, and its tile.

    One warp: a program works on one entity at a time, and several would wait for each other.
    """
    if INTERPRETED:
        return 256, tile(p.width, p.count)
    wide = max(16, min(_power_of_2(p.width), 256 // p.parts))
    entities = min(p.shape["N"], p.batch.negative.numel())
    pairs = p.rows * p.count / max(entities, 1)  # of an entity, if all are drawn alike
    rows = 4 if pairs >= 3 else 1
    piece = max(1, min(32, 2048 // p.shape["R"]))
    return _power_of_2(piece), Tile(rows, wide, 1)


def table_gradient(
    batch: Batch,
    row_scale: Tensor,
    weight: Tensor,
    mutated_weight: Tensor,
    grad_positive: Tensor,
    *,
    atomic: bool,
) -> Tensor:
    with _on(batch.table):
        p = Problem(batch)
        weights = _contiguous(row_scale, weight, mutated_weight, grad_positive)
        shape = batch.table.shape
        if atomic:
            summed = batch.query.new_zeros(shape)
            _scatter(p, weights, summed)
            return summed.to(batch.table.dtype)
        out = _result(batch.table, shape)
        if p.rows:
            segments = Segments(batch)
            _table_gradient(p, segments, weights, segments.keys, out)
        return out.to(batch.table.dtype)


def table_gradient_sparse(
    batch: Batch,
    row_scale: Tensor,
    weight: Tensor,
    mutated_weight: Tensor,
    grad_positive: Tensor,
) -> tuple[Tensor, Tensor]:
    with _on(batch.table):
        p = Problem(batch)
        weights = _contiguous(row_scale, weight, mutated_weight, grad_positive)
        segments = Segments(batch)
        touched, slots = segments.touched(batch.table.shape[0])
        out = _result(batch.table, (touched.numel(), p.dim))
        if p.rows:
            _table_gradient(p, segments, weights, slots, out)
        return touched.to(torch.int64), out.to(batch.table.dtype)


def _contiguous(*tensors: Tensor) -> dict[str, Tensor]:
    names = ("row_scale", "weight", "mutated_weight", "grad_positive")
    return {name: t.contiguous() for name, t in zip(names, tensors, strict=True)}


def _scatter(p: Problem, weights: dict[str, Tensor], out: Tensor) -> None:
    at = p.tile
    run(
        backward.scatter,
        p.rows * max(1, -(-p.count // at.rows)) * p.chunks(at),
        at.warps,
        **p.inputs,
        **p.shape,
        **p.kind,
        **weights,
        negative=p.batch.negative,
        out=out,
        ROWS=at.rows,
        WIDTH=at.width,
    )


# --- mutation alone -------------------------------------------------------------------------------


def _mutate(mask: MaskSpec, tensor: Tensor) -> tuple[dict[str, Any], Tile, int]:
    _, count, dim = tensor.shape
    parts = 2 if mask.mutation == "pair" else 1
    at = tile(dim // parts, count)
    arguments = {
        "seed": mask.seed,
        "thresholds": mask.thresholds,
        "K": count,
        "row_offset": mask.row_offset,
        "threshold": mask.threshold,
        "D": dim,
        "PARTS": parts,
        "MUTATION": mask.mutation,
        "ROWS": at.rows,
        "WIDTH": at.width,
    }
    return arguments, at, -(-(dim // parts) // at.width)


def mutate_forward(positive: Tensor, negative: Tensor, mask: MaskSpec) -> Tensor:
    with _on(negative):
        out = torch.empty_like(negative)
        arguments, at, chunks = _mutate(mask, negative)
        programs = negative.shape[0] * -(-negative.shape[1] // at.rows) * chunks
        run(
            mutate.mutate_forward,
            programs,
            at.warps,
            positive=positive,
            negative=negative,
            out=out,
            **arguments,
        )
        return out


def mutate_backward(grad: Tensor, mask: MaskSpec) -> tuple[Tensor, Tensor]:
    with _on(grad):
        grad_negative = torch.empty_like(grad)
        grad_positive = _result(grad, (grad.shape[0], grad.shape[2]))
        arguments, at, chunks = _mutate(mask, grad)
        run(
            mutate.mutate_backward,
            grad.shape[0] * chunks,
            at.warps,
            grad=grad,
            grad_positive=grad_positive,
            grad_negative=grad_negative,
            **arguments,
        )
        return grad_positive.to(grad.dtype), grad_negative
