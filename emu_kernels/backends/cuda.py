"""The CUDA backend: csrc/cuda, through an extension that knows addresses, sizes and the stream but
no torch.

Every call only launches kernels on torch's current stream; their workspace is torch's memory, so
that streams and graph captures are torch's business. Ids out of range are reported as
:mod:`emu_kernels.backends.ids` says.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from emu_kernels._version import __version__
from emu_kernels.backends import ids as reported
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

LOWEST_CAPABILITY = (8, 0)


def _load() -> tuple[Any, str | None]:
    """The extension module, or why there is none."""
    try:
        _cuda = importlib.import_module("emu_kernels._cuda")
    except ModuleNotFoundError:
        return None, (
            "emu_kernels was built without CUDA: install a CUDA toolkit, 12.4 or newer, set "
            "CUDA_HOME or put nvcc into PATH, and build again (pip install --editable .)"
        )
    except ImportError as error:
        return None, f"the extension module emu_kernels._cuda cannot be imported ({error})"
    if _cuda.version != __version__:
        return None, (
            f"the extension module was built for version {_cuda.version}, this is {__version__}: "
            "build it again (pip install --editable .)"
        )
    return _cuda, None


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None or tensor.numel() == 0 else tensor.data_ptr()


def _rows(tensor: Tensor) -> Tensor:
    """The tensor itself where components of a row are adjacent, else a copy that is so."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _shape3(tensor: Tensor) -> tuple[int, int, int]:
    first, second, third = tensor.shape
    return first, second, third


def _memory(like: Tensor, size: int) -> Tensor:
    return like.new_empty((size,), dtype=torch.uint8)


def _gradient(state: LossState | ScoresGradient) -> tuple[int, ...]:
    return (
        _pointer(state.weight),
        _pointer(state.mutated_weight),
        _pointer(state.grad_query),
        _pointer(state.grad_positive),
        _pointer(state.grad_scale),
        _pointer(state.grad_weights),
    )


