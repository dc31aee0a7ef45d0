"""Training from end to end, trainer against trainer, each at the best settings known to us.

All train the same model at the same dimension, batch, number of negatives (uniform, half of them
heads) and optimiser, on the same triples, with cross-entropy of the positive among its negatives or
with EMU: no regulariser, no constraint on embeddings, no evaluation. A step is everything: drawing
triples and negatives, loss, gradients, optimiser. Building loaders and shuffling is not timed.

The other libraries are imported only where they are used: the list needs none of them.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import io
import itertools
import logging
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import embedding

from bench import eager, measure
from bench.inputs import Shape, is_gpu
from bench.measure import synchronize
from bench.results import MEMORY, Recorder, Row
from bench.steps import Setting
from emu_kernels import fused_emu_loss

MISSING: str | None = None  # why our trainer cannot be imported
try:
    from emu_kernels.trainer import data, loop
    from emu_kernels.trainer.config import Config
    from emu_kernels.trainer.datasets import load_dataset
    from emu_kernels.trainer.errors import ConfigError, DataError
    from emu_kernels.trainer.models import MODELS
    from emu_kernels.trainer.neighbourhood import adjacency, random_walks
except ModuleNotFoundError as error:
    MISSING = str(error)
if TYPE_CHECKING:
    from emu_kernels.trainer.data import Graph

ZIPF = "zipf"
RELATIONS = 500  # of the synthetic graph, which has as many triples as entities
PHASE = "training step"
LEARNING_RATE = 0.1
EMU: dict[str, Any] = {"mutation_rate": 0.61, "beta": 0.53, "alpha": 0.11}
"""Our trainer's defaults; the times do not depend on them."""


@dataclass(frozen=True)
class Task(Shape):
    """One training run. The default is the paper's setting on FB15k-237."""

    entities: int = 1_000_000  # of the synthetic graph
    similarity: str = ""  # the model's
    graph: str = "FB15k-237"
    model: str = "DistMult"
    optimizer: str = "Adagrad"

    def tiny(self) -> Task:
        return super().tiny().replace(graph=ZIPF)

    def load(self) -> Graph:
        """The graph, of training triples alone.

        Raises:
            FileNotFoundError: the dataset is not at hand and cannot be downloaded.
        """
        if MISSING is not None:
            raise ModuleNotFoundError(MISSING)
        if self.graph == ZIPF:
            train = zipf_triples(self.entities, RELATIONS, self.entities)
            entities: Any = range(self.entities)  # training does not use names
            relations: Any = range(RELATIONS)
        else:
            try:
                graph = load_dataset(self.graph)
            except DataError as error:
                raise FileNotFoundError(str(error)) from error
            train, entities, relations = graph.triples["train"], graph.entities, graph.relations
        none = train.new_empty((0, 3))
        return data.Graph(entities, relations, {"train": train, "valid": none, "test": none})

    def __str__(self) -> str:
        sizes = f"d={self.dim}, B={self.batch}, K={self.negatives}"
        graph = f"{self.graph} ({self.entities:,})" if self.graph == ZIPF else self.graph
        return f"{self.model} on {graph}, {sizes}, {self.optimizer}, {self.gradient} gradients"


def zipf_triples(entities: int, relations: int, triples: int) -> Tensor:
    """(triples, 3) of ids: rank i of entities and relations has a probability close to 1 / i.

    Zipf's law with exponent 1 is nearly that of (size + 1)^u, rounded down, for uniform u. Frequent
    entities are at random places, as in a real table, so that their rows are far apart.
    """
    draws = torch.Generator().manual_seed(0)
    place = torch.randperm(entities, generator=draws)

    def ranks(size: int) -> Tensor:
        uniform = torch.rand(triples, generator=draws, dtype=torch.float64)
        return uniform.mul_(math.log(size + 1)).exp_().long().clamp_(1, size) - 1

    columns = (place[ranks(entities)], ranks(relations), place[ranks(entities)])
    return torch.stack(columns, dim=1)


