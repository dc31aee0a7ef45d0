"""EMU for a score that is not a similarity: an MLP on features that a graph network computes.

A relational message-passing layer gives every node a feature vector, and an MLP scores the three
vectors of a triple: a small version of link predictors that end in an MLP on node features
(NBFNet, Zhu et al., 2021). No kernel computes such a score, so `emu_mutate` mutates the candidates'
features, and `uls_cross_entropy` computes the loss from the scores.

    python examples/black_box.py path/to/umls            # with EMU; --vanilla: without
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from emu_kernels import emu_mutate, uls_cross_entropy
from emu_kernels.trainer.reading import load_graph

MUTATION_RATE, BETA, ALPHA = 0.61, 0.53, 0.11


class LinkPredictor(nn.Module):
    """Node features after one round of messages along the training triples, and an MLP on them."""

    train_triples: Tensor

    def __init__(self, train: Tensor, entities: int, relations: int, dim: int = 32) -> None:
        super().__init__()
        self.register_buffer("train_triples", train)
        self.start = nn.Parameter(torch.randn(entities, dim))
        self.relation = nn.Parameter(torch.randn(2 * relations, dim))  # and their inverses
        self.relations = relations
        self.self_loop = nn.Linear(dim, dim)
        self.message = nn.Linear(dim, dim)
        self.score = nn.Sequential(nn.Linear(3 * dim, 2 * dim), nn.ReLU(), nn.Linear(2 * dim, 1))

    def features(self) -> Tensor:
        """(N, d): from each node's own vector and the mean of its neighbours' messages."""
        head, relation, tail = self.train_triples.T
        source, target = torch.cat([head, tail]), torch.cat([tail, head])
        kind = torch.cat([relation, relation + self.relations])
        messages = self.message(self.start[source] * self.relation[kind])
        total = torch.zeros_like(self.start).index_add(0, target, messages)
        degree = torch.bincount(target, minlength=len(self.start)).clamp(min=1)
        return (self.self_loop(self.start) + total / degree[:, None]).relu()

    def forward(self, head: Tensor, relation: Tensor, tail: Tensor) -> Tensor:
        """(...): scores of head and tail features (..., d) and relation ids (...), broadcast."""
        parts = torch.broadcast_tensors(head, self.relation[relation], tail)
        return self.score(torch.cat(parts, dim=-1)).squeeze(-1)


def step_loss(
    model: LinkPredictor, triples: Tensor, negative: Tensor, *, heads: bool, emu: bool
) -> Tensor:
    """The loss of triples (B, 3); negatives (B, K) replace their heads or tails."""
    x = model.features()
    head, relation, tail = x[triples[:, 0]], triples[:, 1], x[triples[:, 2]]
    candidates = x[negative]  # (B, K, d)

    def scores(candidates: Tensor) -> Tensor:
        if heads:
            return model(candidates, relation[:, None], tail[:, None])
        return model(head[:, None], relation[:, None], candidates)

    positive_score = model(head, relation, tail)  # (B,)
    logits = torch.cat([positive_score[:, None], scores(candidates)], dim=1)
    vanilla = cross_entropy(logits, torch.zeros(len(triples), dtype=torch.int64))
    if not emu:
        return vanilla
    mutated = emu_mutate(head if heads else tail, candidates, mutation_rate=MUTATION_RATE)
    return uls_cross_entropy(positive_score, scores(mutated), beta=BETA) + ALPHA * vanilla


def train(
    train_triples: Tensor, entities: int, relations: int, *, steps: int, seed: int, emu: bool
) -> LinkPredictor:
    torch.manual_seed(seed)
    model = LinkPredictor(train_triples, entities, relations)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for step in range(steps):
        triples = train_triples[torch.randint(len(train_triples), (256,))]
        negative = torch.randint(entities, (256, 16))
        loss = step_loss(model, triples, negative, heads=step % 2 == 1, emu=emu)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0:
            print(f"step {step}: loss {float(loss.detach()):.4f}")
    return model


@torch.no_grad()
def filtered_mrr(model: LinkPredictor, triples: Tensor, known: Tensor) -> float:
    """The mean over both directions; `known` are the triples of all splits."""
    x = model.features()
    reciprocal = []
    for triple in triples:
        head, relation, tail = triple
        for given, target in ((0, 2), (2, 0)):
            score = model(x[head], relation, x) if target == 2 else model(x, relation, x[tail])
            same = (known[:, 1] == relation) & (known[:, given] == triple[given])
            own = score[triple[target]].clone()
            score[known[same, target]] = -torch.inf
            better = (score > own).sum() + 0.5 * (score == own).sum()
            reciprocal.append(1 / (1 + better))
    return float(torch.stack(reciprocal).mean())


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path, help="holds train.txt, valid.txt and test.txt")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vanilla", action="store_true", help="sampled softmax alone")
    options = parser.parse_args()
    graph = load_graph(options.folder)
    trained = train(
        graph.triples["train"],
        graph.num_entities,
        graph.num_relations,
        steps=options.steps,
        seed=options.seed,
        emu=not options.vanilla,
    )
    everything = torch.cat(list(graph.triples.values()))
    mrr = filtered_mrr(trained, graph.triples["test"], everything)
    print(f"filtered MRR of the test split: {mrr:.4f}")
