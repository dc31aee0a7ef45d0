"""Train on shards: each process of torchrun holds a part of the entities, by TorchRec.

    torchrun --nproc-per-node 2 examples/distributed.py --dataset CoDEx-S --model ComplEx

It trains, ranks the test split over the shards (filtered, both directions), and writes a checkpoint
by shards to --folder, from which any number of processes goes on. The numbers are those of one
process, up to rounding. docs/distributed.md explains it.
"""

from __future__ import annotations

import argparse
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from emu_kernels import fused_emu_loss
from emu_kernels.integrations.torchrec import ShardedEntities
from emu_kernels.negatives import KnownTriples, derive_seed, generator
from emu_kernels.trainer.batches import AlternatingBatches
from emu_kernels.trainer.data import DIRECTIONS, SPLITS, Graph, split_triples
from emu_kernels.trainer.datasets import load_dataset
from emu_kernels.trainer.evaluation import Metrics
from emu_kernels.trainer.models import MODELS, Model

MUTATION_RATE, BETA, ALPHA = 0.61, 0.53, 0.11  # the paper's
SUPPORTED = ("ComplEx", "DistMult", "RotatE", "TransE")  # their tables are what φ reads


def new_model(name: str, relations: int, dim: int, seed: int) -> Model:
    """Queries and relations; of the entities it holds none."""
    return MODELS[name](0, relations, dim, generator(torch.device("cpu"), seed, "init"))


class Training:
    """A model, the shards of its entities, and how far it is."""

    def __init__(self, graph: Graph, options: argparse.Namespace) -> None:
        self.options = options
        self.model = new_model(options.model, graph.num_relations, options.dim, options.seed)
        self.entities = ShardedEntities(
            graph.num_entities,
            self.model.entity.shape[1],
            lr=options.lr,
            bound=self.model.range,
            seed=options.seed,
        )
        self.optimizer = torch.optim.Adagrad([self.model.relation], lr=options.lr)
        self.graph = graph
        self.batches = AlternatingBatches(graph.triples["train"], options.batch_size, options.seed)
        self.step = torch.zeros((), dtype=torch.int64)

    @property
    def state(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {
            "entities": self.entities,
            "relation": {"table": self.model.relation.detach()},
            "optimizer": {"sum": self.optimizer.state[self.model.relation]["sum"]},
            "step": self.step,
        }

    def train_step(self) -> Tensor:
        """Every process draws the joint batch, which costs little, and takes its part."""
        options, entities, step = self.options, self.entities, int(self.step)
        batch = self.batches(step)
        at = entities.part(options.sets)  # of the sets of negatives, with their rows
        rows_per_set = options.batch_size // options.sets
        own = slice(at.start * rows_per_set, at.stop * rows_per_set)
        draws = generator(torch.device("cpu"), options.seed, "negatives", step)
        size = (options.sets, options.negatives)
        drawn = torch.randint(self.graph.num_entities, size, generator=draws)
        rows = entities.fetch(batch.given[own], batch.positive[own], drawn[at])
        given, positive, negative = rows.ids
        query = self.model.ask(rows.table[given], batch.relation[own], batch.direction)
        loss = fused_emu_loss(
            query.vector,
            rows.table,
            positive,
            negative,
            **self.model.phi(query),
            mutation_rate=MUTATION_RATE,
            beta=BETA,
            alpha=ALPHA,
            seed=derive_seed(options.seed, "mask", step),
            row_offset=own.start,
        )
        self.optimizer.zero_grad()
        mean = entities.backward(loss, [self.model.relation], weight=len(positive))
        self.optimizer.step()
        self.step += 1
        return mean

    def rank(self, split: str) -> Metrics:
        """Each process asks for its part of the triples; all score."""
        entities, graph = self.entities, self.graph
        every = torch.cat([graph.triples[name] for name in SPLITS])
        known = KnownTriples(every, graph.num_entities, graph.num_relations)
        found: list[Tensor] = []
        for direction in DIRECTIONS:
            triples = graph.triples[split]
            own = triples[entities.part(len(triples))]
            given, relation, target = split_triples(own, direction)
            rows = entities.fetch(given)
            query = self.model.ask(rows.table[rows.ids[0]].detach(), relation, direction)
            offsets, answers = known.lists(given, relation, direction)
            asked = torch.arange(len(own)).repeat_interleave(offsets.diff())
            phi = {name: x for name, x in self.model.phi(query).items() if x is not None}
            found.append(entities.ranks(query.vector.detach(), target, (asked, answers), **phi))
        all_found: list[Any] = [None] * entities.processes
        dist.all_gather_object(all_found, torch.cat(found))
        return Metrics.from_ranks(torch.cat(all_found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dataset", default="CoDEx-S")
    parser.add_argument("--model", default="ComplEx", choices=SUPPORTED)
    parser.add_argument("--dim", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=1000)
    parser.add_argument("--negatives", type=int, default=256)
    parser.add_argument("--sets", type=int, default=8, help="of negatives, each of a block of rows")
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="to go on from, if it holds a checkpoint")
    options = parser.parse_args()
    if options.batch_size % options.sets:
        parser.error("--sets must divide --batch-size")

    # A process that waits for a dead one gives up after this time; torchrun then ends all.
    dist.init_process_group("gloo", timeout=timedelta(minutes=2))
    is_first = dist.get_rank() == 0
    if options.sets < dist.get_world_size():
        parser.error("--sets must be at least the number of processes")
    training = Training(load_dataset(options.dataset), options)
    if options.folder is not None and (options.folder / ".metadata").exists():
        load(training.state, checkpoint_id=options.folder)
    first, started = int(training.step), time.perf_counter()
    for step in range(first, options.steps):
        loss = training.train_step()
        if is_first and (step + 1) % 100 == 0:
            rate = (step + 1 - first) / (time.perf_counter() - started)
            print(f"step {step + 1}: loss {float(loss):.4f}, {rate:.0f} steps a second", flush=True)
    if options.folder is not None:
        save(training.state, checkpoint_id=options.folder)
    metrics = training.rank("test")
    if is_first:
        print(
            f"test, filtered, both directions: MRR {metrics.mrr:.4f}, "
            f"Hits@1 {metrics.hits_at_1:.4f}, Hits@10 {metrics.hits_at_10:.4f}"
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