class Trainer:
    """A call trains some steps and returns their seconds."""

    name: ClassVar[str]  # in results and on the command line
    title: ClassVar[str]  # in tables
    library: ClassVar[str] = ""  # the package
    device: ClassVar[str | None] = None  # it runs on any
    models: ClassVar[dict[str, Any]] = {}  # with options; none: all of ours
    can_be_sparse: ClassVar[bool] = True
    has_ours: ClassVar[bool] = False  # our kernels
    optimizer: torch.optim.Optimizer
    loss: Callable[[], Tensor]

    def __init__(self, task: Task, graph: Graph) -> None:
        self.task = task
        self.step = 0

    def __call__(self, steps: int) -> float:
        synchronize(self.task.device)
        start = time.perf_counter()
        self.train(steps)
        synchronize(self.task.device)
        return time.perf_counter() - start

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.optimizer.zero_grad()
            self.loss().backward()
            self.optimizer.step()
            self.step += 1

    def set_optimizer(self, parameters: Iterable[Any]) -> None:
        """The fastest available: on a CPU fused, unless gradients are sparse."""
        task = self.task
        name = "SparseAdam" if task.sparse and task.optimizer == "Adam" else task.optimizer
        fused = {} if task.sparse or is_gpu(task.device) else {"fused": True}
        self.optimizer = getattr(torch.optim, name)(list(parameters), lr=LEARNING_RATE, **fused)

    @classmethod
    def columns(cls, task: Task) -> dict[str, Any]:
        """Of a row of results."""
        version = f"{cls.library} {importlib.metadata.version(cls.library)}" if cls.library else ""
        return {"gradient": cls.adapt(task).gradient, "library": version}

    @classmethod
    def unavailable(cls, task: Task) -> str | None:
        """Why it cannot run the task here, or None."""
        if MISSING is not None:
            return MISSING
        if cls.library and find_spec(cls.library.replace("-", "_")) is None:
            return f"{cls.library} is not installed (pip install {cls.library})"
        if cls.models and task.model not in cls.models:
            return f"has no {task.model}"
        # Parameters, gradients, the optimiser's state and temporaries; tensors of B·K·D.
        tables = 3 if cls.adapt(task).sparse else 6
        entities = task.entities if task.graph == ZIPF else 200_000  # more than any dataset has
        width = MODELS[task.model].entity_width * task.dim * 4
        rows = entities * tables + task.batch * task.negatives * 12
        return measure.too_large(rows * width, task.device)

    @classmethod
    def adapt(cls, task: Task) -> Task:
        """The task with dense gradients where this trainer has no sparse ones for it."""
        return task if cls.can_be_sparse else task.replace(gradient="dense")


class OurTrainer(Trainer):
    """``emu-train``, without evaluation."""

    name, title, kind, has_ours = "trainer-emu", "**our trainer, EMU**", "emu", True

    def __init__(self, task: Task, graph: Graph) -> None:
        super().__init__(task, graph)
        self.trainer = loop.Trainer(loop.settle(self.config(task)), graph)

    @classmethod
    def config(cls, task: Task) -> Config:
        never = 2**62
        return Config(
            data=task.graph,  # a name only: the graph is passed to the trainer
            model=task.model, dim=task.dim, loss=cls.kind, batch_size=task.batch,
            negatives=task.negatives, optimizer=task.optimizer, lr=LEARNING_RATE,
            sparse=task.sparse, device=task.device,
            regularization=0.0, eval_every=never, log_every=never, **EMU,
        )  # fmt: skip

    def train(self, steps: int) -> None:
        self.step += steps
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
            self.trainer.train(self.step)

    @classmethod
    def adapt(cls, task: Task) -> Task:
        with contextlib.suppress(ConfigError):
            cls.config(task)
            return task
        return task.replace(gradient="dense")  # not sparse with these settings


class OurSoftmax(OurTrainer):
    name, title, kind = "trainer-softmax", "our trainer, sampled softmax", "softmax"


