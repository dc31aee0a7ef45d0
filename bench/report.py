"""Markdown tables and plots of results, from the rows alone. Of repeated runs the latest counts."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import pandas as pd
from matplotlib.figure import Figure
from tabulate import tabulate

from bench import results
from bench.inputs import DTYPES, MIB, SIZES, Shape
from bench.results import MEMORY, RATIO, SHARE, SPEED, TIME, slug
from bench.rivals import PHASES, RIVALS, WHOLE
from bench.trainers import BY_NAME, TRAINERS
from bench.trainers import PHASE as STEP

MARKERS = ("<!-- bench report: begin -->", "<!-- bench report: end -->")
SETTING = ["similarity", "dtype", "gradient", "B", "K", "D", "N"]
KEYS = ["rival", "what", "phase"]
Rows: TypeAlias = pd.DataFrame
Columns: TypeAlias = list[tuple[str, tuple[str, ...]]]
"""Headers, and keys of cells: "text" or "spread", and those of ``KEYS`` that are not a line's."""


def latest(rows: Rows) -> Rows:
    """The latest run of each setting; in ``setting`` numbers, in order of their first rows."""
    keys = ["family", "device", "threads", "graph", "model", "optimizer", *SETTING]
    # The trainers of one run may differ in the gradient that they can compute.
    gradient = rows["gradient"].where(rows["family"] != "train", "")
    rows = rows.assign(setting=rows.assign(gradient=gradient).groupby(keys, sort=False).ngroup())
    newest = rows["date"] == rows.groupby("setting")["date"].transform("max")
    return rows[newest].sort_values("setting", kind="stable")


def number(value: float, what: str = TIME) -> str:
    """Three significant digits, no exponent; shares in percent."""
    if math.isnan(value):
        return "–"
    if what == SHARE:
        return f"{100 * value:.0f} %"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:#.3g}".rstrip(".")


def spread(header: str, *key: str) -> Columns:
    """A median and its quantiles."""
    return [(header, ("text", *key)), ("20–80 %", ("spread", *key))]


def each_rival(rows: Rows, header: str, what: str, phase: str = WHOLE) -> Columns:
    """A column for each of the rivals that have rows."""
    present = [rival for rival in RIVALS if (rows["rival"] == rival.name).any()]
    return [(f"{r.title}, {header}", ("text", r.name, what, phase)) for r in present]


def lines(rows: Rows, index: list[str], columns: Columns) -> list[list[Any]]:
    """One for each setting and each value of ``index``, in order; "–" where there is no row."""
    text = [number(r.median, r.what) for r in rows.itertuples()]
    between = [f"{number(r.q20, r.what)}–{number(r.q80, r.what)}" for r in rows.itertuples()]
    line = rows.groupby(["setting", *index], sort=False).ngroup()
    rows = rows.assign(line=line, text=text, spread=between)
    keys = [key for key in KEYS if key not in index]
    wide = rows.pivot_table(["text", "spread"], ["line", *index], keys, aggfunc="last")
    wide = wide.reindex(columns=[key for _, key in columns]).astype(object).fillna("–")
    return [[*names[1:], *cells] for names, cells in zip(wide.index, wide.to_numpy(), strict=True)]


def markdown_table(body: list[list[Any]], header: list[str], names: int = 1) -> str:
    """The first ``names`` columns are aligned to the left."""
    align = ["left"] * names + ["right"] * (len(header) - names)
    return tabulate(body, header, "pipe", disable_numparse=True, colalign=align)


def table(rows: Rows, index: list[str], columns: Columns, first: str = "", names: int = 1) -> str:
    """:func:`lines` below a header, which begins with ``first`` instead of a column's name."""
    header = [first or index[0], *index[1:], *(name for name, _ in columns)]
    return markdown_table(lines(rows, index, columns), header, names)


def titled(rows: Rows, listed: Sequence[Any]) -> Rows:
    """The rows of the listed rivals, in the list's order, with titles as names."""
    order = {rival.name: i for i, rival in enumerate(listed)}
    rows = rows[rows["rival"].isin(order)]
    rows = rows.sort_values("rival", key=lambda names: names.map(order), kind="stable")
    return rows.assign(rival=rows["rival"].map({rival.name: rival.title for rival in listed}))


def sizes(row: Any, without: Sequence[str] = ()) -> str:
    return ", ".join(f"{name}={row[name]}" for name in SIZES if name not in without)


def hardware(rows: Rows, row: Any = None) -> str:
    """Of the rows, or of ``row``; with the instruction sets of our kernels."""
    row = rows.iloc[0] if row is None else row
    ours = rows["instruction_set"][rows["rival"].str.startswith("fused-")].unique()
    used = f"{row['threads']} thread{'s' if row['threads'] != 1 else ''}"
    used = ", ".join(filter(None, [used, " ".join(filter(None, ours))]))
    return (
        f"{row['device']} ({used}); emu-kernels {row['emu_kernels']} ({row['commit']}), "
        f"torch {row['torch']}, Python {row['python']}; {row['date'][:10]}."
    )


