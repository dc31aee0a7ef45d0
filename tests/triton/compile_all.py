"""``python -m tests.triton.compile_all few|most|all``: compiles the kernels, without a GPU, and
prints registers, spills and instructions of each as a JSON line.

`make test` checks ``few`` (see FEW). `make test-all` also checks ``most``: for sm_90 every
similarity, every kind of mutation and each dtype of at most 32 bits, for the other targets the
cheapest and the most expensive similarity. ``all`` is every similarity, mutation, dtype and length
of rows for every target: thousands of kernels.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import NamedTuple

import torch

os.environ.pop("TRITON_INTERPRET", None)

from emu_kernels.similarity import SIMILARITIES
from tests.triton import aot

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DIMS = (100, 500, 512, 1000)
ONCE = ("loss_rows", "reduce_rows", "join_segments", "sum_weights", "merge")
"""Kernels that only loop over earlier kernels' results: compiled for "dot" and for FEW."""


class Case(NamedTuple):
    target: str
    similarity: str
    mutation: str
    dtype: torch.dtype
    dim: int


FEW = (
    # The most common call: one part, one sum, one pass over the candidates.
    Case("sm_90", "dot", "component", torch.float32, 100),
    # Two passes and every feature of a similarity: two parts, two sums, a root, a scale, weights.
    # The kernel of its query's gradient uses all registers.
    Case("sm_90", "hake", "component", torch.float32, 100),
    # Another compiler; a term with both halves; shares instead of masks.
    Case("gfx942", "rotate", "mixup", torch.float32, 100),
    # No masks but moments: with one rate, and with all that a kind can have.
    Case("sm_90", "dot", "expected", torch.float32, 100),
    Case("sm_90", "hake", "learned", torch.float32, 100),
)
"""Every kernel is compiled for each of these cases."""


def most() -> Iterator[Case]:
    fp32 = torch.float32
    for similarity in SIMILARITIES:
        yield Case("sm_90", similarity, "component", fp32, 100)
    for similarity, mutation in itertools.product(("dot", "rotate"), ("none", "mixup")):
        yield Case("sm_90", similarity, mutation, fp32, 100)
    for mutation in ("pair", "rates"):
        yield Case("sm_90", "dot", mutation, fp32, 100)
    for similarity, mutation in itertools.product(SIMILARITIES, ("expected", "learned")):
        yield Case("sm_90", similarity, mutation, fp32, 100)
    yield Case("sm_90", "dot", "learned", torch.bfloat16, 1000)
    yield Case("sm_90", "dot", "component", torch.bfloat16, 1000)
    yield Case("sm_90", "l2", "component", torch.float16, 512)
    for target in aot.TARGETS:
        yield Case(target, "dot", "component", fp32, 100)
        yield Case(target, "hake", "component", fp32, 100)
        yield Case(target, "hake", "learned", fp32, 100)


def everything() -> Iterator[Case]:
    for case in itertools.product(aot.TARGETS, SIMILARITIES, aot.MUTATIONS, DTYPES, DIMS):
        yield Case(*case)


def main(which: str) -> None:
    seen = set()
    for case in {"few": FEW, "most": most(), "all": everything()}[which]:
        made = aot.request(case.similarity, case.mutation, dtype=case.dtype, dim=case.dim)
        every = which == "all" or case in FEW
        for launched in aot.step(made, every=every):
            key = (case.target, launched.name, repr(launched.constants), launched.types)
            once = launched.name in ONCE and case.similarity != "dot" and case not in FEW
            if key in seen or once:
                continue
            seen.add(key)
            compiled = aot.inspect(launched, case.target)
            line = case._asdict() | {"dtype": str(case.dtype)} | asdict(compiled)
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
