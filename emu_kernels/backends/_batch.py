"""A request in the flat form that the kernel backends' own code still takes."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from emu_kernels.mutation import Component, Mixup, Mutation
from emu_kernels.request import Draws, Request


class Batch(NamedTuple):
    query: Tensor
    table: Tensor
    scale: Tensor | None
    weights: Tensor | None
    positive: Tensor
    negative: Tensor
    seed: Tensor
    thresholds: Tensor | None
    row_offset: int
    mutation: str
    threshold: int  # for "mixup" the order
    similarity: str
    phase_scale: float

    @property
    def mutated(self) -> bool:
        return self.mutation != "none"


class MaskSpec(NamedTuple):
    seed: Tensor
    thresholds: Tensor | None
    row_offset: int
    mutation: str
    threshold: int


def _parameters(rule: Mutation) -> tuple[Tensor | None, int]:
    if isinstance(rule, Component):
        return rule.thresholds, rule.threshold
    return None, rule.order if isinstance(rule, Mixup) else 0


def batch(request: Request) -> Batch:
    thresholds, threshold = _parameters(request.mutation)
    return Batch(
        request.query, request.table, request.scale, request.weights, request.positive,
        request.negative, request.seed, thresholds, request.row_offset, request.mutation.name,
        threshold, request.similarity, request.phase_scale,
    )  # fmt: skip


def mask(draws: Draws) -> MaskSpec:
    thresholds, threshold = _parameters(draws.mutation)
    return MaskSpec(draws.seed, thresholds, draws.row_offset, draws.mutation.name, threshold)
