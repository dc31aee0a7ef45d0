"""The CPU backend: csrc/cpu."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emu_kernels import prepare, values
from emu_kernels.backends.base import LossState, SparseRows, SumWeights, TableStep
from emu_kernels.backends.native import NativeBackend, load, pointer, pointers
from emu_kernels.request import LossRequest, Request
from emu_kernels.validate import coefficient

# For example in a checkout of a package that is installed elsewhere: Python first looks for it in
# the current folder.
_NOT_BUILT = (
    f"emu_kernels is imported from {Path(__file__).parents[1]}, where the CPU kernels are not "
    "built: run Python in another folder, or build them there (pip install --editable .)"
)


class CpuBackend(NativeBackend):
    """Multi-threaded vector code; the same bits for any number of threads."""

    name = "cpu"
    device_types = ("cpu",)
    measured = True

    def __init__(self) -> None:
        super().__init__(*load("_C", _NOT_BUILT))

    def unavailable(self) -> str | None:
        return self._missing

    def _place(self, device: torch.device) -> dict[str, int]:
        prepare.alone_after_fork()
        return {"threads": torch.get_num_threads()}

    def _large(self, result: Tensor) -> Tensor:
        self._native.prefer_huge_pages(memory=pointer(result), bytes=result.nbytes)
        return result

    def check_ids(self, name: str, ids: Tensor, *, rows: int, lowest: int) -> None:
        values.check_ids(name, ids, rows=rows, lowest=lowest)

    def loss_forward(self, request: LossRequest, *, need_grad: bool) -> LossState:
        if request.coefficients is not None:
            beta, alpha = request.coefficients.tolist()
            coefficient("beta", beta)
            coefficient("alpha", alpha)
            request = replace(request, beta=beta, alpha=alpha, coefficients=None)
        return super().loss_forward(request, need_grad=need_grad)

    def table_gradient(self, request: Request, sums: SumWeights) -> Tensor:
        problem = self._problem(request)
        segments = self._native.sort_ids(problem=problem)
        return self._add(request, sums, problem=problem, segments=segments)

    def table_gradient_sparse(self, request: Request, sums: SumWeights) -> SparseRows:
        problem = self._problem(request)
        segments = self._native.sort_ids(problem=problem)
        ids = request.positive.new_empty((segments.touched(),))
        return SparseRows(ids, self._add(request, sums, ids, problem=problem, segments=segments))

    def _add(
        self, request: Request, sums: SumWeights, ids: Tensor | None = None, **sorted_ids: Any
    ) -> Tensor:
        """The gradient of the touched rows, whose ids the kernel writes to ``ids``; of all rows if
        that is None."""
        rows = request.table.shape[0] if ids is None else ids.shape[0]
        out = self._large(request.table.new_empty((rows, request.table.shape[1])))
        if ids is None or rows:
            sums = SumWeights(*(t.contiguous() for t in sums))
            self._native.table_gradient(
                **sorted_ids, **pointers(sums), ids=pointer(ids), out=pointer(out), step={}
            )
        return out

    def step_table(self, request: Request, sums: SumWeights, step: TableStep) -> bool:
        table = request.table
        real = table.dtype in (torch.float32, torch.float64)
        if not (real and table.stride(1) == 1 and len(request.positive)):
            return False
        if step.sums is not None:
            width = 1 if step.optimizer == "rowwise_adagrad" else table.shape[1]
            like = step.sums.dtype == table.dtype and step.sums.device == table.device
            if not (like and step.sums.shape == (len(table), width) and step.sums.is_contiguous()):
                return False  # the optimizer's own step takes these sums, or says what is wrong
        sums = SumWeights(*(t.contiguous() for t in sums))
        rows = step.rows.contiguous()
        ids, order = step.ids.sort(stable=True)
        problem = self._problem(request)
        self._native.table_gradient(
            problem=problem,
            segments=self._native.sort_ids(problem=problem),
            **pointers(sums),
            ids=0,
            out=0,
            step={
                "optimizer": step.optimizer,
                "lr": step.lr,
                "eps": step.eps,
                "table": pointer(table),
                "sums": pointer(step.sums),
                "count": len(ids),
                "ids": pointer(ids),
                "order": pointer(order),
                "rows": pointer(rows),
            },
        )
        for written in (table, step.sums):
            if written is not None:
                torch.autograd.graph.increment_version(written)
        return True
