"""Two-tower retrieval with EMU on MovieLens-100k: which film does a user watch next?

The user tower reads the films watched last, the item tower is an embedding and an MLP, and a dot
product compares them. Losses: BPR, sampled softmax with uniform, in-batch and mixed negatives
(both with the logQ correction), unbounded label smoothing, EMU with drawn masks and in closed
form. Beside them: popularity, and LightGCN. Ranks are over all films that the user has not
watched.

    python examples/retrieval.py            # minutes; --tiny: one or two
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch_geometric
from scipy.stats import ttest_rel
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, normalize
from torch_geometric.nn import LightGCN
from tqdm import tqdm

import emu_kernels
from emu_kernels import Expected, fused_emu_loss, fused_softmax_loss
from emu_kernels.trainer.datasets import FOLDER_VARIABLE, RemoteFile, fetch
from emu_kernels.trainer.errors import DataError

warnings.filterwarnings("ignore", "Sparse (CSR|invariant)")  # torch's notes on sparse tensors

LOCAL_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"  # beside a checkout
RATINGS = RemoteFile(
    "ml-100k/u.data",
    "https://files.grouplens.org/datasets/movielens/ml-100k/u.data",
    "sha256:06416e597f82b7342361e41163890c81036900f418ad91315590814211dca490",
)
HISTORY, DIM, TEMPERATURE, TOP = 10, 32, 0.1, 10
BATCH, NEGATIVES, EPOCHS = 512, 64, 5


class Events(NamedTuple):
    """m times that a user watched an item."""

    user: Tensor  # (m,)
    item: Tensor  # (m,)
    history: Tensor  # (m, HISTORY) the user's items before, latest first; `items` is padding


@dataclass(frozen=True)
class Data:
    """Every rating is a positive. Each user's last item is the test, the one before validation."""

    users: int
    items: int
    train: Events
    valid: Events
    test: Events

    @property
    def frequency(self) -> Tensor:
        """(items,) the share of each in the training events; what never occurs counts as once."""
        count = self.train.item.bincount(minlength=self.items).clamp(min=1)
        return count / len(self.train.item)


def load(path: Path) -> Data:
    """Of a file of user, item, rating and time; users and items count from 1."""
    user, item, _, when = np.loadtxt(path, dtype=np.int64).T
    order = np.lexsort((item, when, user))
    user, item = user[order] - 1, item[order] - 1
    items = int(item.max()) + 1
    padded = np.full((len(user), HISTORY), items)
    for back in range(1, HISTORY + 1):
        same = user[back:] == user[:-back]
        padded[back:, back - 1] = np.where(same, item[:-back], items)
    last = np.append(user[1:] != user[:-1], True)
    before = np.append(last[1:], False)

    def events(chosen: np.ndarray) -> Events:
        return Events(*(torch.from_numpy(x[chosen]) for x in (user, item, padded)))

    return Data(int(user.max()) + 1, items, events(~last & ~before), events(before), events(last))


class TwoTowers(nn.Module):
    """Unit vectors; the user's is divided by the temperature."""

    def __init__(self, data: Data) -> None:
        super().__init__()
        self.watched = nn.EmbeddingBag(data.items + 1, DIM, mode="mean", padding_idx=data.items)
        self.item = nn.Embedding(data.items, DIM)
        self.user_mlp, self.item_mlp = (
            nn.Sequential(nn.Linear(DIM, DIM), nn.ReLU(), nn.Linear(DIM, DIM)) for _ in range(2)
        )
        for table in (self.watched, self.item):
            nn.init.normal_(table.weight, std=0.1)

    def users(self, events: Events) -> Tensor:
        x = self.watched(events.history)
        return normalize(x + self.user_mlp(x)) / TEMPERATURE

    def items(self, ids: Tensor) -> Tensor:
        x = self.item(ids)
        return normalize(x + self.item_mlp(x))


def softmax(
    query: Tensor, table: Tensor, positive: Tensor, negative: Tensor, log_q: Tensor | None = None
) -> Tensor:
    """With log_q, of scores less the log of each candidate's probability (Yi et al., 2019)."""
    return fused_softmax_loss(query, table, positive, negative, log_q=log_q)


