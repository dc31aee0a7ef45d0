"""Node classification with EMU: a GCN on Cora and Citeseer, 20 labels a class.

The last layer of a classifier compares a node's embedding with one vector a class. So the embedding
is a query, the vector of its class the positive, and those of the other classes, or the embeddings
of labelled nodes of other classes, are the negatives that EMU mutates. The loss is cross-entropy
+ γ L_emu; the table compares it with cross-entropy, label smoothing, its label smoothing alone, and
supervised contrastive learning.

    python examples/node_classification.py            # minutes; --tiny: seconds
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
from dataclasses import dataclass, replace
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch_geometric
from pytorch_metric_learning.losses import SupConLoss
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components
from scipy.stats import ttest_rel
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, dropout, normalize
from torch_geometric.nn import APPNP, GCNConv
from tqdm import tqdm

import emu_kernels
from emu_kernels import Expected, fused_emu_loss
from emu_kernels.trainer.datasets import FOLDER_VARIABLE, RemoteFile, fetch
from emu_kernels.trainer.errors import DataError

warnings.filterwarnings("ignore", "Sparse (CSR|invariant)")  # torch's notes on sparse tensors

LOCAL_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"  # beside a checkout


def _npz(name: str, digest: str) -> RemoteFile:
    """A graph of Shchur et al., Pitfalls of Graph Neural Network Evaluation (2018)."""
    commit = "99356931fd6158a05de41632669d5ab69e6e105e"
    url = f"https://raw.githubusercontent.com/shchur/gnn-benchmark/{commit}/data/npz/{name}.npz"
    return RemoteFile(f"{name}.npz", url, f"sha256:{digest}")


GRAPHS = {
    "Cora": _npz("cora", "068e22d90c3849b4057dfb05851741428992af058efcd4e7ebb4186f3d581de2"),
    "Citeseer": _npz(
        "citeseer", "280278b21b434c047922e8389518861416fb3ad39389c27865ff0e6bbb0aaab7"
    ),
}


@dataclass(frozen=True)
class Nodes:
    """n nodes with w words and c classes."""

    words: Tensor  # (n, w) sparse CSR, rows of length 1
    links: Tensor  # (n, n) sparse CSR, symmetric
    label: Tensor  # (n,) in [0, c)

    @property
    def classes(self) -> int:
        return int(self.label.max()) + 1


def csr(matrix: csr_matrix) -> Tensor:
    matrix.sum_duplicates()  # sorts
    starts, columns = (
        torch.from_numpy(x.astype(np.int64)) for x in (matrix.indptr, matrix.indices)
    )
    values = torch.from_numpy(matrix.data.astype(np.float32))
    return torch.sparse_csr_tensor(starts, columns, values, matrix.shape, check_invariants=True)


def load(path: Path) -> Nodes:
    """As Shchur et al.: links without direction, largest connected component, words or not.

    Rows of words are scaled to length 1.
    """
    with np.load(path, allow_pickle=False) as file:
        links, words = (
            csr_matrix(tuple(file[f"{x}_{part}"] for part in ("data", "indices", "indptr")),
                       file[f"{x}_shape"])
            for x in ("adj", "attr")
        )  # fmt: skip
        label = file["labels"]
    links = csr_matrix(links + links.T)
    links.setdiag(0)
    links.eliminate_zeros()
    component = connected_components(links)[1]
    largest = component == np.bincount(component).argmax()
    links, words = links[largest][:, largest], words[largest]
    links.data[:] = 1
    counts = np.diff(words.indptr)
    words.data = np.repeat(1 / np.sqrt(counts.clip(min=1)), counts)
    return Nodes(csr(words), csr(links), torch.from_numpy(label[largest].astype(np.int64)))


def split(label: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random nodes to train (20 a class) and to tune on (30 a class); the others are the test."""
    generator = torch.Generator().manual_seed(seed)
    parts: tuple[list[Tensor], ...] = ([], [], [])
    for each in label.unique():
        nodes = (label == each).nonzero()[:, 0]
        nodes = nodes[torch.randperm(len(nodes), generator=generator)]
        for part, some in zip(parts, nodes.split([20, 30, len(nodes) - 50]), strict=True):
            part.append(some)
    train, valid, test = map(torch.cat, parts)
    return train, valid, test