class Loop(Trainer):
    """An ordinary loop: shuffled triples, tails and heads corrupted in turn, embeddings, softmax.

    The query is computed once a row and scored with its K candidates, gathered by ``embedding``.
    """

    name, title = "loop-softmax", "PyTorch loop"
    function: ClassVar[Callable[..., Tensor]] = staticmethod(eager.softmax_loss)

    def __init__(self, task: Task, graph: Graph) -> None:
        super().__init__(task, graph)
        draws = torch.Generator().manual_seed(0)
        self.model = MODELS[task.model](graph.num_entities, graph.num_relations, task.dim, draws)
        self.model.to(task.device)
        self.set_optimizer(self.model.parameters())
        self.triples = graph.triples["train"].to(task.device)
        self.order = torch.randperm(len(self.triples), device=task.device)

    def loss(self) -> Tensor:
        task, model = self.task, self.model
        direction = data.DIRECTIONS[self.step % 2]
        first = self.step * task.batch % max(1, len(self.order) - task.batch + 1)
        batch = self.triples[self.order[first : first + task.batch]]
        given, relation, positive = data.split_triples(batch, direction)
        shape = (len(batch), task.negatives)
        negative = torch.randint(len(model.entity), shape, device=task.device)
        heads = embedding(given, model.entity, sparse=task.sparse)
        relations = embedding(relation, model.relation, sparse=task.sparse)
        query = model.query(heads, relations, direction).vector
        return self.function(query, model.entity, positive, negative, **self.options())

    def options(self) -> dict[str, Any]:
        spelling = eager.SPELLINGS[self.model.similarity][-1 if is_gpu(self.task.device) else 0]
        return {"scores": spelling, "sparse": self.task.sparse}


class LoopEmu(Loop):
    name, title = "loop-emu", "PyTorch loop with eager EMU"
    function = staticmethod(functools.partial(eager.emu_loss, **EMU))


class FusedLoop(Loop):
    name, title, has_ours = "fused-loop-emu", "PyTorch loop with our EMU", True
    function = staticmethod(functools.partial(fused_emu_loss, **EMU))

    def options(self) -> dict[str, Any]:
        return {"similarity": self.model.similarity, "sparse_grad": self.task.sparse}


def _cross_entropy(positive: Tensor, negative: Tensor) -> Tensor:
    """(B,), (B, K) scores -> the loss with the positive as the right class."""
    return eager.first_class(torch.cat([positive[:, None], negative], dim=1))


class Pykeen(Trainer):
    """PyKEEN's SLCWATrainingLoop, its basic sampler (vectorised), CrossEntropyLoss.

    Without worker processes, which would take the cores that compute. Each call trains an epoch of
    steps + 1 batches, and the clock is read when the first and the last one begin.
    """

    name, title = "pykeen", "PyKEEN, sLCWA"
    library, can_be_sparse = "pykeen", False
    models: ClassVar[dict[str, Any]] = {
        "DistMult": {"entity_constrainer": None, "regularizer": None},
        "ComplEx": {"regularizer": None},
        "TransE": {"entity_constrainer": None},
        "RotatE": {},  # relations are constrained to the unit circle: part of the model
    }

    def __init__(self, task: Task, graph: Graph) -> None:
        from pykeen.models import model_resolver
        from pykeen.triples import CoreTriplesFactory

        super().__init__(task, graph)
        logging.getLogger("pykeen").setLevel(logging.ERROR)
        self.triples = graph.triples["train"]
        self.factory = lambda triples: CoreTriplesFactory(
            triples, num_entities=graph.num_entities, num_relations=graph.num_relations
        )
        every = self.factory(self.triples)
        model = model_resolver.make(
            task.model.lower(), triples_factory=every, embedding_dim=task.dim,
            loss="crossentropy", random_seed=0, **self.models[task.model],
        ).to(task.device)  # fmt: skip
        self.set_optimizer(model.get_grad_params())
        self.training_loop = self.loop_class()(
            model=model, triples_factory=every, optimizer=self.optimizer,
            negative_sampler="basic", automatic_memory_optimization=False,
            negative_sampler_kwargs={"num_negs_per_pos": task.negatives},
        )  # fmt: skip
        self.epoch = 0

    def loop_class(self) -> Any:
        from pykeen.training import SLCWATrainingLoop

        return SLCWATrainingLoop

    def __call__(self, steps: int) -> float:
        from pykeen.training import TrainingCallback

        times: list[float] = []
        device = self.task.device

        class Watch(TrainingCallback):
            def pre_batch(self, **kwargs: Any) -> None:
                synchronize(device)
                times.append(time.perf_counter())

        chosen = torch.randint(len(self.triples), ((steps + 1) * self.task.batch,))
        self.epoch += 1
        self.step += steps
        self.training_loop.train(
            self.factory(self.triples[chosen]), num_epochs=self.epoch,  # in total
            continue_training=self.epoch > 1, batch_size=self.task.batch, use_tqdm=False,
            drop_last=True, pin_memory=False, num_workers=0, callbacks=Watch(),
        )  # fmt: skip
        return times[steps] - times[0]


