"""Markdown tables from rows of results, and from nothing else. Of repeated runs the latest."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from bench.inputs import DTYPES, Shape
from bench.results import MEMORY, MIB, RATIO, SHARE, SPEED, TIME, Row
from bench.rivals import PHASES, RIVALS, WHOLE
from bench.scale import FIELDS, family

MARKERS = ("<!-- bench report: begin -->", "<!-- bench report: end -->")

Run = list[Row]
"""Rows of one measurement: of the same date and setting."""


# --- cells ----------------------------------------------------------------------------------------


def _number(value: float) -> str:
    """Three significant digits, no exponent."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:#.3g}".rstrip(".")


def _percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def _cells(
    row: Row | None, *, spread: bool = True, show: Callable[[float], str] = _number
) -> list[str]:
    if row is None:
        return ["–", "–"] if spread else ["–"]
    return [show(row.median), *([f"{show(row.q20)}–{show(row.q80)}"] if spread else [])]


def _table(body: list[list[str]], header: Sequence[str], names: int = 1) -> str:
    align = ["left"] * names + ["right"] * (len(header) - names)
    return tabulate(body, header, "pipe", disable_numparse=True, colalign=align)


def _known(run: Iterable[Row]) -> Callable[..., Row | None]:
    by_key = {(row.rival, row.what, row.phase): row for row in run}
    return lambda rival, what, phase=WHOLE: by_key.get((rival, what, phase))


# --- which rows -----------------------------------------------------------------------------------


def _setting(row: Row) -> tuple[object, ...]:
    # Trainers may differ in the gradient that they can make: one run has both.
    gradient = "" if row.family == "train" else row.gradient
    return (
        row.family, row.device, row.threads, row.graph, row.model, row.optimizer, row.B, row.K,
        row.D, row.N, row.dtype, gradient, row.similarity,
    )  # fmt: skip


def latest(rows: Sequence[Row]) -> list[Run]:
    """The latest run of each setting, in the order in which the settings first came."""
    dates: dict[tuple[object, ...], str] = {}
    for row in rows:
        dates[_setting(row)] = max(row.date, dates.get(_setting(row), ""))
    runs: dict[tuple[object, ...], Run] = {setting: [] for setting in dates}
    for row in rows:
        if row.date == dates[_setting(row)]:
            runs[_setting(row)].append(row)
    return list(runs.values())


def _by(runs: Sequence[Run], key: Callable[[Row], Any]) -> list[list[Run]]:
    groups: dict[Any, list[Run]] = {}
    for run in runs:
        groups.setdefault(key(run[0]), []).append(run)
    return list(groups.values())


def of_gpu(run: Run) -> bool:
    return any(row.instruction_set.startswith("sm_") for row in run)


# --- captions -------------------------------------------------------------------------------------


def _sizes(row: Row) -> str:
    return f"B={row.B}, K={row.K}, D={row.D}, N={row.N}, {row.dtype}"


def _hardware(row: Row, sets: Iterable[str] = ()) -> str:
    used = f", {' '.join(sets)}" if sets else ""
    return (
        f"{row.device} ({row.threads} thread{'s' if row.threads != 1 else ''}{used}); "
        f"emu-kernels {row.emu_kernels} ({row.commit}), torch {row.torch}, "
        f"Python {row.python}; {row.date[:10]}."
    )


def _sets(runs: Iterable[Run]) -> list[str]:
    ours = (row for run in runs for row in run if row.rival.startswith("fused"))
    return list(dict.fromkeys(row.instruction_set for row in ours if row.instruction_set))


def caption(run: Run) -> str:
    """What the numbers of a run are of."""
    first = run[0]
    sparse = ", sparse gradient" if first.gradient == "sparse" else ""
    return f"{first.similarity}, {_sizes(first)}{sparse}. {_hardware(first, _sets([run]))}"


# --- one step -------------------------------------------------------------------------------------


