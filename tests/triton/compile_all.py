"""``python -m tests.triton.compile_all [--all]``: compiles the kernels for GPUs that need not be
here, and prints registers, spills and instructions, a JSON line each.

Without --all it is the part that the tests check: for sm_90 every similarity, every kind of
mutation and each dtype of 32 bits or less, for the other targets the cheapest and the dearest
similarity. With it, every similarity, mutation, dtype and length of rows for every target: some
thousand kernels.
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
SKIPPED = ("loss_rows", "reduce_rows", "join_segments", "sum_weights", "merge")
"""Kernels of one loop over numbers or vectors already made; they differ in dtype alone."""


class Case(NamedTuple):
    target: str
    similarity: str
    mutation: str
    dtype: torch.dtype
    dim: int


def checked() -> Iterator[Case]:
    """What the tests compile."""
    fp32 = torch.float32
    for similarity in SIMILARITIES:
        yield Case("sm_90", similarity, "component", fp32, 100)
    for similarity, mutation in itertools.product(("dot", "rotate"), ("none", "mixup")):
        yield Case("sm_90", similarity, mutation, fp32, 100)
    for mutation in ("pair", "rates"):
        yield Case("sm_90", "dot", mutation, fp32, 100)
    yield Case("sm_90", "dot", "component", torch.bfloat16, 1000)
    yield Case("sm_90", "l2", "component", torch.float16, 512)
    for target in aot.TARGETS:
        yield Case(target, "dot", "component", fp32, 100)
        yield Case(target, "hake", "component", fp32, 100)


def everything() -> Iterator[Case]:
    for case in itertools.product(aot.TARGETS, SIMILARITIES, aot.MUTATIONS, DTYPES, DIMS):
        yield Case(*case)


def main(arguments: list[str]) -> None:
    full = arguments == ["--all"]
    seen = set()
    for case in everything() if full else checked():
        made = aot.request(case.similarity, case.mutation, dtype=case.dtype, dim=case.dim)
        launches = aot.step(made)
        if full or case == Case("sm_90", "dot", "component", torch.float32, 100):
            launches += aot.step(made, atomic=True)
        for launched in launches:
            key = (case.target, launched.name, repr(launched.constants), launched.types)
            if key in seen or (launched.name in SKIPPED and case.similarity != "dot"):
                continue
            seen.add(key)
            compiled = aot.inspect(launched, case.target)
            line = case._asdict() | {"dtype": str(case.dtype)} | asdict(compiled)
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
