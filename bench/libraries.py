"""Other libraries' training, each at the best settings known to us.

What they share: cross-entropy of each positive among its K negatives, no regulariser and no
constraint on embeddings (both cost time, and the others have none), torch's fused optimiser on a
CPU.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import time
from collections import defaultdict
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from bench.loops import synchronize
from bench.tasks import EMU, Task, new_optimizer
from emu_kernels.trainer.data import Graph


@dataclass(frozen=True)
class Library:
    module: str
    package: str

    def missing(self) -> str | None:
        if find_spec(self.module) is not None:
            return None
        return f"{self.package} is not installed (pip install {self.package})"

    def with_version(self) -> str:
        return f"{self.package} {importlib.metadata.version(self.package)}"


PYKEEN = Library("pykeen", "pykeen")
PYG = Library("torch_geometric", "torch-geometric")
TORCHKGE = Library("torchkge", "torchkge")


def _first(positive: Tensor, negative: Tensor) -> Tensor:
    """(B,), (B, K) scores -> cross-entropy with the positive's place as the class."""
    logits = torch.cat([positive[:, None], negative], dim=1)
    return cross_entropy(logits, torch.zeros(len(logits), dtype=torch.int64, device=logits.device))


class Pykeen:
    """PyKEEN's SLCWATrainingLoop, its basic sampler (vectorised), CrossEntropyLoss.

    In the process itself (num_workers=0): workers would take the cores that compute. Without
    ``pin_memory``, progress bars and the search for a batch size. Each call trains one epoch of as
    many triples as are asked for and one batch more, and the clock is read as batches arrive.
    """

    MODELS: ClassVar[dict[str, dict[str, Any]]] = {
        "DistMult": {"entity_constrainer": None, "regularizer": None},
        "ComplEx": {"regularizer": None},
        "TransE": {"entity_constrainer": None},
        "RotatE": {},  # a constraint keeps its relations on the unit circle: part of the model
    }

    def __init__(self, task: Task, graph: Graph) -> None:
        import logging

        from pykeen.models import model_resolver
        from pykeen.triples import CoreTriplesFactory

        logging.getLogger("pykeen").setLevel(logging.ERROR)
        self.task = task
        self.triples = graph.triples["train"]
        self._factory = lambda triples: CoreTriplesFactory(
            triples, num_entities=graph.num_entities, num_relations=graph.num_relations
        )
        every = self._factory(self.triples)
        model = model_resolver.make(
            task.model.lower(),
            triples_factory=every,
            embedding_dim=task.dim,
            loss="crossentropy",
            random_seed=0,
            **self.MODELS[task.model],
        ).to(task.device)
        self.loop = self.new_loop(
            model=model,
            triples_factory=every,
            optimizer=new_optimizer(task, model.get_grad_params()),
            negative_sampler="basic",
            negative_sampler_kwargs={"num_negs_per_pos": task.negatives},
            automatic_memory_optimization=False,
        )
        self.epoch = 0

    @staticmethod
    def new_loop(**arguments: Any) -> Any:
        from pykeen.training import SLCWATrainingLoop

        return SLCWATrainingLoop(**arguments)

    def __call__(self, steps: int) -> float:
        from pykeen.training import TrainingCallback

        times: list[float] = []
        device = self.task.device

        class Watch(TrainingCallback):
            def pre_batch(self, **kwargs: Any) -> None:
                synchronize(device)
                times.append(time.perf_counter())

        wanted = (steps + 1) * self.task.batch
        chosen = torch.randint(len(self.triples), (wanted,))
        self.epoch += 1
        self.loop.train(
            self._factory(self.triples[chosen]),
            num_epochs=self.epoch,  # in all
            continue_training=self.epoch > 1,
            batch_size=self.task.batch,
            use_tqdm=False,
            drop_last=True,
            pin_memory=False,
            num_workers=0,
            callbacks=Watch(),
        )
        return times[steps] - times[0]


class PykeenEmu(Pykeen):
    """The same with EMU, by the loop that we give PyKEEN."""

    @staticmethod
    def new_loop(**arguments: Any) -> Any:
        from emu_kernels.integrations.pykeen import EMUTrainingLoop

        return EMUTrainingLoop(**EMU, **arguments)


