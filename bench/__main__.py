"""Compare with the alternatives that a user has, on this machine.

``python -m bench`` measures what can run here, prints tables and appends rows to the
results of this device. With a command it does one of the parts; ``report`` makes tables from
the rows. Sizes, rivals and rounds are options: ``python -m bench steps --help``.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench import captured, kernels, results, rivals, steps, trainers
from bench.inputs import CHOICES, GRADIENTS, SIMILARITIES, SIZES, Shape, is_gpu
from bench.results import Row
from bench.rivals import PHASES, WHOLE
from bench.steps import SCALES, Setting
from bench.trainers import Task

Options = argparse.Namespace


class Part(NamedTuple):
    """A command that measures the settings of its options one after the other."""

    settings: Callable[[Options], Iterable[Setting]]
    rivals: Sequence[Any]
    rows: Callable[[Any, Setting, Options], Iterator[list[Row]]]


PARTS = {
    "steps": Part(steps.settings, rivals.RIVALS, steps.rows),
    "closed": Part(steps.closed_settings, rivals.RIVALS, steps.rows),
    "scale": Part(steps.scale_settings, rivals.RIVALS, steps.rows),
    "gpu": Part(steps.gpu_settings, rivals.RIVALS, steps.rows),
    "captured": Part(captured.settings, rivals.RIVALS, captured.rows),
    "kernels": Part(kernels.settings, rivals.RIVALS, kernels.rows),
    "train": Part(trainers.settings, trainers.TRAINERS, trainers.rows),
}
_QUICK = ("--rounds", "10", "--rivals", *rivals.SCALED)
DEFAULTS: dict[str, tuple[tuple[str, ...], ...]] = {
    "cpu": (
        ("steps", "--phases", *PHASES),
        ("steps", "--similarity", *[s for s in SIMILARITIES if s != "dot"], *_QUICK),
        ("steps", "--gradient", "sparse", *_QUICK),
        ("steps", "--dtype", "bfloat16", *_QUICK),
        ("closed",),
        ("train", "--graph", "FB15k-237", "WN18RR"),
        ("train", "--graph", "zipf", "--rounds", "5"),
        ("scale", "--axes", "N", "--rounds", "3"),
    ),
    "cuda": (("gpu",), ("captured",), ("train",), ("scale", "--axes", "N")),
}
"""What ``all`` runs."""


def _skip(reasons: Mapping[str, object]) -> None:
    for name, reason in reasons.items():
        print(f"skipped: {name}: {reason}", flush=True)


def _measure(options: Options) -> Iterator[list[Row]]:
    """Rows as they are measured, so that they can be saved at once."""
    part, seen = PARTS[options.command], set[tuple[str, str]]()
    kinds = (None, torch.device(options.device).type)
    for setting in part.settings(options):
        setting = setting.tiny() if options.tiny else setting
        shape = setting.shape.replace(device=options.device)
        asked = [r for r in part.rivals if r.name in setting.rivals and r.device in kinds]
        reasons = {r.name: reason for r in asked if (reason := r.unavailable(shape)) is not None}
        _skip({name: reason for name, reason in reasons.items() if (name, reason) not in seen})
        seen |= reasons.items()
        chosen = [rival for rival in asked if rival.name not in reasons]
        if not chosen:
            continue
        print(f"\n{shape}", flush=True)
        try:
            yield from part.rows(chosen, setting._replace(shape=shape), options)
        except FileNotFoundError as error:
            _skip({str(shape): error})


def _run(options: Options) -> list[Row]:
    """Measure a part and save its rows."""
    save = not options.no_save
    if options.tiny:
        options.rounds = 2
        save = save and options.results != results.FOLDER
    torch.set_num_threads(options.threads)
    print(f"{options.command}: {options.threads} threads; {results.device_name(options.device)}")
    measured: list[Row] = []
    for rows in _measure(options):
        measured += rows
        if save and rows:
            print(f"appended {len(rows)} rows to {results.append(options.results, rows)}")
    _print(measured)
    return measured


def _print(rows: list[Row]) -> None:
    try:
        import pandas as pd

        from bench import report
    except ModuleNotFoundError as error:  # on a GPU's machine
        print(f"no tables of {len(rows)} rows: {error}")
    else:
        print(f"\n{report.markdown(pd.DataFrame(rows))}\n" if rows else "nothing was measured")


def _all(options: Options) -> list[Row]:
    """Each part with its defaults."""
    names = ("device", "threads", "results", "memory", "no_save", "tiny")
    shared = {name: getattr(options, name) for name in names}
    measured: list[Row] = []
    for part in DEFAULTS[torch.device(options.device).type]:
        print(f"\n== python -m bench {' '.join(part)}", flush=True)
        try:
            measured += _run(Options(**vars(_parser().parse_args(part)) | shared))
        except (FileNotFoundError, ModuleNotFoundError) as error:
            _skip({part[0]: error})
    print("\n== all")
    _print(measured)
    return measured


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text}")
    return value


class _Parser(argparse.ArgumentParser):
    def add(self, flag: str, default: Any, help: str) -> None:
        """An option of the default's type; a list takes several values."""
        first = default[0] if isinstance(default, list) else default
        more: dict[str, Any] = {"nargs": "+"} if isinstance(default, list) else {}
        more |= {"type": _positive if isinstance(first, int) else type(first)}
        more = {"action": "store_true"} if first is False else more
        self.add_argument(flag, default=default, help=help, **more)

    def some(self, flag: str, choices: Iterable[str], default: Iterable[str]) -> None:
        named: dict[str, Any] = {"choices": list(choices), "metavar": "NAME"}
        text = f"some of {', '.join(choices)}"
        self.add_argument(flag, nargs="+", default=list(default), help=text, **named)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)

    def command(name: str, text: str, rounds: int = 0, device: str = "cpu") -> _Parser:
        formatter = argparse.ArgumentDefaultsHelpFormatter
        part = commands.add_parser(name, help=text, description=text, formatter_class=formatter)
        if rounds:  # it measures
            part.add("--device", device, "cpu or cuda")
            part.add("--rounds", rounds, "turns of each rival")
            part.add("--threads", torch.get_num_threads(), "of torch and of our kernels")
            part.add_argument("--no-memory", action="store_false", dest="memory", help="only time")
            part.add_argument("--results", type=Path, default=results.FOLDER, help="of CSV files")
            part.add("--no-save", False, "do not append to the results")
            part.add("--tiny", False, "tiny sizes, 2 rounds, not saved: does it work?")
        return part

    command("all", "the default: each part with its defaults", 10)
    part = command("steps", "one training step of the operator, rival against rival", 20)
    for name, field in SIZES.items():
        part.add(f"--{field}", [getattr(Shape, field)], name)
    for field, choices in CHOICES.items():
        part.some(f"--{field}", choices, [getattr(Shape, field)])
    part.some("--phases", PHASES, [WHOLE])
    part.some("--rivals", rivals.BY_NAME, rivals.DEFAULT)

    part = command("train", "trainers from end to end", 7)
    part.add("--graph", [Task.graph], "datasets, or zipf: synthetic")
    part.add("--model", [Task.model], "names")
    part.add("--entities", Task.entities, "of the synthetic graph")
    for field in ("dim", "batch", "negatives"):
        part.add(f"--{field}", getattr(Task, field), "of all trainers")
    part.add_argument("--optimizer", choices=["Adagrad", "Adam"], default="Adagrad", help="of all")
    where = "where possible; by default sparse for zipf"
    part.add_argument("--gradient", choices=GRADIENTS, help=where)
    part.some("--rivals", trainers.BY_NAME, trainers.BY_NAME)

    part = command("scale", "time and memory as one size grows", 5)
    part.some("--axes", SCALES, ["N"])
    part.some("--gradient", GRADIENTS, GRADIENTS)
    part.some("--rivals", rivals.BY_NAME, rivals.SCALED)

    command("closed", "EMU in closed form; one set of negatives for all rows, all entities", 20)

    command("captured", "a whole training step, on a GPU as a CUDA graph", 20)

    command("kernels", "each operator of our backends, at the shapes that are our targets", 20)

    part = command("gpu", "the operator on a GPU, in our target settings", 10, "cuda")
    part.add("--quick", False, "fewer settings")

    part = command("messages", "relational message passing, against plain PyTorch", 3)
    part.add("--graph", ["CoDEx-S", "WN18RR", "FB15k-237"], "datasets, or zipf: synthetic")
    part.add("--batch", [16, 64], "queries at once")
    part.add("--aggregate", ["sum", "pna"], "names")

    part = command("large", "a synthetic graph of Wikidata5M's size, from Parquet to predictions")
    part.add("--entities", 4_600_000, "of the graph, each a head")
    part.add("--triples", 20_000_000, "of the graph")
    part.add("--steps", 300, "of training")
    part.add("--ranked", 1000, "triples of validation and of test, among all entities")
    for field, value in {"dim": 100, "batch": 1000, "negatives": 256}.items():
        part.add(f"--{field}", value, "of training")
    part.add("--chunk", 250, "triples that share a set of negatives, of some more steps")
    part.add("--optimizer", "RowwiseAdagrad", "of emu-train, with --sparse")
    part.add("--threads", torch.get_num_threads(), "of torch and of our kernels")
    part.add_argument("--results", type=Path, default=results.FOLDER / "large", help="of files")
    part.add_argument("--folder", type=Path, help="for some GB of files, removed at the end")
    part.add("--tiny", False, "a tiny graph, not saved: does it work?")

    part = command("distributed", "steps with the entities on several processes, by TorchRec")
    part.add("--processes", [1, 2], "numbers of them")
    part.add("--entities", 1_000_000, "of the table")
    part.add_argument("--sets", type=int, nargs="+", help="of negatives; default: a row's own, 8")
    for field, value in {"dim": 100, "batch": 1000, "negatives": 256}.items():
        part.add(f"--{field}", value, "of a process")
    part.add("--optimizer", "RowwiseAdagrad", "of the table")
    part.add("--steps", 30, "that are timed")
    part.add("--threads", 1, "of a process")
    part.add_argument("--results", type=Path, default=results.FOLDER / "distributed", help="files")
    part.add("--tiny", False, "tiny, not saved: does it work?")

    part = command("study", "the study: named lists of training runs, resumed where they stopped")
    part.add_argument("experiments", nargs="*", metavar="NAME", help="default: all")
    for name in ("dataset", "model", "loss", "seed"):
        part.add_argument(f"--{name}", nargs="+", help="only the runs with one of these")
    part.add("--jobs", 1, "runs at a time, of one thread each")
    part.add("--tiny", False, "runs of seconds: does it work?")
    part.add("--report", False, "only print the tables")
    part.add_argument("--results", type=Path, default=results.FOLDER / "study", help="of files")
    part.add_argument("--folder", type=Path, default=Path("build/study"), help="of unfinished runs")

    part = command("report", "Markdown tables of the results")
    part.add_argument("--results", type=Path, default=results.FOLDER, help="a file or a folder")
    part.add_argument("--into", type=Path, metavar="FILE", help="write between FILE's markers")
    only = "only these: steps, train, train:WN18RR, scale-N, ..."
    part.add_argument("--parts", nargs="+", metavar="NAME", help=only)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or (given[0].startswith("-") and given[0] not in ("-h", "--help")):
        given.insert(0, "all")
    options = _parser().parse_args(given)
    try:
        if is_gpu(getattr(options, "device", "cpu")):
            results.device_name("cuda")  # raises where there is none
        if options.command in ("distributed", "large", "messages", "report", "study"):
            return importlib.import_module(f"bench.{options.command}").run(options)
        return 0 if (_all if options.command == "all" else _run)(options) else 1
    except (ImportError, OSError, ValueError, RuntimeError, AssertionError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
