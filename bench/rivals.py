"""The implementations of one training step that are compared.

A step is the loss of one batch and its gradients with respect to the query and the table. Phase
"forward" is the loss as training computes it (keeping what backward needs), "backward" the
gradients of a computed loss. Sparse gradients are coalesced, as every optimizer does first.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.metadata
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import emu_kernels
from bench import eager, measure
from bench.inputs import Inputs, Shape, is_gpu, make
from bench.measure import Step
from emu_kernels import Expected, backends
from emu_kernels.similarity import SIMILARITIES

EMU: dict[str, Any] = {"mutation_rate": 0.94, "beta": 0.25, "alpha": 0.73}
"""The paper's setting for DistMult on FB15k-237; the times do not depend on it."""
CLOSED = EMU | {"mutation_rate": Expected(EMU["mutation_rate"])}

PHASES = ("forward", "backward", "forward + backward")
WHOLE = PHASES[-1]
TRAINING = "training step"  # the only phase of trainers
OPERATORS = ("loss, no gradient", "loss", "table gradient", "scores", "query gradient of scores")
"""What autograd calls, each by itself: a pass over the negatives, or the gradient of the table."""
Loss = Callable[..., Tensor]  # of query, table, positive and negative


@dataclass(frozen=True)
class Rival:
    """Consists of a module's functions, so that it can be sent to another process, to measure."""

    name: str  # in results and on the command line
    title: str  # in tables
    loss: Callable[[Shape], Loss]  # for steps of a shape; raises an error if it cannot run them
    device: str | None = None  # the only type of device on which it is measured
    backend: str | None = None  # our backend, if it is ours
    phases: tuple[str, ...] = PHASES + OPERATORS
    dense_gradients: int = 1  # (N, D) buffers needed at once
    tiles: int = 0  # (B, K, D) buffers needed at once

    def prepare(self, shape: Shape, inputs: Inputs, phase: str) -> Step:
        if phase in OPERATORS:
            return operator(self.backend, shape, inputs, phase)
        return step(self.loss(shape), inputs, phase)

    def start(self, shape: Shape, inputs: Inputs, phase: str, tiny: bool) -> measure.Turn:
        return measure.turn_of(self.prepare(shape, inputs, phase), shape.device, tiny=tiny)

    def unavailable(self, shape: Shape) -> str | None:
        """Why it cannot run such a step here, or None."""
        if self.device not in (None, torch.device(shape.device).type):
            return f"is measured with --device {self.device}"
        if self.backend and (reason := backends.get(self.backend).unavailable()):
            return reason
        tables = 1 if shape.sparse else 1 + self.dense_gradients
        rows = tables * shape.entities + self.tiles * shape.batch * shape.negatives
        if reason := measure.too_large(4 * rows * shape.dim, shape.device):
            return reason
        try:
            self.loss(shape)
        except (NotImplementedError, OSError, subprocess.CalledProcessError) as error:
            return str(error)
        return None

    def columns(self, shape: Shape) -> dict[str, Any]:
        """The columns of a row of results."""
        used, library = torch.backends.cpu.get_cpu_capability().lower(), ""
        if is_gpu(shape.device):
            used = "sm_{}{}".format(*torch.cuda.get_device_capability(shape.device))
        if self.backend == "cpu":
            used = importlib.import_module("emu_kernels._C").instruction_set()
        elif self.backend == "triton":
            library = f"triton {importlib.metadata.version('triton')}"
        elif self.name == "gather-scatter":
            used = "native"
        return {"instruction_set": used, "library": library}


def step(loss: Loss, inputs: Inputs, phase: str) -> Step:
    def forward() -> Tensor:
        return loss(*inputs)

    def gradients(value: Tensor) -> Any:
        if not value.requires_grad:  # the loss has computed everything
            return value
        of_query, of_table = torch.autograd.grad(value, (inputs.query, inputs.table))
        return of_query, of_table.coalesce() if of_table.is_sparse else of_table

    if phase == "forward":
        return lambda: forward
    if phase == "backward":
        return lambda: partial(gradients, forward())
    return lambda: lambda: gradients(forward())


def operator(backend: str | None, shape: Shape, inputs: Inputs, name: str) -> Step:
    """One of ``OPERATORS``. On a GPU its time is that of all the kernels that it launches."""
    loss, scores = (partial(fused(x, backend, shape), seed=1) for x in ("emu", "scores"))
    fixed = [tensor.detach() for tensor in inputs]
    gradient = torch.autograd.grad

    def of_scores() -> Callable[[], Any]:
        made = tuple(scores(*inputs))
        return partial(gradient, made, inputs.query, [torch.ones_like(x) for x in made])

    steps: tuple[Step, ...] = (
        lambda: partial(loss, *fixed),
        lambda: partial(loss, *inputs),
        lambda: partial(gradient, loss(*inputs), inputs.table),
        lambda: partial(scores, *fixed),
        of_scores,
    )
    return steps[OPERATORS.index(name)]