class GCN(nn.Module):
    """Kipf and Welling's two layers; the second is split into embedding and classifier."""

    def __init__(self, words: int, classes: int, drop: float, hidden: int = 64) -> None:
        super().__init__()
        self.drop = drop
        self.first = GCNConv(words, hidden, cached=True)
        self.spread = APPNP(K=1, alpha=0.0, cached=True)  # the mean over neighbours, no weights
        self.head = nn.Linear(hidden, classes)

    def forward(self, words: Tensor, links: Tensor) -> Tensor:
        """(n, hidden) embeddings; the class of a node is the argmax of ``head`` of its own."""
        kept = dropout(words.values(), self.drop, self.training)
        words = torch.sparse_csr_tensor(
            words.crow_indices(), words.col_indices(), kept, words.shape, check_invariants=False
        )
        hidden = dropout(self.first(words, links).relu(), self.drop, self.training)
        return self.spread(hidden, links)


# A loss takes embeddings (B, d) and labels (B,) of the training nodes, and the classifier.
Loss = Callable[..., Tensor]


def smoothed(z: Tensor, head: nn.Linear, label: Tensor, *, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy, with label smoothing or without."""
    return cross_entropy(head(z), label, label_smoothing=smoothing)


def emu(
    z: Tensor, head: nn.Linear, label: Tensor, *,
    rate: float | Expected, beta: float, gamma: float, negatives: str,
) -> Tensor:  # fmt: skip
    """Cross-entropy + γ L_emu. With rate 0 that is unbounded label smoothing alone."""
    others = label[:, None] != torch.arange(len(head.weight))  # (B, c)
    table = head.weight
    if negatives == "nodes":  # labelled nodes of other classes; −1 is padding
        table = torch.cat([head.weight, z])
        others = torch.cat([torch.zeros_like(others), label[:, None] != label], dim=1)
    negative = torch.arange(len(table)).where(others, -1)
    term = fused_emu_loss(z, table, label, negative, mutation_rate=rate, beta=beta, alpha=0.0)
    return cross_entropy(head(z), label) + gamma * term


def expected(z: Tensor, head: nn.Linear, label: Tensor, *, rate: float, **options: Any) -> Tensor:
    return emu(z, head, label, rate=Expected(rate), **options)


def contrastive(
    z: Tensor, head: nn.Linear, label: Tensor, *, temperature: float, gamma: float
) -> Tensor:
    """Cross-entropy + γ L_sup of Khosla et al. (2020)."""
    return cross_entropy(head(z), label) + gamma * SupConLoss(temperature)(normalize(z), label)


# Each contender: its loss, and the settings it may choose from, as many as every other.
ENCODER = [
    {"drop": drop, "decay": decay} for drop in (0.5, 0.7) for decay in (0.002, 0.005, 0.01)
]  # chosen for cross-entropy, kept for all
MUTATED = [
    {"rate": rate, "beta": 0.3, "gamma": 1.0, "negatives": negatives}
    for negatives in ("classes", "nodes")
    for rate in (0.15, 0.4, 0.7)
]
BASELINE, UNMUTATED = "cross-entropy", "ULS alone"
CONTENDERS: dict[str, tuple[Loss, list[dict[str, Any]]]] = {
    BASELINE: (smoothed, [{}]),
    "label smoothing": (smoothed, [{"smoothing": x} for x in (0.05, 0.1, 0.15, 0.2, 0.3, 0.4)]),
    "supervised contrastive": (
        contrastive,
        [{"temperature": t, "gamma": g} for t in (0.1, 0.3, 1.0) for g in (0.1, 0.5)],
    ),
    UNMUTATED: (
        emu,
        [
            {"rate": 0.0, "beta": beta, "gamma": 1.0, "negatives": negatives}
            for negatives in ("classes", "nodes")
            for beta in (0.1, 0.3, 1.0)
        ],
    ),
    "EMU": (emu, MUTATED),
    "EMU, closed form": (expected, MUTATED),
}


@dataclass(frozen=True)
class Job:
    """One training."""

    graph: str
    contender: str
    settings: dict[str, Any]  # of the loss
    encoder: dict[str, float]
    seed: int  # of the split, the initial weights and the dropout
    steps: int


class Accuracy(NamedTuple):
    valid: float
    test: float


@cache
def read(graph: str) -> Nodes:
    return load(fetch(GRAPHS[graph]))


def run(job: Job) -> Accuracy:
    """Train with Adam on all nodes at once; the last step's weights count."""
    nodes, loss = read(job.graph), CONTENDERS[job.contender][0]
    train, valid, test = split(nodes.label, job.seed)
    torch.manual_seed(job.seed)
    model = GCN(nodes.words.shape[1], nodes.classes, job.encoder["drop"])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02, weight_decay=job.encoder["decay"])
    for _ in range(job.steps):
        optimizer.zero_grad()
        z = model(nodes.words, nodes.links)[train]
        loss(z, model.head, nodes.label[train], **job.settings).backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        right = model.head(model(nodes.words, nodes.links)).argmax(dim=1) == nodes.label
    return Accuracy(*(100 * float(right[part].float().mean()) for part in (valid, test)))