def step_table(rows: Rows) -> str:
    """One setting, a line for each rival. Phases and shares have columns where measured."""
    row = rows.iloc[0]
    columns = spread("median ms", TIME, WHOLE)
    columns += [(f"{p} ms", ("text", TIME, p)) for p in PHASES[:-1] if (rows["phase"] == p).any()]
    columns += spread("× ours", RATIO, WHOLE)
    if (rows["what"] == SHARE).any():
        columns.append(("of copy bandwidth", ("text", SHARE, WHOLE)))
    columns.append(("peak MiB", ("text", MEMORY, WHOLE)))
    sparse = ", sparse gradient" if row["gradient"] == "sparse" else ""
    caption = f"{row['similarity']}, {sizes(row)}, {row['dtype']}{sparse}. {hardware(rows)}"
    return f"{table(titled(rows, RIVALS), ['rival'], columns, first=WHOLE)}\n\n{caption}"


def variations(rows: Rows) -> str:
    """A line for each setting, ours and eager. What differs between settings has a column."""
    row = rows.iloc[0]
    usual = {c: row[c] if c in SIZES else getattr(Shape, c) for c in SETTING}
    differ = [c for c in SETTING if (rows[c] != usual[c]).any()] or ["similarity"]
    columns: Columns = [
        ("EMU, fused, ms", ("text", "fused-emu", TIME, WHOLE)),
        ("softmax, fused, ms", ("text", "fused-softmax", TIME, WHOLE)),
        *spread("eager EMU × ours", "eager-emu", RATIO, WHOLE),
        *spread("eager softmax × ours", "eager-softmax", RATIO, WHOLE),
        ("peak MiB, ours", ("text", "fused-emu", MEMORY, WHOLE)),
        ("eager EMU", ("text", "eager-emu", MEMORY, WHOLE)),
    ]
    common = [sizes(row, differ), *(row[c] for c in ("similarity", "dtype") if c not in differ)]
    named = ", ".join(filter(None, common))
    caption = f"{named}{'. ' if named else ''}{hardware(rows, rows.iloc[-1])}"
    return f"{table(rows, differ, columns, names=len(differ))}\n\n{caption}"


def gpu_table(rows: Rows) -> str:
    """A line for each setting on a GPU and each of our backends in it.

    Times are ours in ms, shares are of the copy bandwidth, × are the rivals' times over this
    backend's medians, and peaks leave a dense table's gradient out.
    """
    header = (
        "ours|forward|share|whole|20–80 %|share|eager EMU ×|compiled ×|eager softmax ×|peak MiB"
    )
    body = []
    for _, run in rows.groupby("setting", sort=False):
        row = run.iloc[0]
        known = run.drop_duplicates(KEYS, keep="last").set_index(KEYS)

        def get(name: str, what: str = TIME, phase: str = WHOLE, known: Any = known) -> float:
            return float(known["median"].get((name, what, phase), math.nan))

        dense = row["N"] * row["D"] * DTYPES[row["dtype"]].itemsize / MIB
        gradient = dense if row["gradient"] == "dense" else 0.0
        for name in (r.name for r in RIVALS if (r.name, TIME, WHOLE) in known.index):
            if not name.startswith("fused-emu"):
                continue
            whole, peak = known.loc[(name, TIME, WHOLE)], get(name, MEMORY)
            extra = peak - get(name.replace("emu", "softmax"), MEMORY)
            others = [get(n) for n in ("eager-emu", "compiled-emu", "eager-softmax")]
            body.append([
                *(row[column] for column in SETTING), name.removeprefix("fused-emu-"),
                number(get(name, TIME, "forward")), number(get(name, SHARE, "forward"), SHARE),
                number(whole["median"]), f"{number(whole['q20'])}–{number(whole['q80'])}",
                number(get(name, SHARE), SHARE), *(number(t / whole["median"]) for t in others),
                *map(number, (peak - gradient, extra, get("eager-emu", MEMORY) - gradient)),
            ])  # fmt: skip
    header += "|EMU − softmax|eager EMU"
    names = [*SETTING, *header.split("|")]
    return f"{markdown_table(body, names, 3)}\n\n{hardware(rows, rows.iloc[-1])}"


def steps_table(rows: Rows) -> str:
    """On a CPU the paper's setting in full, the others in a line each."""
    if rows["instruction_set"].str.startswith("sm_").any():
        return gpu_table(rows)
    usual = [getattr(Shape, SIZES.get(column, column)) for column in SETTING]
    paper = (rows[SETTING] == usual).all(axis=1) | (rows["setting"].nunique() == 1)
    tables = [step_table(run) for _, run in rows[paper].groupby("setting", sort=False)]
    return "\n\n".join([*tables, *([] if paper.all() else [variations(rows[~paper])])])