class PykeenEmu(Pykeen):
    name, title, has_ours = "pykeen-emu", "PyKEEN with our EMU", True

    def loop_class(self) -> Any:
        from emu_kernels.integrations.pykeen import EMUTrainingLoop

        return functools.partial(EMUTrainingLoop, **EMU)


class Pyg(Trainer):
    """torch_geometric.nn.kge, its loader, and negatives drawn as by its ``random_sample``.

    Its own losses take one negative a positive. With K of them the scores of a row are computed by
    broadcasting where the model's ``forward`` allows it, so that heads (or tails) and relations are
    looked up once a row; heads and tails are corrupted in turn.
    """

    name, title = "pyg", "PyTorch Geometric"
    library = "torch-geometric"
    models: ClassVar[dict[str, Any]] = dict.fromkeys(("DistMult", "ComplEx", "TransE", "RotatE"))

    def __init__(self, task: Task, graph: Graph) -> None:
        from torch_geometric.nn import kge

        super().__init__(task, graph)
        sizes = (graph.num_entities, graph.num_relations, task.dim)
        self.model = getattr(kge, task.model)(*sizes, sparse=task.sparse).to(task.device)
        self.set_optimizer(self.model.parameters())
        triples = graph.triples["train"].to(task.device).T.contiguous()
        loader = self.model.loader(*triples, batch_size=task.batch, shuffle=True, drop_last=True)
        self.batches = itertools.chain.from_iterable(itertools.repeat(loader))

    def loss(self) -> Tensor:
        triples = next(self.batches)
        shape = (len(triples[0]), self.task.negatives)
        sampled = torch.randint(self.model.num_nodes, shape, device=self.task.device)
        corrupted = [ids[:, None] for ids in triples]
        corrupted[0 if self.step % 2 else 2] = sampled
        if self.task.model == "RotatE":  # its forward does not broadcast
            corrupted = [ids.expand(shape).flatten() for ids in corrupted]
        return _cross_entropy(self.model(*triples), self.model(*corrupted).view(shape))


class PygEmu(Pyg):
    name, title, has_ours = "pyg-emu", "PyTorch Geometric with our EMU", True

    def loss(self) -> Tensor:
        from emu_kernels.integrations.pyg import emu_loss

        count = self.task.negatives
        return emu_loss(self.model, *next(self.batches), num_negatives=count, **EMU)


class TorchKge(Trainer):
    """TorchKGE's model, DataLoader and UniformNegativeSampler; its scores in cross-entropy.

    Entities are normalised at each look-up, as its models do; ``normalize_parameters``, due once an
    epoch, is left out.
    """

    name, title = "torchkge", "TorchKGE"
    library, can_be_sparse = "torchkge", False
    models: ClassVar[dict[str, Any]] = {
        "DistMult": {}, "ComplEx": {}, "TransE": {"dissimilarity_type": "L1"},
    }  # fmt: skip

    def __init__(self, task: Task, graph: Graph) -> None:
        from torchkge import models
        from torchkge.data_structures import KnowledgeGraph
        from torchkge.sampling import UniformNegativeSampler
        from torchkge.utils import DataLoader

        super().__init__(task, graph)
        columns = graph.triples["train"].to(task.device).T.contiguous()
        known: Any = defaultdict(set)  # only evaluation needs the known triples
        knowledge = KnowledgeGraph(
            kg=dict(zip(("heads", "relations", "tails"), columns, strict=True)),
            ent2ix={i: i for i in range(graph.num_entities)},
            rel2ix={i: i for i in range(graph.num_relations)},
            dict_of_heads=known, dict_of_tails=known, dict_of_rels=known,
        )  # fmt: skip
        sizes = (task.dim, graph.num_entities, graph.num_relations)
        kind = getattr(models, f"{task.model}Model")
        self.model = kind(*sizes, **self.models[task.model]).to(task.device)
        self.set_optimizer(self.model.parameters())
        self.sampler = UniformNegativeSampler(knowledge, n_neg=task.negatives)
        loader = DataLoader(knowledge, batch_size=task.batch)
        batches = itertools.chain.from_iterable(itertools.repeat(loader))
        self.batches = (batch for batch in batches if len(batch[0]) == task.batch)

    def loss(self) -> Tensor:
        head, tail, relation = next(self.batches)
        corrupted = self.sampler.corrupt_batch(head, tail, relation)
        positive, negative = self.model(head, tail, relation, *corrupted)
        rows = len(head)  # both are repeated once a negative, block by block
        return _cross_entropy(positive[:rows], negative.view(-1, rows).T)


