"""Training from end to end, trainer against trainer, each with the fastest settings known to us.

All train the same model with the same dimension, batch, number of negatives (uniform, half of them
heads) and optimizer, on the same triples, with cross-entropy of the positive among its negatives or
with EMU: no regularizer, no constraint on embeddings, no evaluation. A step includes everything:
drawing triples and negatives, loss, gradients, optimizer. Building loaders and shuffling is not
timed. Other libraries, and our trainer, are imported only when they are used.
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
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import embedding

from bench import eager, measure
from bench.inputs import Inputs, Shape, is_gpu
from bench.measure import Run
from bench.rivals import BY_NAME as STEPS
from bench.rivals import EMU, SCALED, TRAINING, Loss, Rival, fused

if TYPE_CHECKING:
    from emu_kernels.trainer.data import Graph

ZIPF = "zipf"
RELATIONS = 500  # of the synthetic graph, which has as many triples as entities
TRIPLES = 272_115  # of FB15k-237
LEARNING_RATE = 0.1
PYG = "torch-geometric"


def zipf_triples(entities: int, relations: int, triples: int) -> Tensor:
    """(triples, 3) of ids: rank i of entities and relations has a probability close to 1 / i.

    (size + 1)^u, rounded down, nearly has Zipf's law for uniform u. Frequent entities have random
    ids, as in a real table, so that their rows are far apart.
    """
    draws = torch.Generator().manual_seed(0)
    place = torch.randperm(entities, generator=draws)

    def ranks(size: int) -> Tensor:
        uniform = torch.rand(triples, generator=draws, dtype=torch.float64)
        return uniform.mul_(math.log(size + 1)).exp_().long().clamp_(1, size) - 1

    columns = (place[ranks(entities)], ranks(relations), place[ranks(entities)])
    return torch.stack(columns, dim=1)


@dataclass(frozen=True)
class Task(Shape):
    """One training run. The default is the paper's setting on FB15k-237."""

    entities: int = 1_000_000  # of the synthetic graph
    similarity: str = ""  # the model's
    graph: str = "FB15k-237"
    model: str = "DistMult"
    optimizer: str = "Adagrad"

    def tiny(self) -> Any:
        return super().tiny().replace(graph=ZIPF)

    def columns(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("graph", "model", "optimizer")}
        return super().columns() | own

    def load(self) -> tuple[Task, Graph]:
        """The task, and its graph with training triples only."""
        from emu_kernels.trainer import data, datasets, errors

        if self.graph == ZIPF:
            train = zipf_triples(self.entities, RELATIONS, self.entities)
            names: Any = range(self.entities), range(RELATIONS)  # training does not use names
        else:
            try:
                graph = datasets.load_dataset(self.graph)
            except errors.DataError as error:
                raise FileNotFoundError(str(error)) from error
            names, train = (graph.entities, graph.relations), graph.triples["train"]
        splits = {"train": train, "valid": train[:0], "test": train[:0]}
        return self.replace(entities=len(names[0])), data.Graph(names[0], names[1], splits)

    def __str__(self) -> str:
        sizes = f"B={self.batch}, K={self.negatives}, D={self.dim}"
        return f"{self.model} on {self.graph}, {sizes}, {self.optimizer}, {self.gradient} gradient"


def adagrad(task: Task, parameters: Iterable[Any]) -> torch.optim.Optimizer:
    """The fastest Adagrad: on a CPU fused, unless gradients are sparse."""
    fused = not task.sparse and not is_gpu(task.device)
    return torch.optim.Adagrad(list(parameters), lr=LEARNING_RATE, fused=fused or None)


def by_hand(task: Task, parameters: Iterable[Any], loss: Callable[[int], Tensor]) -> Run:
    """The usual loop; ``loss`` is given the step's number."""
    optimizer = adagrad(task, parameters)

    def step(number: int) -> None:
        optimizer.zero_grad()
        loss(number).backward()
        optimizer.step()

    return measure.run_of(step, task.device)


