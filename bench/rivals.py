"""Who takes part in the comparison of one training step.

A step is the loss of one batch and its gradients with respect to the query and the table; of its
phases, "forward" is the loss as training computes it (what backward needs is kept), "backward" the
gradients of a loss that is there. Sparse gradients are coalesced: every optimiser begins with that.
A new rival is one entry in ``RIVALS``.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from bench import eager, native
from bench.inputs import Inputs, Shape
from bench.measure import Step
from bench.plans import PLANS, forced
from emu_kernels import backends, fused_emu_loss, fused_softmax_loss

EMU: dict[str, Any] = {"mutation_rate": 0.94, "beta": 0.25, "alpha": 0.73}
"""The paper's setting for DistMult on FB15k-237; the times do not depend on it."""

PHASES = ("forward", "backward", "forward + backward")
WHOLE = PHASES[-1]


@dataclass(frozen=True)
class Rival:
    name: str  # in results and on the command line
    title: str  # in tables
    prepare: Callable[[Inputs, str], Step]  # (inputs, phase)
    unavailable: Callable[[Shape], str | None]  # why it cannot run on such a step here, or None
    instruction_set: Callable[[str], str]  # of a device type
    device: str | None = None  # the only type of device that it is measured on
    phases: tuple[str, ...] = PHASES
    dense_gradients: int = 1  # (N, D) buffers that it needs at once
    tiles: float = 0.0  # (B, K, D) buffers that it needs at once, about
    plan: bool = False  # ours, with the plan of the table's gradient forced
    compiler: str | None = None  # a package that compiles it as it runs

    def library(self) -> str:
        """That package with its version, or ""."""
        if self.compiler is None:
            return ""
        return f"{self.compiler} {importlib.metadata.version(self.compiler)}"


def _step(
    loss: Callable[..., Tensor], inputs: Inputs, phase: str, *arguments: Any, **options: Any
) -> Step:
    query, table = inputs.query, inputs.table

    def forward(_: None = None) -> Tensor:
        return loss(query, table, inputs.positive, inputs.negative, *arguments, **options)

    def gradients(value: Tensor) -> tuple[Tensor, ...]:
        of_query, of_table = torch.autograd.grad(value, (query, table))
        return of_query, of_table.coalesce() if of_table.is_sparse else of_table

    if phase == "forward":
        return Step(forward)
    if phase == "backward":
        return Step(gradients, before=forward)
    return Step(lambda _: gradients(forward()))


# --- ours -----------------------------------------------------------------------------------------

OURS_DEVICES = {"cuda": "cuda", "triton": "cuda", "cpu": "cpu"}
"""Where each backend is measured; a GPU's kernels emulated on a CPU never are."""


def _fused(loss: Callable[..., Tensor], backend: str, **options: Any) -> Any:
    def prepare(inputs: Inputs, phase: str) -> Step:
        return _step(
            loss,
            inputs,
            phase,
            similarity=inputs.similarity,
            sparse_grad=inputs.sparse,
            backend=backend,
            **options,
        )

    return prepare


def _fused_unavailable(backend: str) -> Callable[[Shape], str | None]:
    def unavailable(shape: Shape) -> str | None:
        if torch.device(shape.device).type != OURS_DEVICES[backend]:
            return f"is measured with --device {OURS_DEVICES[backend]}"
        if backend not in backends.NAMES:
            return "this version has no such backend"
        return backends.get(backend).unavailable()

    return unavailable


def _fused_instruction_set(backend: str) -> Callable[[str], str]:
    def instruction_set(device: str) -> str:
        if backend != "cpu":
            return eager_instruction_set(device)
        from emu_kernels import _C

        return str(_C.instruction_set())

    return instruction_set


def ours_name(what: str, backend: str) -> str:
    return f"fused-{what}" if backend == "cpu" else f"fused-{what}-{backend}"


def _ours(what: str, title: str, loss: Callable[..., Tensor], **options: Any) -> list[Rival]:
    def of(backend: str) -> Rival:
        where = "" if backend == "cpu" else f" ({backend})"
        return Rival(
            ours_name(what, backend),
            title.format(where),
            _fused(loss, backend, **options),
            _fused_unavailable(backend),
            _fused_instruction_set(backend),
            device=OURS_DEVICES[backend],
            compiler="triton" if backend == "triton" else None,
        )

    return [of(backend) for backend in OURS_DEVICES]


