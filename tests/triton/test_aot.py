"""The machine code that the kernels compile to, for several GPUs.

A kernel is bound by instructions if a warp executes more of them for each component than fit into
the time to read it. On an H100 about 18 fit for a bf16 component and 36 for an fp32 one (3.35 TB/s;
132 multiprocessors, each with four instructions a cycle at 1.75 GHz). The limits are a tenth to a
third above what Triton 3.9 compiled, so that a test fails when a change adds instructions.
"""

from __future__ import annotations

import json
import os
from typing import Any

import pytest

from emu_kernels.backends import triton as backend
from tests.ops.support import run_python

if backend._missing() is not None:
    pytest.skip("Triton is not installed", allow_module_level=True)

Row = dict[str, Any]

PER_COMPONENT = {
    # (kernel, similarity, mutation), fp32, D = 100, in a tile 128 wide, for sm_90
    ("accumulate", "dot", "none"): 13,
    ("accumulate", "dot", "component"): 34,
    ("accumulate", "dot", "mixup"): 29,
    ("accumulate", "rotate", "none"): 15,
    ("accumulate", "protate", "component"): 80,
    ("scores", "l1", "component"): 42,
    ("scores", "l2", "component"): 42,
    ("scores", "rotate", "component"): 33,
    ("scores", "rotate", "mixup"): 31,
    ("scores", "hake", "component"): 55,
    ("query_gradient", "l1", "component"): 28,
    ("query_gradient", "l2", "component"): 24,
    ("query_gradient", "rotate", "component"): 31,
    ("query_gradient", "rotate", "mixup"): 27,
    ("query_gradient", "hake", "component"): 36,
    ("table_gradient", "dot", "none"): 9,
    ("table_gradient", "dot", "component"): 22,
    ("table_gradient", "dot", "mixup"): 13,
    ("table_gradient", "l1", "component"): 33,
    ("table_gradient", "l2", "component"): 29,
    ("table_gradient", "rotate", "component"): 44,
    ("table_gradient", "rotate", "mixup"): 34,
    ("table_gradient", "hake", "component"): 46,
    ("table_gradient", "protate", "component"): 52,
    ("scatter", "dot", "component"): 30,
    # In closed form: with one rate for all components, and with learned rates for each row.
    ("moments", "dot", "expected"): 11,
    ("query_gradient", "dot", "expected"): 10,
    ("table_gradient", "dot", "expected"): 15,
    ("moments", "dot", "learned"): 15,
    ("query_gradient", "dot", "learned"): 15,
    ("table_gradient", "dot", "learned"): 20,
    ("moments", "l2", "expected"): 13,
    ("query_gradient", "l2", "expected"): 15,
    ("table_gradient", "l2", "expected"): 23,
    ("moments", "rotate", "learned"): 14,
    ("query_gradient", "rotate", "learned"): 17,
    ("table_gradient", "rotate", "learned"): 27,
    ("moments", "hake", "learned"): 26,
    ("query_gradient", "hake", "learned"): 40,
    ("table_gradient", "hake", "learned"): 58,
}
SHARED = 16 * 1024
"""Bytes for each program. With this much, registers limit the programs on a multiprocessor before
shared memory does."""


@pytest.fixture(scope="module", params=["few", pytest.param("most", marks=pytest.mark.slow)])
def compiled(request: pytest.FixtureRequest) -> list[Row]:
    """Compiled in a separate process: this one may interpret the kernels."""
    interpret = os.environ.pop("TRITON_INTERPRET", None)
    try:
        done = run_python("-m", "tests.triton.compile_all", request.param, timeout=1500)
    finally:
        if interpret is not None:
            os.environ["TRITON_INTERPRET"] = interpret
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_kernel_is_compiled(compiled: list[Row]) -> None:
    assert {row["name"] for row in compiled} == {
        "accumulate", "merge", "scores", "moments", "query_gradient", "loss_rows", "reduce_rows",
        "sum_weights", "table_gradient", "join_segments", "scatter", "mutate_forward",
        "mutate_backward",
    }  # fmt: skip


def test_sizes_do_not_compile_anew(compiled: list[Row]) -> None:
    assert [row for row in compiled if row["sizes_matter"]] == []


FULL = 32
"""Bytes that the one kernel that uses all 255 registers may spill: the query's gradient of a
similarity of two halves, with masks (Triton 3.9: 8 for hake on sm_80; 3.6: 24 for rotate on sm_90).
"""


def test_nothing_is_spilled(compiled: list[Row]) -> None:
    def allowed(row: Row) -> int:
        two_halves = row["similarity"] in ("rotate", "hake")
        if row["name"] == "query_gradient" and two_halves:
            return FULL
        return 8 if (row["name"], row["similarity"]) == ("table_gradient", "l2") else 0

    low = [row for row in compiled if row["dtype"] != "torch.float64"]
    assert [row for row in low if row["spilled"] > allowed(row)] == []


def test_shared_memory_is_small(compiled: list[Row]) -> None:
    assert [row for row in compiled if row["shared"] > SHARED] == []


def per_component(row: Row) -> float:
    return row["longest"] / row["components"]


def test_instructions_in_the_loop(compiled: list[Row]) -> None:
    plain = [
        row
        for row in compiled
        if row["target"] == "sm_90" and row["dtype"] == "torch.float32" and row["dim"] == 100
    ]
    found = [(row, (row["name"], row["similarity"], row["mutation"])) for row in plain]
    cases = {key[1:] for _, key in found}
    assert {key for _, key in found} >= {key for key in PER_COMPONENT if key[1:] in cases}
    bounded = [(row, PER_COMPONENT[key]) for row, key in found if key in PER_COMPONENT]
    assert [row for row, bound in bounded if per_component(row) > bound] == []


@pytest.mark.slow
@pytest.mark.parametrize("compiled", ["most"], indirect=True)
@pytest.mark.parametrize("target", ["sm_80", "sm_100"])
@pytest.mark.parametrize("name", ["accumulate", "table_gradient"])
def test_other_targets_take_about_as_many(name: str, target: str, compiled: list[Row]) -> None:
    """At most half as many more than sm_90; AMD's instructions cannot be compared."""
    (row,) = (
        row
        for row in compiled
        if (row["name"], row["target"], row["similarity"]) == (name, target, "dot")
    )
    assert per_component(row) <= 1.5 * PER_COMPONENT[name, "dot", "component"]
