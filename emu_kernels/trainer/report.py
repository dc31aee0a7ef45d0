"""Results for people: tables, and the plot of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tabulate import tabulate

from .breakdown import Line
from .checkpoint import write_atomically
from .data import DIRECTIONS
from .evaluation import METRICS, Metrics


def metrics_table(rows: dict[str, Metrics], form: str = "simple", **columns: Sequence[str]) -> str:
    """A row for each named result, further columns at the end, in one of tabulate's formats."""
    header = ["", "MRR", "Hits@1", "Hits@3", "Hits@10", "MR", *columns]
    body = [
        [
            name,
            *(f"{x:.4f}" for x in (m.mrr, m.hits_at_1, m.hits_at_3, m.hits_at_10)),
            f"{m.mr:.1f}",
            *(column[i] for column in columns.values()),
        ]
        for i, (name, m) in enumerate(rows.items())
    ]
    align = ["left", *["right"] * (len(header) - 1)]
    return tabulate(body, header, form, disable_numparse=True, colalign=align)


def seeds_table(tested: Sequence[Metrics]) -> str:
    """The mean of each metric over runs, and its standard deviation."""
    header = ["runs", "MRR", "Hits@1", "Hits@3", "Hits@10", "MR"]
    cells = [str(len(tested))]
    for metric in METRICS:
        values = torch.tensor([getattr(m, metric) for m in tested], dtype=torch.float64)
        digits = 1 if metric == "mr" else 4
        spread = f" ± {float(values.std()):.{digits}f}" if len(tested) > 1 else ""
        cells.append(f"{float(values.mean()):.{digits}f}{spread}")
    return tabulate([cells], header, disable_numparse=True)


def lines_table(lines: Sequence[Line], form: str = "simple") -> str:
    """A row for each relation, or kind of relation: how well its tails and its heads are ranked."""
    header = ["relations", "triples", "tail MRR", "Hits@10", "head MRR", "Hits@10"]
    body = [
        [
            line.name,
            f"{line.triples:,}",
            *(
                f"{x:.4f}"
                for d in DIRECTIONS
                for x in (line.metrics[d].mrr, line.metrics[d].hits_at_10)
            ),
        ]
        for line in lines
    ]
    align = ["left", *["right"] * 5]
    return tabulate(body, header, form, disable_numparse=True, colalign=align)


def plot_metrics(metrics: list[dict[str, Any]], title: str, path: Path) -> None:
    """Draw loss and validation MRR over steps into a PNG."""
    figure = progress(metrics, title)
    write_atomically(path, lambda file: figure.savefig(file, format="png"))


def progress(metrics: list[dict[str, Any]], title: str = "") -> Figure:
    """Loss and validation MRR over steps, without a display or pyplot."""
    losses = [(m["step"], m["loss"]) for m in metrics if "loss" in m]
    ranks = [(m["step"], m["mrr"]) for m in metrics if m.get("split") == "valid"]
    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    left = figure.add_subplot()
    left.set(title=title, xlabel="step")
    left.set_ylabel("training loss", color="tab:blue")
    left.plot(*zip(*losses, strict=True), color="tab:blue") if losses else None
    right = left.twinx()
    right.set_ylabel("validation MRR", color="tab:orange")
    right.plot(*zip(*ranks, strict=True), color="tab:orange", marker="o") if ranks else None
    right.set_ylim(0, 1.05 * right.get_ylim()[1])
    return figure
