"""Measure against what a user would pick instead, on this machine.

``python -m bench`` lists what can run here, measures it, prints tables and appends rows to the
results of this device. With a command it does one of the parts; ``report`` draws plots and makes
Markdown tables of the rows. Sizes, rivals and rounds are options: ``python -m bench steps --help``.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import gpu_tables, memory, report, results, rivals, scale, steps
from bench.inputs import DTYPES, GRADIENTS, TINY, Shape
from bench.results import Row
from bench.rivals import PHASES, WHOLE
from emu_kernels.similarity import SIMILARITIES

TRAINERS = (
    "trainer-emu", "trainer-softmax", "fused-loop-emu", "loop-softmax", "loop-emu", "pykeen",
    "pykeen-emu", "pyg", "pyg-emu", "torchkge",
)  # fmt: skip
"""The names in bench.train, which needs the trainer's packages to be imported."""


class Missing(Exception):
    """What would be measured needs something that is not here; the message says how to get it."""


# --- the command line -----------------------------------------------------------------------------


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text}")
    return value


def _common(parser: argparse.ArgumentParser, *, rounds: int) -> None:
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--rounds", type=_positive, default=rounds, help="turns of each rival")
    parser.add_argument(
        "--threads", type=_positive, default=torch.get_num_threads(), help="of torch and of ours"
    )
    parser.add_argument(
        "--memory-runs", type=int, default=1, help="fresh processes a rival; 0: no memory"
    )
    parser.add_argument("--results", type=Path, default=results.FOLDER, help="folder of CSV files")
    parser.add_argument("--no-save", action="store_true", help="do not append to the results")
    parser.add_argument(
        "--tiny", action="store_true", help="tiny sizes, 2 rounds, saved nowhere: does it work?"
    )


