"""Training with the entities spread over the processes of ``torchrun``, by TorchRec.

Each process draws the joint batch, which costs little, and trains on its part of it. Every process
has all relations; only the first one writes and prints. The numbers are those of one process, up to
rounding. See docs/distributed.md.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from emu_kernels.integrations.torchrec import ShardedEntities
from emu_kernels.negatives import generator

from . import checkpoint, shards
from .batches import Batch
from .config import Config
from .data import Direction, Graph, split_triples
from .errors import ConfigError, TrainerError
from .evaluation import Evaluator
from .loop import Trainer
from .losses import LOSSES, Step
from .models import Model, Score, Scorer, is_finite
from .run import RunFolder, new_model, restore_model

logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)  # it warns of TorchRec

_BLOCK = 1 << 14  # rows whose initial values are drawn at once


@contextmanager
def group(config: Config) -> Iterator[None]:
    """Make the processes of torchrun a group, if there is none; without torchrun, a group of one.

    Raises:
        ConfigError: the settings do not fit the number of processes.
    """
    processes, sets = int(os.environ.get("WORLD_SIZE", 1)), config.batch_size // config.rows_per_set
    if sets < processes:
        raise ConfigError(
            f"sharded: rows_per_set {config.rows_per_set} makes {sets} sets of negatives of a "
            f"batch of {config.batch_size}, too few for {processes} processes"
        )
    device = torch.device(config.device)
    if device.type == "cuda":
        here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
        if here > gpus or ":" in config.device:
            raise ConfigError(
                f"sharded: expected a GPU for each of {here} processes here and device cuda, got "
                f"{gpus} and {config.device}"
            )
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if dist.is_initialized():
        yield
        return
    backend = "gloo" if device.type == "cpu" else f"cpu:gloo,{device.type}:nccl"
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend)
    else:
        os.environ.setdefault("LOCAL_WORLD_SIZE", "1")  # or TorchRec warns
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


class Onlooker(RunFolder):
    """The run folder in all processes except the first: it writes nothing."""

    def _nothing(self, *_: Any, **__: Any) -> None:
        pass

    save = append_metrics = write_config = write_relations = _nothing
    forget_metrics_after = export_embeddings = _nothing


def first_makes(make: Callable[[], tuple[RunFolder, Graph]]) -> tuple[RunFolder, Graph]:
    """A run folder and its graph, which the first process makes and the others read.

    Raises:
        TrainerError: the first process's error, in all of them.
    """
    made = None
    told: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            made = make()
            told[0] = made[0].path
        except TrainerError as error:
            told[0] = error
    dist.broadcast_object_list(told)
    if isinstance(told[0], TrainerError):
        raise told[0]
    if made is not None:
        return made
    run = Onlooker.open(told[0])
    return run, run.read_graph()


def anywhere(flag: bool) -> bool:
    """Whether the flag is true in any process; all processes must call it."""
    one = torch.tensor(float(flag))
    dist.all_reduce(one, op=dist.ReduceOp.MAX)
    return bool(one)


class _SharedEvent(threading.Event):
    """An event that is set if it is set in any process; all must ask together."""

    def is_set(self) -> bool:
        return anywhere(super().is_set())


class ShardedEvaluator(Evaluator):
    """Each process makes the queries of its part of the triples; all processes score them."""

    def __init__(self, entities: ShardedEntities, model: Model, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._entities = entities
        self._model = model

    def _rank_chunk(self, score: Score, triples: Tensor, direction: Direction) -> Tensor:
        entities, model = self._entities, self._model
        own = triples[entities.part(len(triples))]
        given, relation, target = split_triples(own, direction)
        rows = entities.fetch(given)
        query = model.ask(rows.table[rows.ids[0]], relation, direction)
        offsets, answer = self._known.lists(given, relation, direction)
        known = torch.repeat_interleave(offsets.diff()), answer
        ranks = entities.ranks(query.vector, target, known, **model.phi(query))
        return entities.gather(ranks)[0]

    def _rank_drawn(
        self, model: Any, candidates: Any, score: Score, triples: Tensor, direction: Direction,
        drawn: Tensor,
    ) -> Tensor:  # fmt: skip
        own = self._entities.part(len(triples))
        ranks = super()._rank_drawn(model, candidates, score, triples[own], direction, drawn[own])
        return self._entities.gather(ranks)[0]

    def _fetch(
        self, model: Model, candidates: Tensor, given: Tensor, target: Tensor, drawn: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rows = self._entities.fetch(given, target, drawn)
        given, target, drawn = rows.ids
        return rows.table[given], rows.table, target, drawn


class ShardedTrainer(Trainer):
    """A run of all processes of the group, which call its methods together.

    Attributes:
        entities: the table of entities, which the model does not have.
    """

    entities: ShardedEntities
    model: Model
    _stop_event = _SharedEvent

    def __init__(self, config: Config, graph: Graph, run: RunFolder | None = None) -> None:
        self._is_first = dist.get_rank() == 0
        tracker = config.tracker if self._is_first else "none"
        super().__init__(replace(config, sparse=False, tracker=tracker), graph, run)

    def _new_model(self) -> Model:
        """With the initial values of a run in one process: draws all, and skips other parts."""
        config, size = self.config, self.graph.num_entities
        with torch.device("meta"):
            shape = new_model(config, self.graph)
        assert isinstance(shape, Model)
        width, bound = shape.entity.shape[1], shape.range
        self.entities = entities = ShardedEntities(
            size, width, optimizer=config.optimizer, lr=config.lr, device=self.device
        )
        draws = generator(torch.device("cpu"), config.seed, "init")

        def draw(first: int, last: int) -> Tensor:
            return torch.empty(last - first, width).uniform_(-bound, bound, generator=draws)

        def skip(first: int, last: int) -> None:
            for start in range(first, last, _BLOCK):
                draw(start, min(start + _BLOCK, last))

        skip(0, entities.first)
        entities.fill(draw)
        skip(entities.first + len(entities.local), size)
        model = new_model(config, replace(self.graph, entities=()), draws).to(self.device)
        assert isinstance(model, Model)
        model.entity.requires_grad_(False)
        tqdm.write(f"{size:,} entities in {entities.processes} processes", file=sys.stderr)
        return model

    def _new_evaluator(self) -> Evaluator:
        settings = (self.graph, self.device, self.config, self.config.seed)
        return ShardedEvaluator(self.entities, self.model, *settings)

    def _differentiate(
        self, model: Model, batch: Batch, negative: Tensor, weight: Tensor | None, seed: int
    ) -> Tensor:
        config, entities = self.config, self.entities
        (rate,) = {group["lr"] for group in self.optimizer.param_groups}
        if entities.lr != rate:
            entities.lr = rate
        sets = entities.part(len(negative))  # this process's sets of negatives, with their rows
        own = slice(sets.start * config.rows_per_set, sets.stop * config.rows_per_set)
        rows = entities.fetch(batch.given[own], batch.positive[own], negative[sets])
        given, positive, negative = rows.ids
        loss = LOSSES[config.loss](
            Step(
                config=config,
                model=model,
                query=model.ask(rows.table[given], batch.relation[own], batch.direction),
                table=rows.table,
                positive=positive,
                negative=negative,
                sample_weight=None if weight is None else weight[own],
                seed=seed,
                row_offset=own.start,
            )
        )
        share = len(positive) if weight is None else weight[own].sum()
        replicated = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return entities.backward(loss, replicated, weight=share)

    def _is_finite(self) -> bool:
        return not anywhere(not (super()._is_finite() and is_finite(self.entities.local)))

    def save(self) -> None:
        if self.run is None:
            return
        shards.save(self.run.shards(self.step), self.entities)
        super().save()  # the checkpoint that refers to these shards
        if self._is_first:
            kept = {self.run.shards(step) for step in (self.step, self.best_step)}
            for folder in {*self.run.path.glob("shards-*")} - kept:
                shutil.rmtree(folder)

    def _restore(self) -> None:
        super()._restore()
        assert self.run is not None
        shards.load(self.run.shards(self.step), self.entities)

    def best_model(self) -> Model:
        """This trainer's model, with the values of the best validation."""
        dist.barrier()  # until the first process has written them
        if self.run is not None and self.run.best_file.exists():
            tensors, state = checkpoint.load(self.run.best_file)
            restore_model(self.model, tensors, self.run.best_file)
            shards.load(self.run.shards(state["step"]), self.entities)
        return self.model

    def whole_model(self) -> Scorer | None:
        """The model, in the first process; its table is mapped from a file, never loaded whole."""
        assert self.run is not None
        return self.run.load_model(self.graph)[0] if self._is_first else None

    def _plot(self) -> None:
        if self._is_first:
            super()._plot()
