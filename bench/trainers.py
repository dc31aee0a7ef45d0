"""Training from end to end, trainer against trainer, each at the best settings known to us.

All train the same model at the same dimension, batch, number of negatives (uniform, half of them
heads) and optimiser, on the same triples, with cross-entropy of the positive among its negatives or
with EMU: no regulariser, no constraint on embeddings, no evaluation. A step is everything: drawing
triples and negatives, loss, gradients, optimiser. Building loaders and shuffling is not timed.

The other libraries, and our trainer, are imported only where they are used: the list needs none.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import itertools
import logging
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import embedding

from bench import eager, measure
from bench.inputs import Shape, is_gpu
from bench.rivals import BY_NAME as STEPS
from bench.rivals import EMU, TRAINING, Loss
from bench.steps import Setting
from emu_kernels import fused_emu_loss

if TYPE_CHECKING:
    from emu_kernels.trainer.config import Config
    from emu_kernels.trainer.data import Graph

ZIPF = "zipf"
RELATIONS = 500  # of the synthetic graph, which has as many triples as entities
LEARNING_RATE = 0.1


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

    def columns(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("graph", "model", "optimizer")}
        return super().columns() | own

    def load(self) -> tuple[Task, Graph]:
        """With the graph, of training triples alone.

        Raises:
            FileNotFoundError: the dataset is not at hand and cannot be downloaded.
        """
        from emu_kernels.trainer import data, datasets, errors

        if self.graph == ZIPF:
            train = zipf_triples(self.entities, RELATIONS, self.entities)
            entities: Any = range(self.entities)  # training does not use names
            relations: Any = range(RELATIONS)
        else:
            try:
                graph = datasets.load_dataset(self.graph)
            except errors.DataError as error:
                raise FileNotFoundError(str(error)) from error
            train, entities, relations = graph.triples["train"], graph.entities, graph.relations
        none = train.new_empty((0, 3))
        splits = {"train": train, "valid": none, "test": none}
        return self.replace(entities=len(entities)), data.Graph(entities, relations, splits)

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


Run = Callable[[int], float]  # trains so many steps and returns their seconds


def timed(train: Callable[[int], object], device: str) -> Run:
    return lambda steps: measure.wall_clock(lambda: partial(train, steps), device)


def new_optimizer(task: Task, parameters: Iterable[Any]) -> torch.optim.Optimizer:
    """The fastest available: on a CPU fused, unless gradients are sparse."""
    name = "SparseAdam" if task.sparse and task.optimizer == "Adam" else task.optimizer
    fused = {} if task.sparse or is_gpu(task.device) else {"fused": True}
    return getattr(torch.optim, name)(list(parameters), lr=LEARNING_RATE, **fused)


def by_hand(task: Task, parameters: Iterable[Any], loss: Callable[[int], Tensor]) -> Run:
    """The usual loop, with a loss of the step's number."""
    optimizer, numbers = new_optimizer(task, parameters), itertools.count()

    def train(steps: int) -> None:
        for number in itertools.islice(numbers, steps):
            optimizer.zero_grad()
            loss(number).backward()
            optimizer.step()

    return timed(train, task.device)


def our_config(task: Task, loss: str = "emu") -> Config:
    from emu_kernels.trainer.config import Config

    never = 2**62
    return Config(
        data=task.graph,  # a name only: the graph is passed to the trainer
        model=task.model, dim=task.dim, loss=loss, batch_size=task.batch,
        negatives=task.negatives, optimizer=task.optimizer, lr=LEARNING_RATE, sparse=task.sparse,
        regularization=0.0, eval_every=never, log_every=never, device=task.device, **EMU,
    )  # fmt: skip


def our_trainer(task: Task, graph: Graph, loss: str) -> Run:
    """``emu-train``, without evaluation."""
    from emu_kernels.trainer.loop import Trainer, settle

    trainer = Trainer(settle(our_config(task, loss)), graph)

    def train(steps: int) -> None:
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
            trainer.train(trainer.step + steps)

    return timed(train, task.device)


