"""Relational message passing, forward and backward: ours against plain PyTorch.

The graph is a dataset's training triples and their inverses, as in NBFNet, with different relations
for each query and DistMult messages. Plain PyTorch gathers, multiplies and scatters: it is the
specification, ``backend="reference"``. The graph "zipf" is random, with as many nodes, relations
and triples as FB15k-237, but its busiest node has a tenth of all triples; it needs no download.
``--aggregate nbfnet`` measures a training step of NBFNet, as its authors train it on FB15k-237.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from bench import measure, results
from bench.trainers import ZIPF, zipf_triples
from emu_kernels import RelationalGraph, relational_spmm

OURS, PLAIN = "relational_spmm", "gather, multiply, scatter"
BACKENDS = {OURS: None, PLAIN: "reference"}
NBFNET, STEP = "nbfnet", "a training step of NBFNet"


class Task(NamedTuple):
    """What is measured."""

    graph: str
    batch: int
    aggregate: str
    dim: int = 32
    device: str = "cpu"
    triples: int = 272_115  # of zipf

    def __str__(self) -> str:
        return f"{self.graph}, {self.aggregate}, B={self.batch}, d={self.dim}, {self.device}"

    def tiny(self) -> Task:
        return self._replace(graph=ZIPF, batch=2, triples=1000)

    def load(self) -> tuple[int, int, Tensor]:
        """Numbers of entities and of relations, and the triples (M, 3)."""
        entities, relations = 14_541, 237
        if self.graph == ZIPF:
            return entities, relations, zipf_triples(entities, relations, self.triples)
        from emu_kernels.trainer.datasets import load_dataset  # a GPU's machine may lack it

        graph = load_dataset(self.graph)
        return graph.num_entities, graph.num_relations, graph.triples["train"]

    def messages(self) -> RelationalGraph:
        entities, relations, triples = self.load()
        head, relation, tail = triples.to(self.device).unbind(1)
        index = torch.stack([torch.cat([head, tail]), torch.cat([tail, head])])
        kind = torch.cat([relation, relation + relations])
        return RelationalGraph(index, kind, entities, 2 * relations)

    def training(self) -> Callable[[], None]:
        """A step of NBFNet's training."""
        from emu_kernels.trainer import config, data, loop, presets

        entity_count, relation_count, triples = self.load()
        splits = {"train": triples, "valid": triples[:0], "test": triples[:0]}
        entities, relations = map(str, range(entity_count)), map(str, range(relation_count))
        settings = presets.PRESETS["nbfnet-fb15k-237"] | {"batch_size": self.batch, "dim": self.dim}
        settled = loop.settle(config.Config(**settings, device=self.device))
        graph = data.Graph(list(entities), list(relations), splits)
        return loop.Trainer(settled, graph)._train_step


def prepare(rival: str, task: Task) -> Callable[[], None]:
    if rival == STEP:
        return task.training()
    graph = task.messages()
    shape = (task.batch, task.dim)
    nodes = torch.randn(graph.num_nodes, *shape, device=task.device).requires_grad_()
    relations = torch.randn(graph.num_relations, *shape, device=task.device).requires_grad_()
    own = torch.randn_like(nodes)
    sections = (4,) if task.aggregate == "pna" else ()
    grad = torch.randn(graph.num_nodes, task.batch, *sections, task.dim, device=task.device)

    def step() -> None:
        out = relational_spmm(
            nodes, relations, graph, own=own, aggregate=task.aggregate, backend=BACKENDS[rival]
        )
        torch.autograd.grad(out, (nodes, relations), grad)

    return step


def start(rival: str, task: Task) -> measure.Turn:
    step = prepare(rival, task)
    return measure.turn_of(lambda: step, task.device)


def run(options: argparse.Namespace) -> int:
    torch.set_num_threads(options.threads)
    device = options.device
    for graph, batch, aggregate in product(options.graph, options.batch, options.aggregate):
        task = Task(graph, batch, aggregate, device=device)
        task = task.tiny() if options.tiny else task
        edges = task.messages()
        # Plain PyTorch keeps some eight arrays of edges × batch × dim at a time.
        needed = 32 * edges.num_edges * task.batch * task.dim
        if (reason := measure.too_large(needed, device)) and aggregate != NBFNET:
            print(f"{task}: {PLAIN}: skipped, {reason}", flush=True)
        rivals = [STEP] if aggregate == NBFNET else [OURS] if reason else list(BACKENDS)
        starts = {name: partial(start, name, task) for name in rivals}
        times = measure.alternate(starts, options.rounds)
        shared = results.environment(device) | {
            "family": "messages", "phase": aggregate, "graph": task.graph, "B": task.batch,
            "D": task.dim, "N": edges.num_nodes, "K": edges.num_edges, "threads": options.threads,
            "dtype": "float32",
        }  # fmt: skip
        rows: list[results.Row] = []
        for name in times:
            rows += results.of_times(times, rivals[0], name)
            if options.memory:
                peak = measure.peak(partial(prepare, name), task, options.threads)
                rows.append(results.of_values(results.MEMORY, [peak], rival=name))
        for row in rows:
            spread = f"{row['median']:.4g} ({row['q20']:.4g} to {row['q80']:.4g}) {row['unit']}"
            print(f"{task}: {row['rival']}: {row['what']} {spread}", flush=True)
        if not options.tiny:
            results.append(options.results, [shared | row for row in rows])
    return 0
