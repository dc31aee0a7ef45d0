"""The CUDA backend: csrc/cuda.

Every call only launches kernels on torch's current stream. torch allocates their workspace, and so
takes care of streams and graph captures. Ids out of range are reported as described in
:mod:`emu_kernels.backends.ids`.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from emu_kernels.backends import ids as reported
from emu_kernels.backends.base import SparseRows, SumWeights
from emu_kernels.backends.native import NativeBackend, load, memory, pointer, pointers
from emu_kernels.request import Request

LOWEST_CAPABILITY = (8, 0)


def _load() -> tuple[Any, str | None]:
    return load(
        "_cuda",
        "emu_kernels was built without CUDA: install a CUDA toolkit, 12.4 or newer, set "
        "CUDA_HOME or put nvcc into PATH, and build again in a checkout (pip install .)",
    )


class CudaBackend(NativeBackend):
    """Hand-written kernels for NVIDIA GPUs.

    By default the table's gradient is summed in sorted segments, always in the same order. With
    ``atomic_gradient`` a dense fp32 gradient is summed by atomics, in no fixed order, unless torch
    is asked for determinism or the mutation is a Mixup.
    """

    name = "cuda"
    device_types: tuple[str, ...] = ("cuda",)
    atomic_gradient = False

    def __init__(self) -> None:
        super().__init__(*_load())

    def unavailable(self) -> str | None:
        return self._missing or _device_problem(self._native)

    def _place(self, device: torch.device) -> dict[str, int]:
        index = torch.cuda.current_device() if device.index is None else device.index
        stream = torch.cuda.current_stream(index).cuda_stream
        return {"device": index, "stream": stream, "processors": _processors(index)}

    def _report(self, device: torch.device) -> int:
        return reported.report(device).data_ptr()

    def check_ids(self, name: str, ids: Tensor, *, rows: int, lowest: int) -> None:
        reported.check(name, ids, rows=rows, lowest=lowest)

    def table_gradient(self, request: Request, sums: SumWeights) -> Tensor:
        problem = self._problem(request)
        sums = SumWeights(*(t.contiguous() for t in sums))
        out = request.table.new_empty(request.table.shape)
        if (
            self.atomic_gradient
            and request.table.dtype == torch.float32
            and request.mutation.draw != "share"
            and not torch.are_deterministic_algorithms_enabled()
        ):
            listed = memory(request.query, self._native.sort_workspace(problem=problem))
            self._native.list_ids(problem=problem, sorted=pointer(listed))
            self._native.table_gradient_atomic(
                problem=problem, **pointers(sums), out=pointer(out), sorted=pointer(listed)
            )
            return out
        ordered, partials = self._sorted(request, problem)
        self._native.table_gradient(
            problem=problem,
            **pointers(sums),
            ids=0,
            out=pointer(out),
            sorted=pointer(ordered),
            partials=pointer(partials),
        )
        return out

    def table_gradient_sparse(self, request: Request, sums: SumWeights) -> SparseRows:
        problem = self._problem(request)
        sums = SumWeights(*(t.contiguous() for t in sums))
        ordered, partials = self._sorted(request, problem)
        at = self._native.count_touched(
            problem=problem, sorted=pointer(ordered), partials=pointer(partials)
        )
        assert partials is not None
        touched = int(partials[at : at + 8].view(torch.int64))  # waits: the host needs the size
        ids = request.positive.new_empty((touched,))
        values = request.table.new_empty((touched, request.table.shape[1]))
        if touched:
            self._native.table_gradient(
                problem=problem,
                **pointers(sums),
                ids=pointer(ids),
                out=pointer(values),
                sorted=pointer(ordered),
                partials=pointer(partials),
            )
        return SparseRows(ids, values)

    def _sorted(self, request: Request, problem: Any) -> tuple[Tensor | None, Tensor | None]:
        """The request's ids sorted, and memory for sums of segments."""
        ordered = memory(request.query, self._native.sort_workspace(problem=problem))
        partials = memory(request.query, self._native.partials_workspace(problem=problem))
        self._native.sort_ids(problem=problem, sorted=pointer(ordered))
        return ordered, partials


@functools.cache
def _processors(device: int) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@functools.cache
def _device_problem(native: ModuleType) -> str | None:
    """Why this machine cannot run the kernels that were built, or None."""
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
