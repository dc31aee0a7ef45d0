"""Markdown tables of results, from the rows only. The latest of repeated runs counts."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any, TypeAlias

import pandas as pd
from tabulate import tabulate

from bench import results
from bench.inputs import SIZES, Shape
from bench.results import MEMORY, QUANTILES, RATIO, SPEED, TIME
from bench.rivals import PHASES, RIVALS, TRAINING, WHOLE
from bench.trainers import TRAINERS, WHOLE_STEPS

MARKERS = ("<!-- bench report: begin -->", "<!-- bench report: end -->")
SETTING = ["similarity", "dtype", "gradient", *SIZES]
SPREAD = "20–80 %"
_NAMED: list[Any] = [*RIVALS, *TRAINERS, *WHOLE_STEPS]
TITLES: dict[str, str] = {rival.name: rival.title for rival in _NAMED}
Rows: TypeAlias = pd.DataFrame
Columns: TypeAlias = list[tuple[str, ...]]
"""A header and the keys of its cells: rival, what and phase, except those that name a line."""


def latest(rows: Rows) -> Rows:
    """The latest run of each setting; column ``setting`` numbers these, by their first rows."""
    keys = ["family", "device", "threads", "graph", "model", "optimizer", *SETTING]
    # The trainers of one run may differ in the gradient that they can compute.
    gradient = rows["gradient"].where(rows["family"] != "train", "")
    rows = rows.assign(setting=rows.assign(gradient=gradient).groupby(keys, sort=False).ngroup())
    newest = rows["date"] == rows.groupby("setting")["date"].transform("max")
    return rows[newest].sort_values("setting", kind="stable")


def number(value: float) -> str:
    """Three significant digits, no exponent."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:#.3g}".rstrip(".")


def spread(header: str, *key: str) -> Columns:
    """A median and its quantiles."""
    return [(header, *key), (SPREAD, *key)]


def table(rows: Rows, index: dict[str, str], columns: Columns, left: int = 1) -> str:
    """A line for each setting and each value of ``index``, in order; "–" where there is no row.

    ``index`` maps columns to headers; those after the first ``left`` come last in the table.
    """
    text = rows[list(QUANTILES)].map(number)
    line = rows.groupby(["setting", *index], sort=False).ngroup()
    rows = rows.assign(line=line, text=text["median"], spread=text["q20"] + "–" + text["q80"])
    keys = [key for key in ("rival", "what", "phase") if key not in index]
    wide = rows.pivot_table(["text", "spread"], ["line", *index], keys, aggfunc="last")
    cells = [("spread" if header == SPREAD else "text", *key) for header, *key in columns]
    names = wide.index.to_frame(index=False, name=["", *index.values()]).iloc[:, 1:]
    wide = wide.reindex(columns=cells).astype(object).fillna("–").reset_index(drop=True)
    wide.columns = [header for header, *_ in columns]
    shown = pd.concat([names.iloc[:, :left], wide, names.iloc[:, left:]], axis=1)
    align = ["left"] * left + ["right"] * (len(shown.columns) - left)
    return tabulate(shown, "keys", "pipe", showindex=False, disable_numparse=True, colalign=align)


def titled(rows: Rows) -> Rows:
    """The rows of known rivals, in the order of their lists, with titles and versions as names."""
    order = {name: i for i, name in enumerate(TITLES)}
    rows = rows[rows["rival"].isin(order)]
    rows = rows.sort_values("rival", key=lambda names: names.map(order), kind="stable")
    versions = (" (" + rows["library"].str.extract(r" (\S+)$")[0] + ")").fillna("")
    return rows.assign(rival=rows["rival"].map(TITLES) + versions)


def setting(rows: Rows, without: Sequence[str] = ()) -> str:
    """The setting of the first row, except for some columns."""
    row = rows.iloc[0]
    texts = {"similarity": row["similarity"], **{name: f"{name}={row[name]}" for name in SIZES}}
    texts |= {"dtype": row["dtype"]}
    texts |= {"gradient": "sparse gradient"} if row["gradient"] == "sparse" else {}
    return ", ".join(text for name, text in texts.items() if name not in without)


def caption(rows: Rows, what: str = "") -> str:
    """Where the rows were measured and with what, with our kernels' instruction sets."""
    row = rows.iloc[-1]
    ours = rows["instruction_set"][rows["rival"].str.startswith("fused-")].unique()
    threads = f"{row['threads']} thread{'s' if row['threads'] != 1 else ''}"
    used = ", ".join(filter(None, [threads, " ".join(filter(None, ours))]))
    return (
        f"\n\n{what}{'. ' if what else ''}"
        f"{row['device']} ({used}); emu-kernels {row['emu_kernels']} ({row['commit']}), "
        f"torch {row['torch']}, Python {row['python']}; {row['date'][:10]}."
    )


def step_table(rows: Rows, index: Sequence[str] = ()) -> str:
    """A line for each rival and value of the index. Phases that were measured have columns."""
    columns = spread("median ms", TIME, WHOLE)
    columns += [(f"{p} ms", TIME, p) for p in PHASES[:-1] if (rows["phase"] == p).any()]
    columns += [*spread("× ours", RATIO, WHOLE), ("peak MiB", MEMORY, WHOLE)]
    lines = {name: name for name in index} | {"rival": "rival" if index else WHOLE}
    what = caption(rows, "" if index else setting(rows))
    return table(titled(rows), lines, columns, len(lines)) + what


