"""The bytes that a step must move, and the bandwidth to hold them against.

Memory moves in lines: 64 bytes on a CPU, 32-byte sectors on a GPU. What must move:

forward   the ids; the query; the row of every id, each time it is named (a row's lines are counted
          where it lies: 400-byte rows straddle them).
backward  the ids and the query again; the table's gradient, once (all N rows where dense, the
          touched rows and their ids where sparse); the query's gradient; and for every similarity
          but dot, whose derivative does not need them, the touched rows once more.

Scores, weights, masks and sorted ids are an implementation's own and do not count. Where the table
fits a cache its rows are mostly read from there, and the share of the copy bandwidth, which is
memory's, may exceed 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bench.inputs import Inputs
from bench.measure import Step

LINE_BYTES = {"cpu": 64, "cuda": 32}
COPY_BYTES = {"cpu": 2**28, "cuda": 2**30}
"""Larger than any cache."""


def _row_bytes(ids: Tensor, row: int, line: int) -> int:
    """Of the lines that rows of ``row`` bytes, one behind the other, touch, each row by itself."""
    first = ids * row
    lines = (first + row - 1) // line - first // line + 1
    return int(lines.sum()) * line


def _whole(size: int, line: int) -> int:
    return -(-size // line) * line


def step_bytes(inputs: Inputs) -> dict[str, int]:
    """Bytes by phase (:data:`bench.rivals.PHASES`)."""
    shape = inputs.shape
    line = LINE_BYTES[torch.device(shape.device).type]
    row = shape.dim * shape.itemsize
    every = torch.cat([inputs.positive, inputs.negative.flatten()])
    touched = every.unique()
    ids = _whole(every.numel() * every.itemsize, line)
    query = _whole(shape.batch * row, line)
    forward = ids + query + _row_bytes(every, row, line)
    backward = ids + 2 * query
    if inputs.sparse:
        backward += _whole(touched.numel() * row, line) + _whole(touched.nbytes, line)
    else:
        backward += _whole(shape.table_bytes, line)
    if shape.similarity != "dot":
        backward += _row_bytes(touched, row, line)
    return {"forward": forward, "backward": backward, "forward + backward": forward + backward}


def copy_step(device: str, size: int | None = None) -> tuple[Step, int]:
    """A copy through memory, and the bytes that it moves, read and written."""
    size = COPY_BYTES[torch.device(device).type] if size is None else size
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    return Step(lambda _: target.copy_(source)), 2 * source.nbytes
