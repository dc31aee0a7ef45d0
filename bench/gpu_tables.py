"""The settings that are measured on a GPU (``python -m bench gpu``)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from bench.inputs import Shape
from bench.rivals import PHASES, RIVALS, WHOLE
from emu_kernels.similarity import SIMILARITIES

ENTITIES = {"dense": 14541, "sparse": 2_500_000}
"""FB15k-237's, whose gradient is dense, and a large graph's, with sparse gradients on all sides."""

PLANS_FAMILY = "plans"

_COUNTS = (64, 256, 1024)  # K
_DIMS = (100, 512, 1000)
_DTYPES = ("float32", "bfloat16")
_WITHOUT_PLANS = tuple(rival.name for rival in RIVALS if not rival.plan)
_PLANS = tuple(rival.name for rival in RIVALS if rival.plan)
_NOT_COMPILED = tuple(name for name in _WITHOUT_PLANS if name != "compiled-emu")


@dataclass(frozen=True)
class Setting:
    """A shape, who is measured on it, and in which phases."""

    shape: Shape
    rivals: tuple[str, ...]
    phases: tuple[str, ...] = PHASES
    family: str = "steps"


def _shape(count: int, dim: int, gradient: str, dtype: str, similarity: str = "dot") -> Shape:
    return Shape(
        batch=1024, negatives=count, dim=dim, entities=ENTITIES[gradient],
        similarity=similarity, dtype=dtype, gradient=gradient, device="cuda",
    )  # fmt: skip


def main_table(*, quick: bool) -> list[Setting]:
    """Every K, D, number of entities and dtype; quick: K = 256 and two D, compiled for one of
    them."""
    settings = []
    for dtype in _DTYPES:
        for gradient in ENTITIES:
            for dim in _DIMS[:2] if quick else _DIMS:
                for count in (256,) if quick else _COUNTS:
                    compiled = not quick or (dim == 512 and dtype == "float32")
                    rivals = _WITHOUT_PLANS if compiled else _NOT_COMPILED
                    settings.append(Setting(_shape(count, dim, gradient, dtype), rivals))
    return settings


def similarities(*, quick: bool) -> list[Setting]:
    """Each of them at K = 256, D = 512; quick: with a dense gradient only."""
    return [
        Setting(_shape(256, 512, gradient, "float32", similarity), _NOT_COMPILED)
        for gradient in (("dense",) if quick else tuple(ENTITIES))
        for similarity in SIMILARITIES
        if similarity != "dot"  # is in the main table
    ]


def plans(*, quick: bool) -> list[Setting]:
    """The dense gradient by sorted segments against atomics: a table that fits a cache, and one
    that does not."""
    return [
        Setting(
            dataclasses.replace(_shape(count, dim, "dense", dtype), entities=entities),
            _PLANS,
            (PHASES[1], WHOLE),
            PLANS_FAMILY,
        )
        for dtype in (("float32",) if quick else _DTYPES)
        for entities in ENTITIES.values()
        for dim in ((512,) if quick else _DIMS)
        for count in ((256,) if quick else _COUNTS)
    ]


TABLES = {"main": main_table, "similarities": similarities, "plans": plans}


def small(setting: Setting, device: str) -> Setting:
    """The same in small, for tests, on a CPU too."""
    shape = dataclasses.replace(
        setting.shape, batch=8, negatives=5, dim=20, entities=50, device=device
    )
    return dataclasses.replace(setting, shape=shape)