def emu_train(task: Task, graph: Graph, loss: str) -> Run:
    """``emu-train``, without evaluation."""
    from emu_kernels.trainer.config import Config
    from emu_kernels.trainer.loop import Trainer, settle

    never = 2**62
    config = Config(
        data=task.graph,  # a name only: the graph is passed to the trainer
        model=task.model, dim=task.dim, loss=loss, batch_size=task.batch,
        negatives=task.negatives, optimizer=task.optimizer, lr=LEARNING_RATE, sparse=task.sparse,
        regularization=0.0, eval_every=never, log_every=never, device=task.device, **EMU,
    )  # fmt: skip
    trainer = Trainer(settle(config), graph)

    def train(steps: int) -> None:
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
            trainer.train(trainer.step + steps)

    return lambda steps: measure.wall_clock(lambda: partial(train, steps), task.device)


def pytorch_loop(task: Task, graph: Graph, new_loss: Callable[[Shape], Loss]) -> Run:
    """Shuffled triples, tails and heads in turn; each row's query is scored with K candidates."""
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


def full_batches(loader: Any, size: int) -> Iterator[Any]:
    """The full batches of a loader, epoch after epoch."""
    every = itertools.chain.from_iterable(itertools.repeat(loader))
    return (batch for batch in every if len(batch[0]) == size)


LIBRARIES: dict[str, dict[str, dict[str, Any]]] = {
    "pykeen": {
        "DistMult": {"entity_constrainer": None, "regularizer": None},
        "ComplEx": {"regularizer": None},
        "TransE": {"entity_constrainer": None},
        "RotatE": {},  # relations are constrained to the unit circle: part of the model
    },
    PYG: {"DistMult": {}, "ComplEx": {}, "TransE": {}, "RotatE": {}},
    "torchkge": {"DistMult": {}, "ComplEx": {}, "TransE": {"dissimilarity_type": "L1"}},
}
"""For each package its models, with their options."""
DENSE = ("pykeen", "torchkge")  # those without sparse gradients


def pykeen(task: Task, graph: Graph, *, ours: bool) -> Run:
    """PyKEEN's SLCWATrainingLoop, its basic sampler (vectorized), CrossEntropyLoss.

    Without worker processes, which would take cores from the computation. Each call trains an epoch
    of steps + 1 batches, and the clock is read when the first and the last one begin.
    """
    from pykeen.models import model_resolver
    from pykeen.training import SLCWATrainingLoop, TrainingCallback
    from pykeen.triples import CoreTriplesFactory

    from emu_kernels.integrations.pykeen import EMUTrainingLoop

    new_loop: Any = partial(EMUTrainingLoop, **EMU) if ours else SLCWATrainingLoop
    logging.getLogger("pykeen").setLevel(logging.ERROR)
    train = graph.triples["train"]
    sizes: Any = {"num_entities": graph.num_entities, "num_relations": graph.num_relations}
    every = CoreTriplesFactory(train, **sizes)
    model = model_resolver.make(
        task.model.lower(), triples_factory=every, embedding_dim=task.dim,
        loss="crossentropy", random_seed=0, **LIBRARIES["pykeen"][task.model],
    ).to(task.device)  # fmt: skip
    training_loop = new_loop(
        model=model, triples_factory=every, optimizer=adagrad(task, model.get_grad_params()),
        negative_sampler_kwargs={"num_negs_per_pos": task.negatives},
        automatic_memory_optimization=False,
    )  # fmt: skip
    times: list[float] = []
    epochs = itertools.count(1)

    class Watch(TrainingCallback):
        def pre_batch(self, **kwargs: Any) -> None:
            measure.synchronize(task.device)
            times.append(time.perf_counter())

    def run(steps: int) -> float:
        times.clear()
        chosen = torch.randint(len(train), ((steps + 1) * task.batch,))
        epoch = next(epochs)
        training_loop.train(
            CoreTriplesFactory(train[chosen], **sizes), num_epochs=epoch,  # in total
            continue_training=epoch > 1, batch_size=task.batch, use_tqdm=False, pin_memory=False,
            callbacks=Watch(),
        )  # fmt: skip
        return times[steps] - times[0]

    return run