def table(run: Run) -> str:
    """A line for each rival. Phases and shares have columns where they were measured."""
    known = _known(run)
    parts = [phase for phase in PHASES[:-1] if any(row.phase == phase for row in run)]
    shares = any(row.what == SHARE for row in run)
    header = [
        WHOLE, "median ms", "20–80 %", *[f"{part} ms" for part in parts], "× ours", "20–80 %",
        *(["of copy bandwidth"] if shares else []), "peak MiB",
    ]  # fmt: skip
    body = [
        [
            rival.title,
            *_cells(known(rival.name, TIME)),
            *(c for part in parts for c in _cells(known(rival.name, TIME, part), spread=False)),
            *_cells(known(rival.name, RATIO)),
            *(_cells(known(rival.name, SHARE), spread=False, show=_percent) if shares else []),
            *_cells(known(rival.name, MEMORY), spread=False),
        ]
        for rival in RIVALS
        if any(row.rival == rival.name for row in run)
    ]
    return _table(body, header)


_SETTING = ("similarity", "dtype", "gradient", "B", "K", "D", "N")


def _columns(runs: Sequence[Run]) -> list[str]:
    """In what the runs differ, and in what kind they differ from the paper's setting."""
    values = {c: {getattr(run[0], c) for run in runs} for c in _SETTING}
    usual = Shape()
    kinds = ("similarity", "dtype", "gradient")
    differ = [
        c for c in _SETTING
        if len(values[c]) > 1 or (c in kinds and values[c] != {getattr(usual, c)})
    ]  # fmt: skip
    return differ or ["similarity"]


def variations(runs: Sequence[Run]) -> str:
    """A line for each run on a CPU: ours, and what the eager twins take of it.

    What all runs have in common has no column.
    """
    columns = _columns(runs)
    header = [
        *columns, "EMU, fused, ms", "softmax, fused, ms", "eager EMU × ours", "20–80 %",
        "eager softmax × ours", "20–80 %", "peak MiB, ours", "eager EMU",
    ]  # fmt: skip
    body = []
    for run in runs:
        known = _known(run)
        body.append(
            [
                *(str(getattr(run[0], column)) for column in columns),
                *_cells(known("fused-emu", TIME), spread=False),
                *_cells(known("fused-softmax", TIME), spread=False),
                *_cells(known("eager-emu", RATIO)),
                *_cells(known("eager-softmax", RATIO)),
                *_cells(known("fused-emu", MEMORY), spread=False),
                *_cells(known("eager-emu", MEMORY), spread=False),
            ]
        )
    return _table(body, header, len(columns))


def gradient_mib(row: Row) -> float:
    """What the table's dense gradient takes; a sparse one is not known from a row."""
    return row.N * row.D * DTYPES[row.dtype].itemsize / MIB if row.gradient == "dense" else 0.0


def gpu_table(runs: Sequence[Run]) -> str:
    """A line for each run on a GPU and each of our backends in it.

    Times are ours in ms, shares are of the copy bandwidth, × are the rivals' times over this
    backend's medians, and peaks leave a dense table's gradient out.
    """
    header = [
        "similarity", "dtype", "gradient", "B", "K", "D", "N", "ours", "forward", "share", "whole",
        "20–80 %", "share", "eager EMU ×", "compiled ×", "eager softmax ×", "peak MiB",
        "EMU − softmax", "eager EMU",
    ]  # fmt: skip
    body = []
    for run in runs:
        known = _known(run)
        first = run[0]

        def beyond(rival: str, known: Any = known, first: Row = first) -> float | None:
            row = known(rival, MEMORY)
            return None if row is None else row.median - gradient_mib(first)

        for rival in (r for r in RIVALS if r.name.startswith("fused-emu")):
            ours = known(rival.name, TIME)
            if ours is None:
                continue
            times = (known(n, TIME) for n in ("eager-emu", "compiled-emu", "eager-softmax"))
            peak, eager = beyond(rival.name), beyond("eager-emu")
            vanilla = beyond(rival.name.replace("emu", "softmax"))
            extra = None if peak is None or vanilla is None else peak - vanilla
            body.append(
                [
                    *(str(getattr(first, column)) for column in _SETTING),
                    rival.name.removeprefix("fused-emu").removeprefix("-") or "cpu",
                    *_cells(known(rival.name, TIME, "forward"), spread=False),
                    *_cells(known(rival.name, SHARE, "forward"), spread=False, show=_percent),
                    *_cells(ours),
                    *_cells(known(rival.name, SHARE), spread=False, show=_percent),
                    *("–" if t is None else _number(t.median / ours.median) for t in times),
                    *("–" if m is None else _number(m) for m in (peak, extra, eager)),
                ]
            )
    return _table(body, header, 3)


