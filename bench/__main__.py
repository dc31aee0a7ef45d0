"""Compare with the alternatives that a user has, on this machine.

``python -m bench`` lists what can run here, measures it, prints tables and appends rows to the
results of this device. With a command it does one of the parts; ``report`` makes tables and plots
from the rows. Sizes, rivals and rounds are options: ``python -m bench steps --help``.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from bench import captured, measure, results, rivals, steps, trainers, training
from bench.inputs import DTYPES, GRADIENTS, SIMILARITIES, SIZES, Shape, is_gpu
from bench.results import Row
from bench.rivals import PHASES, WHOLE
from bench.steps import SCALES, Setting
from bench.trainers import Task

Options = argparse.Namespace
Measured = Iterator[list[Row]]
"""Rows of one setting after the other, so that each is saved once it is measured."""


def _skip(reasons: Mapping[str, object]) -> None:
    for name, reason in reasons.items():
        print(f"skipped: {name}: {reason}", flush=True)


def _measure(options: Options, settings: Iterable[Setting]) -> Measured:
    seen: dict[str, str] = {}
    for setting in settings:
        shape = setting.shape.replace(device=options.device)
        setting = setting.tiny(options.device) if options.tiny else setting._replace(shape=shape)
        chosen, reasons = steps.runnable(setting.rivals, setting.shape)
        _skip({name: reason for name, reason in reasons.items() if seen.get(name) != reason})
        seen |= reasons
        if chosen:
            print(f"\n{setting.shape}", flush=True)
            yield steps.rows(chosen, setting, options)


def _steps(options: Options) -> Measured:
    fields = (*SIZES.values(), "similarity", "dtype", "gradient")
    shapes = steps.product(**{field: getattr(options, field) for field in fields})
    return _measure(options, (Setting(s, options.rivals, options.phases) for s in shapes))


def _scale(options: Options) -> Measured:
    if options.values and len(options.axes) > 1:
        raise ValueError("--values: give a single axis")
    for axis in options.axes:
        values = (5, 10) if options.tiny else options.values or SCALES[axis]
        settings = steps.scale(axis, values, options.gradient, rivals=options.rivals)
        yield from _measure(options, settings)


def _gpu(options: Options) -> Measured:
    for table in options.tables:
        yield from _measure(options, steps.gpu_settings(table, quick=options.quick))


def _train(options: Options) -> Measured:
    fields = ("entities", "dim", "batch", "negatives", "optimizer", "device")
    shared = {field: getattr(options, field) for field in fields}
    for graph, model in itertools.product(options.graph, options.model):
        gradient = options.gradient or ("sparse" if graph == trainers.ZIPF else "dense")
        task = Task(graph=graph, model=model, gradient=gradient, **shared)
        task = task.tiny() if options.tiny else task
        chosen, reasons = trainers.runnable(options.rivals, task)
        _skip(reasons)
        if not chosen:
            continue
        print(f"\n{task}", flush=True)
        try:
            yield trainers.rows(chosen, task, options)
        except FileNotFoundError as error:
            _skip({graph: error})


def _sampling(options: Options) -> Measured:
    graph = trainers.ZIPF if options.tiny else options.graph
    print(f"\n{options.walks} walks of {options.hops} hops on {graph}", flush=True)
    yield trainers.sampling_rows(graph, options)


def _captured(options: Options) -> Measured:
    shape = Shape(device=options.device)
    shape = shape.tiny() if options.tiny else shape
    print(f"\na whole training step of DistMult: {shape}", flush=True)
    yield captured.rows(shape, options)


PARTS: dict[str, Callable[[Options], Measured]] = {
    "steps": _steps, "train": _train, "scale": _scale, "sampling": _sampling,
    "captured": _captured, "gpu": _gpu,
}  # fmt: skip
_QUICK = ("--rounds", "10", "--rivals", *rivals.SCALED)
DEFAULTS: dict[str, tuple[tuple[str, ...], ...]] = {
    "cpu": (
        ("steps", "--phases", "all"),
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
"""What ``all`` runs."""


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text}")
    return value


class _Some(argparse.Action):
    """Stores the values, or all choices for "all"."""

    def __call__(self, parser: Any, options: Options, values: Any, flag: Any = None) -> None:
        every = [choice for choice in self.choices or () if choice != "all"]
        setattr(options, self.dest, every if "all" in values else values)


class _Parser(argparse.ArgumentParser):
    def some(self, flag: str, choices: Sequence[str], default: Sequence[str]) -> None:
        self.add_argument(
            flag, nargs="+", action=_Some, choices=[*choices, "all"], default=list(default),
            metavar="NAME", help=f"all, or some of {', '.join(choices)}",
        )  # fmt: skip

    def number(self, flag: str, default: int | None, help: str) -> None:
        self.add_argument(flag, type=_positive, default=default, help=help)

    def flag(self, flag: str, help: str) -> None:
        self.add_argument(flag, action="store_true", help=help)

    def common(self, *, rounds: int, device: str = "cpu") -> None:
        self.add_argument("--device", default=device, help="cpu or cuda")
        self.number("--rounds", rounds, "turns of each rival")
        self.number("--threads", torch.get_num_threads(), "of torch and of our kernels")
        self.add_argument("--memory-runs", type=int, default=1, help="processes a rival, or 0")
        self.add_argument("--results", type=Path, default=results.FOLDER, help="of CSV files")
        self.flag("--no-save", "do not append to the results")
        self.flag("--tiny", "tiny sizes, 2 rounds, not saved: does it work?")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)

    def command(name: str, text: str) -> _Parser:
        formatter = argparse.ArgumentDefaultsHelpFormatter
        added: _Parser = commands.add_parser(
            name, help=text.splitlines()[0], description=text, formatter_class=formatter
        )
        return added

    command("all", "the default: each part with its defaults").common(rounds=10)
    part = command("list", "what can run here, and why the rest cannot")
    part.add_argument("--device", default="cpu", help="cpu or cuda")

    part = command("steps", "one training step of the operator, rival against rival")
    part.common(rounds=20)
    for name, field in SIZES.items():
        default = [getattr(Shape, field)]
        part.add_argument(f"--{field}", type=_positive, nargs="+", default=default, help=name)
    part.some("--similarity", SIMILARITIES, ["dot"])
    part.some("--dtype", tuple(DTYPES), ["float32"])
    part.some("--gradient", GRADIENTS, ["dense"])
    part.some("--phases", PHASES, [WHOLE])
    part.some("--rivals", tuple(rivals.BY_NAME), rivals.DEFAULT)

    part = command("train", "trainers from end to end")
    part.common(rounds=7)
    datasets = "datasets, or zipf: synthetic"
    part.add_argument("--graph", nargs="+", default=["FB15k-237"], help=datasets)
    part.number("--entities", Task.entities, "of the synthetic graph")
    part.add_argument("--model", nargs="+", default=[Task.model], help="names")
    for field in ("dim", "batch", "negatives"):
        part.number(f"--{field}", getattr(Task, field), "of all trainers")
    part.add_argument("--optimizer", choices=["Adagrad", "Adam"], default="Adagrad", help="of all")
    default_gradient = "where possible; by default sparse for zipf"
    part.add_argument("--gradient", choices=GRADIENTS, help=default_gradient)
    part.some("--rivals", tuple(trainers.BY_NAME), tuple(trainers.BY_NAME))

    part = command("scale", "time and memory as one size grows")
    part.common(rounds=5)
    part.some("--axes", tuple(SCALES), ["N"])
    part.add_argument("--values", type=_positive, nargs="+", help="of a single axis")
    part.some("--gradient", GRADIENTS, GRADIENTS)
    part.some("--rivals", tuple(rivals.BY_NAME), rivals.SCALED)

    part = command("sampling", "the random walks of structure-aware negatives")
    part.common(rounds=3)
    part.add_argument("--graph", default="FB15k-237", help="a dataset, or zipf: synthetic")
    part.number("--hops", 3, "of a walk")
    part.number("--walks", 1000, "from each entity")

    command("captured", "a whole training step, on a GPU as a CUDA graph").common(rounds=20)

    part = command("gpu", "the operator on a GPU, in our target settings")
    part.common(rounds=10, device="cuda")
    part.some("--tables", steps.GPU_TABLES, steps.GPU_TABLES)
    part.flag("--quick", "fewer settings")

    training.add_options(command("training", training.__doc__ or ""))

    part = command("report", "Markdown tables and plots of the results")
    part.add_argument("--results", type=Path, default=results.FOLDER, help="a file or a folder")
    part.add_argument("--into", type=Path, metavar="FILE", help="write between FILE's markers")
    only = "only these: steps, train, train:WN18RR, scale-N, ..."
    part.add_argument("--parts", nargs="+", metavar="NAME", help=only)
    part.add_argument("--plots", type=Path, help="folder (default: plots beside the results)")
    part.flag("--no-plots", "tables only")
    return parser


def _print(rows: list[Row]) -> None:
    """Tables, or plain lines where what makes tables is not installed."""
    if not rows:
        print("nothing was measured")
    elif all(find_spec(name) for name in ("matplotlib", "pandas", "tabulate")):
        import pandas as pd

        from bench import report

        print(f"\n{report.markdown(pd.DataFrame(rows))}\n")
    else:
        for row in rows:
            spread = f"{row['median']:.4g} ({row['q20']:.4g}–{row['q80']:.4g}) {row['unit']}"
            print(f"{row['rival']}, {row['phase']}, {row['what']}: {spread}")


def _run(options: Options) -> list[Row]:
    """Measure a part and save its rows."""
    save = not options.no_save
    if options.tiny:
        options.rounds, options.memory_runs = 2, min(options.memory_runs, 1)
        save = save and options.results != results.FOLDER
    if options.memory_runs and options.device == "cpu" and (reason := measure.memory_unavailable()):
        _skip({"memory": reason})
        options.memory_runs = 0
    torch.set_num_threads(options.threads)
    print(f"{options.command}: {options.threads} threads; {results.device_name(options.device)}")
    measured: list[Row] = []
    for rows in PARTS[options.command](options):
        measured += rows
        for path in results.append(options.results, rows) if save else ():
            print(f"appended {len(rows)} rows to {path}")
    _print(measured)
    return measured


def _all(options: Options) -> int:
    _list(options)
    shared = [f"--{name}={getattr(options, name)}" for name in ("device", "threads", "results")]
    shared += [f"--memory-runs={options.memory_runs}", *["--no-save"] * options.no_save]
    shared += ["--tiny"] * options.tiny
    measured: list[Row] = []
    for part in DEFAULTS[torch.device(options.device).type]:
        print(f"\n== python -m bench {' '.join(part)}", flush=True)
        try:
            measured += _run(_parser().parse_args([*part, *shared]))
        except (FileNotFoundError, ModuleNotFoundError) as error:
            _skip({part[0]: error})
    print("\n== all")
    _print(measured)
    return 0 if measured else 1


def _list(options: Options) -> int:
    print(f"on {results.device_name(options.device)}:")
    shape, task = Shape(device=options.device), Task(device=options.device)
    for title, reasons in (
        ("one step (steps, scale, gpu)", {r.name: r.unavailable(shape) for r in rivals.RIVALS}),
        ("trainers (train)", {t.name: t.unavailable(task) for t in trainers.TRAINERS}),
    ):
        print(f" {title}")
        for name, reason in reasons.items():
            print(f"  {name:<26} {reason or 'can run'}")
    return 0


def _report(options: Options) -> int:
    from bench import report

    return report.run(options)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or (given[0].startswith("-") and given[0] not in ("-h", "--help")):
        given.insert(0, "all")
    options = _parser().parse_args(given)
    others = {"all": _all, "list": _list, "report": _report, "training": training.run}
    try:
        if is_gpu(getattr(options, "device", "cpu")):
            results.device_name("cuda")  # raises where there is none
        if options.command in others:
            return others[options.command](options)
        return 0 if _run(options) else 1
    except (ImportError, OSError, ValueError, RuntimeError, AssertionError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