def pytorch_loop(task: Task, graph: Graph, new_loss: Callable[[Shape], Loss]) -> Run:
    """An ordinary loop: shuffled triples, tails and heads corrupted in turn, embeddings.

    The query is computed once a row and scored with its K candidates.
    """
    from emu_kernels.trainer.batches import AlternatingBatches
    from emu_kernels.trainer.models import MODELS

    draws = torch.Generator().manual_seed(0)
    model = MODELS[task.model](graph.num_entities, graph.num_relations, task.dim, draws)
    model.to(task.device)
    batches = AlternatingBatches(graph.triples["train"].to(task.device), task.batch, seed=0)
    loss_of = new_loss(task.replace(similarity=model.similarity))

    def loss(step: int) -> Tensor:
        batch = batches(step)
        shape = (task.batch, task.negatives)
        negative = torch.randint(len(model.entity), shape, device=task.device)
        given = embedding(batch.given, model.entity, sparse=task.sparse)
        relation = embedding(batch.relation, model.relation, sparse=task.sparse)
        query = model.query(given, relation, batch.direction).vector
        return loss_of(query, model.entity, batch.positive, negative)

    return by_hand(task, model.parameters(), loss)


def our_emu(shape: Shape) -> Loss:
    return partial(fused_emu_loss, similarity=shape.similarity, sparse_grad=shape.sparse, **EMU)


def cross_entropy(positive: Tensor, negative: Tensor) -> Tensor:
    """(B,), (B, K) scores -> the loss with the positive as the right class."""
    return eager.first_class(torch.cat([positive[:, None], negative], dim=1))


LIBRARIES: dict[str, dict[str, dict[str, Any]]] = {
    "pykeen": {
        "DistMult": {"entity_constrainer": None, "regularizer": None},
        "ComplEx": {"regularizer": None},
        "TransE": {"entity_constrainer": None},
        "RotatE": {},  # relations are constrained to the unit circle: part of the model
    },
    "torch-geometric": {"DistMult": {}, "ComplEx": {}, "TransE": {}, "RotatE": {}},
    "torchkge": {"DistMult": {}, "ComplEx": {}, "TransE": {"dissimilarity_type": "L1"}},
}
"""By package its models, with their options."""
DENSE = ("pykeen", "torchkge")  # those without sparse gradients


def pykeen(task: Task, graph: Graph, *, ours: bool) -> Run:
    """PyKEEN's SLCWATrainingLoop, its basic sampler (vectorised), CrossEntropyLoss.

    Without worker processes, which would take the cores that compute. Each call trains an epoch of
    steps + 1 batches, and the clock is read when the first and the last one begin.
    """
    from pykeen.models import model_resolver
    from pykeen.training import SLCWATrainingLoop, TrainingCallback
    from pykeen.triples import CoreTriplesFactory

    new_loop: Any = SLCWATrainingLoop
    if ours:
        from emu_kernels.integrations.pykeen import EMUTrainingLoop

        new_loop = partial(EMUTrainingLoop, **EMU)
    logging.getLogger("pykeen").setLevel(logging.ERROR)
    triples = graph.triples["train"]
    sizes: Any = {"num_entities": graph.num_entities, "num_relations": graph.num_relations}
    every = CoreTriplesFactory(triples, **sizes)
    model = model_resolver.make(
        task.model.lower(), triples_factory=every, embedding_dim=task.dim,
        loss="crossentropy", random_seed=0, **LIBRARIES["pykeen"][task.model],
    ).to(task.device)  # fmt: skip
    training_loop = new_loop(
        model=model, triples_factory=every, optimizer=new_optimizer(task, model.get_grad_params()),
        negative_sampler="basic", automatic_memory_optimization=False,
        negative_sampler_kwargs={"num_negs_per_pos": task.negatives},
    )  # fmt: skip

    times: list[float] = []
    epochs = itertools.count(1)

    class Watch(TrainingCallback):
        def pre_batch(self, **kwargs: Any) -> None:
            measure.synchronize(task.device)
            times.append(time.perf_counter())

    def run(steps: int) -> float:
        times.clear()
        chosen = torch.randint(len(triples), ((steps + 1) * task.batch,))
        epoch = next(epochs)
        training_loop.train(
            CoreTriplesFactory(triples[chosen], **sizes), num_epochs=epoch,  # in total
            continue_training=epoch > 1, batch_size=task.batch, use_tqdm=False,
            drop_last=True, pin_memory=False, num_workers=0, callbacks=Watch(),
        )  # fmt: skip
        return times[steps] - times[0]

    return run