TRAINERS: tuple[type[Trainer], ...] = (
    OurTrainer, OurSoftmax, FusedLoop, Loop, LoopEmu, Pykeen, PykeenEmu, Pyg, PygEmu, TorchKge,
)  # fmt: skip
BY_NAME = {trainer.name: trainer for trainer in TRAINERS}


def settings(options: Any) -> Iterator[Setting]:
    """Of the command ``train``."""
    fields = ("entities", "dim", "batch", "negatives", "optimizer")
    shared = {field: getattr(options, field) for field in fields}
    for graph, model in itertools.product(options.graph, options.model):
        gradient = options.gradient or ("sparse" if graph == ZIPF else "dense")
        task = Task(graph=graph, model=model, gradient=gradient, **shared)
        yield Setting(task, options.rivals, family="train")


def for_memory(name: str, task: Any) -> Callable[[], Trainer]:
    """Model, gradients, optimiser and temporaries; not the triples."""
    return functools.partial(_start, BY_NAME[name], task, task.load())


def _start(trainer: type[Trainer], task: Task, graph: Graph) -> Trainer:
    """Warmed up."""
    run = trainer(trainer.adapt(task), graph)
    run(measure.MEMORY_STEPS)
    return run


def _turn(run: Trainer, min_seconds: float) -> measure.Turn:
    steps = max(1, math.ceil(min_seconds / run(1)))
    return lambda: run(steps) / steps


def rows(trainers: Sequence[type[Trainer]], setting: Setting, options: Any) -> list[Row]:
    """Measure, with the options of the command line."""
    task: Any = setting.shape
    graph = task.load()
    record = Recorder(
        task.device, family=setting.family, phase=PHASE, graph=task.graph, model=task.model,
        optimizer=task.optimizer, threads=options.threads,
        **task.columns() | {"N": graph.num_entities},
    )  # fmt: skip
    turns, peaks = {}, {}
    for trainer in measure.progress(trainers, "trainer"):
        start = functools.partial(_start, trainer, task, graph)
        if is_gpu(task.device):
            run, peak = measure.cuda_peak(start)
            peaks[trainer.name] = [peak]
        else:
            run = start()
        turns[trainer.name] = _turn(run, 0.0 if options.tiny else 0.25)
    times = measure.alternate(turns, options.rounds)
    del run, turns
    if not is_gpu(task.device):
        peaks = measure.peaks(options, for_memory, times, task)
    for trainer in trainers:
        here = {"rival": trainer.name, **trainer.columns(task)}
        record.add_times(times, OurTrainer.name, batch=task.batch, **here)
        if trainer.name in peaks:
            record.add(MEMORY, peaks[trainer.name], **here)
    return record.rows


def sampling_rows(options: Any) -> list[Row]:
    """The random walks of structure-aware negatives, from the training triples, nothing cached.

    K is the number of walks from each entity.
    """
    name = ZIPF if options.tiny else options.graph
    graph = Task(graph=name, entities=1000).load()
    record = Recorder(
        "cpu", family="sampling", graph=name, phase=f"{options.hops} hops",
        threads=options.threads, B=0, K=options.walks, D=0, N=graph.num_entities,
    )  # fmt: skip

    def seconds() -> float:
        start = time.perf_counter()
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
            edges = adjacency(graph.triples["train"], graph.num_entities)
            random_walks(edges, options.hops, options.walks, seed=0)
        return time.perf_counter() - start

    times = measure.alternate({"random-walks": seconds}, options.rounds)
    record.add_times(times, rival="random-walks")
    return record.rows
