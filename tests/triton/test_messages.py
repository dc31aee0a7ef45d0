"""The kernels of relational messages: their machine code, and tiles as on a GPU."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest
import torch

from emu_kernels import backends
from emu_kernels.backends import triton as backend
from tests.ops.support import run_python
from tests.ops.test_relational import TOLERANCES, graph, inputs, results

if backend._missing() is not None:
    pytest.skip("Triton is not installed", allow_module_level=True)

REGISTERS = {
    # Per thread, by message and aggregate, float32, for sm_80 and sm_90: 5 to 25 % above what
    # Triton 3.9 uses. With 128 of them a multiprocessor holds 16 warps.
    ("aggregate", "distmult", "sum"): 66,
    ("aggregate", "distmult", "pna"): 140,
    ("aggregate", "rotate", "pna"): 132,
    ("message_gradient", "distmult", "sum"): 66,
    ("message_gradient", "distmult", "pna"): 80,
    ("message_gradient", "rotate", "pna"): 88,
    ("join_pieces", "distmult", "sum"): 40,
    ("join_pieces", "distmult", "pna"): 40,
    ("join_pieces", "rotate", "pna"): 40,
}


@pytest.fixture(scope="module", params=["few", pytest.param("most", marks=pytest.mark.slow)])
def compiled(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """Compiled in a separate process: this one may interpret the kernels."""
    interpret = os.environ.pop("TRITON_INTERPRET", None)
    try:
        done = run_python("-m", "tests.triton.compile_messages", request.param, timeout=1500)
    finally:
        if interpret is not None:
            os.environ["TRITON_INTERPRET"] = interpret
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_compiled_kernels_spill_nothing(compiled: list[dict[str, Any]]) -> None:
    """Except 8 bytes with rows of 16 or 64 bits on sm_80, where ptxas prefers that to using more
    than 64 or 80 registers."""
    found = [row for row in compiled if row["spilled"]]
    assert [row for row in found if row["spilled"] > 8 or row["more"] == "[]"] == []
    assert {(row["target"], row["name"]) for row in found} <= {("sm_80", "message_gradient")}


def test_compiled_sizes_do_not_compile_anew(compiled: list[dict[str, Any]]) -> None:
    assert [row for row in compiled if row["sizes_matter"]] == []


def test_compiled_kernels_leave_room_for_others(compiled: list[dict[str, Any]]) -> None:
    """They use few registers, and no shared memory except for sums of short rows and 16 bits."""
    plain = [row for row in compiled if row["more"] == "[]"]
    found = [(row, (row["name"], row["message"], row["aggregate"])) for row in plain]
    assert {key for _, key in found} >= set(REGISTERS)
    bounded = [(row, REGISTERS[key]) for row, key in found if key in REGISTERS]
    assert [row for row, bound in bounded if row["registers"] > bound] == []
    assert [row for row in plain if row["shared"]] == []
    assert max(row["shared"] for row in compiled) <= 4096


@pytest.mark.skipif(
    backends.get("triton").unavailable() is not None or not backend.interpreted(),
    reason="needs the interpreter",
)
@pytest.mark.parametrize(
    ("rows", "message", "aggregate"), [(4, "distmult", "pna"), (1, "rotate", "max")]
)
def test_tiles_as_on_a_gpu(
    rows: int, message: str, aggregate: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interpreter's tiles would hold a whole row here. These give partial tiles in each
    direction, and several blocks of a row; for 5 queries of 6 components."""
    from emu_kernels.triton import launch, messages

    monkeypatch.setattr(messages, "tile", lambda *given: launch.Tile(rows, 16, 1))
    g = graph("triton", nodes=6, edges=20)
    keep = torch.arange(g.num_edges) % 3 > 0
    for per_query, edge_weight in ((False, keep), (True, None)):
        leaves = inputs(g, 5, 6, torch.float32, per_query=per_query)
        options = {"message": message, "aggregate": aggregate, "edge_weight": edge_weight}
        expected = results(leaves, g, backend="reference", **options)
        found = results(leaves, g, backend="triton", **options)
        for x, y in zip(found, expected, strict=True):
            scale = y.abs().max().clamp(min=1.0)
            assert (x - y).abs().max() <= TOLERANCES[torch.float32] * scale
