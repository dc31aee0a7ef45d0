"""``python -m tests.ops.peak_memory BACKEND CASE...``: bytes that a forward and backward pass adds.

It is the growth of the process's peak resident memory, so memory that kernels allocate outside
torch is included. Linux only.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch

from emu_kernels import Mixup, emu_scores, fused_emu_loss, fused_softmax_loss
from emu_kernels.similarity import SIMILARITIES
from tests.ops.support import LOSS, Inputs, make

BATCH, COUNT, DIM, ROWS = 512, 512, 128, 2000
CUBE = BATCH * COUNT * DIM * 4  # bytes of one (B, K, D) fp32 tensor: 134 MB

SPARSE_ROWS, SPARSE_DIM = 10**7, 256
PLANE = SPARSE_ROWS * SPARSE_DIM * 4  # bytes of one (N, D) fp32 tensor: 10 GB

PROCESS = Path("/proc/self")


def resident(field: str) -> int:
    lines = (PROCESS / "status").read_text().splitlines()
    (value,) = [line.split()[1] for line in lines if line.startswith(f"{field}:")]
    return int(value) * 1024


def added_peak(step: Callable[[Inputs, str], object], inputs: Inputs, backend: str) -> int:
    before = resident("VmRSS")
    (PROCESS / "clear_refs").write_text("5")  # resets the peak
    kept = step(inputs, backend)
    del kept
    return resident("VmHWM") - before


def emu(inputs: Inputs, backend: str) -> object:
    loss = fused_emu_loss(*inputs, backend=backend, **LOSS)
    return torch.autograd.grad(loss, inputs[:2])


def softmax(inputs: Inputs, backend: str) -> object:
    loss = fused_softmax_loss(*inputs, backend=backend)
    return torch.autograd.grad(loss, inputs[:2])


def scores(inputs: Inputs, backend: str) -> object:
    scored = emu_scores(*inputs, mutation_rate=0.5, seed=1, backend=backend)
    total = scored.positive.sum() + scored.negative.sum() + scored.mutated.square().sum()
    return torch.autograd.grad(total, inputs[:2])


def sparse(inputs: Inputs, backend: str) -> object:
    loss = fused_emu_loss(*inputs, sparse_grad=True, backend=backend, **LOSS)
    return torch.autograd.grad(loss, inputs[:2])


def similar(similarity: str, rate: float | Mixup) -> Callable[[Inputs, str], object]:
    def step(inputs: Inputs, backend: str) -> object:
        options = LOSS | {"mutation_rate": rate, "similarity": similarity}
        loss = fused_emu_loss(*inputs, backend=backend, **options)
        return torch.autograd.grad(loss, inputs[:2])

    return step


CASES: dict[str, Callable[[Inputs, str], object]] = {
    "emu": emu,
    "softmax": softmax,
    "scores": scores,
    "shared": emu,
    "bfloat16": emu,
    "sparse": sparse,
}
for name in SIMILARITIES:
    CASES[name] = similar(name, 0.5)
    CASES[f"{name} mixup"] = similar(name, Mixup())


def build(case: str) -> Inputs:
    if case == "sparse":
        # Ten million rows share one row's memory; a gradient of the table's size would not fit.
        generator = torch.Generator().manual_seed(0)
        row = torch.randn(1, SPARSE_DIM, generator=generator)
        inputs = Inputs(
            torch.randn(64, SPARSE_DIM, generator=generator),
            row.expand(SPARSE_ROWS, SPARSE_DIM),
            torch.randint(SPARSE_ROWS, (64,), generator=generator),
            torch.randint(SPARSE_ROWS, (64, 64), generator=generator),
        )
    else:
        inputs = make(
            BATCH,
            COUNT,
            DIM,
            rows=ROWS,
            groups=1 if case == "shared" else None,
            dtype=torch.bfloat16 if case == "bfloat16" else torch.float32,
        )
    return inputs._replace(
        query=inputs.query.requires_grad_(), table=inputs.table.detach().requires_grad_()
    )


def main(backend: str, *cases: str) -> None:
    for case in cases:
        step = CASES[case]
        warm = make()
        warm = warm._replace(query=warm.query.requires_grad_(), table=warm.table.requires_grad_())
        step(warm, backend)
        print(case, added_peak(step, build(case), backend))


if __name__ == "__main__":
    main(*sys.argv[1:])