def pyg(task: Task, graph: Graph, *, ours: bool) -> Run:
    """torch_geometric.nn.kge, its loader, and negatives drawn as by its ``random_sample``.

    Its own losses take one negative a positive. With K of them the scores of a row are computed by
    broadcasting where the model's ``forward`` allows it, so that heads (or tails) and relations are
    looked up once a row; heads and tails are corrupted in turn.
    """
    from torch_geometric.nn import kge

    from emu_kernels.integrations.pyg import emu_loss

    sizes = (graph.num_entities, graph.num_relations, task.dim)
    model = getattr(kge, task.model)(*sizes, sparse=task.sparse).to(task.device)
    columns = graph.triples["train"].to(task.device).T.contiguous()
    loader = model.loader(*columns, batch_size=task.batch, shuffle=True, drop_last=True)
    batches = itertools.chain.from_iterable(itertools.repeat(loader))

    def loss(step: int) -> Tensor:
        triples = next(batches)
        if ours:
            return emu_loss(model, *triples, num_negatives=task.negatives, **EMU)
        shape = (len(triples[0]), task.negatives)
        sampled = torch.randint(model.num_nodes, shape, device=task.device)
        corrupted = [ids[:, None] for ids in triples]
        corrupted[0 if step % 2 else 2] = sampled
        if task.model == "RotatE":  # its forward does not broadcast
            corrupted = [ids.expand(shape).flatten() for ids in corrupted]
        return cross_entropy(model(*triples), model(*corrupted).view(shape))

    return by_hand(task, model.parameters(), loss)


def torchkge(task: Task, graph: Graph) -> Run:
    """TorchKGE's model, DataLoader and UniformNegativeSampler; its scores in cross-entropy.

    Entities are normalised at each look-up, as its models do; ``normalize_parameters``, due once an
    epoch, is left out.
    """
    from torchkge import models
    from torchkge.data_structures import KnowledgeGraph
    from torchkge.sampling import UniformNegativeSampler
    from torchkge.utils import DataLoader

    columns = graph.triples["train"].to(task.device).T.contiguous()
    known: Any = defaultdict(set)  # only evaluation needs the known triples
    knowledge = KnowledgeGraph(
        kg=dict(zip(("heads", "relations", "tails"), columns, strict=True)),
        ent2ix={i: i for i in range(graph.num_entities)},
        rel2ix={i: i for i in range(graph.num_relations)},
        dict_of_heads=known, dict_of_tails=known, dict_of_rels=known,
    )  # fmt: skip
    new_model = getattr(models, f"{task.model}Model")
    sizes = (task.dim, graph.num_entities, graph.num_relations)
    model = new_model(*sizes, **LIBRARIES["torchkge"][task.model]).to(task.device)
    sampler = UniformNegativeSampler(knowledge, n_neg=task.negatives)
    loader = DataLoader(knowledge, batch_size=task.batch)
    every = itertools.chain.from_iterable(itertools.repeat(loader))
    batches = (batch for batch in every if len(batch[0]) == task.batch)

    def loss(step: int) -> Tensor:
        head, tail, relation = next(batches)
        corrupted = sampler.corrupt_batch(head, tail, relation)
        positive, negative = model(head, tail, relation, *corrupted)
        rows = len(head)  # both are repeated once a negative, block by block
        return cross_entropy(positive[:rows], negative.view(-1, rows).T)

    return by_hand(task, model.parameters(), loss)


def ours_can_be_sparse(task: Task) -> bool:
    from emu_kernels.trainer.errors import ConfigError

    try:
        our_config(task.replace(gradient="sparse"))
    except ConfigError:
        return False
    return True


