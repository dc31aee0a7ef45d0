"""What every kernel takes, in one place: its tensors, its sizes, and its compile-time constants.

A kernel's parameters begin with ``inputs`` (:class:`Inputs`), ``kind`` (:class:`Kind`) and, one by
one, the fields of :class:`Sizes`: for an integer in a tuple, Triton compiles the kernel anew for 1
and for multiples of 16, whatever ``do_not_specialize`` says (in 3.6 and 3.9).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

SIZES = ["B", "K", "R", "N", "row_offset", "threshold"]
"""Parameters on whose values the code does not depend: a kernel's ``do_not_specialize``."""


class Inputs(NamedTuple):
    """Pointers, None where absent; shapes as in :class:`emu_kernels.request.Request`."""

    query: Any = None
    table: Any = None
    scale: Any = None
    weights: Any = None
    positive: Any = None
    negative: Any = None
    seed: Any = None
    thresholds: Any = None
    rate: Any = None
    positive_log_q: Any = None  # of emu_kernels.request.LossRequest, like the next one
    negative_log_q: Any = None
    report: Any = None  # where ids out of range are reported (emu_kernels/backends/ids.py)


class Sizes(NamedTuple):
    B: Any
    K: Any
    R: Any  # rows that share a set of negatives
    N: Any
    row_offset: Any
    threshold: Any


class Kind(NamedTuple):
    """Compile-time constants: the shape of rows and tiles, the similarity, the mutation rule.

    A row of D components is one part of W = D; or two parts of W = D/2 each, if the similarity has
    two halves or the mask's unit is the pair.
    """

    D: int
    STRIDE: int  # of the table's rows
    PARTS: int
    W: int  # components of a part
    ROWS: int  # of a tile
    WIDTH: int  # of a tile
    CHUNKS: int  # tiles that cover a part

    # emu_kernels.similarity.Similarity
    TERMS: tuple[Callable[..., Any], ...]  # for each part, or one for both (similarities.py)
    COUPLED: bool
    BILINEAR: bool
    SUMS: int  # 1, or one for each part
    ROOTS: tuple[bool, ...]  # of each sum
    DIRECT: bool
    SCALED: tuple[bool, ...]  # for each part, whether it has a scale
    SCALE_D: int  # components of a row of the scale, which are those of the last parts
    HALF: float  # κ/2

    # emu_kernels.mutation.Mutation
    MUTATED: bool
    MOMENTS: bool  # it draws nothing: scores have a mean and a variance
    RATE_ROW: int  # the stride from a row's rates to the next row's: 0 if all rows share them
    ONE_RATE: bool  # all components have the same rate
    SHARED: bool  # it draws shares, not masks
    PAIRS: bool
    SHARE: Callable[..., Any] | None  # masks.py
    PARAMETER: int  # of SHARE

    SOURCE: str
    """A hash of the functions above. Triton's cache identifies a function that is a constant by its
    name only, and would not notice that it was changed."""


class Query(NamedTuple):
    """Tiles of one query and its positive, each a tuple of one tile for each part.

    Used within kernels only, like :class:`Candidates`.
    """

    q: Any
    a: Any  # the scale; any tile for a part without one
    z: Any  # the positive
    t: Any  # its terms: one tile if the similarity is coupled
    d: Any  # their derivatives by the query


class Candidates(NamedTuple):
    """Tiles of ROWS candidates, in the same way."""

    c: Any
    t: Any
    d: Any