class CudaBackend(KernelBackend):
    """Hand-written kernels for NVIDIA GPUs.

    ``atomic_gradient`` has a dense fp32 table gradient added up by atomics, in no fixed order,
    where torch does not ask for determinism; by default it is added up in sorted segments, in the
    same order every time.
    """

    name = "cuda"
    device_types: tuple[str, ...] = ("cuda",)
    atomic_gradient = False

    def __init__(self) -> None:
        self._native, self._missing = _load()

    def unavailable(self) -> str | None:
        return self._missing or _device_problem(self._native)

    def _place(self, device: torch.device) -> Any:
        index = torch.cuda.current_device() if device.index is None else device.index
        stream = torch.cuda.current_stream(index).cuda_stream
        return self._native.Place(device=index, stream=stream, processors=_processors(index))

    def _batch(self, batch: Batch) -> Any:
        table = _rows(batch.table)
        return self._native.Batch(
            # Kept alive by the native object; `table` may be a copy.
            keep=(batch, table),
            where=self._place(table.device),
            query=_pointer(batch.query),
            table=_pointer(table),
            table_dtype=_dtype(table),
            table_stride=table.stride(0),
            table_rows=table.shape[0],
            scale=_pointer(batch.scale),
            weights=_pointer(batch.weights),
            positive=_pointer(batch.positive),
            negative=_pointer(batch.negative),
            report=reported.report(table.device).data_ptr(),
            batch=batch.query.shape[0],
            dim=batch.query.shape[1],
            groups=batch.negative.shape[0],
            count=batch.negative.shape[1],
            seed=batch.seed.data_ptr(),
            thresholds=_pointer(batch.thresholds),
            row_offset=batch.row_offset,
            mutation=batch.mutation,
            threshold=batch.threshold,
            similarity=batch.similarity,
            phase_scale=batch.phase_scale,
        )

    def _mask(self, mask: MaskSpec) -> Any:
        return self._native.MaskSpec(
            mutation=mask.mutation,
            seed=mask.seed.data_ptr(),
            row_offset=mask.row_offset,
            threshold=mask.threshold,
            thresholds=_pointer(mask.thresholds),
        )

    def check_ids(self, name: str, ids: Tensor, *, rows: int, lowest: int) -> None:
        reported.check(name, ids, rows=rows, lowest=lowest)

    def loss_forward(self, request: LossRequest, *, need_grad: bool) -> LossState:
        beta, alpha, coefficients = request.beta, request.alpha, request.coefficients
        state = new_loss_state(request, need_grad=need_grad)
        native = self._batch(batch(request))
        workspace = _memory(request.query, native.loss_workspace(need_grad))
        self._native.loss_forward(
            native,
            beta=beta,
            alpha=alpha,
            coefficients=_pointer(coefficients),
            sample_weight=_pointer(request.sample_weight),
            reduction=request.reduction,
            loss=_pointer(state.loss),
            terms=_pointer(state.terms),
            row_scale=_pointer(state.row_scale),
            gradient=_gradient(state),
            need_grad=need_grad,
            workspace=_pointer(workspace),
        )
        return state

    def scores_forward(self, request: Request) -> Scores:
        scores = new_scores(request)
        self._native.scores_forward(self._batch(batch(request)), *map(_pointer, scores))
        return scores

    def query_gradient(self, request: Request, upstream: ScoreWeights) -> ScoresGradient:
        positive_weight, weight, mutated_weight = upstream
        state = new_scores_gradient(request)
        native = self._batch(batch(request))
        workspace = _memory(request.query, native.query_gradient_workspace())
        self._native.query_gradient(
            native,
            _pointer(positive_weight),
            _pointer(weight),
            _pointer(mutated_weight),
            _gradient(state),
            _pointer(workspace),
        )
        return state

    def _segments(self, request: Request, native: Any) -> tuple[Tensor, Tensor]:
        """The batch's ids sorted, and room for sums of segments."""
        ordered = _memory(request.query, native.sort_workspace())
        partials = _memory(request.query, native.partials_workspace())
        self._native.sort_ids(native, _pointer(ordered))
        return ordered, partials

    def table_gradient(self, request: Request, sums: SumWeights) -> Tensor:
        row_scale, weight, mutated_weight, grad_positive = sums
        native = self._batch(batch(request))
        out = request.table.new_empty(request.table.shape)
        given = tuple(w.contiguous() for w in (row_scale, weight, mutated_weight, grad_positive))
        if (
            self.atomic_gradient
            and request.table.dtype == torch.float32
            and request.mutation.draw != "share"
            and not torch.are_deterministic_algorithms_enabled()
        ):
            listed = _memory(request.query, native.sort_workspace())
            self._native.table_gradient_atomic(
                native,
                *map(_pointer, given),
                out=_pointer(out),
                sorted=_pointer(listed),
                partials=0,
            )
            return out
        ordered, partials = self._segments(request, native)
        self._native.table_gradient(
            native,
            *map(_pointer, given),
            ids=0,
            out=_pointer(out),
            sorted=_pointer(ordered),
            partials=_pointer(partials),
        )
        return out

    def table_gradient_sparse(self, request: Request, sums: SumWeights) -> SparseRows:
        row_scale, weight, mutated_weight, grad_positive = sums
        native = self._batch(batch(request))
        given = tuple(w.contiguous() for w in (row_scale, weight, mutated_weight, grad_positive))
        ordered, partials = self._segments(request, native)
        at = self._native.count_touched(native, _pointer(ordered), _pointer(partials))
        touched = int(partials[at : at + 8].view(torch.int64))  # waits: sizes are the host's
        touched_ids = request.positive.new_empty((touched,))
        out = request.table.new_empty((touched, request.table.shape[1]))
        if touched:
            self._native.table_gradient(
                native,
                *map(_pointer, given),
                ids=_pointer(touched_ids),
                out=_pointer(out),
                sorted=_pointer(ordered),
                partials=_pointer(partials),
            )
        return SparseRows(touched_ids, out)

    def mutate_forward(self, positive: Tensor, negative: Tensor, draws: Draws) -> Tensor:
        out = torch.empty_like(negative)
        self._native.mutate_forward(
            _pointer(positive),
            _pointer(negative),
            _pointer(out),
            dtype=_dtype(negative),
            shape=_shape3(negative),
            mask=self._mask(mask(draws)),
            where=self._place(negative.device),
        )
        return out

    def mutate_backward(self, grad: Tensor, draws: Draws) -> MutateGradient:
        grad_negative = torch.empty_like(grad)
        grad_positive = grad.new_empty((grad.shape[0], grad.shape[2]))
        self._native.mutate_backward(
            _pointer(grad),
            _pointer(grad_positive),
            _pointer(grad_negative),
            dtype=_dtype(grad),
            shape=_shape3(grad),
            mask=self._mask(mask(draws)),
            where=self._place(grad.device),
        )
        return MutateGradient(grad_positive, grad_negative)


@functools.cache
def _processors(device: int) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@functools.cache
def _device_problem(native: ModuleType) -> str | None:
    """Why the machine cannot run what was built, or None."""
    if not torch.backends.cuda.is_built():
        return "this torch was built without CUDA"
    problem: str = native.driver_problem()
    if problem:
        return problem
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    capability = torch.cuda.get_device_capability()
    if capability < LOWEST_CAPABILITY:
        wanted, found = (".".join(map(str, c)) for c in (LOWEST_CAPABILITY, capability))
        return (
            f"{torch.cuda.get_device_name()} has compute capability {found}, "
            f"and the kernels need {wanted}"
        )
    return None