def pyg(task: Task, graph: Graph, *, ours: bool) -> Run:
    """torch_geometric.nn.kge, its loader, and negatives drawn like its ``random_sample`` does.

    Its own losses take one negative per positive. For K of them the scores of a row are computed by
    broadcasting, if the model's ``forward`` allows it, so that heads (or tails) and relations are
    looked up once per row; heads and tails are corrupted in turn.
    """
    from torch_geometric.nn import kge

    from emu_kernels.integrations.pyg import emu_loss

    sizes = (graph.num_entities, graph.num_relations, task.dim)
    model = getattr(kge, task.model)(*sizes, sparse=task.sparse).to(task.device)
    columns = graph.triples["train"].to(task.device).T.contiguous()
    loader = model.loader(*columns, batch_size=task.batch, shuffle=True, drop_last=True)
    batches = full_batches(loader, task.batch)

    def loss(step: int) -> Tensor:
        batch = next(batches)
        if ours:
            return emu_loss(model, *batch, num_negatives=task.negatives, **EMU)
        shape = (task.batch, task.negatives)
        corrupted = [ids[:, None] for ids in batch]
        corrupted[0 if step % 2 else 2] = torch.randint(
            graph.num_entities, shape, device=task.device
        )
        if task.model == "RotatE":  # its forward does not broadcast
            corrupted = [ids.expand(shape).flatten() for ids in corrupted]
        scores = model(*batch)[:, None], model(*corrupted).view(shape)
        return eager.first_class(torch.cat(scores, dim=1))

    return by_hand(task, model.parameters(), loss)


def torchkge(task: Task, graph: Graph) -> Run:
    """TorchKGE's model, DataLoader and UniformNegativeSampler; its scores in cross-entropy.

    Its models normalize entities at each look-up; ``normalize_parameters``, which is due once per
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
    batches = full_batches(DataLoader(knowledge, batch_size=task.batch), task.batch)

    def loss(step: int) -> Tensor:
        head, tail, relation = next(batches)
        corrupted = sampler.corrupt_batch(head, tail, relation)
        positive, negative = model(head, tail, relation, *corrupted)
        # Both are repeated once for each negative, block by block.
        scores = positive[: task.batch, None], negative.view(-1, task.batch).T
        return eager.first_class(torch.cat(scores, dim=1))

    return by_hand(task, model.parameters(), loss)


@dataclass(frozen=True)
class Trainer:
    """Consists of a module's functions, like a :class:`bench.rivals.Rival`."""

    name: str  # in results and on the command line
    title: str  # in tables
    train: Callable[[Task, Graph], Run]
    library: str = ""  # its package, one of ``LIBRARIES``
    device: None = None  # any
    phases: tuple[str, ...] = (TRAINING,)

    def adapt(self, task: Task) -> Task:
        """The task, with dense gradients if this trainer has no sparse ones for it."""
        from emu_kernels.trainer.models import MODELS, Model

        whole = MODELS[task.model].candidates is not Model.candidates  # of all entities
        dense = self.library in DENSE or (self.name.startswith("trainer-") and whole)
        return task.replace(gradient="dense") if dense else task

    def start(self, task: Task, graph: Graph, phase: str, tiny: bool) -> measure.Turn:
        return measure.turn_of_run(self.train(self.adapt(task), graph), tiny=tiny)

    def columns(self, task: Task) -> dict[str, Any]:
        """The columns of a row of results."""
        version = self.library and f"{self.library} {importlib.metadata.version(self.library)}"
        return {"gradient": self.adapt(task).gradient, "library": version}

    def unavailable(self, task: Task) -> str | None:
        """Why it cannot run the task here, or None."""
        from emu_kernels.trainer.models import MODELS

        if self.library and find_spec(self.library.replace("-", "_")) is None:
            return f"{self.library} is not installed (pip install {self.library})"
        if task.model not in LIBRARIES.get(self.library, MODELS):
            return f"has no {task.model}"
        # Parameters, gradients, the optimizer's state and temporaries; tensors of B·K·D.
        tables = 3 if self.adapt(task).sparse else 6
        entities = task.entities if task.graph == ZIPF else 200_000  # more than any dataset has
        rows = entities * tables + task.batch * task.negatives * 12
        width = MODELS[task.model].entity_width * task.dim
        return measure.too_large(4 * rows * width, task.device)