def _is_paper(row: Row) -> bool:
    paper = Shape()
    sizes = (paper.batch, paper.negatives, paper.dim, paper.entities)
    kind = (paper.similarity, paper.dtype, paper.gradient)
    return (row.B, row.K, row.D, row.N, row.similarity, row.dtype, row.gradient) == (*sizes, *kind)


def _steps(runs: Sequence[Run]) -> list[str]:
    """Of one device: on a CPU the paper's setting in full, the others in a line each."""
    hardware = _hardware(runs[-1][0], _sets(runs))
    if of_gpu(runs[0]):
        return [f"{gpu_table(runs)}\n\n{hardware}"]
    full = [run for run in runs if _is_paper(run[0]) or len(runs) == 1]
    parts = [f"{table(run)}\n\n{caption(run)}" for run in full]
    others = [run for run in runs if run not in full]
    if others:
        common = [c for c in _SETTING if c not in _columns(others)]
        named = ", ".join(
            f"{c}={getattr(others[0][0], c)}" if c in "BKDN" else getattr(others[0][0], c)
            for c in ("B", "K", "D", "N", "similarity", "dtype")
            if c in common
        )
        parts.append(f"{variations(others)}\n\n{named}{'. ' if named else ''}{hardware}")
    return parts


def planned(runs: Sequence[Run]) -> str:
    """A line for each run: the plans of the table's gradient side by side."""
    present = {row.rival for run in runs for row in run}
    shown = [rival for rival in RIVALS if rival.name in present]
    header = ["dtype", "B", "K", "D", "N"]
    header += [f"{r.title}, {part}, ms" for r in shown for part in ("backward", "whole")]
    body = []
    for run in runs:
        known = _known(run)
        body.append(
            [
                *(str(getattr(run[0], column)) for column in header[:5]),
                *(
                    _cells(known(rival.name, TIME, phase), spread=False)[0]
                    for rival in shown
                    for phase in PHASES[1:]
                ),
            ]
        )
    return f"{_table(body, header)}\n\n{_hardware(runs[0][0], _sets(runs))}"


# --- trainers -------------------------------------------------------------------------------------


def trainers(run: Run) -> str:
    """A line for each trainer."""
    from bench.train import RIVALS as TRAINERS

    phase = "training step"
    known = _known(run)
    header = [
        "end to end", "triples / s", "ms a step", "20–80 %", "× ours", "20–80 %", "peak MiB",
        "table's gradient",
    ]  # fmt: skip
    body = []
    for rival in TRAINERS:
        first = known(rival.name, TIME, phase)
        if first is None:
            continue
        version = f" ({first.library.split()[-1]})" if first.library else ""
        title = f"{rival.title}{version}"
        body.append(
            [
                title,
                *_cells(known(rival.name, SPEED, phase), spread=False),
                *_cells(first),
                *_cells(known(rival.name, RATIO, phase)),
                *_cells(known(rival.name, MEMORY, phase), spread=False),
                first.gradient,
            ]
        )
    row = run[0]
    what = f"{row.model} on {row.graph}, {row.N:,} entities, d={row.D}, B={row.B}, K={row.K}"
    return f"{_table(body, header)}\n\n{what}, {row.optimizer}. {_hardware(row)}"


