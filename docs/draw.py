"""Draws the pages' figures from the rows of bench/results: ``python docs/draw.py``."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from bench import geometry, report, results, study
from bench.experiments import EXPERIMENTS
from bench.rivals import WHOLE
from emu_kernels import emu_mutate

IMAGES = Path(__file__).with_name("images")
OURS, OTHERS = "#00796b", "#b0bec5"


def step() -> Figure:
    """A training step of every trainer, from the latest run on a CPU."""
    rows = report.latest(results.read(results.FOLDER))
    rows = rows[(rows["family"] == "train") & (rows["what"] == results.TIME)]
    rows = rows[(rows["graph"] == "FB15k-237") & (rows["model"] == "DistMult")]
    rows = report.titled(rows[rows["date"] == rows["date"].max()])
    rows = rows.sort_values("median", ascending=False)
    names = rows["rival"].str.strip("*")
    colours = names.str.contains("our").map({True: OURS, False: OTHERS})
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


def growth() -> Figure:
    """Time and memory of a step by the number of negatives, from the latest run on a CPU."""
    rows = report.latest(results.read(results.FOLDER))
    rows = rows[(rows["family"] == "scale-K") & (rows["phase"] == WHOLE)]
    rows = report.titled(rows[rows["gradient"] == "dense"])
    figure = Figure(figsize=(7.2, 3), layout="constrained")
    for axes, what in zip(figure.subplots(1, 2), (results.TIME, results.MEMORY), strict=True):
        shown = rows[rows["what"] == what]
        for name, line in shown.groupby("rival", sort=False):
            ours = "fused" in name
            style = {"color": OURS if ours else "#607d8b", "ls": "-" if "EMU" in name else "--"}
            axes.loglog(line["K"], line["median"], marker="o", ms=3, label=name.strip("*"), **style)
        axes.set_xticks(ticks := sorted(shown["K"].unique()), [f"{tick:,}" for tick in ticks])
        axes.minorticks_off()
        axes.set_ylabel(f"{what}, {shown['unit'].iloc[0]}", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    handles = axes.get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=4, fontsize=7, frameon=False)
    row = rows.iloc[0]
    figure.supxlabel(
        f"negatives of each of {row['B']:,} rows, d = {row['D']}; loss and gradients\n"
        f"{row['device']}, {row['threads']} threads; {row['date'][:10]}",
        fontsize=8,
    )
    return figure


KINDS = {"uniform": "#607d8b", "structure-aware": "#c77700", "mutants": OURS}


def negatives() -> Figure:
    """Cosines of negatives with their positives, and negatives around one positive."""
    folder = results.FOLDER / "geometry"
    measured = results.read(folder, geometry.COLUMNS, geometry.NUMBERS)
    points = results.read(folder / "points", geometry.POINT_COLUMNS, geometry.POINT_NUMBERS)
    name = ["dataset", "loss"]
    runs = list(measured.groupby(name, sort=False))
    figure = Figure(figsize=(7.2, 4), layout="constrained")
    every = figure.subplots(2, len(runs), squeeze=False)
    for (above, below), ((dataset, loss), run) in zip(every.T, runs, strict=True):
        around = points[(points["dataset"] == dataset) & (points["loss"] == loss)]
        for _, row in run.iterrows():
            kind = row["negatives"]
            shares = row[list(geometry.EDGES)].to_list()
            above.stairs(shares, geometry.BINS, color=KINDS[kind], label=kind)
            here = around[around["negatives"] == kind]
            below.scatter(here["x"], here["y"], s=4, color=KINDS[kind])
        below.scatter(0, 0, marker="+", s=60, color="black")
        below.set_aspect("equal", "datalim")
        above.set_title(f"{dataset}, {loss}", fontsize=8)
        above.set_yticks([])
        above.tick_params(labelsize=7)
        below.tick_params(labelsize=7)
        above.spines[["top", "right", "left"]].set_visible(False)
    figure.legend(
        *every[0, 0].get_legend_handles_labels(),
        loc="outside upper center", ncols=3, fontsize=8, frameon=False,
    )  # fmt: skip
    return figure


def sensitivity() -> Figure:
    """Test MRR, and below it the mean rank, by rate, beta and alpha."""
    rows = study.read(results.FOLDER / "study")
    names, found = study.tested(EXPERIMENTS["sensitivity"].runs(), rows)
    cells = pd.DataFrame(found["line"].to_list(), columns=names).join(found[["mrr", "mr"]])
    numbers = dict.fromkeys(set(names) - {"varied"}, float)
    cells = cells.replace("", "nan").astype(numbers)
    figure = Figure(figsize=(7.2, 3.4), layout="constrained")
    grids = list(cells.groupby("varied", sort=False))
    every = figure.subplots(1, len(grids), squeeze=False)[0]
    for axes, (varied, part) in zip(every, grids, strict=True):
        rate, beta = str(varied).split(", ")
        mrr, rank = (part.pivot(index=rate, columns=beta, values=value) for value in ("mrr", "mr"))
        axes.imshow(mrr, cmap="BuGn", vmin=cells["mrr"].min(), vmax=cells["mrr"].max() + 0.1)
        for (y, x), value in np.ndenumerate(mrr):
            if np.isnan(value):
                continue
            text = f"{value:.3f}\n{rank.iloc[y, x]:.0f}"
            axes.text(x, y, text, ha="center", va="center", fontsize=7)
        axes.set_xticks(range(len(mrr.columns)), [f"{x:g}" for x in mrr.columns], fontsize=8)
        axes.set_yticks(range(len(mrr.index)), [f"{y:g}" for y in mrr.index], fontsize=8)
        axes.set_xlabel(beta, fontsize=8)
        axes.set_ylabel(rate.replace("_", " "), fontsize=8)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    return figure


def mutation() -> Figure:
    """What emu_mutate makes of one negative."""
    components = 24
    positive, negative = torch.ones(1, components), torch.zeros(1, 1, components)
    mutant = emu_mutate(positive, negative, mutation_rate=0.61, seed=1, backend="reference")
    names = ("positive z⁺", "negative z⁻", "mutant ẑ")
    figure = Figure(figsize=(7.2, 1.3), layout="constrained")
    axes = figure.add_subplot(xlim=(0, components), ylim=(3.1, -0.1), aspect="equal")
    for y, row in enumerate((positive[0], negative[0, 0], mutant[0, 0])):
        for x, taken in enumerate(row.tolist()):
            colour = OURS if taken else OTHERS
            axes.add_patch(Rectangle((x + 0.05, y + 0.05), 0.9, 0.9, color=colour))
    axes.set_yticks([0.5, 1.5, 2.5], names, fontsize=8)
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return figure


if __name__ == "__main__":
    IMAGES.mkdir(exist_ok=True)
    matplotlib.rcParams["svg.hashsalt"] = "emu"  # the same file from the same rows
    for draw in (step, growth, negatives, sensitivity, mutation):
        draw().savefig(IMAGES / f"{draw.__name__}.svg", metadata={"Date": None})
