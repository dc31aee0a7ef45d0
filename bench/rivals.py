"""Implementations of one training step that are compared.

A step is the loss of one batch and its gradients with respect to the query and the table. Phase
"forward" is the loss as training computes it (keeping what backward needs), "backward" the
gradients of a computed loss. Sparse gradients are coalesced, as every optimiser does first.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import eager, measure
from bench.inputs import Inputs, Shape, is_gpu, make
from bench.measure import Step
from emu_kernels import (
    Expected,
    backends,
    fused_emu_loss,
    fused_softmax_loss,
    one_vs_all_loss,
    prepare,
)
from emu_kernels.backends.base import ScoreWeights, SumWeights
from emu_kernels.similarity import SIMILARITIES

EMU: dict[str, Any] = {"mutation_rate": 0.94, "beta": 0.25, "alpha": 0.73}
"""The paper's setting for DistMult on FB15k-237; the times do not depend on it."""
CLOSED = EMU | {"mutation_rate": Expected(EMU["mutation_rate"])}

PHASES = ("forward", "backward", "forward + backward")
WHOLE = PHASES[-1]
TRAINING = "training step"  # the only phase of a trainer's
OPERATORS = ("loss, no gradient", "loss", "table gradient", "scores", "query gradient of scores")
"""What autograd calls, by themselves: a pass over the negatives, or the gradient of the table."""
Loss = Callable[..., Tensor]  # of query, table, positive and negative


@dataclass(frozen=True)
class Rival:
    name: str  # in results and on the command line
    title: str  # in tables
    loss: Callable[[Shape], Loss]  # for steps of a shape
    cannot: Callable[[Shape], str | None] = lambda shape: None  # why it cannot run such a step
    device: str | None = None  # the only type of device on which it is measured
    backend: str | None = None  # of ours
    phases: tuple[str, ...] = PHASES + OPERATORS
    dense_gradients: int = 1  # (N, D) buffers needed at once
    tiles: int = 0  # (B, K, D) buffers needed at once

    def prepare(self, shape: Shape, inputs: Inputs, phase: str) -> Step:
        if phase in OPERATORS:
            return operator(str(self.backend), shape, inputs, phase)
        loss = self.loss(shape)
        if self.phases == (WHOLE,):
            return lambda: partial(loss, *inputs)
        return step(loss, inputs, phase)

    def start(
        self, shape: Shape, inputs: Inputs, phase: str, *, tiny: bool
    ) -> tuple[measure.Turn, float | None]:
        """Warm up; on a GPU with the MiB that a step needs."""
        step = self.prepare(shape, inputs, phase)
        turn = measure.turn_of(step, shape.device, 0.0 if tiny else None)
        measured = is_gpu(shape.device) and phase in PHASES
        return turn, measure.cuda_peak(step())[1] if measured else None

    def unavailable(self, shape: Shape) -> str | None:
        """Why it cannot run such a step here, or None."""
        if self.device not in (None, torch.device(shape.device).type):
            return f"is measured with --device {self.device}"
        tables = 1 if shape.sparse else 1 + self.dense_gradients
        tiles = self.tiles * shape.batch * shape.negatives * shape.dim * 4
        too_large = measure.too_large(tables * shape.table_bytes + tiles, shape.device)
        return self.cannot(shape) or too_large

    def columns(self, shape: Shape) -> dict[str, Any]:
        """Of a row of results."""
        used, library = instruction_set(shape.device), ""
        if self.backend == "cpu":
            from emu_kernels import _C

            used = _C.instruction_set()
        elif self.backend == "triton":
            library = f"triton {importlib.metadata.version('triton')}"
        elif self.name == "gather-scatter":
            used = "native"
        return {"instruction_set": used, "library": library}


def instruction_set(device: str) -> str:
    """Torch's."""
    if is_gpu(device):
        return "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    return torch.backends.cpu.get_cpu_capability().lower()