_FUSED = partial(fused, "emu", None)
_SOFTMAX, _EMU = STEPS["eager-softmax"].loss, STEPS["eager-emu"].loss
TRAINERS = (
    Trainer("trainer-emu", "**our trainer, EMU**", partial(emu_train, loss="emu")),
    Trainer("trainer-softmax", "our trainer, sampled softmax", partial(emu_train, loss="softmax")),
    Trainer("fused-loop-emu", "PyTorch loop with our EMU", partial(pytorch_loop, new_loss=_FUSED)),
    Trainer("loop-softmax", "PyTorch loop", partial(pytorch_loop, new_loss=_SOFTMAX)),
    Trainer("loop-emu", "PyTorch loop with eager EMU", partial(pytorch_loop, new_loss=_EMU)),
    Trainer("pykeen", "PyKEEN, sLCWA", partial(pykeen, ours=False), "pykeen"),
    Trainer("pykeen-emu", "PyKEEN with our EMU", partial(pykeen, ours=True), "pykeen"),
    Trainer("pyg", "PyTorch Geometric", partial(pyg, ours=False), PYG),
    Trainer("pyg-emu", "PyTorch Geometric with our EMU", partial(pyg, ours=True), PYG),
    Trainer("torchkge", "TorchKGE", torchkge, "torchkge"),
)
BY_NAME = {trainer.name: trainer for trainer in TRAINERS}


@dataclass(frozen=True)
class WholeStep(Rival):
    """A rival's loss in a whole training step, sampling included, on a GPU perhaps as CUDA graphs.

    DistMult with Adagrad, tails and heads in turn. Triples (random, as many as FB15k-237's),
    negatives and seeds are drawn on the device; each replay advances its generator.
    """

    captured: bool = False

    def start(self, shape: Shape, inputs: Inputs, phase: str, tiny: bool) -> measure.Turn:
        device, loss_of = shape.device, self.loss(shape)
        columns = zipf_triples(shape.entities, 237, TRIPLES).T.contiguous().to(device)  # (3, M)
        sizes = ((n, shape.dim) for n in (shape.entities, 237))
        tables = [torch.empty(size, device=device).uniform_(-0.26, 0.26) for size in sizes]
        sums = [torch.zeros_like(table) for table in tables]

        def step(head: bool) -> None:
            place = torch.randint(TRIPLES, (shape.batch,), device=device)
            negative = torch.randint(shape.entities, (shape.batch, shape.negatives), device=device)
            first, relation, last = columns[:, place]
            given, positive = (last, first) if head else (first, last)
            # Rows are leaves, so that their gradients are (B, D) and not a second (N, D).
            leaves = tables[0], tables[0][given], tables[1][relation]
            entity, rows, relations = (leaf.requires_grad_() for leaf in leaves)
            loss = loss_of(rows * relations, entity, positive, negative)
            of_entity, of_given, of_rows = torch.autograd.grad(loss, leaves)
            entity.requires_grad_(False)
            of_entity.index_add_(0, given, of_given)
            of_relation = torch.zeros_like(tables[1]).index_add_(0, relation, of_rows)
            for p, total, g in zip(tables, sums, (of_entity, of_relation), strict=True):
                p.addcdiv_(g, total.addcmul_(g, g).sqrt().add_(1e-10), value=-0.1)

        steps: list[Any] = [partial(step, False), partial(step, True)]
        steps = [*map(measure.Captured, steps)] if self.captured else steps
        return measure.turn_of_run(measure.run_of(lambda n: steps[n % 2](), device), tiny=tiny)

    def columns(self, shape: Shape) -> dict[str, Any]:
        named = {"graph": f"{TRIPLES} random triples", "model": "DistMult", "optimizer": "Adagrad"}
        return super().columns(shape) | named


CAPTURED = ", captured"
WHOLE_STEPS = [WholeStep(**vars(STEPS[n]) | {"phases": (TRAINING,)}) for n in SCALED]
WHOLE_STEPS += [
    replace(r, name=r.name + CAPTURED, title=r.title + CAPTURED, device="cuda", captured=True)
    for r in WHOLE_STEPS
    if r.device != "cpu"
]
