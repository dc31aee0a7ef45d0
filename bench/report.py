"""Markdown tables from rows of results, and from nothing else."""

from __future__ import annotations

import re
from collections.abc import Sequence

from tabulate import tabulate

from bench.results import MEMORY, RATIO, TIME, Row
from bench.rivals import RIVALS

MARKERS = ("<!-- bench report: begin -->", "<!-- bench report: end -->")
_HEADER = ("forward + backward", "median ms", "20–80 %", "× ours", "20–80 %", "peak MiB")


def _number(value: float) -> str:
    """Three significant digits, no exponent."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:#.3g}".rstrip(".")


def _cells(row: Row | None, *, spread: bool = True) -> list[str]:
    if row is None:
        return ["–", "–"] if spread else ["–"]
    return [_number(row.median), *([f"{_number(row.q20)}–{_number(row.q80)}"] if spread else [])]


def table(rows: Sequence[Row]) -> str:
    """The table of one run."""
    known = {(row.rival, row.what): row for row in rows}
    body = [
        [
            rival.title,
            *_cells(known.get((rival.name, TIME))),
            *_cells(known.get((rival.name, RATIO))),
            *_cells(known.get((rival.name, MEMORY)), spread=False),
        ]
        for rival in RIVALS
        if any(row.rival == rival.name for row in rows)
    ]
    align = ("left", *["right"] * (len(_HEADER) - 1))
    return tabulate(body, _HEADER, "pipe", disable_numparse=True, colalign=align)


def caption(rows: Sequence[Row], *, several: bool = False) -> str:
    """What the numbers of a run are of, or those of ``several`` of different similarities."""
    first = rows[0]
    sets = dict.fromkeys(row.instruction_set for row in rows if row.rival.startswith("fused"))
    used = f", {' '.join(sets)}" if sets else ""
    what = "" if several else f"{first.similarity}, "
    return (
        f"{what}B={first.B}, K={first.K}, D={first.D}, N={first.N}, {first.dtype}. {first.device} "
        f"({first.threads} thread{'s' if first.threads != 1 else ''}{used}); "
        f"emu-kernels {first.emu_kernels} ({first.commit}), torch {first.torch}, "
        f"Python {first.python}; {first.date[:10]}."
    )


def markdown(rows: Sequence[Row]) -> str:
    """The latest run of each device, number of threads, shape and dtype.

    Where such a setting was run with several similarities, all but the first share a table.
    """
    settings: dict[tuple[object, ...], dict[str, str]] = {}

    def key(row: Row) -> tuple[object, ...]:
        return row.device, row.threads, row.dtype, row.B, row.K, row.D, row.N

    for row in rows:
        latest = settings.setdefault(key(row), {})
        latest[row.similarity] = max(row.date, latest.get(row.similarity, ""))
    parts = []
    for setting, latest in settings.items():
        first, *others = [
            [r for r in rows if (key(r), r.similarity, r.date) == (setting, similarity, date)]
            for similarity, date in latest.items()
        ]
        parts.append(f"{table(first)}\n\n{caption(first)}")
        if others:
            parts.append(f"{similarities(others)}\n\n{caption(others[0], several=True)}")
    return "\n\n".join(parts)


def similarities(runs: Sequence[Sequence[Row]]) -> str:
    """A line for each run: ours, and what the eager twins take of it."""
    header = (
        "similarity",
        "EMU, fused, ms",
        "softmax, fused, ms",
        "eager EMU × ours",
        "20–80 %",
        "eager softmax × ours",
        "20–80 %",
        "peak MiB, ours",
        "eager EMU",
    )
    body = []
    for run in runs:
        known = {(row.rival, row.what): row for row in run}
        body.append(
            [
                run[0].similarity,
                *_cells(known.get(("fused-emu", TIME)), spread=False),
                *_cells(known.get(("fused-softmax", TIME)), spread=False),
                *_cells(known.get(("eager-emu", RATIO))),
                *_cells(known.get(("eager-softmax", RATIO))),
                *_cells(known.get(("fused-emu", MEMORY)), spread=False),
                *_cells(known.get(("eager-emu", MEMORY)), spread=False),
            ]
        )
    align = ("left", *["right"] * (len(header) - 1))
    return tabulate(body, header, "pipe", disable_numparse=True, colalign=align)


def insert(text: str, block: str) -> str:
    """``text`` with what stands between the markers replaced.

    Raises:
        ValueError: not exactly one pair of markers.
    """
    begin, end = map(re.escape, MARKERS)
    new, count = re.subn(
        f"(?s)({begin}\n).*?({end})", lambda found: f"{found[1]}{block}\n{found[2]}", text
    )
    if count != 1:
        raise ValueError(f"expected one line {MARKERS[0]} and below it one {MARKERS[1]}")
    return new
