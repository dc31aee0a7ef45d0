"""The Triton backend: triton/kernels, installed as emu_kernels.triton, on NVIDIA's and AMD's GPUs.

With TRITON_INTERPRET=1 in the environment, set before Triton is first imported, the same kernels
run on CPU tensors, about a thousand times slower, so that they can be tested without a GPU. Triton
is imported at the first call.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

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
)
from emu_kernels.library import Values
from emu_kernels.ops import KernelBackend
from emu_kernels.request import Draws, LossRequest, Request
from emu_kernels.validate import coefficient

OLDEST = (3, 6)

table_gradients = "sorted"
"""How dense gradients of the table are summed: "sorted" (entity by entity, deterministic, the
default) or "atomic" (query by query, with fp32 atomic additions into an N·D buffer; ignored if
torch is asked to be deterministic). For measurements: set it between calls."""


def interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def _hide_own_folder() -> None:
    """If Triton is not installed, this repository's folder of that name is found in its place, as
    an empty namespace package, which makes torch fail: say that there is no Triton."""
    spec = importlib.util.find_spec("triton")
    own = Path(__file__).resolve().parents[2] / "triton"
    if (
        spec is not None
        and spec.origin is None
        and str(own) in (spec.submodule_search_locations or ())
    ):
        sys.modules["triton"] = None  # type: ignore[assignment]


_hide_own_folder()


@functools.cache
def _missing() -> str | None:
    """Why Triton cannot be used, or None. A mere folder of that name, such as this repository's, is
    not Triton: only a package with code has an origin."""
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return "Triton is not installed (pip install triton)"
    for name in ("triton", "triton-windows", "pytorch-triton", "pytorch-triton-rocm"):
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
            oldest = ".".join(map(str, OLDEST))
            return f"Triton {version} is too old: {oldest} or newer is needed"
        break
    if importlib.util.find_spec("emu_kernels.triton") is None:
        return "the kernels, emu_kernels.triton, are not installed (pip install --editable .)"
    return None


@functools.cache
def _no_gpu() -> str | None:
    if not torch.cuda.is_available():
        return "there is no GPU that torch can use"
    if torch.version.hip is None and torch.cuda.get_device_capability() < (8, 0):
        major, minor = torch.cuda.get_device_capability()
        return f"the GPU has compute capability {major}.{minor}: 8.0 or newer is needed"
    return None


def _kernels() -> Any:
    """emu_kernels.triton.launch, imported at the first call, as it imports Triton."""
    from emu_kernels.triton import launch

    return launch


class TritonBackend(KernelBackend):
    """Compiled at the first call of each shape and similarity, then cached on disk by Triton."""

    name = "triton"

    @property
    def device_types(self) -> tuple[str, ...]:
        return ("cpu",) if interpreted() else ("cuda",)

    def unavailable(self) -> str | None:
        return _missing() or (None if interpreted() else _no_gpu())

    def check_ids(self, name: str, ids_: Tensor, *, rows: int, lowest: int) -> None:
        ids.check(name, ids_, rows=rows, lowest=lowest)

    def loss_forward(self, request: LossRequest, *, need_grad: bool) -> LossState:
        coefficients = request.coefficients
        if coefficients is not None and coefficients.device.type == "cpu":
            # Reading them here does not wait. On a GPU the kernels turn a bad one into NaN.
            for name, value in zip(("beta", "alpha"), coefficients.tolist(), strict=True):
                coefficient(name, value)
        return _kernels().loss_forward(request, need_grad=need_grad)

    def scores_forward(self, request: Request) -> Scores:
        return _kernels().scores_forward(request)

    def query_gradient(self, request: Request, upstream: ScoreWeights) -> ScoresGradient:
        return _kernels().query_gradient(request, upstream)

    def table_gradient(self, request: Request, sums: SumWeights) -> Tensor:
        atomic = table_gradients == "atomic" and not torch.are_deterministic_algorithms_enabled()
        return _kernels().table_gradient(request, sums, atomic=atomic)

    def table_gradient_sparse(self, request: Request, sums: SumWeights) -> SparseRows:
        return _kernels().table_gradient_sparse(request, sums)

    def mutate_forward(self, positive: Tensor, negative: Tensor, draws: Draws) -> Tensor:
        return _kernels().mutate_forward(positive, negative, draws)

    def mutate_backward(self, grad: Tensor, draws: Draws) -> MutateGradient:
        return _kernels().mutate_backward(grad, draws)

    def relational(self, given: Values, task: str, out: Tensor, **more: Any) -> None:
        """One task of :func:`emu_kernels.relational_spmm`, by the name that its module uses."""
        from emu_kernels.triton import messages

        messages.run(given, task, out, **more)
