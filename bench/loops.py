"""Training as one writes it in PyTorch, with our operator in it, and by our trainer."""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import embedding

from bench import eager
from bench.tasks import EMU, Run, Task, new_optimizer
from emu_kernels import fused_emu_loss, fused_softmax_loss
from emu_kernels.trainer.config import Config
from emu_kernels.trainer.data import DIRECTIONS, Graph, split_triples
from emu_kernels.trainer.errors import ConfigError
from emu_kernels.trainer.loop import Trainer, settle
from emu_kernels.trainer.models import MODELS


def synchronize(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


class Loop:
    """An ordinary loop: shuffled triples, tails and heads corrupted in turn, embeddings, softmax.

    The query is computed once a row and met with its K candidates, gathered by ``embedding``.
    """

    LOSSES: ClassVar[dict[str, Callable[..., Tensor]]] = {
        "softmax": eager.softmax_loss,
        "emu": eager.emu_loss,
    }

    def __init__(self, task: Task, graph: Graph, loss: str) -> None:
        self.task = task
        self.sparse = task.gradient == "sparse"
        self.loss, self.options = self.LOSSES[loss], EMU if loss == "emu" else {}
        draws = torch.Generator().manual_seed(0)
        self.model = MODELS[task.model](graph.num_entities, graph.num_relations, task.dim, draws)
        self.model.to(task.device)
        self.scores = eager.SPELLINGS[self.model.similarity][0 if task.device == "cpu" else -1]
        self.optimizer = new_optimizer(task, self.model.parameters())
        self.triples = graph.triples["train"].to(task.device)
        self.order = torch.randperm(len(self.triples), device=task.device)
        self.step = 0

    @classmethod
    def of(cls, loss: str) -> Callable[[Task, Graph], Run]:
        return lambda task, graph: cls(task, graph, loss)

    def __call__(self, steps: int) -> float:
        synchronize(self.task.device)
        start = time.perf_counter()
        for _ in range(steps):
            self._train_step()
        synchronize(self.task.device)
        return time.perf_counter() - start

    def _train_step(self) -> None:
        task, model = self.task, self.model
        direction = DIRECTIONS[self.step % 2]
        first = self.step * task.batch % max(1, len(self.order) - task.batch + 1)
        batch = self.triples[self.order[first : first + task.batch]]
        given, relation, positive = split_triples(batch, direction)
        shape = (len(batch), task.negatives)
        negative = torch.randint(len(model.entity), shape, device=task.device)
        query = model.query(
            embedding(given, model.entity, sparse=self.sparse),
            embedding(relation, model.relation, sparse=self.sparse),
            direction,
        ).vector
        self.optimizer.zero_grad()
        self._loss(query, positive, negative).backward()
        self.optimizer.step()
        self.step += 1

    def _loss(self, query: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        return self.loss(
            query, self.model.entity, positive, negative,
            scores=self.scores, sparse=self.sparse, **self.options,
        )  # fmt: skip


class FusedLoop(Loop):
    """The same loop with the loss replaced by ours."""

    LOSSES: ClassVar[dict[str, Callable[..., Tensor]]] = {
        "softmax": fused_softmax_loss,
        "emu": fused_emu_loss,
    }

    def _loss(self, query: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        arguments: dict[str, Any] = {"similarity": self.model.similarity, **self.options}
        return self.loss(
            query, self.model.entity, positive, negative, sparse_grad=self.sparse, **arguments
        )


class OurTrainer:
    """``emu-train``, without evaluation."""

    def __init__(self, task: Task, graph: Graph, loss: str) -> None:
        self.task = task
        self.trainer = Trainer(settle(self._config(task, loss)), graph)

    @staticmethod
    def _config(task: Task, loss: str) -> Config:
        never = 2**62
        return Config(
            data=task.graph,  # a name; the graph itself is given
            model=task.model,
            dim=task.dim,
            loss=loss,
            batch_size=task.batch,
            negatives=task.negatives,
            optimizer=task.optimizer,
            lr=task.lr,
            sparse=task.gradient == "sparse",
            regularization=0.0,
            eval_every=never,
            log_every=never,
            device=task.device,
            **EMU,
        )

    @classmethod
    def can_be_sparse(cls, task: Task) -> bool:
        """Whether ``--sparse`` goes with the rest."""
        try:
            cls._config(task.replace(gradient="sparse"), "emu")
        except ConfigError:
            return False
        return True

    @classmethod
    def of(cls, loss: str) -> Callable[[Task, Graph], Run]:
        return lambda task, graph: cls(task, graph, loss)

    def __call__(self, steps: int) -> float:
        synchronize(self.task.device)
        start = time.perf_counter()
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bar is for a terminal
            self.trainer.train(self.trainer.step + steps)
        synchronize(self.task.device)
        return time.perf_counter() - start