Runner = Callable[[list[Job]], list[Accuracy]]


def study(graph: str, runs: Runner, *, splits: int, tuning: int, steps: int) -> str:
    """The table of one graph. Tuning has splits of its own; only their validation nodes count."""

    def best(candidates: list[Job]) -> Job:
        """The one with the best mean over the tuning splits."""
        jobs = [replace(job, seed=1000 + seed) for job in candidates for seed in range(tuning)]
        valid = [accuracy.valid for accuracy in runs(jobs)]
        means = [sum(valid[i : i + tuning]) for i in range(0, len(valid), tuning)]
        return candidates[means.index(max(means))]

    start = Job(graph, BASELINE, {}, {}, 0, steps)
    encoder = best([replace(start, encoder=each) for each in ENCODER]).encoder
    chosen = {
        name: best([replace(start, contender=name, settings=x, encoder=encoder) for x in settings])
        for name, (_, settings) in CONTENDERS.items()
    }
    found = runs([replace(job, seed=seed) for job in chosen.values() for seed in range(splits)])
    test = np.array([accuracy.test for accuracy in found]).reshape(len(chosen), splits)
    accuracy = dict(zip(chosen, test, strict=True))
    table = [
        {
            "loss": name,
            "test accuracy": f"{accuracy[name].mean():.2f} ± {accuracy[name].std(ddof=1):.2f}",
            "− cross-entropy": compare(accuracy[name], accuracy[BASELINE]),
            "− ULS alone": compare(accuracy[name], accuracy[UNMUTATED]),
            "chosen": ", ".join(f"{key} {value}" for key, value in job.settings.items())
            or ", ".join(f"{key} {value}" for key, value in encoder.items()),
        }
        for name, job in chosen.items()
    ]
    nodes = read(graph)
    title = f"{graph}: {len(nodes.label):,} nodes, {nodes.classes} classes, {splits} splits"
    return f"{title}\n\n{tabulate(table, headers='keys', tablefmt='pipe')}"


def compare(ours: np.ndarray, other: np.ndarray) -> str:
    """The mean difference, and p of a paired t-test over the splits."""
    if (ours == other).all():
        return "–"
    p = ttest_rel(ours, other).pvalue
    return f"{(ours - other).mean():+.2f} (p {'< 0.01' if p < 0.01 else f'{p:.2f}'})"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--splits", type=int, default=20, help="random splits; default %(default)s")
    parser.add_argument("--tiny", action="store_true", help="two splits, three steps: a smoke test")
    options = parser.parse_args(arguments)
    if LOCAL_DATA.is_dir():
        os.environ.setdefault(FOLDER_VARIABLE, str(LOCAL_DATA))
    sizes = {"splits": options.splits, "tuning": 3, "steps": 60}
    if options.tiny:
        sizes = {"splits": 2, "tuning": 1, "steps": 3}
    settings = len(ENCODER) + sum(len(settings) for _, settings in CONTENDERS.values())
    each = settings * sizes["tuning"] + len(CONTENDERS) * sizes["splits"]
    workers, start = torch.get_num_threads(), time.perf_counter()
    try:
        for graph in GRAPHS:
            read(graph)
        # A graph this small keeps one thread busy at most, so runs go side by side.
        with ExitStack() as stack:
            mapped: Callable[..., Iterable[Accuracy]] = map
            if workers > 1:
                mapped = stack.enter_context(
                    ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (1,))
                ).map
            bar = stack.enter_context(tqdm(total=each * len(GRAPHS), unit="run"))

            def runs(jobs: list[Job]) -> list[Accuracy]:
                results = []
                for result in mapped(run, jobs):
                    results.append(result)
                    bar.update()
                return results

            tables = [study(graph, runs, **sizes) for graph in GRAPHS]
    except DataError as error:
        print(f"node_classification: {error}", file=sys.stderr)
        return 1
    for table in tables:
        print(f"\n{table}")
    print(
        f"\n{each * len(GRAPHS)} runs in {time.perf_counter() - start:.0f} s "
        f"({sum(os.times()[:4]):.0f} s of CPU time), {workers} threads, "
        f"{torch.backends.cpu.get_cpu_capability()}; emu-kernels {emu_kernels.__version__}, "
        f"torch {torch.__version__}, PyG {torch_geometric.__version__}; {time.strftime('%Y-%m-%d')}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