def emu(
    query: Tensor, table: Tensor, positive: Tensor, negative: Tensor, *,
    rate: float | Expected, beta: float, alpha: float, log_q: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """With rate 0, unbounded label smoothing alone."""
    return fused_emu_loss(
        query, table, positive, negative, mutation_rate=rate, beta=beta, alpha=alpha, log_q=log_q
    )


def expected(*tensors: Tensor, rate: float, **options: Any) -> Tensor:
    return emu(*tensors, rate=Expected(rate), **options)


def bpr(query: Tensor, table: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    """Of all negatives of each row (Rendle et al., 2009, with more than one)."""
    own = (query * table[positive]).sum(dim=1, keepdim=True)
    shared = negative.amax(dim=0)  # one set for the batch, with −1 where a row's own item is in it
    real = (negative >= 0) & (shared >= 0)
    difference = own - query @ table[shared.clamp(min=0)].T
    return -logsigmoid(difference)[real].mean()


def sample(kind: str, data: Data, positive: Tensor, count: int) -> Tensor:
    """Item ids (count,): uniform, positives of the batch ("in-batch"), or half of each."""
    taken = {"uniform": 0, "in-batch": count, "mixed": count // 2}[kind]
    return torch.cat(
        [
            positive[torch.randint(len(positive), (taken,))],
            torch.randint(data.items, (count - taken,)),
        ]
    )


def log_probability(kind: str, data: Data) -> Tensor:
    """(items,) the log of the probability that a draw of `sample` is the item."""
    share = {"uniform": 0.0, "in-batch": 1.0, "mixed": 0.5}[kind]
    return (share * data.frequency + (1 - share) / data.items).log()


class Ranked(NamedTuple):
    """Of each user, for one held-out item."""

    recall: Tensor  # (users,) at TOP
    ndcg: Tensor  # (users,) at TOP


def rank(score: Tensor, held: Events, seen: Tensor) -> Ranked:
    """Among all items but `seen` (users, items); of equal scores the mean rank."""
    score = score.masked_fill(seen, -torch.inf)[held.user]
    own = score.gather(1, held.item[:, None])
    before = (score > own).sum(dim=1) + ((score == own).sum(dim=1) - 1) / 2
    hit = (before < TOP).float()
    return Ranked(hit, hit / (before + 2).log2())


# Each contender: its loss, what its negatives are, and the settings it may choose from.
TOWERS = [{"lr": lr, "decay": decay} for lr in (0.005, 0.015) for decay in (0.01, 0.3)]
GRAPHS = [{"lr": lr, "decay": decay} for lr in (0.015, 0.05) for decay in (0.01, 0.1)]
MUTATED = [
    {"rate": rate, "beta": beta, "alpha": 0.5} for rate in (0.2, 0.5) for beta in (0.02, 0.1)
]
BASELINE, UNMUTATED = "softmax, uniform", "ULS alone"
CONTENDERS: dict[str, tuple[Callable[..., Tensor], str, list[dict[str, Any]]]] = {
    BASELINE: (softmax, "uniform", TOWERS),
    "softmax, in-batch, logQ": (softmax, "in-batch", TOWERS),
    "softmax, mixed, logQ": (softmax, "mixed", TOWERS),
    "BPR": (bpr, "uniform", TOWERS),
    "LightGCN": (bpr, "uniform", GRAPHS),
    UNMUTATED: (
        emu,
        "uniform",
        [{"rate": 0.0, "beta": b, "alpha": a} for b in (0.02, 0.1) for a in (0.1, 0.5)],
    ),
    "EMU": (emu, "uniform", MUTATED),
    "EMU, mixed, logQ": (emu, "mixed", MUTATED),
    "EMU, closed form": (expected, "uniform", MUTATED),
}


@dataclass(frozen=True)
class Job:
    """One training: of `contender`, with its `settings`, over those of the baseline's towers."""

    contender: str
    settings: dict[str, Any]
    seed: int
    epochs: int


@cache
def read() -> Data:
    return load(fetch(RATINGS))


def train(job: Job) -> Ranked:
    """The ranks of the validation items (seed < 0: tuning) or of the test items."""
    data = read()
    loss, kind, _ = CONTENDERS[job.contender]
    settings = dict(job.settings)
    lr, decay = settings.pop("lr"), settings.pop("decay")
    torch.manual_seed(abs(job.seed))
    score = train_graph if job.contender == "LightGCN" else train_towers
    held = data.valid if job.seed < 0 else data.test
    seen = torch.zeros(data.users, data.items, dtype=torch.bool)
    for events in (data.train,) if job.seed < 0 else (data.train, data.valid):
        seen[events.user, events.item] = True
    if "logQ" in job.contender:
        settings["log_q"] = log_probability(kind, data)
    return rank(score(data, job.epochs, lr, decay, loss, kind, settings, held), held, seen)


def train_towers(
    data: Data, epochs: int, lr: float, decay: float, loss: Callable[..., Tensor], kind: str,
    settings: dict[str, Any], held: Events,
) -> Tensor:  # fmt: skip
    """(users, items) scores at the time of the held-out events."""
    model = TwoTowers(data)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=decay)
    log_q = settings.pop("log_q", None)
    for _ in range(epochs):
        for rows in torch.randperm(len(data.train.item)).split(BATCH):
            batch = Events(*(column[rows] for column in data.train))
            negative = sample(kind, data, batch.item, NEGATIVES)
            # The item tower computes the batch's candidates alone; the ids become rows of those.
            ids, row = torch.cat([batch.item, negative]).unique(return_inverse=True)
            positive, negative = row.split([len(rows), NEGATIVES])
            negative = negative.where(negative != positive[:, None], -1)  # (B, K), −1 is padding
            query, table = model.users(batch), model.items(ids)
            local = settings if log_q is None else settings | {"log_q": log_q[ids]}
            optimizer.zero_grad()
            loss(query, table, positive, negative, **local).backward()
            optimizer.step()
    with torch.no_grad():
        by_user = held.user.argsort()
        users = model.users(Events(*(column[by_user] for column in held)))
        return users @ model.items(torch.arange(data.items)).T


def train_graph(
    data: Data, epochs: int, lr: float, decay: float, loss: Callable[..., Tensor], kind: str,
    settings: dict[str, Any], held: Events,
) -> Tensor:  # fmt: skip
    """(users, items) scores of LightGCN, which knows no order of events. Batches are larger."""
    user, item = data.train.user, data.train.item + data.users
    nodes = data.users + data.items
    degree = torch.cat([user, item]).bincount(minlength=nodes).clamp(min=1)
    weight = (degree[user] * degree[item]).rsqrt()
    links = torch.sparse_coo_tensor(
        torch.stack([torch.cat([user, item]), torch.cat([item, user])]),
        weight.repeat(2), (nodes, nodes), check_invariants=True,
    ).coalesce().to_sparse_csr()  # fmt: skip
    model = LightGCN(nodes, DIM, num_layers=2, normalize=False)
    nn.init.normal_(model.embedding.weight, std=0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=decay)
    for _ in range(3 * epochs):
        for rows in torch.randperm(len(user)).split(8 * BATCH):
            z = model.get_embedding(links)
            negative = torch.randint(data.items, (NEGATIVES,)) + data.users
            negative = negative.where(negative != item[rows, None], -1)
            optimizer.zero_grad()
            loss(z[user[rows]], z, item[rows], negative).backward()
            optimizer.step()
    with torch.no_grad():
        of_users, of_items = model.get_embedding(links).split([data.users, data.items])
        return of_users @ of_items.T


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=5, help="default %(default)s")
    parser.add_argument("--tiny", action="store_true", help="two seeds, one epoch: a smoke test")
    options = parser.parse_args(arguments)
    if LOCAL_DATA.is_dir():
        os.environ.setdefault(FOLDER_VARIABLE, str(LOCAL_DATA))
    seeds, epochs = (2, 1) if options.tiny else (options.seeds, EPOCHS)
    tuned = {name: settings for name, (*_, settings) in CONTENDERS.items()}
    total = sum(map(len, tuned.values())) + len(CONTENDERS) * seeds
    workers, start = torch.get_num_threads(), time.perf_counter()
    try:
        data = read()
        with ExitStack() as stack:
            mapped: Callable[..., Iterable[Ranked]] = map
            if workers > 1:  # batches this small keep one thread busy, so runs go side by side
                mapped = stack.enter_context(
                    ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (1,))
                ).map
            bar = stack.enter_context(tqdm(total=total, unit="run"))

            def runs(jobs: list[Job]) -> list[Ranked]:
                results = []
                for result in mapped(train, jobs):
                    results.append(result)
                    bar.update()
                return results

            def best(jobs: list[Job]) -> Job:
                scores = [float(ranked.ndcg.mean()) for ranked in runs(jobs)]
                return jobs[scores.index(max(scores))]

            base = best([Job(BASELINE, each, -1, epochs) for each in TOWERS]).settings
            chosen = {BASELINE: base}
            for name, settings in tuned.items():
                if name != BASELINE:
                    jobs = [Job(name, base | each, -1, epochs) for each in settings]
                    chosen[name] = best(jobs).settings
            jobs = [
                Job(name, settings, seed, epochs)
                for name, settings in chosen.items()
                for seed in range(seeds)
            ]
            found = runs(jobs)
    except DataError as error:
        print(f"retrieval: {error}", file=sys.stderr)
        return 1
    results = {
        name: Ranked(*map(torch.stack, zip(*found[at * seeds : (at + 1) * seeds], strict=True)))
        for at, name in enumerate(chosen)
    }
    print(f"\nMovieLens-100k: {data.users:,} users, {data.items:,} items, {seeds} seeds\n")
    print(table(data, results, chosen))
    print(
        f"\n{total} runs in {time.perf_counter() - start:.0f} s "
        f"({sum(os.times()[:4]):.0f} s of CPU time), {workers} threads, "
        f"{torch.backends.cpu.get_cpu_capability()}; emu-kernels {emu_kernels.__version__}, "
        f"torch {torch.__version__}, PyG {torch_geometric.__version__}; {time.strftime('%Y-%m-%d')}"
    )
    return 0


