"""What a similarity φ(query, candidate) is, apart from its arithmetic.

φ = Σ_s w_s v_s(S_s). Each S_s is a sum of terms over components; v is the sum itself or, for a sum
of squares, minus its root. A row of D components is one part, or two halves of D/2 each. The
arithmetic of each similarity is in :mod:`emu_kernels.reference`, csrc/common/similarity.h and
triton/kernels/similarities.py; a test compares csrc's traits with these.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Factor = Literal["none", "scale", "phase"]
"""What a half of the candidate is multiplied by: nothing, the optional ``scale``, or κ/2."""


@dataclass(frozen=True)
class Similarity:
    name: str
    halves: int = 1
    """1: a row is one part; 2: it is re‖im, or phase‖modulus."""
    coupled: bool = False
    """Whether a term depends on both halves, such as on both parts of a complex number."""
    bilinear: bool = False
    """Whether a term is q·c; otherwise it is a function of q − a·c."""
    weights: int = 0
    """How many ``similarity_weights`` it takes: one for each sum, or none."""
    factors: tuple[Factor, ...] = ("none",)
    """One for each half."""
    roots: tuple[bool, ...] = (False,)
    """For each sum, whether it is a sum of squares under a root."""

    @property
    def sums(self) -> int:
        return 1 if self.coupled else self.halves

    @property
    def direct(self) -> bool:
        """Whether the score is simply its only sum."""
        return self.sums == 1 and not self.roots[0] and not self.weights

    @property
    def scaled_halves(self) -> int:
        """How many halves, counted from the last, the optional ``scale`` multiplies."""
        return self.factors.count("scale")

    @property
    def phases(self) -> bool:
        """Whether it takes a ``phase_scale``."""
        return "phase" in self.factors


SIMILARITIES = {
    similarity.name: similarity
    for similarity in (
        Similarity("dot", bilinear=True),
        Similarity("l1", factors=("scale",)),
        Similarity("l2", factors=("scale",), roots=(True,)),
        Similarity("rotate", halves=2, coupled=True, factors=("none", "none")),
        Similarity("hake", halves=2, weights=2, factors=("phase", "scale"), roots=(False, True)),
        Similarity("protate", weights=1, factors=("phase",)),
    )
}