BACKENDS = {"cuda": "cuda", "triton": "cuda", "cpu": "cpu"}
"""The device type on which each backend is measured: never a GPU's kernels emulated on a CPU."""


def ours(loss: str, backend: str) -> str:
    """The rival's name."""
    return f"fused-{loss}" if backend == "cpu" else f"fused-{loss}-{backend}"


FUSED: dict[str, tuple[str, Callable[..., Any]]] = {
    "emu": ("**EMU, fused{}**", partial(emu_kernels.fused_emu_loss, **EMU)),
    "softmax": ("sampled softmax, fused{}", emu_kernels.fused_softmax_loss),
    "expected": ("EMU in closed form, fused{}", partial(emu_kernels.fused_emu_loss, **CLOSED)),
    "scores": ("", partial(emu_kernels.emu_scores, mutation_rate=EMU["mutation_rate"])),
}
"""Titles of our losses, and functions."""


def fused(loss: str, backend: str | None, shape: Shape) -> Loss:
    pairs = loss == "expected" and SIMILARITIES[shape.similarity].coupled
    unit = {"mask_unit": "pair"} if pairs else {}
    given = {"similarity": shape.similarity, "sparse_grad": shape.sparse, "backend": backend}
    return partial(FUSED[loss][1], **given, **unit)


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


def _eager(loss: Loss, shape: Shape, **options: Any) -> Loss:
    return partial(loss, scores=fastest(shape), sparse=shape.sparse, **options)


@functools.lru_cache(maxsize=1)
def _compiled(shape: Shape) -> Loss:
    if shape.sparse:
        raise NotImplementedError("torch.compile cannot trace sparse gradients")
    if shape.device == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None:
        raise NotImplementedError("torch.compile needs a C++ compiler (install GCC, or set CXX)")
    # Otherwise torch stops compiling after some shapes and runs the function as it is.
    torch.compiler.reset()
    scores = eager.SPELLINGS[shape.similarity][-1]
    return torch.compile(lambda *x: eager.emu_loss(*x, scores=scores, **EMU), dynamic=False)


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
    """Gather the rows of ``ids``; return (N, D), whose row n is Σ query_b over ids_bk = n."""
    gradient = torch.empty(table.shape)
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (table, query, ids, gradient)]
    sizes = map(ctypes.c_int64, (*ids.shape, *table.shape[::-1]))
    _native()(*pointers[:3], *sizes, torch.get_num_threads(), pointers[3])
    return gradient


def _gather_scatter(shape: Shape) -> Loss:
    if (shape.dtype, shape.gradient) != ("float32", "dense"):
        raise NotImplementedError("supports only float32 and dense gradients")
    _native()  # raises without a C++ compiler that has OpenMP
    return gather_scatter


def _product(name: str, shape: Shape) -> Loss:
    losses: dict[str, Loss] = {
        "shared-expected": lambda q, t, p, n: emu_kernels.fused_emu_loss(q, t, p, n[:1], **CLOSED),
        "shared-softmax": eager.shared_softmax_loss,
        "all-expected": lambda q, t, p, n: emu_kernels.one_vs_all_loss(q, t, p, **CLOSED),
        "all-softmax": lambda q, t, p, n: torch.nn.functional.cross_entropy(q @ t.T, p),
    }
    return losses[name]


OURS = tuple(
    Rival(
        ours(loss, backend), title.format("" if backend == "cpu" else f" ({backend})"),
        partial(fused, loss, backend), device=device, backend=backend,
    )
    for loss, (title, _) in FUSED.items()
    for backend, device in BACKENDS.items()
    if title
)  # fmt: skip
PRODUCTS = tuple(
    Rival(name, title, partial(_product, name))
    for name, title in {
        "shared-expected": "EMU in closed form, one set of negatives",
        "shared-softmax": "sampled softmax, one set of negatives",
        "all-expected": "EMU in closed form, all entities",
        "all-softmax": "softmax of all entities",
    }.items()
)
"""For dot with dense gradients, in the command ``closed`` only."""
_EAGER_EMU = partial(_eager, eager.emu_loss, **EMU)
_EAGER_SOFTMAX = partial(_eager, eager.softmax_loss)
_BARE = "bare gather and scatter of the rows"
RIVALS = (
    *OURS,
    Rival("eager-emu", "EMU, eager PyTorch", _EAGER_EMU, dense_gradients=2, tiles=8),
    Rival("compiled-emu", "EMU, torch.compile", _compiled, dense_gradients=2, tiles=4),
    Rival("eager-softmax", "sampled softmax, eager PyTorch", _EAGER_SOFTMAX, tiles=4),
    Rival("gather-scatter", _BARE, _gather_scatter, "cpu", phases=(WHOLE,)),
    *PRODUCTS,
)  # fmt: skip
BY_NAME = {rival.name: rival for rival in RIVALS}
DEFAULT = tuple(r.name for r in RIVALS if r not in PRODUCTS)
SCALED = tuple(n for n in DEFAULT if n not in ("compiled-emu", "gather-scatter"))
"""Compiling for every size takes longer than measuring; the bare gather and scatter is dense."""