def variations(rows: Rows) -> str:
    """A line for each setting, with ours and eager. What differs between settings has a column."""
    usual = {c: rows[c].iloc[0] if c in SIZES else getattr(Shape, c) for c in SETTING}
    differ = [c for c in SETTING if (rows[c] != usual[c]).any()] or ["similarity"]
    columns: Columns = [
        ("EMU, fused, ms", "fused-emu", TIME, WHOLE),
        ("softmax, fused, ms", "fused-softmax", TIME, WHOLE),
        *spread("eager EMU × ours", "eager-emu", RATIO, WHOLE),
        *spread("eager softmax × ours", "eager-softmax", RATIO, WHOLE),
        ("peak MiB, ours", "fused-emu", MEMORY, WHOLE),
        ("eager EMU", "eager-emu", MEMORY, WHOLE),
    ]
    what = caption(rows, setting(rows, differ))
    return table(rows, {c: c for c in differ}, columns, len(differ)) + what


def steps_table(rows: Rows) -> str:
    """On a GPU a line for each setting and rival; on a CPU the paper's setting in full, and a line
    for each other setting."""
    if rows["instruction_set"].str.startswith("sm_").any():
        return step_table(rows, SETTING)
    usual = [getattr(Shape, SIZES.get(column, column)) for column in SETTING]
    paper = (rows[SETTING] == usual).all(axis=1) | (rows["setting"].nunique() == 1)
    tables = [step_table(run) for _, run in rows[paper].groupby("setting", sort=False)]
    return "\n\n".join([*tables, *([] if paper.all() else [variations(rows[~paper])])])


def trainers_table(rows: Rows) -> str:
    """One setting, a line for each trainer."""
    columns: Columns = [("triples / s", SPEED, TRAINING), *spread("ms a step", TIME, TRAINING)]
    columns += [*spread("× ours", RATIO, TRAINING), ("peak MiB", MEMORY, TRAINING)]
    row = rows.iloc[0]
    what = f"{row['model']} on {row['graph']}, {row['N']:,} entities, d={row['D']}"
    what += f", B={row['B']}, K={row['K']}, {row['optimizer']}"
    index = {"rival": "end to end", "gradient": "table's gradient"}
    return table(titled(rows), index, columns) + caption(rows, what)


def scale_table(rows: Rows) -> str:
    """A line for each size and gradient."""
    axis = rows["family"].iloc[0].removeprefix("scale-")
    columns: Columns = [
        (f"{rival.title}, {unit}", rival.name, what, WHOLE)
        for unit, what in (("ms", TIME), ("MiB", MEMORY))
        for rival in RIVALS
        if (rows["rival"] == rival.name).any()
    ]
    shown = rows.sort_values(["gradient", axis], kind="stable")
    shown = shown.assign(**{axis: shown[axis].map("{:,}".format)})
    what = caption(rows, setting(rows, (axis, "gradient")))
    return table(shown, {axis: axis, "gradient": "gradient"}, columns, 2) + what


def kernels_table(rows: Rows) -> str:
    """One setting, a line for each operator; a column for each backend."""
    present = [rival for rival in RIVALS if (rows["rival"] == rival.name).any()]
    columns = [column for r in present for column in spread(f"{r.title}, ms", r.name, TIME)]
    return table(rows, {"phase": "operator"}, columns) + caption(rows, setting(rows))


# A family's table, and whether each setting has its own table.
TABLES = {
    "steps": (steps_table, False),
    "closed": (step_table, True),
    "captured": (trainers_table, True),
    "kernels": (kernels_table, True),
    "train": (trainers_table, True),
    "scale-": (scale_table, False),
}


def markdown(rows: Rows) -> str:
    """All tables, device by device."""
    parts: list[str] = []
    for _, on_device in latest(rows).groupby(["device", "threads"], sort=False):
        for name, (make, alone) in TABLES.items():
            chosen = on_device[on_device["family"].str.startswith(name)]
            tables = chosen.groupby("setting" if alone else "family", sort=False)
            parts += [make(of_table) for _, of_table in tables]
    return "\n\n".join(parts)


def insert(text: str, block: str) -> str:
    """``text`` with the part between the markers replaced."""
    begin, end = MARKERS
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"expected one line {begin} and below it one {end}")
    return f"{text.partition(begin)[0]}{begin}\n{block}\n{end}{text.partition(end)[2]}"


def run(options: argparse.Namespace) -> int:
    rows = results.read(options.results)
    if options.parts:
        names = rows["family"] + ":" + rows["graph"]
        rows = rows[rows["family"].isin(options.parts) | names.isin(options.parts)]
    if rows.empty:
        of = f" of {', '.join(options.parts)}" if options.parts else ""
        print(f"no results{of} in {options.results}: run python -m bench first", file=sys.stderr)
        return 1
    tables = markdown(rows)
    if options.into is None:
        print(tables)
    else:
        text = options.into.read_text(encoding="utf-8")
        options.into.write_text(insert(text, tables), encoding="utf-8")
    return 0
