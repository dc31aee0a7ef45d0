"""What the processes of tests/integrations/test_torchrec.py run: `torchrun sharded.py TASK FOLDER`.

Tables, batches and losses are functions of their names and steps, so that the test computes the
same in one process.
"""

from __future__ import annotations

import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from emu_kernels import Expected, fused_emu_loss, fused_softmax_loss, queries

ENTITIES, RELATIONS, DIM, BATCH, NEGATIVES, STEPS, LR = 41, 3, 8, 12, 5, 3, 0.1
TIMEOUT, SHORT = 90, 15  # seconds that a process waits for the others


class Case(NamedTuple):
    model: str = "distmult"
    loss: str = "emu"
    optimizer: str = "Adagrad"
    sets: int = BATCH  # G
    uneven: bool = False  # batches of different sizes

    @property
    def width(self) -> int:
        """The width of a relation."""
        return DIM // 2 if self.model == "rotate" else DIM


CASES = [
    Case(),
    Case("complex", "uls", "RowwiseAdagrad"),
    Case("transe", "softmax"),
    Case("rotate", "expected", sets=BATCH // 2),
    Case("distmult", "expected", "SGD", uneven=True),
    Case("transe", "emu", "RowwiseAdagrad", sets=6),
    Case("rotate", "emu", uneven=True),
]
SIMILARITIES = {"distmult": "dot", "complex": "dot", "transe": "l1", "rotate": "rotate"}


def initial(rows: int, width: int) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(rows))


def batch(case: Case, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The joint batch: given, relation, positive (B,), and negatives (G, K) with padding."""
    draws = torch.Generator().manual_seed(step)
    size = (BATCH,)
    given = torch.randint(ENTITIES, size, generator=draws)
    relation = torch.randint(RELATIONS - 1, size, generator=draws)  # the last one is never used
    positive = torch.randint(ENTITIES, size, generator=draws)
    negative = torch.randint(-1, ENTITIES, (case.sets, NEGATIVES), generator=draws)
    return given, relation, positive, negative


def part(case: Case, rank: int, processes: int) -> slice:
    """The batch's rows of a rank. In an uneven case the first has twice as many as the others."""
    parts = processes + case.uneven
    first = 0 if rank == 0 else rank + case.uneven
    return slice(first * BATCH // parts, (rank + 1 + case.uneven) * BATCH // parts)


def loss_of(
    case: Case, step: int, table: Tensor, relation: Tensor, ids: Any, offset: int
) -> Tensor:
    given, positive, negative = ids
    query = getattr(queries, case.model)(table[given], relation, "tail")
    similarity = SIMILARITIES[case.model]
    if case.loss == "softmax":
        return fused_softmax_loss(query, table, positive, negative, similarity=similarity)
    rates: dict[str, Any] = {"emu": 0.5, "uls": 0.0, "expected": Expected(0.5)}
    return fused_emu_loss(
        query, table, positive, negative, similarity=similarity, mutation_rate=rates[case.loss],
        beta=0.5, alpha=0.3, seed=7 + step, row_offset=offset,
        mask_unit="pair" if case.model == "rotate" else "component",
    )  # fmt: skip


def known(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Three known answers of each query in `rows`, as (place in rows, entity)."""
    place = torch.arange(len(rows)).repeat_interleave(3)
    return place, (rows.repeat_interleave(3) * 5 + torch.arange(3).repeat(len(rows))) % ENTITIES


class Run:
    """A case trained on shards."""

    def __init__(self, case: Case) -> None:
        from emu_kernels.integrations.torchrec import ShardedEntities

        self.case = case
        self.entities = ShardedEntities(ENTITIES, DIM, optimizer=case.optimizer, lr=LR)
        table = initial(ENTITIES, DIM)
        self.entities.fill(lambda first, last: table[first:last])
        self.relation = torch.nn.Parameter(initial(RELATIONS, case.width))
        self.optimizer = torch.optim.Adagrad([self.relation], lr=LR)
        self.losses: list[float] = []

    def train(self, first: int, steps: int) -> None:
        case, entities = self.case, self.entities
        for step in range(first, first + steps):
            given, relation, positive, negative = batch(case, step)
            at = part(case, entities.rank, entities.processes)
            share = BATCH // case.sets
            own = slice(at.start // share, at.stop // share)
            rows = entities.fetch(given[at], positive[at], negative[own])
            weights = self.relation[relation[at]]
            loss = loss_of(case, step, rows.table, weights, rows.ids, at.start)
            self.optimizer.zero_grad()
            mean = entities.backward(loss, [self.relation], weight=at.stop - at.start)
            self.optimizer.step()
            self.losses.append(float(mean))

    def result(self) -> dict[str, Any]:
        """Rows and relations, and the ranks of a batch."""
        entities, case = self.entities, self.case
        given, relation, positive, _ = batch(case, 0)
        at = part(case, entities.rank, entities.processes)
        rows = entities.fetch(given[at], positive[at])
        query = getattr(queries, case.model)(
            rows.table[rows.ids[0]].detach(), self.relation.detach()[relation[at]], "tail"
        )
        ranks = entities.ranks(
            query, positive[at], known(torch.arange(BATCH)[at]), similarity=SIMILARITIES[case.model]
        )
        found: list[Any] = [None] * entities.processes
        dist.all_gather_object(found, (entities.first, entities.local.clone(), ranks))
        found.sort(key=lambda shard: shard[0])
        return {
            "table": torch.cat([x[1] for x in found]),
            "shards": [len(x[1]) for x in found],
            "ranks": torch.cat([x[2] for x in found]),
            "relation": self.relation.detach(),
            "losses": self.losses,
        }

    @property
    def state(self) -> dict[str, Any]:
        return {
            "entities": self.entities,
            "relation": {"table": self.relation.detach()},
            "optimizer": {"sum": self.optimizer.state[self.relation]["sum"]},
        }


def main() -> None:
    task, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    seconds = SHORT if task == "hang" else TIMEOUT
    dist.init_process_group("gloo", timeout=timedelta(seconds=seconds))
    rank, processes = dist.get_rank(), dist.get_world_size()
    results: dict[Any, Any] = {}
    if task in ("die", "hang"):
        run = Run(CASES[0])
        if rank == 1 and task == "die":
            os._exit(3)
        if rank == 1:
            time.sleep(600)
        run.train(0, 1)
    if task == "all":
        for case in CASES:
            run = Run(case)
            run.train(0, STEPS)
            results[tuple(case)] = run.result()
            if processes == 2 and case in CASES[:2]:
                save(run.state, checkpoint_id=folder / f"saved-{case.model}")
    if task in ("all", "resume"):
        for case in CASES[:2]:
            if processes == 2:
                continue
            run = Run(case)
            load(run.state, checkpoint_id=folder / f"saved-{case.model}")
            run.entities.lr = LR / 2
            run.train(STEPS, 2)
            results["resumed", tuple(case)] = run.result()
    if rank == 0:
        torch.save(results, folder / f"{task}-{processes}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