# --- scale ----------------------------------------------------------------------------------------


def axis_of(row: Row) -> str | None:
    return next((axis for axis in FIELDS if row.family == family(axis)), None)


def scales(runs: Sequence[Run]) -> str:
    """Of one device and axis: a line for each size and gradient."""
    axis = axis_of(runs[0][0])
    assert axis is not None
    present = {row.rival for run in runs for row in run}
    shown = [rival for rival in RIVALS if rival.name in present]
    header = [axis, "gradient", *(f"{r.title}, ms" for r in shown)]
    header += [f"{r.title}, MiB" for r in shown]
    body = []
    for run in sorted(runs, key=lambda run: (run[0].gradient, getattr(run[0], axis))):
        known = _known(run)
        body.append(
            [
                f"{getattr(run[0], axis):,}",
                run[0].gradient,
                *(_cells(known(r.name, TIME), spread=False)[0] for r in shown),
                *(_cells(known(r.name, MEMORY), spread=False)[0] for r in shown),
            ]
        )
    row = runs[0][0]
    fixed = ", ".join(
        f"{name}={getattr(row, name)}" for name in ("B", "K", "D", "N") if name != axis
    )
    return (
        f"{_table(body, header, 2)}\n\n{row.similarity}, {fixed}, {row.dtype}. "
        f"{_hardware(row, _sets(runs))}"
    )


# --- the rest -------------------------------------------------------------------------------------


def others(runs: Sequence[Run]) -> str:
    """A line for each measurement that is compared with nothing."""
    header = ["what", "seconds", "20–80 %"]
    body = []
    for row in (row for run in runs for row in run):
        what = f"{row.rival.replace('-', ' ')} on {row.graph}: {row.K} walks of {row.phase}"
        seconds = (f"{x / 1000:.3g}" for x in (row.median, row.q20, row.q80))
        median, low, high = seconds
        body.append([f"{what} from each of {row.N:,} entities", median, f"{low}–{high}"])
    return f"{_table(body, header)}\n\n{_hardware(runs[0][0])}"


def markdown(rows: Sequence[Row], plots: Sequence[str] = ()) -> str:
    """All tables, device by device, then links to the plots."""
    parts: list[str] = []
    for of_device in _by(latest(rows), lambda row: (row.device, row.threads)):
        steps = [run for run in of_device if run[0].family == "steps"]
        if steps:
            parts += _steps(steps)
        plans = [run for run in of_device if run[0].family == "plans"]
        if plans:
            parts.append(planned(plans))
        graph_steps = [run for run in of_device if run[0].family == "captured"]
        if graph_steps:
            parts.append(captured(graph_steps))
        parts += [trainers(run) for run in of_device if run[0].family == "train"]
        along = [run for run in of_device if axis_of(run[0])]
        parts += [scales(group) for group in _by(along, lambda row: row.family)]
        sampling = [run for run in of_device if run[0].family == "sampling"]
        if sampling:
            parts.append(others(sampling))
    parts += [f"![{Path(plot).stem}]({plot})" for plot in plots]
    return "\n\n".join(parts)


def captured(runs: Sequence[Run]) -> str:
    """A line for each whole training step that was captured as a CUDA graph, or that was not."""
    header = ["training step", "µs", "20–80 %", "triples / s", "× ours", "20–80 %"]
    body = []
    for run in runs:
        known = _known(run)
        for name in dict.fromkeys(row.rival for row in run):
            row = known(name, TIME, "training step")
            assert row is not None
            median, low, high = (_number(1000 * x) for x in (row.median, row.q20, row.q80))
            speed = _cells(known(name, SPEED, "training step"), spread=False)
            ratio = _cells(known(name, RATIO, "training step"))
            body.append([name, median, f"{low}–{high}", *speed, *ratio])
    row = runs[0][0]
    what = f"{row.model} on {row.graph}, {_sizes(row)}, {row.optimizer}"
    return f"{_table(body, header)}\n\n{what}. {_hardware(row)}"


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
