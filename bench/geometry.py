"""Where negatives lie: their cosines with positives, and how even their directions are.

``python -m bench geometry RUN...`` reads run folders of ``emu-train`` and draws, for one batch of
training triples, uniform and structure-aware negatives and mutants of the uniform ones (figures 3
and 4 of EMU's paper). For each kind it writes the distribution of the cosine with the positive;
and, for the differences from the positive, the share of their variance in the two leading principal
components, and the participation ratio (Σλ)² / (D Σλ²) of the covariance's eigenvalues λ: 1 if all
directions are alike, 1/D if all lie on a line. The subfolder ``points`` has the negatives of the
batch's first positive, projected to the two leading components of all three kinds together.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from bench import results
from bench.results import Row
from emu_kernels import emu_mutate
from emu_kernels.trainer.models import Model
from emu_kernels.trainer.run import RunFolder
from emu_kernels.trainer.sampling import CORRUPTIONS, new_negatives

BINS = np.linspace(-1, 1, 41)
EDGES = tuple(f"from{edge:+.2f}" for edge in BINS[:-1])
# loss: the one that the model was trained with; negatives: their kind; leading, evenness: the share
# of two components and the participation ratio, means over positives; from...: shares of cosines.
COLUMNS = (
    "date", "commit", "dataset", "model", "loss", "step", "negatives", "cosine", "leading",
    "evenness", *EDGES, "device", "emu_kernels", "torch", "python",
)  # fmt: skip
NUMBERS = dict.fromkeys(("cosine", "leading", "evenness", *EDGES), "float64")
# x, y: of a negative, relative to the positive.
POINT_COLUMNS = (
    "date", "commit", "dataset", "model", "loss", "step", "negatives", "x", "y", "device",
)  # fmt: skip
POINT_NUMBERS = dict.fromkeys(("x", "y"), "float64")
POINTS = 64
"""How many negatives of each kind are projected."""
UNIFORM, AWARE, MUTANTS = "uniform", "structure-aware", "mutants"


def spectrum(differences: Tensor) -> tuple[float, float]:
    """Mean leading share and evenness of (B, K, D), K differences around each of B points."""
    centred = differences.double() - differences.double().mean(dim=1, keepdim=True)
    variances = torch.linalg.svdvals(centred).square()  # (B, min(K, D)), the others are 0
    total = variances.sum(dim=1)
    leading = variances[:, :2].sum(dim=1) / total
    evenness = total.square() / variances.square().sum(dim=1) / differences.shape[2]
    return float(leading.mean()), float(evenness.mean())


def _measured(positive: Tensor, negative: Tensor) -> Row:
    cosines = cosine_similarity(negative, positive[:, None], dim=2).clamp(-1, 1)  # rounding
    shares = np.histogram(cosines.flatten().numpy(), BINS)[0] / cosines.numel()
    leading, evenness = spectrum(negative - positive[:, None])
    row: Row = {"cosine": float(cosines.mean()), "leading": leading, "evenness": evenness}
    return row | dict(zip(EDGES, shares.tolist(), strict=True))


def rows(folder: Path, batch_size: int, negatives: int, rate: float) -> tuple[list[Row], list[Row]]:
    """The rows of one run, and its points."""
    run = RunFolder.open(folder)
    graph = run.read_graph()
    model, state = run.load_model(graph)
    if not isinstance(model, Model):
        raise ValueError(f"{folder}: expected a model with embeddings of entities")
    settings: dict[str, Any] = {"batch_size": batch_size, "negatives": negatives}
    config = dataclasses.replace(run.read_config(), **settings, filter_negatives=False)
    train = graph.triples["train"]
    batch = CORRUPTIONS[config.corruption].make(config, graph, train)(0)
    table = model.candidates().detach()
    positive = table[batch.positive]
    kinds: dict[str, Tensor] = {}
    for sampler in (UNIFORM, AWARE):
        drawn = new_negatives(dataclasses.replace(config, sampler=sampler), graph, train)(0, batch)
        kinds[sampler] = table[drawn.clamp(min=0)]
    kinds[MUTANTS] = emu_mutate(positive, kinds[UNIFORM], mutation_rate=rate, seed=config.seed)
    name = {"dataset": config.dataset or str(config.data), "model": config.model}
    name |= {"loss": config.loss, "step": state["step"]} | results.environment()
    measured = [
        name | {"negatives": kind} | _measured(positive, negative)
        for kind, negative in kinds.items()
    ]
    around = {kind: negative[0, :POINTS] - positive[0] for kind, negative in kinds.items()}
    differences = torch.cat(list(around.values()))
    _, _, axes = torch.linalg.svd(differences - differences.mean(dim=0), full_matrices=False)
    kept = {column: value for column, value in name.items() if column in POINT_COLUMNS}
    points = [
        kept | {"negatives": kind, "x": x, "y": y}
        for kind, part in around.items()
        for x, y in (part @ axes[:2].T).tolist()
    ]
    return measured, points


def run(options: argparse.Namespace) -> int:
    for folder in options.runs:
        found, points = rows(folder, options.batch, options.negatives, options.rate)
        for row in found:
            numbers = ", ".join(f"{k} {row[k]:.3f}" for k in ("cosine", "leading", "evenness"))
            print(f"{folder}: {row['negatives']}: {numbers}", flush=True)
        results.append(options.results, found, COLUMNS)
        results.append(options.results / "points", points, POINT_COLUMNS)
    return 0