@dataclass(frozen=True)
class Trainer:
    name: str  # in results and on the command line
    title: str  # in tables
    train: Callable[[Task, Graph], Run]
    library: str = ""  # its package, one of ``LIBRARIES``
    can_be_sparse: Callable[[Task], bool] = lambda task: True
    device: str | None = None  # any
    phases: tuple[str, ...] = (TRAINING,)

    def adapt(self, task: Task) -> Task:
        """The task with dense gradients where this trainer has no sparse ones for it."""
        possible = self.library not in DENSE and self.can_be_sparse(task)
        return task if possible else task.replace(gradient="dense")

    def warm(self, task: Task, graph: Graph) -> Run:
        run = self.train(self.adapt(task), graph)
        run(measure.MEMORY_STEPS)
        return run

    def start(
        self, task: Task, graph: Graph, _phase: str, *, tiny: bool
    ) -> tuple[measure.Turn, float | None]:
        """Warm up; on a GPU with the MiB that this takes."""
        warm, on_gpu = partial(self.warm, task, graph), is_gpu(task.device)
        run, peak = measure.cuda_peak(warm) if on_gpu else (warm(), None)
        steps = max(1, math.ceil((0.0 if tiny else 0.25) / run(1)))
        return lambda: run(steps) / steps, peak

    def columns(self, task: Task) -> dict[str, Any]:
        """Of a row of results."""
        version = self.library and f"{self.library} {importlib.metadata.version(self.library)}"
        return {"gradient": self.adapt(task).gradient, "library": version}

    def unavailable(self, task: Task) -> str | None:
        """Why it cannot run the task here, or None."""
        from emu_kernels.trainer.models import MODELS

        if self.library and find_spec(self.library.replace("-", "_")) is None:
            return f"{self.library} is not installed (pip install {self.library})"
        if task.model not in LIBRARIES.get(self.library, MODELS):
            return f"has no {task.model}"
        # Parameters, gradients, the optimiser's state and temporaries; tensors of B·K·D.
        tables = 3 if self.adapt(task).sparse else 6
        entities = task.entities if task.graph == ZIPF else 200_000  # more than any dataset has
        width = MODELS[task.model].entity_width * task.dim * 4
        rows = entities * tables + task.batch * task.negatives * 12
        return measure.too_large(rows * width, task.device)


def _ours(loss: str, title: str) -> Trainer:
    start = partial(our_trainer, loss=loss)
    return Trainer(f"trainer-{loss}", title, start, can_be_sparse=ours_can_be_sparse)


_SOFTMAX, _EMU = STEPS["eager-softmax"].loss, STEPS["eager-emu"].loss
_PYG = "torch-geometric"
TRAINERS = (
    _ours("emu", "**our trainer, EMU**"),
    _ours("softmax", "our trainer, sampled softmax"),
    Trainer("fused-loop-emu", "PyTorch loop with our EMU", partial(pytorch_loop, new_loss=our_emu)),
    Trainer("loop-softmax", "PyTorch loop", partial(pytorch_loop, new_loss=_SOFTMAX)),
    Trainer("loop-emu", "PyTorch loop with eager EMU", partial(pytorch_loop, new_loss=_EMU)),
    Trainer("pykeen", "PyKEEN, sLCWA", partial(pykeen, ours=False), "pykeen"),
    Trainer("pykeen-emu", "PyKEEN with our EMU", partial(pykeen, ours=True), "pykeen"),
    Trainer("pyg", "PyTorch Geometric", partial(pyg, ours=False), _PYG),
    Trainer("pyg-emu", "PyTorch Geometric with our EMU", partial(pyg, ours=True), _PYG),
    Trainer("torchkge", "TorchKGE", torchkge, "torchkge"),
)
BASE = TRAINERS[0].name
BY_NAME = {trainer.name: trainer for trainer in TRAINERS}


def for_memory(name: str, task: Any) -> Callable[[], Run]:
    """Model, gradients, optimiser and temporaries; not the triples."""
    return partial(BY_NAME[name].warm, *task.load())


def settings(options: Any) -> Iterator[Setting]:
    """Of the command ``train``."""
    fields = ("entities", "dim", "batch", "negatives", "optimizer")
    shared = {field: getattr(options, field) for field in fields}
    for graph, model in itertools.product(options.graph, options.model):
        gradient = options.gradient or ("sparse" if graph == ZIPF else "dense")
        task = Task(graph=graph, model=model, gradient=gradient, **shared)
        yield Setting(task, options.rivals, (TRAINING,), "train", BASE, for_memory)
