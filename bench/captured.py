"""A whole training step on a GPU as one CUDA graph: sampler, loss, gradients and optimiser.

DistMult with Adagrad, tails and heads corrupted in turn. Triples and negatives are drawn on the
device, with replacement, and so are the masks' seeds; each replay advances the generator. The
triples are random, as many as FB15k-237's. On a CPU the same step runs without a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from bench import measure
from bench.inputs import Shape, is_gpu
from bench.results import Recorder, Row
from bench.rivals import SCALED, TRAINING, Loss, Rival, base_of, instruction_set
from bench.steps import Setting
from bench.trainers import zipf_triples

_CAPTURED = ", captured"


def training_step(
    triples: Tensor, shape: Shape, num_relations: int, loss_of: Loss
) -> Callable[[], None]:
    """A step in each direction, on parameters and an optimiser's state of its own."""
    device = shape.device
    columns = triples.T.contiguous().to(device)  # (3, M)
    sizes = ((n, shape.dim) for n in (shape.entities, num_relations))
    tables = [torch.empty(size, device=device).uniform_(-0.26, 0.26) for size in sizes]
    sums = [torch.zeros_like(table) for table in tables]

    def step() -> None:
        for head in (False, True):
            place = torch.randint(columns.shape[1], (shape.batch,), device=device)
            negative = torch.randint(shape.entities, (shape.batch, shape.negatives), device=device)
            first, relation, last = columns[:, place]
            given, positive = (last, first) if head else (first, last)
            # Rows are leaves: their gradients are (B, D) and not a second (N, D).
            leaves = tables[0], tables[0][given], tables[1][relation]
            entity, rows, relations = (leaf.requires_grad_() for leaf in leaves)
            loss = loss_of(rows * relations, entity, positive, negative)
            of_entity, of_given, of_rows = torch.autograd.grad(loss, leaves)
            entity.requires_grad_(False)
            of_entity.index_add_(0, given, of_given)
            of_relation = torch.zeros_like(tables[1]).index_add_(0, relation, of_rows)
            for p, total, g in zip(tables, sums, (of_entity, of_relation), strict=True):
                p.addcdiv_(g, total.addcmul_(g, g).sqrt().add_(1e-10), value=-0.1)

    return step


def settings(options: Any) -> list[Setting]:
    return [Setting(Shape(), SCALED, family="captured")]


def rows(rivals: Sequence[Rival], setting: Setting, options: Any) -> Iterator[list[Row]]:
    """Measure whole steps, on a GPU captured and launched one by one; first the one of ours that
    all are compared with and plain PyTorch, then the others of ours."""
    shape, device, relations = setting.shape, setting.shape.device, 237
    triples = zipf_triples(shape.entities, relations, 100 if options.tiny else 272_115)
    repeats = 20 if is_gpu(device) else 1  # without waiting for the GPU in between, as in training
    losses = {rival.name: rival.loss(shape) for rival in rivals}
    kinds = ("", _CAPTURED) if is_gpu(device) else ("",)

    def start(name: str) -> measure.Turn:
        loss = losses[name.removesuffix(_CAPTURED)]
        run: Callable[[], Any] = training_step(triples, shape, relations, loss)
        if name.endswith(_CAPTURED):
            run = measure.Captured(run)
        return measure.turn_of(lambda: lambda: [run() for _ in range(repeats)], device, wall=True)

    record = Recorder(
        device, family=setting.family, phase=TRAINING, graph=f"{len(triples)} random triples",
        model="DistMult", optimizer="Adagrad", threads=options.threads,
        instruction_set=instruction_set(device), **shape.columns(),
    )  # fmt: skip
    base = base_of(losses)
    plain = [name for name in losses if not name.startswith("fused-")]
    others = [name for name in losses if name not in (base, *plain)]
    for group in (plain, others):
        names = [name + kind for name in filter(None, (base, *group)) for kind in kinds]
        of_several = measure.alternate(names, start, options.rounds)
        times = {name: [t / (2 * repeats) for t in values] for name, values in of_several.items()}
        of_ratios = next((b for kind in reversed(kinds) if (b := f"{base}{kind}") in times), None)
        for name in times:
            if group is plain or name.removesuffix(_CAPTURED) != base:
                record.add_times(times, of_ratios, rival=name, batch=shape.batch)
        yield record.taken()
