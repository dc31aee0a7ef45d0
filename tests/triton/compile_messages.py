"""``python -m tests.triton.compile_messages few|most``: compiles the kernels of relational messages
without a GPU, and prints registers and spills of each as a JSON line.

``few`` is what `make test` checks: NBFNet's own settings, and the message with the largest tiles.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from dataclasses import asdict
from typing import Any

import torch

os.environ.pop("TRITON_INTERPRET", None)

from emu_kernels.relational import AGGREGATES, MESSAGES
from tests.triton import aot

TARGETS = ("sm_80", "sm_90")
FEW: list[dict[str, Any]] = [
    {"message": message, "aggregate": aggregate}
    for message, aggregate in (("distmult", "sum"), ("distmult", "pna"), ("rotate", "pna"))
]
MORE: list[dict[str, Any]] = [
    {"dtype": torch.bfloat16},
    {"dtype": torch.float16, "shared": True},
    {"dtype": torch.float64},
    {"batch": 3, "dim": 50, "shared": True, "weighted": True},
    {"batch": 1},
    {"batch": 64},
]
"""Other dtypes, rows whose length is no power of 2, a short row and a long one."""


def most() -> list[dict[str, Any]]:
    every = [{"message": m, "aggregate": a} for m, a in itertools.product(MESSAGES, AGGREGATES)]
    return every + [few | more for few, more in itertools.product(FEW, MORE)]


def main(which: str) -> None:
    for case, target in itertools.product({"few": FEW, "most": most()}[which], TARGETS):
        for launched in aot.messages(**case):
            line = asdict(aot.inspect(launched, target))
            line["message"], line["aggregate"], *more = case.values()
            line["more"] = str(more)
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
