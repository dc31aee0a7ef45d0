"""The mutation rules: how a negative is mutated toward the positive, and with which parameters.

A rule draws masks, which take components from the positive, or shares, which mix positive and
negative linearly, or nothing (:data:`Draw`). Here it is a frozen dataclass; its arithmetic is in
:mod:`emu_kernels.reference`, csrc/common/mutation.h and triton/kernels/masks.py. Its parameters
have the same names everywhere, also in the operators' schemas.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from numbers import Integral
from typing import ClassVar, Literal, TypeAlias

from torch import SymInt, Tensor

from emu_kernels.mask import MAX_MIXUP_ORDER, rate_to_threshold

Draw = Literal["none", "mask", "share", "moments"]
"""What a rule draws at random: for "mask" a bit for each component (or pair), for "share" the share
of itself that each negative keeps. Nothing is drawn for "none", which leaves negatives unchanged,
nor for "moments", which takes the mean and the variance of the scores that masks would give."""

DIFFERENTIABLE = {"differentiable": True}
"""Metadata of the fields of rules and requests that get a gradient."""


@dataclass(frozen=True)
class Mutation:
    """A rule with its parameters, which have defaults and are numbers or tensors."""

    name: ClassVar[str]
    draw: ClassVar[Draw]
    pairs: ClassVar[bool] = False
    """Whether a mask's unit is the pair of components j and D/2 + j."""


@dataclass(frozen=True)
class NoMutation(Mutation):
    """Leaves negatives unchanged: the loss is the vanilla term alone."""

    name = "none"
    draw = "none"


@dataclass(frozen=True)
class Component(Mutation):
    """ẑ = λ ⊙ z⁺ + (1 − λ) ⊙ z⁻ with a mask bit for each component."""

    name = "component"
    draw = "mask"

    threshold: int = 0
    """0..256: the bytes below it mutate (:func:`emu_kernels.mask.rate_to_threshold`)."""
    thresholds: Tensor | None = None
    """int16, one for each unit of the mask, instead of ``threshold``."""


@dataclass(frozen=True)
class Pair(Component):
    """The same with a bit for each pair: (D/2,) thresholds."""

    name = "pair"
    pairs = True


@dataclass(frozen=True)
class Mixup(Mutation):
    """Mix each negative with the positive as a whole, instead of component by component.

    ẑ_k = z⁺ + μ_k (z⁻_k − z⁺) with one share μ_k ~ Beta(``order``, 1) for each negative, drawn by
    the masks' generator (:func:`emu_kernels.mask.mixup_share`). EMU's paper (arXiv 2504.03327)
    compares with Mixup (Zhang et al., 2018) of order 2.

    Args:
        order: 1 to 4; 1 is the uniform distribution.

    Raises:
        TypeError: an order that is not an int.
        ValueError: an order out of range.
    """

    name = "mixup"
    draw = "share"

    order: int = 2

    def __post_init__(self) -> None:
        known = (int, Integral, SymInt)  # the last while torch.compile traces
        if isinstance(self.order, bool) or not isinstance(self.order, known):
            raise TypeError(f"order: expected an int, got {type(self.order).__name__}")
        object.__setattr__(self, "order", int(self.order))
        if not 1 <= self.order <= MAX_MIXUP_ORDER:
            raise ValueError(f"order: expected 1 to {MAX_MIXUP_ORDER}, got {self.order}")


@dataclass(frozen=True)
class Expected(Mutation):
    r"""EMU in closed form: the expectation over all masks instead of a draw of them.

    With independent mask bits λ_kj ~ Bernoulli(ρ_j), a mutated score ŝ_k has, to second order,

        mean m_k = E ŝ_k     variance v_k = Var ŝ_k     cumulant c_k = log E e^ŝ_k ≈ m_k + v_k / 2

    and the loss takes L̄_emu = (1/K) [(l̄ − s⁺) + β Σ_k (l̄ − m_k)] with l̄ = logsumexp(s⁺, c_1..c_K),
    an upper bound of the mean of L_emu over masks, except for terms beyond second order. Where a
    score is a sum over components, with u_kj = φ_j(q, z⁺) − φ_j(q, z⁻_k):

        m_k = s⁺ − Σ_j (1 − ρ_j) u_kj     v_k = Σ_j ρ_j (1 − ρ_j) u_kj²

    "rotate" needs ``mask_unit="pair"``, as one of its components is a pair; all others need
    "component", also "dot" of complex numbers. A sum S of squares under a root ("l2", "hake") has
    an exact mean M and variance V; those of the root follow by the delta method:
    E −√S ≈ −√M + V / (8 M^{3/2}), Var √S ≈ V / (4 M).

    Args:
        rate: ρ in [0, 1]: a number, or a tensor of one rate for all, (), one for each component,
            (D,), or pair, (D/2,), or a row of these for each query, (B, D) or (B, D/2). Not
            rounded. A tensor gets a gradient if it requires one, so that rates can be learned.
            Rates out of range raise an error (on a GPU, the loss is NaN): learn
            ``torch.sigmoid(logits)``, or clamp after each step. Make a new rule for each step: it
            holds the rates' graph.
        learned: whether ``rate`` gets a gradient; set by the functions that take the rule.

    Raises:
        TypeError, ValueError: an invalid rate; some are found only when the rule is used.
    """

    name = "expected"
    draw = "moments"

    rate: float | Tensor | None = field(default=None, metadata=DIFFERENTIABLE)
    learned: bool = False

    def __post_init__(self) -> None:
        if self.rate is None or isinstance(self.rate, bool):
            raise TypeError(f"rate: expected a number or a tensor, got {self.rate}")


MutationRate: TypeAlias = float | Tensor | Mixup | Expected
"""What ``mutation_rate`` may be: the rate of drawn masks, one for all components or a tensor of one
for each; a :class:`Mixup`; or an :class:`Expected`, for the closed form."""

RULES: dict[str, type[Mutation]] = {
    rule.name: rule for rule in (NoMutation, Component, Pair, Mixup, Expected)
}

MASK_UNITS = tuple(rule.name for rule in RULES.values() if rule.draw == "mask")
"""The values of ``mask_unit``: the rules that a plain mutation rate can mean."""


def mask_unit(*, pairs: bool) -> str:
    """The ``mask_unit`` that means pairs, or the one that means components."""
    return next(unit for unit in MASK_UNITS if RULES[unit].pairs == pairs)


def masked(unit: str, rate: float | Tensor) -> Mutation:
    """The rule of a mask's unit, with one rate or with an int16 threshold for each unit."""
    rule = RULES[unit]
    assert issubclass(rule, Component)
    if isinstance(rate, Tensor):
        return rule(thresholds=rate)
    return rule(threshold=rate_to_threshold(rate))
