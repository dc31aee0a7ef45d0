"""Every kernel once: in small for sanitizers, at the goals' sizes for a profiler.

``python -m bench.gpu_cases`` runs the small cases of each backend that can run on the GPU,
``--hot`` the large ones, whose timed part is the NVTX range "hot". Values are the tests' business.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.inputs import DTYPES, Shape, make
from bench.plans import PLANS, forced
from bench.rivals import BY_NAME, EMU, OURS_DEVICES, WHOLE, ours_name
from emu_kernels import emu_mutate, emu_scores, fused_emu_loss, fused_softmax_loss
from emu_kernels.similarity import SIMILARITIES

ODD = Shape(batch=9, negatives=7, dim=38, entities=13)
"""No size is a multiple of a block's; rows are not aligned to 16 bytes in 16 bits."""

WIDE = Shape(batch=4, negatives=70, dim=260, entities=2000)
"""More than one block of components and of negatives, segments of one entry."""

HOT = (
    Shape(batch=1024, negatives=256, dim=512),
    Shape(batch=1024, negatives=256, dim=512, entities=200_000, gradient="sparse"),
)


@dataclass(frozen=True)
class Case:
    name: str
    shape: Shape
    shared: bool = False  # one set of negatives for all rows, some of them padding


def cases(device: str, similarities: Sequence[str] = tuple(SIMILARITIES)) -> Iterator[Case]:
    """The similarities in fp32, and dot and rotate in the other dtypes."""
    for similarity in similarities:
        for dtype in DTYPES:
            if dtype != "float32" and similarity not in ("dot", "rotate"):
                continue
            kind: Any = {"similarity": similarity, "dtype": dtype, "device": device}
            name = f"{similarity}, {dtype}"
            yield Case(name, replace(ODD, **kind))
            if dtype == "float32":
                yield Case(f"{name}, shared, padded", replace(ODD, **kind), shared=True)
            yield Case(f"{name}, sparse", replace(WIDE, **kind, gradient="sparse"))


def run(case: Case, backend: str) -> None:
    """Each public function, forward and backward, on the case."""
    inputs = make(case.shape)
    negative = inputs.negative
    if case.shared:
        negative = negative[:1].clone()
        negative[0, ::3] = -1
    arguments = (inputs.query, inputs.table, inputs.positive, negative)
    options: dict[str, Any] = {"similarity": case.shape.similarity, "backend": backend}
    sparse: dict[str, Any] = {"sparse_grad": inputs.sparse}

    def backward(*values: Tensor) -> None:
        # In a sum of scores −inf, a padding's score, would be no number.
        total = sum(torch.where(v.isfinite(), v, 0).sum() for v in values)
        assert isinstance(total, Tensor)
        torch.autograd.grad(total, (inputs.query, inputs.table))

    emu = partial(fused_emu_loss, *arguments, seed=1, **(EMU | options))
    for plan in PLANS:
        with forced(backend, plan):
            backward(emu(**sparse))
    backward(partial(fused_softmax_loss, *arguments, **options)(**sparse))
    backward(*partial(emu_scores, *arguments, mutation=0.5, seed=1, **options)(**sparse))
    with torch.no_grad():
        emu()
    rows = inputs.table.detach()[inputs.negative]  # (B, K, D)
    first = rows[:, 0].clone().requires_grad_()
    mutated = emu_mutate(first, rows.requires_grad_(), mutation_rate=0.5, seed=1, backend=backend)
    torch.autograd.grad(mutated.float().sum(), (first, rows))


def _hot(backend: str, device: str, shapes: Sequence[Shape]) -> None:
    on_gpu = torch.device(device).type == "cuda"
    for shape in shapes:
        for dtype in ("float32", "bfloat16"):
            inputs = make(replace(shape, dtype=dtype, device=device))
            step = BY_NAME[ours_name("emu", backend)].prepare(inputs, WHOLE)
            step()
            step()
            print(f"{backend}: {inputs.shape}", flush=True)
            with torch.cuda.nvtx.range("hot") if on_gpu else contextlib.nullcontext():
                step()
            if on_gpu:
                torch.cuda.synchronize()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_cases", description=__doc__)
    parser.add_argument("--hot", action="store_true", help="the large cases")
    parser.add_argument("--backends", nargs="+", choices=OURS_DEVICES)
    parser.add_argument(
        "--similarities", nargs="+", choices=SIMILARITIES, default=list(SIMILARITIES)
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--list", action="store_true", help="which backends can run; no more")
    options = parser.parse_args(arguments)
    ran = 0
    for backend in options.backends or OURS_DEVICES:
        shape = Shape(device=options.device)
        reason = BY_NAME[ours_name("emu", backend)].unavailable(shape)
        print(f"{backend}: {reason or 'can run'}", flush=True)
        if reason is not None:
            continue
        ran += 1
        if options.list:
            continue
        if options.hot:
            _hot(backend, options.device, HOT)
            continue
        for case in cases(options.device, options.similarities):
            print(f"{backend}: {case.name}", flush=True)
            run(case, backend)
            if torch.device(options.device).type == "cuda":
                torch.cuda.synchronize()
    return 0 if ran else 1


if __name__ == "__main__":
    sys.exit(main())
