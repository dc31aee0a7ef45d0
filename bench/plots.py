"""Plots (PNG) from rows of results, and from nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench.report import Run, axis_of, latest
from bench.results import MEMORY, SPEED, TIME, Row, slug
from bench.rivals import BY_NAME, WHOLE

_COLOURS = {
    "fused-emu": "C0", "fused-softmax": "C2", "eager-emu": "C3", "eager-softmax": "C1",
    "compiled-emu": "C4", "gather-scatter": "C7", "fused-emu-cuda": "C0", "fused-emu-triton": "C9",
    "fused-softmax-cuda": "C2", "fused-softmax-triton": "C8",
}  # fmt: skip


def draw(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Write a plot for each device and axis, and one for each comparison of trainers."""
    curves: dict[tuple[str, str], list[Run]] = {}
    paths = []
    for run in latest(rows):
        row = run[0]
        if axis_of(row):
            curves.setdefault((row.device, row.family), []).append(run)
        elif row.family == "train":
            name = slug(f"{row.device} train {row.graph} {row.N} {row.model} {row.D}")
            paths.append(_speeds(run, folder / f"{name}.png"))
    for (device, family), runs in curves.items():
        paths.append(_curves(runs, folder / f"{slug(f'{device} {family}')}.png"))
    return paths


def _figure(width: float, height: float, panels: int):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(1, panels, figsize=(width, height), layout="constrained", squeeze=False)


def _save(figure, path: Path) -> Path:
    from matplotlib import pyplot

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, metadata={"Software": None})
    pyplot.close(figure)
    return path


def _title(name: str) -> str:
    return BY_NAME[name].title.replace("*", "") if name in BY_NAME else name


def _curves(runs: Sequence[Run], path: Path) -> Path:
    """Time and memory along an axis; solid where gradients are dense, dashed where sparse."""
    first = runs[0][0]
    axis = axis_of(first)
    assert axis is not None
    figure, ((of_time, of_memory),) = _figure(12, 4, 2)
    panels = {TIME: (of_time, "ms a step"), MEMORY: (of_memory, "peak MiB of a step")}
    for what, (panel, label) in panels.items():
        lines: dict[tuple[str, str], list[Row]] = {}
        for row in (row for run in runs for row in run):
            if row.what == what and row.phase == WHOLE:
                lines.setdefault((row.rival, row.gradient), []).append(row)
        for (rival, gradient), points in sorted(lines.items()):
            points.sort(key=lambda row: int(getattr(row, axis)))
            x = [getattr(row, axis) for row in points]
            style = "-" if gradient == "dense" else "--"
            colour = _COLOURS.get(rival, "C5")
            panel.plot(
                x, [row.median for row in points], style, color=colour, marker="o", markersize=4,
                label=f"{_title(rival)}, {gradient}",
            )  # fmt: skip
            low, high = ([getattr(row, q) for row in points] for q in ("q20", "q80"))
            panel.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
        panel.set(xscale="log", yscale="log", xlabel=axis, ylabel=label)
        panel.grid(alpha=0.3)
    figure.legend(*of_time.get_legend_handles_labels(), loc="outside right", fontsize=7)
    fixed = ", ".join(f"{name}={getattr(first, name)}" for name in "BKDN" if name != axis)
    figure.suptitle(f"{first.similarity}, {fixed}, {first.dtype}; {first.device}", fontsize=10)
    return _save(figure, path)


def _speeds(run: Run, path: Path) -> Path:
    """Triples a second of each trainer."""
    from bench.train import BY_NAME as TRAINERS
    from bench.train import OURS_IN

    speeds = [row for row in run if row.what == SPEED][::-1]
    row = run[0]
    figure, ((panel,),) = _figure(7, 0.4 * len(speeds) + 1.2, 1)
    names = [TRAINERS[s.rival].title.replace("*", "") for s in speeds]
    errors = [[s.median - s.q20 for s in speeds], [s.q80 - s.median for s in speeds]]
    colours = ["C0" if s.rival in OURS_IN else "C7" for s in speeds]
    medians = [s.median for s in speeds]
    panel.errorbar(medians, names, xerr=errors, fmt="none", ecolor="0.6")
    panel.scatter(medians, names, color=colours, zorder=3)
    panel.set(xscale="log", xlabel="triples a second")
    panel.grid(alpha=0.3)
    title = f"{row.model} on {row.graph} ({row.N:,} entities), d={row.D}, B={row.B}, K={row.K}"
    panel.set_title(f"{title}\n{row.device}", fontsize=9)
    return _save(figure, path)
