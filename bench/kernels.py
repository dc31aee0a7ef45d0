"""Each operator of our backends by itself, at the two shapes that are our targets.

An operator is what autograd calls: a pass over the negatives, or the gradient of the table. On a
GPU its time is GPU time between two CUDA events, of all the kernels that it launches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from bench import measure
from bench.inputs import Shape, make
from bench.measure import Step
from bench.results import TIME, Recorder, Row
from bench.rivals import BACKENDS, EMU, Rival, ours
from bench.steps import ENTITIES, Setting
from emu_kernels import backends, prepare
from emu_kernels.backends.base import Kernels, ScoreWeights, SumWeights
from emu_kernels.request import LossRequest

FAMILY = "kernels"
TARGETS = (Shape(), Shape(1024, 256, 512, ENTITIES["sparse"], gradient="sparse"))
"""The paper's on FB15k-237, and long rows of a large table, which lie in no cache."""
OPERATORS = (
    "loss, no gradient", "loss", "table gradient", "scores", "query gradient of scores",
)  # fmt: skip


def settings(options: Any) -> Iterator[Setting]:
    for shape in TARGETS:
        yield Setting(shape, [ours("emu", backend) for backend in BACKENDS], OPERATORS, FAMILY)


def _request(shape: Shape) -> LossRequest:
    query, table, positive, negative = make(shape)
    scores = prepare.scores(
        query.detach(), table.detach(), positive, negative, similarity=shape.similarity,
        mutation=EMU["mutation_rate"], mask_unit="component", scale=None, similarity_weights=None,
        phase_scale=1.0, seed=1, row_offset=0, sparse_grad=shape.sparse,
    )  # fmt: skip
    loss = {name: EMU[name] for name in ("beta", "alpha")}
    return prepare.loss(scores, **loss, sample_weight=None, reduction="mean")


def operators(backend: str, shape: Shape, request: LossRequest) -> dict[str, Callable[[], Any]]:
    """By the names of ``OPERATORS``."""
    kernels: Any = backends.get(backend)
    assert isinstance(kernels, Kernels)
    state = kernels.loss_forward(request, need_grad=True)
    sums = SumWeights(*(getattr(state, name) for name in SumWeights._fields))
    scored = kernels.scores_forward(request)
    upstream = ScoreWeights(*(torch.ones_like(score) for score in scored))
    table = kernels.table_gradient_sparse if shape.sparse else kernels.table_gradient
    calls: list[Callable[[], Any]] = [
        lambda: kernels.loss_forward(request, need_grad=False),
        lambda: kernels.loss_forward(request, need_grad=True),
        lambda: table(request, sums),
        lambda: kernels.scores_forward(request),
        lambda: kernels.query_gradient(request, upstream),
    ]
    return dict(zip(OPERATORS, calls, strict=True))


def rows(rivals: Sequence[Rival], setting: Setting, options: Any) -> Iterator[list[Row]]:
    """Measure; the rows of one backend after the other."""
    shape, device = setting.shape, setting.shape.device
    record = Recorder(device, family=setting.family, threads=options.threads, **shape.columns())
    request, shortest = _request(shape), 0.0 if options.tiny else None
    for rival in rivals:
        calls = operators(str(rival.backend), shape, request)

        def start(phase: str, calls: Mapping[str, Callable[[], Any]] = calls) -> measure.Turn:
            return measure.turn_of(Step(lambda _: calls[phase]()), device, shortest)

        times = measure.alternate(measure.turns_of(calls, start), options.rounds)
        for phase, seconds in times.items():
            here = {"rival": rival.name, "phase": phase, **rival.columns(shape)}
            record.add(TIME, [1000 * t for t in seconds], **here)
        yield record.taken()
