"""A whole training step on a GPU as one CUDA graph: sampler, loss, gradients and optimiser.

DistMult with Adagrad, tails and heads corrupted in turn. Triples and negatives are drawn on the
device, with replacement, by the generator that a graph advances at each replay; the masks' seed is
a tensor that the graph counts up. On a CPU the same step runs without a graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding

from bench import eager, measure, results
from bench.inputs import Shape
from bench.measure import Spread, Step
from bench.results import RATIO, SPEED, TIME, UNITS, Row
from bench.rivals import (
    BY_NAME,
    EMU,
    OURS_DEVICES,
    base_of,
    eager_instruction_set,
    ours_name,
)
from bench.zipf import zipf_triples
from emu_kernels import fused_emu_loss, fused_softmax_loss

FAMILY = "captured"
PHASE = "training step"
GRAPH = "FB15k-237"
SIZES = {"entities": 14541, "relations": 237, "triples": 272115}

Loss = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""(query, table, positive, negative, seed) -> loss."""


def losses(device: str) -> dict[str, Loss]:
    """Of every rival that can run there, by its name."""
    found: dict[str, Loss] = {}
    for backend in OURS_DEVICES:
        if BY_NAME[ours_name("emu", backend)].unavailable(Shape(device=device)) is None:
            found[ours_name("emu", backend)] = lambda *x, backend=backend: fused_emu_loss(
                *x[:4], seed=x[4], backend=backend, **EMU
            )
            found[ours_name("softmax", backend)] = lambda *x, backend=backend: fused_softmax_loss(
                *x[:4], backend=backend
            )
    scores = eager.SPELLINGS["dot"][0]
    found["eager-emu"] = lambda *x: eager.emu_loss(*x[:4], scores=scores, **EMU)
    found["eager-softmax"] = lambda *x: eager.softmax_loss(*x[:4], scores=scores)
    return found


def load_triples() -> tuple[str, Tensor]:
    """The dataset's, or where it is not at hand random ones of its sizes; and which."""
    try:
        from bench import graphs
        from emu_kernels.trainer.errors import DataError
    except ModuleNotFoundError:  # the trainer needs packages that a bare machine lacks
        return f"random, as large as {GRAPH}", zipf_triples(**SIZES)
    try:
        return GRAPH, graphs.load(GRAPH, **SIZES).triples["train"]
    except DataError:
        return f"random, as large as {GRAPH}", zipf_triples(**SIZES)


class TrainingStep:
    """Parameters, the optimiser's state, and a step of one direction."""

    def __init__(self, triples: Tensor, shape: Shape, relations: int, loss: Loss) -> None:
        device = shape.device
        self.shape, self.loss = shape, loss
        self.columns = triples.T.contiguous().to(device)  # (3, M)
        draws = torch.Generator(device).manual_seed(0)

        def table(rows: int) -> Tensor:
            values = torch.empty(rows, shape.dim, device=device)
            return values.uniform_(-0.26, 0.26, generator=draws).requires_grad_()

        self.entity, self.relation = table(shape.entities), table(relations)
        self.sums = [torch.zeros_like(p) for p in (self.entity, self.relation)]
        self.seed = torch.zeros((), dtype=torch.int64, device=device)

    def __call__(self, head: bool) -> None:
        shape, device = self.shape, self.shape.device
        place = torch.randint(self.columns.shape[1], (shape.batch,), device=device)
        negative = torch.randint(shape.entities, (shape.batch, shape.negatives), device=device)
        first, relation, last = self.columns[:, place]
        given, positive = (last, first) if head else (first, last)
        # A leaf of its own, so that its gradient is (B, D) and no second (N, D).
        rows = self.entity.detach()[given].requires_grad_()
        self.seed += 1
        query = rows * embedding(relation, self.relation)
        loss = self.loss(query, self.entity, positive, negative, self.seed)
        of_rows, of_relation, of_entity = torch.autograd.grad(
            loss, (rows, self.relation, self.entity)
        )
        of_entity.index_add_(0, given, of_rows)
        parameters = (self.entity, self.relation)
        with torch.no_grad():
            for p, total, g in zip(parameters, self.sums, (of_entity, of_relation), strict=True):
                total.addcmul_(g, g)
                p.addcdiv_(g, total.sqrt().add_(1e-10), value=-0.1)

    def both(self) -> None:
        """One step of each direction."""
        self(head=False)
        self(head=True)

    def capture(self) -> Callable[[], None]:
        """:meth:`both` as a CUDA graph."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.both()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.both()
        return graph.replay


def rows(shape: Shape, *, rounds: int, threads: int, tiny: bool = False) -> list[Row]:
    """Measure whole steps, on a GPU captured and as they are launched one by one."""
    if tiny:
        relations, name = 3, "zipf"
        triples = zipf_triples(shape.entities, relations, 100)
    else:
        relations = SIZES["relations"]
        name, triples = load_triples()
    on_gpu = torch.device(shape.device).type == "cuda"
    repeats = 20 if on_gpu else 1  # without waiting for the GPU in between, as training does
    steps: dict[str, Step] = {}

    def repeat(run: Callable[[], None]) -> Step:
        def several(_: None) -> None:
            for _i in range(repeats):
                run()

        return Step(several)

    for rival, loss in losses(shape.device).items():
        step = TrainingStep(triples, shape, relations, loss)
        steps[rival] = repeat(step.both)
        if on_gpu:
            try:
                captured = TrainingStep(triples, shape, relations, loss).capture()
            except RuntimeError as error:
                print(f"skipped: {rival}, captured: {str(error).partition(chr(10))[0]}")
            else:
                steps[f"{rival}, captured"] = repeat(captured)
    clock = measure.wall_clock_synchronized if on_gpu else measure.wall_clock
    times = measure.alternate(steps, rounds, shape.device, clock=clock)
    common: dict[str, Any] = results.environment(shape.device) | {
        "family": FAMILY, "phase": PHASE, "graph": name, "model": "DistMult",
        "optimizer": "Adagrad", "library": "", "similarity": "dot", "dtype": "float32",
        "gradient": "dense", "threads": threads,
        "instruction_set": eager_instruction_set(shape.device),
        "B": shape.batch, "K": shape.negatives, "D": shape.dim, "N": shape.entities,
    }  # fmt: skip
    base = base_of(list(steps))
    if base is not None and f"{base}, captured" in steps:
        base = f"{base}, captured"
    found = []

    def add(rival: str, what: str, spread: Spread, base: str = "") -> None:
        values = spread._asdict()
        found.append(Row(what=what, rival=rival, base=base, unit=UNITS[what], **values, **common))

    for rival, of_several in times.items():
        mine = [t / (2 * repeats) for t in of_several]
        add(rival, TIME, Spread.of([1000 * t for t in mine]))
        add(rival, SPEED, Spread.of(mine).per(shape.batch))
        if base is not None:
            pairs = zip(of_several, times[base], strict=True)
            add(rival, RATIO, Spread.of([theirs / ours for theirs, ours in pairs]), base)
    return found
