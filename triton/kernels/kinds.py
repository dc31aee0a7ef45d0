"""What every kernel takes, in one place: its tensors, its sizes, and its compile-time constants.

A kernel's parameters begin with ``inputs`` (:class:`Inputs`), ``kind`` (:class:`Kind`) and, one by
one, the fields of :class:`Sizes`: Triton compiles anew for some values of an integer in a tuple.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

SIZES = ["B", "K", "R", "N", "row_offset", "threshold"]
"""Parameters on whose values no code depends: a kernel's ``do_not_specialize``."""


class Inputs(NamedTuple):
    """Pointers, None where absent; shapes as in :class:`emu_kernels.request.Request`."""

    query: Any
    table: Any
    scale: Any
    weights: Any
    positive: Any
    negative: Any
    seed: Any
    thresholds: Any
    report: Any  # where ids out of range are reported (emu_kernels/backends/ids.py)


NO_INPUTS = Inputs(*[None] * len(Inputs._fields))


class Sizes(NamedTuple):
    B: Any
    K: Any
    R: Any  # rows that share a set of negatives
    N: Any
    row_offset: Any
    threshold: Any


class Kind(NamedTuple):
    """Compile-time constants: the shape of rows and tiles, the similarity, the mutation rule.

    A row of D components is one part of W = D, or two halves of W = D/2 each, where the similarity
    has two or the mask's unit is the pair.
    """

    D: int
    STRIDE: int  # of the table's rows
    PARTS: int
    W: int  # components of a part
    ROWS: int  # of a tile
    WIDTH: int  # of a tile
    CHUNKS: int  # tiles that cover a part

    # emu_kernels.similarity.Similarity
    TERMS: (
        Callable[..., Any] | None
    )  # of the first half, or of both where COUPLED (similarities.py)
    SECOND_TERMS: Callable[..., Any] | None
    COUPLED: bool
    BILINEAR: bool
    SUMS: int
    ROOT: bool  # of the first sum
    SECOND_ROOT: bool
    DIRECT: bool
    SCALED: bool  # whether there is a scale of the first part
    SECOND_SCALED: bool
    HALF: float  # κ/2

    # emu_kernels.mutation.Mutation
    MUTATED: bool
    SHARED: bool  # it draws shares, not masks
    PAIRS: bool
    SHARE: Callable[..., Any] | None  # masks.py
    PARAMETER: int  # of SHARE

    SOURCE: str
    """A hash of the functions above. Triton's cache knows a function that is a constant by its name
    alone, and would not notice a changed one."""