def _sizes(parser: argparse.ArgumentParser) -> None:
    """Each may have several values: every combination is measured."""
    for name, default, text in (
        ("--batch", Shape.batch, "B, rows"),
        ("--negatives", Shape.negatives, "K, a row"),
        ("--dim", Shape.dim, "D, components"),
        ("--entities", Shape.entities, "N, table rows"),
    ):
        parser.add_argument(name, type=_positive, nargs="+", default=[default], help=text)
    for name, choices, chosen in (
        ("--similarity", SIMILARITIES, "dot"),
        ("--dtype", DTYPES, "float32"),
        ("--gradient", GRADIENTS, "dense"),
    ):
        parser.add_argument(
            name, nargs="+", choices=[*choices, "all"], default=[chosen], help="some, or all"
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, text: str, *, rounds: int | None = None) -> argparse.ArgumentParser:
        added = commands.add_parser(
            name, help=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        if rounds is not None:
            _common(added, rounds=rounds)
        return added

    command("all", "what happens without a command: each part at its defaults", rounds=10)
    command("list", "what can run here, and why the rest cannot").add_argument(
        "--device", default="cpu", help="cpu or cuda"
    )

    part = command("steps", "the operator: a training step, rival against rival", rounds=20)
    _sizes(part)
    part.add_argument("--phases", nargs="+", choices=PHASES, default=[WHOLE])
    part.add_argument("--rivals", nargs="+", choices=rivals.BY_NAME, default=None, metavar="NAME")

    part = command("train", "trainers from end to end", rounds=7)
    part.add_argument(
        "--graph", nargs="+", default=["FB15k-237"], help="datasets, or zipf: synthetic"
    )
    part.add_argument("--entities", type=_positive, default=1_000_000, help="of the synthetic one")
    part.add_argument("--model", nargs="+", default=["DistMult"])
    part.add_argument("--dim", type=_positive, default=100)
    part.add_argument("--batch", type=_positive, default=1000)
    part.add_argument("--negatives", type=_positive, default=256)
    part.add_argument("--optimizer", choices=["Adagrad", "Adam"], default="Adagrad")
    part.add_argument(
        "--gradient", choices=GRADIENTS, default=None,
        help="of those that can choose (default: sparse for the synthetic graph)",
    )  # fmt: skip
    part.add_argument("--rivals", nargs="+", choices=TRAINERS, default=TRAINERS, metavar="NAME")

    part = command("scale", "time and memory as one size grows", rounds=5)
    part.add_argument("--axes", nargs="+", choices=scale.FIELDS, default=["N"])
    part.add_argument("--values", type=_positive, nargs="+", help="of a single axis")
    part.add_argument("--gradient", nargs="+", choices=GRADIENTS, default=list(GRADIENTS))
    part.add_argument(
        "--rivals", nargs="+", choices=rivals.BY_NAME, default=rivals.SCALED, metavar="NAME"
    )

    part = command("sampling", "the walks of structure-aware negatives", rounds=3)
    part.add_argument("--graph", default="FB15k-237", help="a dataset, or zipf: synthetic")
    part.add_argument("--hops", type=_positive, default=3)
    part.add_argument("--walks", type=_positive, default=1000, help="from each entity")

    command("captured", "a whole step on the device; on a GPU as one CUDA graph", rounds=20)

    part = command("gpu", "the operator on a GPU, at the settings of our goals", rounds=10)
    part.set_defaults(device="cuda")
    part.add_argument(
        "--tables", nargs="+", choices=gpu_tables.TABLES, default=list(gpu_tables.TABLES)
    )
    part.add_argument("--quick", action="store_true", help="fewer settings")

    show = command("report", "draw plots, print Markdown tables of the results")
    show.add_argument("--results", type=Path, default=results.FOLDER, help="a file or a folder")
    show.add_argument(
        "--into", type=Path, metavar="FILE", help=f"put them into FILE after {report.MARKERS[0]}"
    )
    show.add_argument(
        "--parts",
        nargs="+",
        metavar="NAME",
        help="steps, train, train:WN18RR, scale-N, ...: these families only",
    )
    show.add_argument("--plots", type=Path, help="folder (default: plots beside the results)")
    show.add_argument("--no-plots", action="store_true", help="tables only")
    return parser


# --- the parts ------------------------------------------------------------------------------------


Measured = Iterator[list[Row]]
"""Rows, setting by setting: each is saved as it comes."""


def _skip(reasons: dict[str, str]) -> None:
    for name, reason in reasons.items():
        print(f"skipped: {name}: {reason}")


def _memory_runs(options: argparse.Namespace) -> int:
    if not options.memory_runs or torch.device(options.device).type == "cuda":
        return int(options.memory_runs)
    reason = memory.unavailable()
    if reason is not None:
        print(f"skipped: memory: {reason}")
        return 0
    return int(options.memory_runs)


def _measure_steps(
    options: argparse.Namespace,
    shapes: Sequence[Shape],
    names: Sequence[str],
    *,
    phases: Sequence[str] = (WHOLE,),
    family: str = "steps",
) -> Measured:
    told: dict[str, str] = {}
    memory_runs = _memory_runs(options)
    for shape in shapes:
        chosen, reasons = steps.runnable(names, shape)
        _skip({n: r for n, r in reasons.items() if told.get(n) != r})
        told |= reasons
        if not chosen:
            continue
        print(f"\n{shape}", flush=True)
        yield steps.rows(
            chosen,
            shape,
            phases=phases,
            rounds=options.rounds,
            threads=options.threads,
            memory_runs=memory_runs,
            family=family,
            copy_bytes=2**20 if options.tiny else None,
            min_seconds=0.0 if options.tiny else None,
        )


def _every(chosen: Sequence[str], choices: Sequence[str]) -> Sequence[str]:
    return choices if "all" in chosen else chosen


def _steps(options: argparse.Namespace) -> Measured:
    tiny = options.tiny
    shapes = steps.product(
        batch=[TINY.batch] if tiny else options.batch,
        negatives=[TINY.negatives] if tiny else options.negatives,
        dim=[TINY.dim] if tiny else options.dim,
        entities=[TINY.entities] if tiny else options.entities,
        similarity=_every(options.similarity, tuple(SIMILARITIES)),
        dtype=_every(options.dtype, tuple(DTYPES)),
        gradient=_every(options.gradient, GRADIENTS),
        device=[options.device],
    )
    names = options.rivals or rivals.DEFAULT
    yield from _measure_steps(options, list(shapes), names, phases=options.phases)


def _scale(options: argparse.Namespace) -> Measured:
    if options.values and len(options.axes) > 1:
        raise ValueError("--values: give a single axis")
    for axis in options.axes:
        values = (5, 10) if options.tiny else options.values or scale.VALUES[axis]
        shapes = scale.shapes(axis, values, options.gradient, options.device)
        if options.tiny:
            shapes = [scale.tiny(shape, axis) for shape in shapes]
        yield from _measure_steps(options, shapes, options.rivals, family=scale.family(axis))


def _train(options: argparse.Namespace) -> Measured:
    try:
        from bench import train
        from bench.tasks import Task, tiny
        from emu_kernels.trainer.errors import TrainerError
    except ModuleNotFoundError as error:
        raise Missing(str(error)) from error
    memory_runs = _memory_runs(options)
    for graph in options.graph:
        for model in options.model:
            gradient = options.gradient or ("sparse" if graph == "zipf" else "dense")
            task = Task(
                graph=graph, entities=options.entities, model=model, dim=options.dim,
                batch=options.batch, negatives=options.negatives, optimizer=options.optimizer,
                gradient=gradient, device=options.device,
            )  # fmt: skip
            task = tiny(task) if options.tiny else task
            chosen, reasons = train.runnable(options.rivals, task)
            _skip(reasons)
            print(f"\n{task}", flush=True)
            try:
                yield train.rows(
                    chosen,
                    task,
                    rounds=options.rounds,
                    threads=options.threads,
                    memory_runs=memory_runs,
                    min_seconds=0.0 if options.tiny else None,
                )
            except TrainerError as error:  # no such data here
                print(f"skipped: {graph}: {error}")


def _sampling(options: argparse.Namespace) -> Measured:
    try:
        from bench import sampling
        from emu_kernels.trainer.errors import TrainerError
    except ModuleNotFoundError as error:
        raise Missing(str(error)) from error
    graph = "zipf" if options.tiny else options.graph
    print(f"\n{options.walks} walks of {options.hops} hops on {graph}", flush=True)
    try:
        yield sampling.rows(
            graph,
            hops=options.hops,
            walks=options.walks,
            rounds=options.rounds,
            threads=options.threads,
        )
    except TrainerError as error:
        print(f"skipped: {graph}: {error}")


def _captured(options: argparse.Namespace) -> Measured:
    from bench import captured

    shape = TINY if options.tiny else Shape()
    sizes: dict[str, Any] = {"batch": shape.batch, "negatives": shape.negatives, "dim": shape.dim}
    print(f"\na whole training step of DistMult: {shape}", flush=True)
    yield captured.rows(
        Shape(entities=shape.entities, device=options.device, **sizes),
        rounds=options.rounds,
        threads=options.threads,
        tiny=options.tiny,
    )


def _gpu(options: argparse.Namespace) -> Measured:
    for name in options.tables:
        for setting in gpu_tables.TABLES[name](quick=options.quick):
            if options.tiny:
                setting = gpu_tables.small(setting, options.device)
            yield from _measure_steps(
                options,
                [setting.shape],
                setting.rivals,
                phases=setting.phases,
                family=setting.family,
            )


PARTS: dict[str, Callable[[argparse.Namespace], Measured]] = {
    "steps": _steps,
    "train": _train,
    "scale": _scale,
    "sampling": _sampling,
    "captured": _captured,
    "gpu": _gpu,
}

_QUICK = ("--rounds", "10", "--rivals", *rivals.SCALED)

DEFAULTS: dict[str, tuple[tuple[str, ...], ...]] = {
    "cpu": (
        ("steps", "--phases", *PHASES),
        ("steps", "--similarity", *[s for s in SIMILARITIES if s != "dot"], *_QUICK),
        ("steps", "--gradient", "sparse", *_QUICK),
        ("steps", "--dtype", "bfloat16", *_QUICK),
        ("train", "--graph", "FB15k-237", "WN18RR"),
        ("train", "--graph", "zipf", "--rounds", "5"),
        ("scale", "--axes", "N", "--rounds", "3"),
        ("sampling",),
    ),
    "cuda": (("gpu",), ("captured",), ("train",), ("scale", "--axes", "N")),
}
"""What ``all`` does."""


def _run(options: argparse.Namespace) -> list[Row]:
    """Measure a part, saving rows as they come."""
    save = not options.no_save
    if options.tiny:
        options.rounds, options.memory_runs = 2, min(options.memory_runs, 1)
        save = save and options.results != results.FOLDER
    torch.set_num_threads(options.threads)
    print(f"{options.command}: {options.threads} threads; {results.device(options.device)}")
    measured: list[Row] = []
    for rows in PARTS[options.command](options):
        measured += rows
        if save:
            for path in results.append(options.results, rows):
                print(f"appended {len(rows)} rows to {path}")
    print(f"\n{report.markdown(measured)}\n" if measured else "nothing was measured")
    return measured


def _all(options: argparse.Namespace) -> int:
    _list(options)
    shared = [
        "--device", options.device, "--threads", str(options.threads), "--results",
        str(options.results), "--memory-runs", str(options.memory_runs),
    ]  # fmt: skip
    shared += [
        flag for flag in ("--no-save", "--tiny") if getattr(options, flag[2:].replace("-", "_"))
    ]
    measured: list[Row] = []
    for part in DEFAULTS[torch.device(options.device).type]:
        print(f"\n== python -m bench {' '.join(part)}", flush=True)
        try:
            measured += _run(_parser().parse_args([*part, *shared]))
        except Missing as error:
            print(f"skipped: {part[0]}: {error}")
    print(f"\n== all\n\n{report.markdown(measured)}" if measured else "nothing was measured")
    return 0 if measured else 1


def _list(options: argparse.Namespace) -> int:
    print(f"on {results.device(options.device)}:")

    def tell(name: str, reason: str | None) -> None:
        print(f"  {name:<26} {'can run' if reason is None else reason}")

    print(" one step (steps, scale, gpu)")
    for rival in rivals.RIVALS:
        tell(rival.name, rival.unavailable(Shape(device=options.device)))
    print(" trainers (train)")
    try:
        from bench import train
        from bench.tasks import Task
    except ModuleNotFoundError as error:
        for name in TRAINERS:
            tell(name, str(error))
    else:
        for trainer in train.RIVALS:
            tell(trainer.name, trainer.unavailable(Task(device=options.device)))
    return 0


def _report(options: argparse.Namespace) -> int:
    rows = results.read(options.results)
    if options.parts:
        parts = set(options.parts)
        rows = [row for row in rows if parts & {row.family, f"{row.family}:{row.graph}"}]
    if not rows:
        what = f"no results of {', '.join(options.parts)}" if options.parts else "no results"
        print(f"{what} in {options.results}: run python -m bench first", file=sys.stderr)
        return 1
    links: list[str] = []
    if not options.no_plots:
        from bench import plots

        folder = options.results if options.results.is_dir() else options.results.parent
        start = Path.cwd() if options.into is None else options.into.resolve().parent
        drawn = plots.draw(rows, options.plots or folder / "plots")
        links = [Path(os.path.relpath(path.resolve(), start)).as_posix() for path in drawn]
    tables = report.markdown(rows, links)
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
        given.insert(0, "all")
    options = _parser().parse_args(given)
    try:
        if torch.device(getattr(options, "device", "cpu")).type == "cuda":
            results.device("cuda")  # raises where there is none
        if options.command == "report":
            return _report(options)
        if options.command in ("all", "list"):
            return (_all if options.command == "all" else _list)(options)
        return 0 if _run(options) else 1
    except (Missing, OSError, ValueError, RuntimeError, AssertionError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
