"""How negatives are mutated: what the public functions take, and what the operators are told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from emu_kernels import validate
from emu_kernels.mask import MAX_MIXUP_ORDER, rate_to_threshold

MASK_UNITS = ("component", "pair")


@dataclass(frozen=True)
class Mixup:
    """Mix each negative with the positive as a whole, instead of component by component.

    ẑ_k = z⁺ + μ_k (z⁻_k − z⁺) with one share μ_k ~ Beta(``order``, 1) a negative, drawn from the
    masks' Philox streams (:func:`emu_kernels.mask.mixup_share`). Mixup (Zhang et al., 2018) as
    EMU's paper compares with it (arXiv 2504.03327) has order 2.

    Args:
        order: 1 to 4; 1 is the uniform distribution.

    Raises:
        ValueError: another order.
    """

    order: int = 2

    def __post_init__(self) -> None:
        if isinstance(self.order, bool) or not isinstance(self.order, int):
            raise TypeError(f"order: expected an int, got {type(self.order).__name__}")
        if not 1 <= self.order <= MAX_MIXUP_ORDER:
            raise ValueError(f"order: expected 1 to {MAX_MIXUP_ORDER}, got {self.order}")


class Mutation(NamedTuple):
    """A mutation in the operators' terms."""

    kind: str  # "none", "component", "pair" or "mixup"
    threshold: int  # of all bytes, 0..256; for "mixup" the order
    thresholds: Tensor | None = None  # int16 of each component (or pair), instead of the one


NONE = Mutation("none", 0)


def parse(
    name: str, value: object, unit: object, dim: int | torch.SymInt, device: torch.device
) -> Mutation:
    """Check the arguments ``name`` and ``mask_unit`` of a call for vectors of ``dim`` components.

    Raises:
        TypeError, ValueError: what does not fit.
    """
    validate.one_of("mask_unit", unit, MASK_UNITS)
    assert isinstance(unit, str)
    if unit == "pair" and dim % 2:
        raise ValueError(f"mask_unit: 'pair' needs an even number of components, got {dim}")
    if isinstance(value, Mixup):
        return Mutation("mixup", value.order)
    if not isinstance(value, Tensor):
        validate.rate(name, value)
        assert isinstance(value, (int, float))
        return Mutation(unit, rate_to_threshold(value))
    units = dim // 2 if unit == "pair" else dim
    if value.ndim != 1 or value.shape[0] != units or not value.dtype.is_floating_point:
        raise ValueError(
            f"{name}: expected a number, a Mixup or a floating-point tensor of shape ({units},), "
            f"one rate a {unit}, got shape {tuple(value.shape)}, dtype {value.dtype}"
        )
    if value.requires_grad:
        raise ValueError(f"{name}: is not differentiated; pass {name}.detach()")
    if value.device != device:
        raise ValueError(f"{name}: expected to be on {device} like table, got {value.device}")
    return Mutation(unit, 0, torch.ops.emu_kernels.rates_to_thresholds(value, name))