def table(data: Data, results: dict[str, Ranked], chosen: dict[str, dict[str, Any]]) -> str:
    """Means over users; ± is the standard deviation over seeds."""
    seen = torch.zeros(data.users, data.items, dtype=torch.bool)
    for events in (data.train, data.valid):
        seen[events.user, events.item] = True
    popular = rank(data.frequency.expand(data.users, -1), data.test, seen)
    rows = [["popularity", *(f"{float(x.mean()):.4f}" for x in popular), "", "", ""]]
    for name, result in results.items():
        means = [x.mean(dim=1) for x in result]
        rows.append(
            [
                name,
                *(f"{float(x.mean()):.4f} ± {float(x.std()):.4f}" for x in means),
                *(compare(result.ndcg, results[each].ndcg) for each in (BASELINE, UNMUTATED)),
                ", ".join(f"{key} {value}" for key, value in chosen[name].items()),
            ]
        )
    headers = ["", f"Recall@{TOP}", f"NDCG@{TOP}", "NDCG − softmax", "NDCG − ULS", "chosen"]
    return tabulate(rows, headers=headers, tablefmt="pipe")


def compare(ours: Tensor, other: Tensor) -> str:
    """The mean difference of (seeds, users), with p of paired t-tests over seeds and over users."""
    if torch.equal(ours, other):
        return "–"
    difference = float((ours - other).mean())
    p = [float(ttest_rel(ours.mean(dim=d), other.mean(dim=d)).pvalue) for d in (1, 0)]
    said = " / ".join("< 0.01" if x < 0.01 else f"{x:.2f}" for x in p)
    return f"{difference:+.4f} (p {said})"


if __name__ == "__main__":
    sys.exit(main())
