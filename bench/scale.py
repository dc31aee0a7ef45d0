"""How time and memory of a step grow with one size, the others fixed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from bench.inputs import TINY, Shape

FIELDS = {"N": "entities", "D": "dim", "K": "negatives", "B": "batch"}
"""The axes, and what they are of a shape."""

VALUES: dict[str, tuple[int, ...]] = {
    "N": (10_000, 100_000, 1_000_000, 10_000_000),
    "D": (32, 64, 128, 256, 512, 1024),
    "K": (16, 64, 256, 1024),
    "B": (64, 256, 1024, 4096),
}

_SMALLER_BATCH = 256
"""Of the axes along which B·K·D grows, so that what is written in PyTorch still fits a machine."""


def family(axis: str) -> str:
    return f"scale-{axis}"


def fixed(axis: str) -> Shape:
    """What the other sizes are."""
    return Shape(batch=_SMALLER_BATCH) if axis in ("D", "K") else Shape()


def _of_axis(axis: str, value: int) -> dict[str, Any]:
    return {FIELDS[axis]: value}


def shapes(axis: str, values: Sequence[int], gradients: Sequence[str], device: str) -> list[Shape]:
    """From small to large, every gradient at each size."""
    return [
        dataclasses.replace(fixed(axis), gradient=gradient, device=device, **_of_axis(axis, value))
        for value in sorted(values)
        for gradient in gradients
    ]


def tiny(shape: Shape, axis: str) -> Shape:
    """The other sizes in small, for tests."""
    kept = {FIELDS[axis]: getattr(shape, FIELDS[axis])}
    sizes = {field: getattr(TINY, field) for field in FIELDS.values()} | kept
    return dataclasses.replace(shape, **sizes)