def _planned(backend: str, plan: str) -> Rival:
    """EMU with one of the two plans of the table's gradient."""
    prepare = _fused(fused_emu_loss, backend, **EMU)

    def prepared(inputs: Inputs, phase: str) -> Step:
        step = prepare(inputs, phase)

        def run(argument: Any) -> Any:
            with forced(backend, plan):
                return step.run(argument)

        return Step(run, step.before)

    return Rival(
        f"{ours_name('emu', backend)}-{plan}",
        f"EMU, fused ({backend}, {plan})",
        prepared,
        _fused_unavailable(backend),
        _fused_instruction_set(backend),
        device=OURS_DEVICES[backend],
        plan=True,
        compiler="triton" if backend == "triton" else None,
    )


# --- PyTorch --------------------------------------------------------------------------------------


def eager_instruction_set(device: str) -> str:
    if torch.device(device).type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"sm_{major}{minor}"
    return torch.backends.cpu.get_cpu_capability().lower()


def _eager(loss: Callable[..., Tensor], **options: Any) -> Callable[[Inputs, str], Step]:
    def prepare(inputs: Inputs, phase: str) -> Step:
        scores = eager.fastest(inputs)
        return _step(loss, inputs, phase, scores=scores, sparse=inputs.sparse, **options)

    return prepare


@lru_cache(maxsize=1)
def _compiled_loss(shape: Shape) -> Callable[..., Tensor]:
    # Or, after some shapes, torch would stop compiling and run the function as it is.
    torch.compiler.reset()
    scores = eager.SPELLINGS[shape.similarity][-1]

    def loss(query: Tensor, table: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        return eager.emu_loss(query, table, positive, negative, scores=scores, **EMU)

    return torch.compile(loss, dynamic=False)


def _compiled(inputs: Inputs, phase: str) -> Step:
    return _step(_compiled_loss(inputs.shape), inputs, phase)


def _compiled_unavailable(shape: Shape) -> str | None:
    if shape.gradient == "sparse":
        return "torch.compile cannot trace sparse gradients"
    if shape.device == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None:
        return "torch.compile needs a C++ compiler (install GCC, or set CXX)"
    return None


# --- the bare movement of rows --------------------------------------------------------------------


def _gather_scatter(inputs: Inputs, phase: str) -> Step:
    run = native.prepare(inputs)
    return Step(lambda _: run())


def _gather_scatter_unavailable(shape: Shape) -> str | None:
    if shape.device != "cpu":
        return "is measured with --device cpu"
    if (shape.dtype, shape.gradient) != ("float32", "dense"):
        return "is written for float32 and dense gradients"
    return native.unavailable()


_FUSED_EMU = _ours("emu", "**EMU, fused{}**", fused_emu_loss, **EMU)
OURS = _FUSED_EMU[-1]  # on a CPU
RIVALS = (
    *_FUSED_EMU,
    *_ours("softmax", "sampled softmax, fused{}", fused_softmax_loss),
    *(_planned(backend, plan) for backend in ("cuda", "triton") for plan in PLANS),
    Rival(
        "eager-emu",
        "EMU, eager PyTorch",
        _eager(eager.emu_loss, **EMU),
        lambda shape: None,
        eager_instruction_set,
        dense_gradients=2,
        tiles=8,
    ),
    Rival(
        "compiled-emu",
        "EMU, torch.compile",
        _compiled,
        _compiled_unavailable,
        eager_instruction_set,
        dense_gradients=2,
        tiles=4,
    ),
    Rival(
        "eager-softmax",
        "sampled softmax, eager PyTorch",
        _eager(eager.softmax_loss),
        lambda shape: None,
        eager_instruction_set,
        tiles=4,
    ),
    Rival(
        "gather-scatter",
        "bare gather and scatter of the rows",
        _gather_scatter,
        _gather_scatter_unavailable,
        lambda device: "native",
        device="cpu",
        phases=(WHOLE,),
    ),
)
BY_NAME = {rival.name: rival for rival in RIVALS}
DEFAULT = tuple(rival.name for rival in RIVALS if not rival.plan)
SCALED = tuple(n for n in DEFAULT if n not in ("compiled-emu", "gather-scatter"))
"""Compiling for every size takes longer than measuring; the bare movement is dense only."""


def base_of(names: list[str] | tuple[str, ...]) -> str | None:
    """Whose time the others' are divided by: EMU by our fastest backend among them."""
    ours = (ours_name("emu", backend) for backend in OURS_DEVICES)
    return next((name for name in ours if name in names), None)
