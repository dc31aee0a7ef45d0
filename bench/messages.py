"""Relational message passing, forward and backward: ours against plain PyTorch.

The graph is a dataset's training triples and their inverses, as NBFNet has them, with relations of
each query and DistMult messages. Plain PyTorch gathers, multiplies and scatters: it is the
specification, ``backend="reference"``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import product
from typing import NamedTuple

import torch

from bench import measure, results
from bench.results import Recorder
from emu_kernels import RelationalGraph, relational_spmm
from emu_kernels.trainer import datasets

OURS, PLAIN = "relational_spmm", "gather, multiply, scatter"
BACKENDS = {OURS: "cpu", PLAIN: "reference"}


class Task(NamedTuple):
    """What is measured."""

    graph: str
    batch: int
    aggregate: str
    dim: int = 32

    def tiny(self) -> Task:
        return self._replace(graph="nations", batch=2)

    def messages(self) -> RelationalGraph:
        graph = datasets.load_dataset(self.graph)
        head, relation, tail = graph.triples["train"].unbind(1)
        index = torch.stack([torch.cat([head, tail]), torch.cat([tail, head])])
        kind = torch.cat([relation, relation + graph.num_relations])
        return RelationalGraph(index, kind, graph.num_entities, 2 * graph.num_relations)


def prepare(rival: str, task: Task) -> Callable[[], None]:
    graph = task.messages()
    shape = (task.batch, task.dim)
    nodes = torch.randn(graph.num_nodes, *shape).requires_grad_()
    relations = torch.randn(graph.num_relations, *shape).requires_grad_()
    own = torch.randn(nodes.shape)

    def step() -> None:
        out = relational_spmm(
            nodes, relations, graph, own=own, aggregate=task.aggregate, backend=BACKENDS[rival]
        )
        torch.autograd.grad(out.sum(), (nodes, relations))

    return step


def run(options: argparse.Namespace) -> int:
    torch.set_num_threads(options.threads)
    for graph, batch, aggregate in product(options.graph, options.batch, options.aggregate):
        task = Task(graph, batch, aggregate)
        task = task.tiny() if options.tiny else task
        edges = task.messages()
        # Plain PyTorch keeps some eight arrays of edges × batch × dim at a time.
        needed = 32 * edges.num_edges * task.batch * task.dim
        reason = measure.too_large(needed, "cpu")
        rivals = [OURS] if reason else list(BACKENDS)
        turns = {name: measure.turn_of(measure.Step(_call(name, task)), "cpu") for name in rivals}
        times = measure.alternate(turns, options.rounds)
        del turns
        recorder = Recorder(
            "cpu", family="messages", phase=aggregate, graph=task.graph, B=task.batch, D=task.dim,
            N=edges.num_nodes, K=edges.num_edges, threads=options.threads, dtype="float32",
        )  # fmt: skip
        for name in rivals:
            recorder.add_times(times, OURS, rival=name)
            if options.memory:
                peak = measure.peak(prepare, name, task, options.threads)
                recorder.add(results.MEMORY, [peak], rival=name)
        for row in recorder.rows:
            spread = f"{row['median']:.4g} ({row['q20']:.4g} to {row['q80']:.4g}) {row['unit']}"
            print(f"{task}: {row['rival']}: {row['what']} {spread}", flush=True)
        if reason:
            print(f"{task}: {PLAIN}: skipped, {reason}", flush=True)
        if not options.tiny:
            results.append(options.results, recorder.rows)
    return 0


def _call(name: str, task: Task) -> Callable[[None], None]:
    step = prepare(name, task)
    return lambda _: step()