def step(loss: Loss, inputs: Inputs, phase: str) -> Step:
    def forward() -> Tensor:
        return loss(*inputs)

    def gradients(value: Tensor) -> tuple[Tensor, ...]:
        of_query, of_table = torch.autograd.grad(value, (inputs.query, inputs.table))
        return of_query, of_table.coalesce() if of_table.is_sparse else of_table

    if phase == "forward":
        return lambda: forward
    if phase == "backward":
        return lambda: partial(gradients, forward())
    return lambda: lambda: gradients(forward())


def operator(backend: str, shape: Shape, inputs: Inputs, name: str) -> Step:
    """One of ``OPERATORS``. On a GPU its time is that of all the kernels that it launches."""
    query, table, positive, negative = inputs
    scores = prepare.scores(
        query.detach(), table.detach(), positive, negative, similarity=shape.similarity,
        mutation=EMU["mutation_rate"], seed=1, sparse_grad=shape.sparse,
    )  # fmt: skip
    loss = {name: EMU[name] for name in ("beta", "alpha")}
    request = prepare.loss(scores, **loss, sample_weight=None, reduction="mean")
    kernels: Any = backends.get(backend)
    state = kernels.loss_forward(request, need_grad=True)
    sums = SumWeights(*(getattr(state, name) for name in SumWeights._fields))
    upstream = ScoreWeights(*map(torch.ones_like, kernels.scores_forward(request)))
    table_gradient = kernels.table_gradient_sparse if shape.sparse else kernels.table_gradient
    calls = (
        lambda: kernels.loss_forward(request, need_grad=False),
        lambda: kernels.loss_forward(request, need_grad=True),
        lambda: table_gradient(request, sums),
        lambda: kernels.scores_forward(request),
        lambda: kernels.query_gradient(request, upstream),
    )
    return lambda: calls[OPERATORS.index(name)]


BACKENDS = {"cuda": "cuda", "triton": "cuda", "cpu": "cpu"}
"""The device type on which each backend is measured: never a GPU's kernels emulated on a CPU."""


def ours(loss: str, backend: str) -> str:
    """The name of ours with that loss of ``FUSED``."""
    return f"fused-{loss}" if backend == "cpu" else f"fused-{loss}-{backend}"


def base_of(names: Iterable[str]) -> str | None:
    """The rival that others are compared with: EMU by our fastest backend among ``names``."""
    return next((n for backend in BACKENDS if (n := ours("emu", backend)) in names), None)


FUSED: dict[str, tuple[str, Callable[..., Tensor]]] = {
    "emu": ("EMU, fused", partial(fused_emu_loss, **EMU)),
    "softmax": ("sampled softmax, fused", fused_softmax_loss),
    "expected": ("EMU in closed form, fused", partial(fused_emu_loss, **CLOSED)),
}
"""Titles and functions of our losses."""


def _fused(loss: str, backend: str) -> Rival:
    title, function = FUSED[loss]
    title += "" if backend == "cpu" else f" ({backend})"

    def loss_of(shape: Shape) -> Loss:
        pairs = loss == "expected" and SIMILARITIES[shape.similarity].coupled
        unit = {"mask_unit": "pair"} if pairs else {}
        given = {"similarity": shape.similarity, "sparse_grad": shape.sparse, "backend": backend}
        return partial(function, **given, **unit)

    return Rival(
        ours(loss, backend), f"**{title}**" if loss == "emu" else title, loss_of,
        lambda shape: backends.get(backend).unavailable(), BACKENDS[backend], backend,
    )  # fmt: skip


@functools.cache
def fastest(shape: Shape) -> eager.Scores:
    """The spelling that takes the least time, forward and backward."""
    spellings = eager.SPELLINGS[shape.similarity]
    if (shape.device, shape.dtype) == ("cpu", "float32"):
        return spellings[0]
    inputs = make(shape)

    def seconds(scores: eager.Scores) -> float:
        loss = partial(eager.softmax_loss, scores=scores, sparse=True)
        try:
            return measure.turn_of(step(loss, inputs, WHOLE), shape.device)()
        except (NotImplementedError, RuntimeError):  # not for this dtype
            return float("inf")

    return min(reversed(spellings), key=seconds)


def _eager(loss: Loss, **options: Any) -> Callable[[Shape], Loss]:
    return lambda shape: partial(loss, scores=fastest(shape), sparse=shape.sparse, **options)