class Pyg:
    """torch_geometric.nn.kge, its loader, and negatives as its ``random_sample`` draws them.

    Its own losses know one negative a positive. With K of them the scores of a row are computed by
    broadcasting where the model's ``forward`` allows it (all but RotatE), so that heads (or tails)
    and relations are looked up once a row; heads and tails are corrupted in turn.
    """

    MODELS: ClassVar[dict[str, bool]] = {  # whether forward broadcasts
        "DistMult": True,
        "ComplEx": True,
        "TransE": True,
        "RotatE": False,
    }

    def __init__(self, task: Task, graph: Graph) -> None:
        from torch_geometric.nn import kge

        self.task = task
        self.model = getattr(kge, task.model)(
            graph.num_entities,
            graph.num_relations,
            task.dim,
            sparse=task.gradient == "sparse",
        ).to(task.device)
        self.optimizer = new_optimizer(task, self.model.parameters())
        head, relation, tail = graph.triples["train"].to(task.device).T.contiguous()
        loader = self.model.loader(
            head, relation, tail, batch_size=task.batch, shuffle=True, drop_last=True
        )
        self.batches = itertools.chain.from_iterable(itertools.repeat(loader))
        self.step = 0

    def __call__(self, steps: int) -> float:
        synchronize(self.task.device)
        start = time.perf_counter()
        for _ in range(steps):
            self._train_step()
        synchronize(self.task.device)
        return time.perf_counter() - start

    def _train_step(self) -> None:
        head, relation, tail = next(self.batches)
        self.optimizer.zero_grad()
        self._loss(head, relation, tail).backward()
        self.optimizer.step()
        self.step += 1

    def _loss(self, head: Tensor, relation: Tensor, tail: Tensor) -> Tensor:
        task, model = self.task, self.model
        shape = (len(head), task.negatives)
        sampled = torch.randint(model.num_nodes, shape, device=task.device)
        others: tuple[Tensor, ...] = (head[:, None], relation[:, None], tail[:, None])
        if not self.MODELS[task.model]:
            others = tuple(x.expand(shape).flatten() for x in others)
            sampled = sampled.flatten()
        corrupted = (others[0], others[1], sampled)
        if self.step % 2:
            corrupted = (sampled, others[1], others[2])
        return _first(model(head, relation, tail), model(*corrupted).view(shape))


class PygEmu(Pyg):
    """The same with EMU, by the loss that we give PyG's models."""

    def _loss(self, head: Tensor, relation: Tensor, tail: Tensor) -> Tensor:
        from emu_kernels.integrations.pyg import emu_loss

        model, count = self.model, self.task.negatives
        return emu_loss(model, head, relation, tail, num_negatives=count, **EMU)


class TorchKge:
    """TorchKGE's model, DataLoader and UniformNegativeSampler; its scores in cross-entropy.

    Entities are normalised where they are looked up, as its models do; ``normalize_parameters``,
    due once an epoch, is left out.
    """

    MODELS: ClassVar[dict[str, dict[str, Any]]] = {
        "DistMult": {},
        "ComplEx": {},
        "TransE": {"dissimilarity_type": "L1"},
    }

    def __init__(self, task: Task, graph: Graph) -> None:
        from torchkge import models
        from torchkge.data_structures import KnowledgeGraph
        from torchkge.sampling import UniformNegativeSampler
        from torchkge.utils import DataLoader

        self.task = task
        head, relation, tail = graph.triples["train"].to(task.device).T.contiguous()
        nothing: dict[Any, Any] = defaultdict(set)  # known triples, for evaluation only
        knowledge = KnowledgeGraph(
            kg={"heads": head, "tails": tail, "relations": relation},
            ent2ix={i: i for i in range(graph.num_entities)},
            rel2ix={i: i for i in range(graph.num_relations)},
            dict_of_heads=nothing,
            dict_of_tails=nothing,
            dict_of_rels=nothing,
        )
        model = getattr(models, f"{task.model}Model")
        self.model = model(
            task.dim, graph.num_entities, graph.num_relations, **self.MODELS[task.model]
        ).to(task.device)
        self.optimizer = new_optimizer(task, self.model.parameters())
        self.sampler = UniformNegativeSampler(knowledge, n_neg=task.negatives)
        loader = DataLoader(knowledge, batch_size=task.batch)
        self.batches = (
            batch
            for batch in itertools.chain.from_iterable(itertools.repeat(loader))
            if len(batch[0]) == task.batch
        )

    def __call__(self, steps: int) -> float:
        synchronize(self.task.device)
        start = time.perf_counter()
        for _ in range(steps):
            head, tail, relation = next(self.batches)
            self.optimizer.zero_grad()
            positive, negative = self.model(
                head, tail, relation, *self.sampler.corrupt_batch(head, tail, relation)
            )
            rows = len(head)  # repeated once a negative, block by block
            _first(positive[:rows], negative.view(-1, rows).T).backward()
            self.optimizer.step()
        synchronize(self.task.device)
        return time.perf_counter() - start
