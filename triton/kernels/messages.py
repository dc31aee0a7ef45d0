"""Launches relational.py's kernels for a call of relational_spmm's operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from emu_kernels.relational import EPSILON
from emu_kernels.triton import launch, relational


def tile(lanes: int, loads: int, size: int) -> launch.Tile:
    """The tile of a kernel that reads ``loads`` numbers for each edge and lane, where numbers of
    nodes have ``size`` bytes.

    A thread reads 16 bytes of a row at once, and has the same lanes of each row. More rows mean
    more reads in flight, as far as registers suffice (see the ahead-of-time tests).
    """
    if launch.INTERPRETED:
        return launch.Tile(32, max(16, min(launch._power_of_2(lanes), 1024)), 1)
    each = 16 // size
    wide = max(16, min(launch._power_of_2(lanes), 64 * each))
    rows = max(1, min(4, 16 // loads) // (2 if size == 2 else 1))
    return launch.Tile(rows, wide, max(1, wide // (32 * each)))


def run(
    given: dict[str, Any],
    task: str,
    out: Tensor,
    *,
    start: Tensor,
    other: Tensor,
    edge: Tensor,
    relation: Tensor | None = None,
    source: Tensor | None = None,
    piece_relation: Tensor | None = None,
    pieces: int = 0,
    grad: Tensor | None = None,
    result: Tensor | None = None,
) -> None:
    """Write the result ("forward"), or its gradient by "nodes" or "relations", to ``out``."""
    nodes, relations, keep = given["nodes"], given["relations"], given["keep"]
    aggregate, message = given["aggregate"], given["message"]
    count, batch, dim = nodes.shape
    parts = 2 if message == "rotate" else 1
    lanes = batch * dim // parts
    loads = parts * {"sum": 2, "mean": 2, "pna": 8 if grad is not None else 4}.get(aggregate, 3)
    at = tile(lanes, loads, nodes.element_size())
    kind = relational.MessageKind(
        D=dim,
        PARTS=parts,
        W=dim // parts,
        ROWS=at.rows,
        WIDTH=at.width,
        SHARED=relations.ndim == 2,
        MESSAGE=message,
        AGGREGATE=aggregate,
        SECTIONS=4 if aggregate == "pna" else 1,
        EPSILON=EPSILON,
    )
    inputs = relational.Graph(
        nodes=nodes,
        relations=relations,
        own=given["own"] if task == "forward" else None,
        weight=given["weight"],
        keep=None if keep is None else keep.view(torch.uint8),
        start=start,
        other=other,
        relation=relation if piece_relation is None else piece_relation,
        edge=edge,
        source=source,
    )
    both = {"kind": kind, "B": batch}
    blocks = -(-lanes // at.width)
    with launch._on(nodes):
        if task == "forward":
            given = {"inputs": inputs, **both, "out": out}
            launch.run(relational.aggregate, count * blocks, at.warps, **given)
            return
        given = {"inputs": inputs, **both, "grad": grad, "result": result}
        gradient = relational.message_gradient
        if piece_relation is None:
            given |= {"out": out, "OF_NODES": True}
            launch.run(gradient, count * blocks, at.warps, **given)
            return
        partial = out.new_empty((pieces, batch, dim))
        given |= {"out": partial, "OF_NODES": False}
        launch.run(gradient, pieces * blocks, at.warps, **given)
        every = torch.arange(out.shape[0] + 1, device=out.device)
        first = torch.searchsorted(piece_relation, every)
        sums = out if out.ndim == 3 else out.new_empty((out.shape[0], batch, dim))
        own = {"first": first, "partial": partial, "out": sums}
        launch.run(relational.join_pieces, out.shape[0] * blocks, at.warps, **both, **own)
        if out.ndim == 2:
            torch.sum(sums, 1, out=out)
