"""Draws the pages' figures from the rows of bench/results: ``python docs/draw.py``."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from matplotlib.figure import Figure

from bench import report, results

IMAGES = Path(__file__).with_name("images")


def steps() -> Figure:
    """A training step of every trainer, from the latest run on a CPU."""
    rows = report.latest(results.read(results.FOLDER))
    rows = rows[(rows["family"] == "train") & (rows["what"] == results.TIME)]
    rows = rows[(rows["graph"] == "FB15k-237") & (rows["model"] == "DistMult")]
    rows = report.titled(rows[rows["date"] == rows["date"].max()])
    rows = rows.sort_values("median", ascending=False)
    names = rows["rival"].str.strip("*")
    colours = names.str.contains("our").map({True: "#00796b", False: "#b0bec5"})
    figure = Figure(figsize=(7.2, 3.4), layout="constrained")
    axes = figure.add_subplot()
    bars = axes.barh(names, rows["median"], color=colours)
    axes.bar_label(
        bars,
        [f"{x:,.3g} ms" if x < 1000 else f"{x:,.0f} ms" for x in rows["median"]],
        padding=3,
        fontsize=8,
    )
    axes.set_xscale("log")
    axes.set_xlim(5, rows["median"].max() * 3)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    row = rows.iloc[0]
    figure.supxlabel(
        f"a training step, logarithmic: {row['model']} on {row['graph']}, d = {row['D']}, "
        f"{row['B']:,} triples × {row['K']} negatives\n"
        f"{row['device']}, {row['threads']} threads; medians of one run, {row['date'][:10]}",
        fontsize=8,
    )
    return figure


if __name__ == "__main__":
    IMAGES.mkdir(exist_ok=True)
    steps().savefig(IMAGES / "step.svg", metadata={"Date": None})
