"""Who takes part in the comparison of one training step on the CPU.

A step is the loss of one batch and its gradients with respect to the query and the table. A new
rival is one entry in ``RIVALS``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench import eager, native
from bench.inputs import Inputs
from emu_kernels import backends, fused_emu_loss, fused_softmax_loss

Step = Callable[[], Any]

EMU: dict[str, Any] = {"mutation_rate": 0.94, "beta": 0.25, "alpha": 0.73}
"""The paper's setting for DistMult on FB15k-237; the times do not depend on it."""


@dataclass(frozen=True)
class Rival:
    name: str  # in results and on the command line
    title: str  # in tables
    prepare: Callable[[Inputs], Step]
    unavailable: Callable[[], str | None]  # why it cannot run here, or None
    instruction_set: Callable[[], str]


def _gradients(loss: Callable[..., Tensor], **options: Any) -> Callable[[Inputs], Step]:
    def prepare(inputs: Inputs) -> Step:
        query, table = inputs.query, inputs.table

        def step() -> tuple[Tensor, ...]:
            value = loss(
                query,
                table,
                inputs.positive,
                inputs.negative,
                similarity=inputs.similarity,
                **options,
            )
            return torch.autograd.grad(value, (query, table))

        return step

    return prepare


def _fused_unavailable() -> str | None:
    return backends.get("cpu").unavailable()


def _fused_instruction_set() -> str:
    from emu_kernels import _C

    return str(_C.instruction_set())


def _eager_instruction_set() -> str:
    return torch.backends.cpu.get_cpu_capability().lower()


OURS = Rival(
    "fused-emu",
    "**EMU, fused**",
    _gradients(fused_emu_loss, **EMU, backend="cpu"),
    _fused_unavailable,
    _fused_instruction_set,
)
RIVALS = (
    OURS,
    Rival(
        "fused-softmax",
        "sampled softmax, fused",
        _gradients(fused_softmax_loss, backend="cpu"),
        _fused_unavailable,
        _fused_instruction_set,
    ),
    Rival(
        "eager-emu",
        "EMU, eager PyTorch",
        _gradients(eager.emu_loss, **EMU),
        lambda: None,
        _eager_instruction_set,
    ),
    Rival(
        "eager-softmax",
        "sampled softmax, eager PyTorch",
        _gradients(eager.softmax_loss),
        lambda: None,
        _eager_instruction_set,
    ),
    Rival(
        "gather-scatter",
        "bare gather and scatter of the rows",
        native.prepare,
        native.unavailable,
        lambda: "native",
    ),
)
BY_NAME = {rival.name: rival for rival in RIVALS}