def plans_table(rows: Rows) -> str:
    """A line for each setting: the plans of the table's gradient side by side."""
    backward = each_rival(rows, "backward, ms", TIME, "backward")
    pairs = zip(backward, each_rival(rows, "whole, ms", TIME), strict=True)
    columns = [column for pair in pairs for column in pair]
    return f"{table(rows, ['dtype', *SIZES], columns)}\n\n{hardware(rows)}"


def scaled(rows: Rows, factors: Any) -> Rows:
    return rows.assign(**{name: rows[name] * factors for name in ("median", "q20", "q80")})


def captured_table(rows: Rows) -> str:
    """A line for each whole training step, captured as a CUDA graph or not."""
    row = rows.iloc[0]
    columns = [*spread("µs", TIME, STEP), ("triples / s", ("text", SPEED, STEP))]
    columns += spread("× ours", RATIO, STEP)
    shown = scaled(rows, rows["what"].map({TIME: 1000}).fillna(1))
    what = f"{row['model']} on {row['graph']}, {sizes(row)}, {row['dtype']}, {row['optimizer']}"
    return f"{table(shown, ['rival'], columns, first=STEP)}\n\n{what}. {hardware(rows[:0], row)}"


def trainers_table(rows: Rows) -> str:
    """A line for each trainer, below each setting its caption."""
    columns: Columns = [("triples / s", ("text", SPEED, STEP)), *spread("ms a step", TIME, STEP)]
    columns += [*spread("× ours", RATIO, STEP), ("peak MiB", ("text", MEMORY, STEP))]
    header = ["end to end", *(name for name, _ in columns), "table's gradient"]
    tables = []
    for _, run in rows.groupby("setting", sort=False):
        row, shown = run.iloc[0], titled(run, TRAINERS)
        versions = (" (" + shown["library"].str.extract(r" (\S+)$")[0] + ")").fillna("")
        shown = shown.assign(rival=shown["rival"] + versions)
        found = lines(shown, ["rival", "gradient"], columns)
        body = [[name, *cells, gradient] for name, gradient, *cells in found]
        what = f"{row['model']} on {row['graph']}, {row['N']:,} entities, d={row['D']}, "
        what += f"B={row['B']}, K={row['K']}, {row['optimizer']}"
        tables.append(f"{markdown_table(body, header)}\n\n{what}. {hardware(run)}")
    return "\n\n".join(tables)


def scale_table(rows: Rows) -> str:
    """A line for each size and gradient."""
    row = rows.iloc[0]
    axis = row["family"].removeprefix("scale-")
    columns = [*each_rival(rows, "ms", TIME), *each_rival(rows, "MiB", MEMORY)]
    shown = rows.sort_values(["gradient", axis], kind="stable")
    shown = shown.assign(**{axis: shown[axis].map("{:,}".format)})
    caption = f"{row['similarity']}, {sizes(row, [axis])}, {row['dtype']}. {hardware(rows)}"
    return f"{table(shown, [axis, 'gradient'], columns, names=2)}\n\n{caption}"


def sampling_table(rows: Rows) -> str:
    """A line for each graph."""
    names = [
        f"{r.rival.replace('-', ' ')} on {r.graph}: {r.K} walks of {r.phase} from each of "
        f"{r.N:,} entities"
        for r in rows.itertuples()
    ]
    shown, columns = scaled(rows, 0.001).assign(rival=names, phase=""), spread("seconds", TIME, "")
    return f"{table(shown, ['rival'], columns, first='what')}\n\n{hardware(rows)}"


TABLES = {
    "steps": steps_table, "plans": plans_table, "captured": captured_table,
    "train": trainers_table, "scale-": scale_table, "sampling": sampling_table,
}  # fmt: skip


def markdown(rows: Rows, plots: Sequence[str] = ()) -> str:
    """All tables, device by device, then links to the plots."""
    parts: list[str] = []
    for _, on_device in latest(rows).groupby(["device", "threads"], sort=False):
        for name, make in TABLES.items():
            chosen = on_device[on_device["family"].str.startswith(name)]
            parts += [make(family) for _, family in chosen.groupby("family", sort=False)]
    parts += [f"![{Path(plot).stem}]({plot})" for plot in plots]
    return "\n\n".join(parts)


_COLOURS = {
    "fused-emu": "C0", "fused-softmax": "C2", "eager-emu": "C3", "eager-softmax": "C1",
    "compiled-emu": "C4", "gather-scatter": "C7", "fused-emu-cuda": "C0", "fused-emu-triton": "C9",
    "fused-softmax-cuda": "C2", "fused-softmax-triton": "C8",
}  # fmt: skip
_NAMED: list[Any] = [*RIVALS, *TRAINERS]
_TITLES = {rival.name: rival.title.replace("*", "") for rival in _NAMED}


