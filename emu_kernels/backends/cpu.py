"""The CPU backend: csrc/cpu, through an extension that knows addresses and sizes but no torch."""

from __future__ import annotations

import torch
from torch import Tensor

from emu_kernels._version import __version__
from emu_kernels.backends._batch import Batch, MaskSpec, batch, mask
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
from emu_kernels.ops import KernelBackend
from emu_kernels.request import Draws, LossRequest, Request
from emu_kernels.validate import coefficient
from emu_kernels.values import bad_id

_UNAVAILABLE: str | None = None
try:
    import emu_kernels._C as _C  # `from emu_kernels` would speak of a circular import
except ImportError as error:  # a source tree that was never built, or another platform's binary
    _UNAVAILABLE = f"the extension module emu_kernels._C cannot be imported ({error})"
else:
    if _C.version != __version__:
        _UNAVAILABLE = (
            f"the extension module was built for version {_C.version}, this is {__version__}: "
            "build it again (pip install --editable .)"
        )


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _rows(tensor: Tensor) -> Tensor:
    """The tensor itself where components of a row are adjacent, else a copy that is so."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None or tensor.numel() == 0 else tensor.data_ptr()


def _prefer_huge_pages(tensor: Tensor) -> Tensor:
    """The tensor, just allocated, on large pages if it is large (csrc/cpu/huge_pages.h)."""
    _C.prefer_huge_pages(_pointer(tensor), tensor.nbytes)
    return tensor


def _shape3(tensor: Tensor) -> tuple[int, int, int]:
    first, second, third = tensor.shape
    return first, second, third


def _gradient(state: LossState | ScoresGradient) -> tuple[int, ...]:
    return (
        _pointer(state.weight),
        _pointer(state.mutated_weight),
        _pointer(state.grad_query),
        _pointer(state.grad_positive),
        _pointer(state.grad_scale),
        _pointer(state.grad_weights),
    )


def _mask(mask: MaskSpec) -> _C.MaskSpec:
    return _C.MaskSpec(
        mutation=mask.mutation,
        seed=int(mask.seed),
        row_offset=mask.row_offset,
        threshold=mask.threshold,
        thresholds=_pointer(mask.thresholds),
    )


class CpuBackend(KernelBackend):
    """Multi-threaded vector code; the same bits for any number of threads."""

    name = "cpu"
    device_types = ("cpu",)

    def unavailable(self) -> str | None:
        return _UNAVAILABLE

    def _native(self, batch: Batch) -> _C.Batch:
        table = _rows(batch.table)
        return _C.Batch(
            # Kept alive by the native object; `table` may be a copy.
            keep=(batch, table),
            query=_pointer(batch.query),
            table=_pointer(table),
            table_dtype=_dtype(table),
            table_stride=table.stride(0),
            table_rows=table.shape[0],
            scale=_pointer(batch.scale),
            weights=_pointer(batch.weights),
            positive=_pointer(batch.positive),
            negative=_pointer(batch.negative),
            batch=batch.query.shape[0],
            dim=batch.query.shape[1],
            groups=batch.negative.shape[0],
            count=batch.negative.shape[1],
            seed=int(batch.seed),
            thresholds=_pointer(batch.thresholds),
            row_offset=batch.row_offset,
            mutation=batch.mutation,
            threshold=batch.threshold,
            similarity=batch.similarity,
            phase_scale=batch.phase_scale,
            threads=torch.get_num_threads(),
        )

    def check_ids(self, name: str, ids: Tensor, *, rows: int, lowest: int) -> None:
        at = _C.find_bad_id(_pointer(ids), ids.numel(), lowest, rows, torch.get_num_threads())
        if at >= 0:
            raise bad_id(name, ids, at, rows=rows, lowest=lowest)

    def loss_forward(self, request: LossRequest, *, need_grad: bool) -> LossState:
        beta, alpha, coefficients = request.beta, request.alpha, request.coefficients
        if coefficients is not None:
            beta, alpha = coefficients.tolist()
            coefficient("beta", beta)
            coefficient("alpha", alpha)
        state = new_loss_state(request, need_grad=need_grad)
        _C.loss_forward(
            self._native(batch(request)),
            beta=beta,
            alpha=alpha,
            sample_weight=_pointer(request.sample_weight),
            reduction=request.reduction,
            loss=_pointer(state.loss),
            terms=_pointer(state.terms),
            row_scale=_pointer(state.row_scale),
            gradient=_gradient(state),
            need_grad=need_grad,
        )
        return state

    def scores_forward(self, request: Request) -> Scores:
        scores = new_scores(request)
        _C.scores_forward(self._native(batch(request)), *map(_pointer, scores))
        return scores

    def query_gradient(self, request: Request, upstream: ScoreWeights) -> ScoresGradient:
        positive_weight, weight, mutated_weight = upstream
        state = new_scores_gradient(request)
        _C.query_gradient(
            self._native(batch(request)),
            _pointer(positive_weight),
            _pointer(weight),
            _pointer(mutated_weight),
            _gradient(state),
        )
        return state

    def _table_gradient(
        self, request: Request, weights: tuple[Tensor, ...], sparse: bool
    ) -> tuple[Tensor | None, Tensor]:
        native = self._native(batch(request))
        segments = _C.Segments(native)
        weights = tuple(w.contiguous() for w in weights)
        rows = segments.touched() if sparse else request.table.shape[0]
        ids = request.positive.new_empty((rows,)) if sparse else None
        out = _prefer_huge_pages(request.table.new_empty((rows, request.table.shape[1])))
        if sparse and rows == 0:
            return ids, out
        _C.table_gradient(
            native,
            segments,
            *map(_pointer, weights),
            ids=_pointer(ids),
            out=_pointer(out),
        )
        return ids, out

    def table_gradient(self, request: Request, sums: SumWeights) -> Tensor:
        row_scale, weight, mutated_weight, grad_positive = sums
        weights = (row_scale, weight, mutated_weight, grad_positive)
        return self._table_gradient(request, weights, sparse=False)[1]

    def table_gradient_sparse(self, request: Request, sums: SumWeights) -> SparseRows:
        row_scale, weight, mutated_weight, grad_positive = sums
        weights = (row_scale, weight, mutated_weight, grad_positive)
        ids, values = self._table_gradient(request, weights, sparse=True)
        assert ids is not None
        return SparseRows(ids, values)

    def mutate_forward(self, positive: Tensor, negative: Tensor, draws: Draws) -> Tensor:
        out = _prefer_huge_pages(torch.empty_like(negative))
        _C.mutate_forward(
            _pointer(positive),
            _pointer(negative),
            _pointer(out),
            dtype=_dtype(negative),
            shape=_shape3(negative),
            mask=_mask(mask(draws)),
            threads=torch.get_num_threads(),
        )
        return out

    def mutate_backward(self, grad: Tensor, draws: Draws) -> MutateGradient:
        grad_negative = _prefer_huge_pages(torch.empty_like(grad))
        grad_positive = grad.new_empty((grad.shape[0], grad.shape[2]))
        _C.mutate_backward(
            _pointer(grad),
            _pointer(grad_positive),
            _pointer(grad_negative),
            dtype=_dtype(grad),
            shape=_shape3(grad),
            mask=_mask(mask(draws)),
            threads=torch.get_num_threads(),
        )
        return MutateGradient(grad_positive, grad_negative)
