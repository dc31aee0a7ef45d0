"""Compare with the alternatives that a user has, on this machine.

``python -m bench`` measures what can run here, prints tables and appends rows to the
results of this device. With a command it does one of the parts; ``report`` makes tables from
the rows. Sizes, rivals and rounds are options: ``python -m bench steps --help``.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench import captured, results, rivals, steps, trainers
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
    "kernels": Part(steps.kernels_settings, rivals.RIVALS, steps.rows),
    "train": Part(trainers.settings, trainers.TRAINERS, steps.rows),
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


def _skip(name: str, reason: object) -> None:
    print(f"skipped: {name}: {reason}", flush=True)


def _run(options: Options) -> list[Row]:
    """Measure a part. Rows are saved when they are measured."""
    save = not options.tiny or options.results != results.FOLDER
    if options.tiny:
        options.rounds = 2
    torch.set_num_threads(options.threads)
    print(f"{options.command}: {options.threads} threads; {results.device_name(options.device)}")
    part, measured, said = PARTS[options.command], list[Row](), set[tuple[str, str]]()
    for setting in part.settings(options):
        setting = setting.tiny() if options.tiny else setting
        shape = setting.shape.replace(device=options.device)
        chosen = []
        for rival in part.rivals:
            kinds = (None, torch.device(options.device).type)
            if rival.name not in setting.rivals or rival.device not in kinds:
                continue
            if (reason := rival.unavailable(shape)) is None:
                chosen.append(rival)
            elif (rival.name, reason) not in said:
                said.add((rival.name, reason))
                _skip(rival.name, reason)
        if not chosen:
            continue
        print(f"\n{shape}", flush=True)
        try:
            for rows in part.rows(chosen, setting._replace(shape=shape), options):
                measured += rows
                if save and rows:
                    path = results.append(options.results, rows)
                    print(f"appended {len(rows)} rows to {path}")
        except FileNotFoundError as error:
            _skip(str(shape), error)
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


def _all(options: Options, given: Sequence[str]) -> list[Row]:
    """Each part with its defaults and the options that are given."""
    measured: list[Row] = []
    for part in DEFAULTS[torch.device(options.device).type]:
        print(f"\n== python -m bench {' '.join(part)}", flush=True)
        try:
            measured += _run(_parser().parse_args([*part, *given]))
        except (FileNotFoundError, ModuleNotFoundError) as error:
            _skip(part[0], error)
    print("\n== all")
    _print(measured)
    return measured


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text}")
    return value


class _Parser(argparse.ArgumentParser):
    def add(self, flag: str, default: Any, help: str = "", choices: Iterable[str] = ()) -> None:
        """An option of the default's type; a list takes several values, any of the choices."""
        first = default[0] if isinstance(default, list) else default
        more: dict[str, Any] = {"nargs": "+"} if isinstance(default, list) else {}
        more |= {"type": _positive if isinstance(first, int) else type(first)}
        more = {"action": "store_true"} if first is False else more
        if listed := list(choices):
            more |= {"choices": listed, "metavar": "NAME"}
            help = f"some of {', '.join(listed)}"
        self.add_argument(flag, default=default, help=help, **more)

    def training(self, entities: int, whose: str) -> None:
        """Sizes of a training run."""
        self.add("--entities", entities, "of the synthetic graph")
        for field, value in {"dim": 100, "batch": 1000, "negatives": 256}.items():
            self.add(f"--{field}", value, whose)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)

    def command(name: str, text: str, folder: str = "", threads: int = 0) -> _Parser:
        formatter = argparse.ArgumentDefaultsHelpFormatter
        part = commands.add_parser(name, help=text, description=text, formatter_class=formatter)
        part.add("--results", results.FOLDER / folder, "folder of CSV files")
        if name not in ("geometry", "report"):
            part.add("--tiny", False, "tiny sizes, not saved without --results: does it work?")
        if threads:
            part.add("--threads", threads, "of torch and of our kernels")
        return part

    def measuring(name: str, text: str, rounds: int = 0, device: str = "cpu") -> _Parser:
        part = command(name, text, threads=torch.get_num_threads())
        part.add("--device", device, "cpu or cuda")
        part.add_argument("--no-memory", action="store_false", dest="memory", help="only time")
        if rounds:
            part.add("--rounds", rounds, "turns of each rival; 2 if tiny")
        return part

    measuring("all", "the default: each part with its defaults")
    part = measuring("steps", "one training step of the operator, rival against rival", 20)
    for name, field in SIZES.items():
        part.add(f"--{field}", [getattr(Shape, field)], name)
    for field, choices in CHOICES.items():
        part.add(f"--{field}", [getattr(Shape, field)], choices=choices)
    part.add("--phases", [WHOLE], choices=PHASES)
    part.add("--rivals", list(rivals.DEFAULT), choices=rivals.DEFAULT)

    part = measuring("train", "trainers from end to end", 7)
    part.add("--graph", [Task.graph], "datasets, or zipf: synthetic")
    part.add("--model", [Task.model], "names")
    part.training(Task.entities, "of all trainers")
    part.add_argument("--optimizer", choices=["Adagrad", "Adam"], default="Adagrad", help="of all")
    where = "where possible; by default sparse for zipf"
    part.add_argument("--gradient", choices=GRADIENTS, help=where)
    part.add("--rivals", list(trainers.BY_NAME), choices=trainers.BY_NAME)

    part = measuring("scale", "time and memory as one size grows", 5)
    part.add("--axes", ["N"], choices=SCALES)
    part.add("--gradient", list(GRADIENTS), choices=GRADIENTS)
    part.add("--rivals", list(rivals.SCALED), choices=rivals.DEFAULT)

    measuring("closed", "EMU in closed form; one set of negatives for all rows, all entities", 20)
    measuring("captured", "a whole training step, on a GPU as a CUDA graph", 20)
    measuring("kernels", "each operator of our backends, at the shapes that are our targets", 20)
    part = measuring("gpu", "the operator on a GPU, in our target settings", 10, "cuda")
    part.add("--quick", False, "fewer settings")

    part = measuring("messages", "relational message passing, against plain PyTorch", 3)
    part.add("--graph", ["CoDEx-S", "WN18RR", "FB15k-237"], "datasets, or zipf: synthetic")
    part.add("--batch", [16, 64], "queries at once")
    part.add("--aggregate", ["sum", "pna"], "names; nbfnet: a step of the model's training")

    text = "a synthetic graph of Wikidata5M's size, from Parquet to predictions"
    part = command("large", text, "large", torch.get_num_threads())
    part.training(4_600_000, "of training")
    part.add("--triples", 20_000_000, "of the graph")
    part.add("--steps", 300, "of training")
    part.add("--ranked", 1000, "triples of validation and of test, among all entities")
    part.add("--chunk", 250, "triples that share a set of negatives, of some more steps")
    part.add("--optimizer", "RowwiseAdagrad", "of emu-train, with --sparse")
    part.add("--processes", 1, "if more, they train it once again, by TorchRec")
    part.add_argument("--folder", type=Path, help="for some GB of files, removed at the end")

    text = "steps with the entities on several processes, by TorchRec"
    part = command("distributed", text, "distributed", 1)
    part.training(1_000_000, "of a process")
    part.add("--processes", [1, 2], "numbers of them")
    part.add_argument("--sets", type=int, nargs="+", help="of negatives; default: a row's own, 8")
    part.add("--optimizer", "RowwiseAdagrad", "of the table")
    part.add("--steps", 30, "that are timed")

    text = "the study: named lists of training runs, resumed where they stopped"
    part = command("study", text, "study")
    part.add_argument("experiments", nargs="*", metavar="NAME", help="default: all")
    for name in ("dataset", "model", "loss", "seed"):
        part.add_argument(f"--{name}", nargs="+", help="only the runs with one of these")
    part.add("--jobs", 1, "runs at a time, of one thread each")
    part.add("--report", False, "only print the tables")
    part.add_argument("--folder", type=Path, default=Path("build/study"), help="of unfinished runs")

    text = "where negatives lie around positives, in trained models"
    part = command("geometry", text, "geometry")
    part.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders of emu-train")
    part.add("--batch", 200, "positives")
    part.add("--negatives", 256, "of each")
    part.add("--rate", 0.61, "of mutation")

    part = command("report", "Markdown tables of the results")
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
        if options.command in ("distributed", "geometry", "large", "messages", "report", "study"):
            return importlib.import_module(f"bench.{options.command}").run(options)
        return 0 if (_all(options, given[1:]) if options.command == "all" else _run(options)) else 1
    except (ImportError, OSError, ValueError, RuntimeError, AssertionError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
