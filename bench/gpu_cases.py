"""Every kernel once: small cases for sanitizers, large ones for a profiler.

``python -m bench.gpu_cases`` runs the small cases on each backend that can run on the GPU,
``--hot`` the large ones, whose measured step is the NVTX range "hot". Values are not checked.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import sys
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bench.inputs import DTYPES, SIMILARITIES, Shape, is_gpu, make
from bench.measure import synchronize
from bench.rivals import BACKENDS, BY_NAME, EMU, WHOLE, ours
from emu_kernels import (
    RelationalGraph,
    emu_mutate,
    emu_scores,
    fused_emu_loss,
    fused_softmax_loss,
    relational_spmm,
)
from emu_kernels.relational import AGGREGATES, MESSAGES
from emu_kernels.relational import BACKENDS as MESSAGE_BACKENDS

_ATOMIC = "emu_kernels.backends.cuda.CudaBackend.atomic_gradient"
_TABLE = "emu_kernels.backends.triton.table_gradients"
_PASSES = "emu_kernels.triton.launch.passes"
PLANS: dict[str, list[tuple[str, Any]]] = {
    "cuda": [(_ATOMIC, False), (_ATOMIC, True)],
    "triton": [(_TABLE, "sorted"), (_TABLE, "atomic"), (_PASSES, 1), (_PASSES, 2)],
}
"""Switches of a GPU's backend: a dense gradient summed by sorted ids or by atomic additions, and
passes over the candidates."""
ODD = Shape(batch=9, negatives=7, dim=38, entities=13)
"""No size is a multiple of a block's; 16-bit rows are not aligned to 16 bytes."""
WIDE = Shape(batch=4, negatives=70, dim=260, entities=2000, gradient="sparse")
"""More than one block of components and of negatives; most ids occur once."""
HOT = tuple(
    Shape(1024, 256, 512, entities, dtype=dtype, gradient=gradient)
    for entities, gradient in ((Shape.entities, "dense"), (200_000, "sparse"))
    for dtype in ("float32", "bfloat16")
)


def cases(similarities: Sequence[str]) -> Iterator[tuple[Shape, bool]]:
    """Shapes, and whether all rows share one set of negatives with padding in it."""
    for similarity in similarities:
        for dtype in DTYPES if similarity in ("dot", "rotate") else ("float32",):
            for shape, shared in ((ODD, False), (ODD, True), (WIDE, False)):
                if dtype == "float32" or not shared:
                    yield shape.replace(similarity=similarity, dtype=dtype), shared


def run(shape: Shape, backend: str, *, shared: bool) -> None:
    """Each public function, forward and backward."""
    inputs = make(shape)
    rows = inputs.table.detach()[inputs.negative].requires_grad_()  # (B, K, D)
    if shared:
        inputs = inputs._replace(negative=inputs.negative[:1].clone())
        inputs.negative[0, ::3] = -1
    options: dict[str, Any] = {"similarity": shape.similarity, "backend": backend}

    def call(function: Any, **more: Any) -> Any:
        return function(*inputs, sparse_grad=shape.sparse, **options, **more)

    def backward(*values: Tensor) -> None:
        finite = [torch.where(v.isfinite(), v, 0).sum() for v in values]  # padding scores −inf
        torch.autograd.grad(torch.stack(finite).sum(), (inputs.query, inputs.table))

    emu = functools.partial(call, fused_emu_loss, seed=1, **EMU)
    backward(emu())
    for plan in PLANS.get(backend, []):
        with mock.patch(*plan):
            backward(emu())
    backward(call(fused_softmax_loss))
    backward(*call(emu_scores, mutation_rate=0.5, seed=1))
    with torch.no_grad():
        emu()
    first = rows.detach()[:, 0].clone().requires_grad_()
    mutated = emu_mutate(first, rows, mutation_rate=0.5, seed=1, backend=backend)
    torch.autograd.grad(mutated.float().sum(), (first, rows))
    synchronize(shape.device)


def run_messages(shape: Shape, backend: str) -> None:
    """Each message and aggregate, forward and backward."""
    draws = torch.Generator(shape.device).manual_seed(0)
    many = functools.partial(torch.randint, generator=draws, device=shape.device)
    relations = 3
    index, kind = many(shape.entities, (2, 100)), many(relations, (100,))
    graph = RelationalGraph(index, kind, shape.entities, relations)
    rows = shape.batch, shape.dim
    for message, aggregate in itertools.product(MESSAGES, AGGREGATES):
        leaves = [
            torch.zeros(count, *rows, device=shape.device, dtype=DTYPES[shape.dtype])
            for count in (shape.entities, relations, shape.entities)
        ]
        nodes, of_relations, own = (leaf.requires_grad_() for leaf in leaves)
        out = relational_spmm(
            nodes, of_relations, graph, own=own, edge_weight=kind > 0, backend=backend,
            message=message, aggregate=aggregate,
        )  # fmt: skip
        out.float().sum().backward()
    synchronize(shape.device)


def run_hot(shape: Shape, backend: str) -> None:
    step = BY_NAME[ours("emu", backend)].prepare(shape, make(shape), WHOLE)
    step()()
    step()()
    with torch.cuda.nvtx.range("hot") if is_gpu(shape.device) else contextlib.nullcontext():
        step()()
    synchronize(shape.device)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_cases", description=__doc__)
    add = parser.add_argument
    add("--hot", action="store_true", help="the large cases")
    add("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    add("--similarities", nargs="+", choices=SIMILARITIES, default=list(SIMILARITIES))
    add("--device", default="cuda")
    options = parser.parse_args(arguments)
    able = []
    for backend in options.backends:
        reason = BY_NAME[ours("emu", backend)].unavailable(Shape(device=options.device))
        print(f"{backend}: {reason or 'can run'}", flush=True)
        able += [backend] if reason is None else []
    chosen = [(shape, False) for shape in HOT] if options.hot else cases(options.similarities)
    for backend, (shape, shared) in itertools.product(able, chosen):
        shape = shape.replace(device=options.device)
        print(f"{backend}: {shape}{', shared, padded' if shared else ''}", flush=True)
        run_hot(shape, backend) if options.hot else run(shape, backend, shared=shared)
    for backend, dtype in itertools.product(able, () if options.hot else DTYPES):
        if backend in MESSAGE_BACKENDS:
            print(f"{backend}: messages, {dtype}", flush=True)
            run_messages(ODD.replace(device=options.device, dtype=dtype), backend)
    return 0 if able else 1


if __name__ == "__main__":
    sys.exit(main())
