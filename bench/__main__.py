"""Measure a training step against what a user would pick instead, on this machine.

``python -m bench`` measures, prints a table and appends rows to the results of this device;
``python -m bench report`` makes Markdown tables of those rows.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from bench import measure, memory, report, results
from bench.inputs import TINY, Shape, make
from bench.measure import Spread
from bench.rivals import BY_NAME, OURS, RIVALS, Rival
from emu_kernels.reference import SIMILARITIES

MIB = 2**20


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text}")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser(
        "run",
        help="measure a training step (what happens without a command)",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    run.add_argument("--batch", type=_positive, default=Shape.batch, help="B, rows")
    run.add_argument("--negatives", type=_positive, default=Shape.negatives, help="K, a row")
    run.add_argument("--dim", type=_positive, default=Shape.dim, help="D, components")
    run.add_argument("--entities", type=_positive, default=Shape.entities, help="N, table rows")
    run.add_argument(
        "--similarity", choices=[*SIMILARITIES, "all"], default="dot", help="one, or each in turn"
    )
    run.add_argument("--rivals", nargs="+", choices=BY_NAME, default=list(BY_NAME), metavar="NAME")
    run.add_argument("--rounds", type=_positive, default=20, help="turns that each rival gets")
    run.add_argument(
        "--threads", type=_positive, default=torch.get_num_threads(), help="of torch and of ours"
    )
    run.add_argument(
        "--memory-runs", type=int, default=3, help="fresh processes a rival; 0: no memory"
    )
    run.add_argument("--results", type=Path, default=results.FOLDER, help="folder of CSV files")
    run.add_argument("--no-save", action="store_true", help="do not append to the results")
    run.add_argument(
        "--tiny", action="store_true", help="a tiny shape, 2 rounds, a memory run: does it work?"
    )
    show = commands.add_parser("report", help="print Markdown tables of the results")
    show.add_argument("--results", type=Path, default=results.FOLDER, help="a file or a folder")
    show.add_argument(
        "--into", type=Path, metavar="FILE", help=f"put them into FILE after {report.MARKERS[0]}"
    )
    return parser


def _runnable(names: Sequence[str]) -> list[Rival]:
    """Those that can run; a line for each that cannot."""
    runnable = []
    for rival in RIVALS:
        if rival.name not in names:
            continue
        reason = rival.unavailable()
        if reason is None:
            runnable.append(rival)
        else:
            print(f"skipped: {rival.name}: {reason}")
    return runnable


def _measure(
    rivals: Sequence[Rival], shape: Shape, *, rounds: int, threads: int, memory_runs: int
) -> list[results.Row]:
    inputs = make(shape)
    common = results.environment() | {
        "similarity": shape.similarity,
        "B": shape.batch,
        "K": shape.negatives,
        "D": shape.dim,
        "N": shape.entities,
        "dtype": str(inputs.table.dtype).removeprefix("torch."),
        "threads": threads,
    }
    rows: list[results.Row] = []

    def add(rival: Rival, what: str, values: Sequence[float], unit: str) -> None:
        rows.append(
            results.Row(
                what=what,
                rival=rival.name,
                unit=unit,
                instruction_set=rival.instruction_set(),
                **Spread.of(values)._asdict(),
                **common,
            )
        )

    times = measure.alternate({rival.name: rival.prepare(inputs) for rival in rivals}, rounds)
    for rival in rivals:
        add(rival, results.TIME, [1000 * t for t in times[rival.name]], "ms")
        if OURS.name in times:
            pairs = zip(times[rival.name], times[OURS.name], strict=True)
            add(rival, results.RATIO, [theirs / ours for theirs, ours in pairs], "x")
    if memory_runs:
        peaks: dict[str, list[float]] = {rival.name: [] for rival in rivals}
        for name in tqdm([r.name for r in rivals] * memory_runs, desc="memory", unit="process"):
            peaks[name].append(memory.peak(name, shape, threads) / MIB)
        for rival in rivals:
            add(rival, results.MEMORY, peaks[rival.name], "MiB")
    return rows


def _run(options: argparse.Namespace) -> int:
    shape = Shape(options.batch, options.negatives, options.dim, options.entities)
    similarities = list(SIMILARITIES) if options.similarity == "all" else [options.similarity]
    rounds, memory_runs = options.rounds, options.memory_runs
    save = not options.no_save
    if options.tiny:
        shape, rounds, memory_runs = TINY, 2, min(memory_runs, 1)
        save = save and options.results != results.FOLDER
    torch.set_num_threads(options.threads)
    print(f"forward + backward; {options.threads} threads; {results.device()}")
    rivals = _runnable(options.rivals)
    if not rivals:
        return 1
    no_memory = memory.unavailable() if memory_runs else None
    if no_memory is not None:
        print(f"skipped: memory: {no_memory}")
        memory_runs = 0
    for similarity in similarities:
        shape = dataclasses.replace(shape, similarity=similarity)
        print(f"\n{shape}", flush=True)
        rows = _measure(
            rivals, shape, rounds=rounds, threads=options.threads, memory_runs=memory_runs
        )
        print(f"\n{report.table(rows)}\n")
        if save:
            for path in results.append(options.results, rows):
                print(f"appended {len(rows)} rows to {path}")
    return 0


def _report(options: argparse.Namespace) -> int:
    rows = results.read(options.results)
    if not rows:
        print(f"no results in {options.results}: run python -m bench first", file=sys.stderr)
        return 1
    tables = report.markdown(rows)
    if options.into is None:
        print(tables)
    else:
        text = options.into.read_text(encoding="utf-8")
        options.into.write_text(report.insert(text, tables), encoding="utf-8")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or (given[0].startswith("-") and given[0] not in ("-h", "--help")):
        given.insert(0, "run")
    options = _parser().parse_args(given)
    try:
        return _run(options) if options.command == "run" else _report(options)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