@functools.lru_cache(maxsize=1)
def _compiled_loss(shape: Shape) -> Loss:
    # Otherwise torch stops compiling after some shapes and runs the function as it is.
    torch.compiler.reset()
    scores = eager.SPELLINGS[shape.similarity][-1]
    return torch.compile(lambda *x: eager.emu_loss(*x, scores=scores, **EMU), dynamic=False)


def _cannot_compile(shape: Shape) -> str | None:
    if shape.sparse:
        return "torch.compile cannot trace sparse gradients"
    if shape.device == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None:
        return "torch.compile needs a C++ compiler (install GCC, or set CXX)"
    return None


@functools.cache
def _native() -> Callable[..., None]:
    """gather_scatter.cpp compiled for this machine."""
    source = Path(__file__).with_name("gather_scatter.cpp")
    flags = ["-std=c++20", "-O3", "-march=native", "-shared", "-fPIC", "-fopenmp"]
    with tempfile.TemporaryDirectory() as folder:
        target = f"{folder}/gather_scatter.so"
        subprocess.run([os.environ.get("CXX", "c++"), *flags, source, "-o", target], check=True)
        return ctypes.CDLL(target).gather_scatter  # stays mapped after the file is deleted


def gather_scatter(query: Tensor, table: Tensor, positive: Tensor, ids: Tensor) -> Tensor:
    """Gather the rows of ``ids``; (N, D), row n the Σ of query_b over ids_bk = n."""
    gradient = torch.empty(table.shape)
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (table, query, ids, gradient)]
    sizes = map(ctypes.c_int64, (*ids.shape, *table.shape[::-1]))
    _native()(*pointers[:3], *sizes, torch.get_num_threads(), pointers[3])
    return gradient


def _cannot_gather(shape: Shape) -> str | None:
    if (shape.dtype, shape.gradient) != ("float32", "dense"):
        return "supports only float32 and dense gradients"
    try:
        _native()
    except (OSError, subprocess.CalledProcessError) as error:
        return f"needs a C++ compiler with OpenMP (install GCC, or set CXX): {error}"
    return None


def _shared_expected(query: Tensor, table: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    return fused_emu_loss(query, table, positive, negative[:1], **CLOSED)


def _all_expected(query: Tensor, table: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    return one_vs_all_loss(query, table, positive, **CLOSED)


_SETS, _ALL = "one set of negatives", "all entities"
PRODUCTS = (
    Rival("shared-expected", f"EMU in closed form, {_SETS}", lambda _: _shared_expected),
    Rival("shared-softmax", f"sampled softmax, {_SETS}", lambda _: eager.shared_softmax_loss),
    Rival("all-expected", f"EMU in closed form, {_ALL}", lambda _: _all_expected),
    Rival("all-softmax", f"softmax of {_ALL}", lambda _: eager.all_softmax_loss),
)
"""Of dot with dense gradients: of the command ``closed`` alone."""

RIVALS = (
    *(_fused(loss, backend) for loss in FUSED for backend in BACKENDS),
    Rival(
        "eager-emu", "EMU, eager PyTorch", _eager(eager.emu_loss, **EMU),
        dense_gradients=2, tiles=8,
    ),
    Rival(
        "compiled-emu", "EMU, torch.compile", _compiled_loss, _cannot_compile,
        dense_gradients=2, tiles=4,
    ),
    Rival("eager-softmax", "sampled softmax, eager PyTorch", _eager(eager.softmax_loss), tiles=4),
    Rival(
        "gather-scatter", "bare gather and scatter of the rows", lambda shape: gather_scatter,
        _cannot_gather, "cpu", phases=(WHOLE,),
    ),
    *PRODUCTS,
)  # fmt: skip
BY_NAME = {rival.name: rival for rival in RIVALS}
DEFAULT = tuple(r.name for r in RIVALS if r not in PRODUCTS)
SCALED = tuple(n for n in DEFAULT if n not in ("compiled-emu", "gather-scatter"))
"""Compiling for every size takes longer than measuring; the bare gather and scatter is dense."""