def draw(rows: Rows, folder: Path) -> list[Path]:
    """A PNG for each comparison of trainers, and one for each device and axis of scale."""
    figures: dict[str, Any] = {}
    rows = latest(rows)
    for _, run in rows[rows["family"] == "train"].groupby("setting", sort=False):
        names = ["device", "family", "graph", "N", "model", "D"]
        figures[slug(" ".join(map(str, run.iloc[0][names])))] = _speeds(run)
    scales = rows[rows["family"].str.startswith("scale-")]
    for (device, family), run in scales.groupby(["device", "family"], sort=False):
        figures[slug(f"{device} {family}")] = _curves(run)
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.png", dpi=120, metadata={"Software": None})
    return [folder / f"{name}.png" for name in figures]


def _curves(rows: Rows) -> Any:
    """Time and memory along an axis; solid where gradients are dense, dashed where sparse."""
    row = rows.iloc[0]
    axis = row["family"].removeprefix("scale-")
    figure: Any = Figure(figsize=(12, 4), layout="constrained")
    panels = figure.subplots(1, 2)
    labels = {TIME: "ms a step", MEMORY: "peak MiB of a step"}
    for panel, (what, label) in zip(panels, labels.items(), strict=True):
        shown = rows[(rows["what"] == what) & (rows["phase"] == WHOLE)].sort_values(axis)
        for (rival, gradient), line in shown.groupby(["rival", "gradient"]):
            colour, style = _COLOURS.get(rival, "C5"), "-" if gradient == "dense" else "--"
            panel.plot(
                line[axis], line["median"], style, color=colour, marker="o", markersize=4,
                label=f"{_TITLES.get(rival, rival)}, {gradient}",
            )  # fmt: skip
            between = (line[axis], line["q20"], line["q80"])
            panel.fill_between(*between, color=colour, alpha=0.2, linewidth=0)
        panel.set(xscale="log", yscale="log", xlabel=axis, ylabel=label)
        panel.grid(alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right", fontsize=7)
    title = f"{row['similarity']}, {sizes(row, [axis])}, {row['dtype']}; {row['device']}"
    figure.suptitle(title, fontsize=10)
    return figure


def _speeds(rows: Rows) -> Any:
    """Triples a second of each trainer."""
    row, speeds = rows.iloc[0], rows[rows["what"] == SPEED].iloc[::-1]
    figure: Any = Figure(figsize=(7, 0.4 * len(speeds) + 1.2), layout="constrained")
    panel = figure.subplots()
    names, medians = speeds["rival"].map(_TITLES), speeds["median"]
    errors = [medians - speeds["q20"], speeds["q80"] - medians]
    panel.errorbar(medians, names, xerr=errors, fmt="none", ecolor="0.6")
    colours = ["C0" if BY_NAME[name].has_ours else "C7" for name in speeds["rival"]]
    panel.scatter(medians, names, color=colours, zorder=3)
    panel.set(xscale="log", xlabel="triples a second")
    panel.grid(alpha=0.3)
    what = f"{row['model']} on {row['graph']} ({row['N']:,} entities), d={row['D']}"
    panel.set_title(f"{what}, B={row['B']}, K={row['K']}\n{row['device']}", fontsize=9)
    return figure


def insert(text: str, block: str) -> str:
    """``text`` with the part between the markers replaced."""
    begin, end = MARKERS
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"expected one line {begin} and below it one {end}")
    return f"{text.partition(begin)[0]}{begin}\n{block}\n{end}{text.partition(end)[2]}"


def run(options: argparse.Namespace) -> int:
    path: Path = options.results
    rows = results.read(path)
    if options.parts:
        names = rows["family"] + ":" + rows["graph"]
        rows = rows[rows["family"].isin(options.parts) | names.isin(options.parts)]
    if rows.empty:
        what = f"no results of {', '.join(options.parts)}" if options.parts else "no results"
        print(f"{what} in {path}: run python -m bench first", file=sys.stderr)
        return 1
    links: list[str] = []
    if not options.no_plots:
        folder = options.plots or (path if path.is_dir() else path.parent) / "plots"
        start = Path.cwd() if options.into is None else options.into.resolve().parent
        drawn = draw(rows, folder)
        links = [Path(os.path.relpath(plot.resolve(), start)).as_posix() for plot in drawn]
    tables = markdown(rows, links)
    if options.into is None:
        print(tables)
    else:
        text = options.into.read_text(encoding="utf-8")
        options.into.write_text(insert(text, tables), encoding="utf-8")
    return 0
