"""The picture of a run: loss and validation MRR over steps."""

from __future__ import annotations

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .checkpoint import write_atomically
from .run import Metric


def plot_metrics(metrics: list[Metric], title: str, path: Path) -> None:
    """Draw into a PNG, without a display and without pyplot's global state."""
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
    right.set_ylim(bottom=0)
    write_atomically(path, lambda file: figure.savefig(file, format="png"))
