"""What trainers are given: a model, its sizes, a graph."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from bench import graphs
from emu_kernels.trainer.data import Graph

EMU: dict[str, Any] = {"mutation_rate": 0.61, "beta": 0.53, "alpha": 0.11}
"""The trainer's defaults; the times do not depend on them."""


@dataclass(frozen=True)
class Task:
    """One training run. The default is the paper's setting on FB15k-237."""

    graph: str = "FB15k-237"
    entities: int = 1_000_000  # of the synthetic graph, and so on
    relations: int = 500
    triples: int = 1_000_000
    model: str = "DistMult"
    dim: int = 100
    batch: int = 1000
    negatives: int = 256
    optimizer: str = "Adagrad"
    lr: float = 0.1
    gradient: str = "dense"
    device: str = "cpu"

    @property
    def num_entities(self) -> int:
        """The synthetic graph's; of the public ones, which are small, an upper limit."""
        return self.entities if self.graph == graphs.ZIPF else 200_000

    def load(self) -> Graph:
        return graphs.load(self.graph, self.entities, self.relations, self.triples)

    def replace(self, **changes: Any) -> Task:
        return dataclasses.replace(self, **changes)

    def __str__(self) -> str:
        sizes = f"d={self.dim}, B={self.batch}, K={self.negatives}"
        graph = f"{self.graph} ({self.entities:,})" if self.graph == graphs.ZIPF else self.graph
        return f"{self.model} on {graph}, {sizes}, {self.optimizer}, {self.gradient} gradients"


def tiny(task: Task) -> Task:
    """The same run in small, for tests and to warm up what a process does only once."""
    return task.replace(
        graph=graphs.ZIPF, entities=50, relations=3, triples=200, dim=8, batch=10, negatives=4
    )


class Run(Protocol):
    def __call__(self, steps: int) -> float:
        """Train; returns the seconds that the steps took."""


def new_optimizer(task: Task, parameters: Any) -> torch.optim.Optimizer:
    """The fastest that there is: on a CPU fused, which sparse gradients do not have."""
    parameters = list(parameters)
    if task.gradient == "sparse":
        if task.optimizer == "Adam":
            return torch.optim.SparseAdam(parameters, lr=task.lr)
        return torch.optim.Adagrad(parameters, lr=task.lr)
    fused = True if torch.device(task.device).type == "cpu" else None
    optimizer: torch.optim.Optimizer = getattr(torch.optim, task.optimizer)(
        parameters, lr=task.lr, fused=fused
    )
    return optimizer
