"""The bytes that must move, counted by hand and by brute force."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from bench import roofline
from bench.inputs import Inputs, Shape, make


def lines_of_rows(ids: torch.Tensor, row: int, line: int) -> int:
    return sum(len({at // line for at in range(i * row, (i + 1) * row)}) for i in ids.tolist())


def given(shape: Shape, positive: list[int], negative: list[list[int]]) -> Inputs:
    made = make(shape)
    ids: Any = {"positive": torch.tensor(positive), "negative": torch.tensor(negative)}
    return dataclasses.replace(made, **ids)


def test_aligned_rows_by_hand():
    """B = 2, K = 3, rows of 128 bytes: two lines each of a CPU's."""
    shape = Shape(batch=2, negatives=3, dim=32, entities=10)
    found = roofline.step_bytes(given(shape, [1, 2], [[3, 3, 1], [9, 9, 9]]))
    ids, query, rows = 64, 2 * 128, 8 * 128
    assert found["forward"] == ids + query + rows
    assert found["backward"] == ids + 2 * query + 10 * 128
    assert found["forward + backward"] == found["forward"] + found["backward"]


def test_sparse_and_other_similarities_by_hand():
    """The touched rows are 1, 2, 3 and 9."""
    shape = Shape(batch=2, negatives=3, dim=32, entities=10, similarity="l1", gradient="sparse")
    found = roofline.step_bytes(given(shape, [1, 2], [[3, 3, 1], [9, 9, 9]]))
    ids, query, touched = 64, 2 * 128, 4 * 128
    assert found["backward"] == ids + 2 * query + touched + 64 + touched


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("line", [32, 64])
def test_rows_that_straddle_lines(dtype, line):
    shape = Shape(batch=5, negatives=7, dim=25, entities=40, dtype=dtype)
    inputs = make(shape)
    ids = torch.cat([inputs.positive, inputs.negative.flatten()])
    row = shape.dim * shape.itemsize
    assert roofline._row_bytes(ids, row, line) == line * lines_of_rows(ids, row, line)


def test_the_copy_moves_what_it_says():
    step, moved = roofline.copy_step("cpu", size=4096)
    assert moved == 2 * 4096
    assert torch.equal(step(), torch.ones(1024))
