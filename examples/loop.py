"""RotatE in a hand-written loop, in the style of its authors' trainer (Sun et al., 2019).

It trains with EMU (`emu_loss`), or with the authors' self-adversarial loss (`vanilla_loss`). The
folder holds train.txt, valid.txt and test.txt (head, relation, tail; separated by tabs):

    python examples/loop.py path/to/umls            # with EMU; --vanilla: without
"""

from __future__ import annotations

import argparse
import math
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from emu_kernels import fused_emu_loss, queries

MARGIN = 6.0


class RotatE(nn.Module):
    """γ − Σ |h ∘ r − t|. An entity's row holds its real parts, then its imaginary parts."""

    def __init__(self, entities: int, relations: int, dim: int) -> None:
        super().__init__()
        self.range = (MARGIN + 2.0) / dim
        self.entity = nn.Parameter(torch.empty(entities, 2 * dim).uniform_(-self.range, self.range))
        self.relation = nn.Parameter(torch.empty(relations, dim).uniform_(-self.range, self.range))

    def query(self, sample: Tensor, mode: str) -> Tensor:
        """(B, 2d): the head rotated, or for "head-batch" the tail rotated back."""
        phase = self.relation[sample[:, 1]] * (math.pi / self.range)
        if mode == "head-batch":
            return queries.rotate(self.entity[sample[:, 2]], phase, to="head")
        return queries.rotate(self.entity[sample[:, 0]], phase, to="tail")

    def forward(self, sample: Tensor, candidates: Tensor, mode: str) -> Tensor:
        """(B, K): scores of the sample with candidates (B, K) as its heads or tails."""
        difference = self.query(sample, mode)[:, None] - self.entity[candidates]
        return MARGIN - torch.stack(difference.chunk(2, dim=2)).norm(dim=0).sum(dim=2)


Batch = tuple[Tensor, Tensor, Tensor, str]


def batches(train: Tensor, entities: int, size: int, negatives: int) -> Iterator[Batch]:
    """Endless batches: positives (B, 3), negatives (B, K), subsampling weights (B,), mode."""
    pairs = torch.cat([train[:, :2], train[:, [2, 1]] + torch.tensor([entities, 0])])
    _, pair, count = pairs.unique(dim=0, return_inverse=True, return_counts=True)
    of_head, of_tail = count[pair].split(len(train))
    weight = (of_head + of_tail + 4).float().rsqrt()  # counts start at 4, as the authors' do
    while True:
        for rows in torch.randperm(len(train)).split(size):
            for mode in ("tail-batch", "head-batch"):
                negative = torch.randint(entities, (len(rows), negatives))
                yield train[rows], negative, weight[rows], mode


def vanilla_loss(model: RotatE, batch: Batch) -> Tensor:
    positive, negative, weight, mode = batch
    target = positive[:, 0 if mode == "head-batch" else 2]
    positive_score = model(positive, target[:, None], mode)[:, 0]
    negative_score = model(positive, negative, mode)
    share = negative_score.detach().softmax(dim=1)
    rows = -logsigmoid(positive_score) - (share * logsigmoid(-negative_score)).sum(dim=1)
    return (weight * rows).sum() / (2 * weight.sum())


def emu_loss(model: RotatE, batch: Batch) -> Tensor:
    positive, negative, weight, mode = batch
    target = positive[:, 0 if mode == "head-batch" else 2]
    return fused_emu_loss(
        model.query(positive, mode), model.entity, target, negative, similarity="rotate",
        sample_weight=weight, mutation_rate=0.61, beta=0.53, alpha=0.11,
    )  # fmt: skip


@torch.no_grad()
def filtered_mrr(model: RotatE, triples: Tensor, known: Tensor) -> float:
    """The mean over both directions; `known` are the triples of all splits."""
    entities = len(model.entity)
    everyone = torch.arange(entities)
    reciprocal = []
    for mode, given, target in (("tail-batch", 0, 2), ("head-batch", 2, 0)):
        for triple in triples:
            score = model(triple[None], everyone[None], mode)[0]
            same = (known[:, 1] == triple[1]) & (known[:, given] == triple[given])
            other = known[same, target]
            own = score[triple[target]].clone()
            score[other] = -math.inf
            better = (score > own).sum() + 0.5 * (score == own).sum()
            reciprocal.append(1 / (1 + better))
    return float(torch.stack(reciprocal).mean())


def run(splits: dict[str, Tensor], *, steps: int, seed: int = 0, emu: bool = True) -> float:
    """Train on (M, 3) ids and return the filtered MRR of the test split, both directions."""
    torch.manual_seed(seed)
    everything = torch.cat(list(splits.values()))
    entities, relations = int(everything[:, ::2].max()) + 1, int(everything[:, 1].max()) + 1
    model = RotatE(entities, relations, dim=32)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    source = batches(splits["train"], entities, size=256, negatives=32)
    for step in range(steps):
        optimizer.zero_grad()
        loss = (emu_loss if emu else vanilla_loss)(model, next(source))
        loss.backward()
        optimizer.step()
        if step % 500 == 0:
            print(f"step {step}: loss {float(loss.detach()):.4f}")
    return filtered_mrr(model, splits["test"], everything)


def read(folder: Path) -> dict[str, Tensor]:
    """The splits as (M, 3) ids, numbered in the order in which the names appear."""
    entity: dict[str, int] = defaultdict(lambda: len(entity))
    relation: dict[str, int] = defaultdict(lambda: len(relation))
    splits = {}
    for split in ("train", "valid", "test"):
        lines = [x.split("\t") for x in (folder / f"{split}.txt").read_text().splitlines()]
        splits[split] = torch.tensor([(entity[h], relation[r], entity[t]) for h, r, t in lines])
    return splits


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vanilla", action="store_true", help="the self-adversarial loss")
    options = parser.parse_args()
    splits = read(options.folder)
    mrr = run(splits, steps=options.steps, seed=options.seed, emu=not options.vanilla)
    print(f"filtered MRR of the test split: {mrr:.4f}")
