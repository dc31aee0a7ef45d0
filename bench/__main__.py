"""Compare with the alternatives that a user has, on this machine.

``python -m bench`` measures everything that can run here, prints tables and appends rows to
this device's results. With a command it does one of the parts; ``report`` makes tables from
the rows. Sizes, rivals and rounds are options: ``python -m bench steps --help``.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench import results, rivals, steps, trainers
from bench.inputs import CHOICES, GRADIENTS, SIMILARITIES, SIZES, Shape, is_gpu
from bench.results import Row
from bench.trainers import Task

_HERE = {"tiny": False, "threads": torch.get_num_threads()}
_DEVICE = {"device": "cpu", "memory": True, **_HERE}
_SHAPE = {field: [getattr(Shape, field)] for field in (*SIZES.values(), *CHOICES)}
_TRAINED = {"dim": 100, "batch": 1000, "negatives": 256}
COMMANDS = {
    "all": "the default: each part with its defaults",
    "steps": "one training step of the operator, rival against rival",
    "train": "trainers from end to end; by default gradients of zipf are sparse",
    "scale": "time and memory as one size grows",
    "closed": "EMU in closed form; one set of negatives for all rows, all entities",
    "captured": "a whole training step, on a GPU as CUDA graphs",
    "kernels": "each operator of our backends, at the shapes that are our targets",
    "gpu": "the operator on a GPU, in our target settings",
    "messages": "relational message passing, against plain PyTorch",
    "large": "a synthetic graph of Wikidata5M's size, from Parquet to predictions",
    "distributed": "steps with the entities on several processes, by TorchRec",
    "study": "the study: named lists of training runs, resumed where they stopped",
    "geometry": "where negatives lie around positives, in trained models",
    "report": "Markdown tables of the results",
}
OPTIONS: dict[str, dict[str, Any]] = {
    "all": _DEVICE,
    "steps": _DEVICE | _SHAPE
    | {"rounds": 20, "phases": [rivals.WHOLE], "rivals": [*rivals.DEFAULT]},
    "train": _DEVICE | {"rounds": 7, "graph": [Task.graph], "entities": Task.entities}
    | _TRAINED | {"model": [Task.model], "gradient": str, "rivals": [*trainers.BY_NAME]},
    "scale": _DEVICE | {"rounds": 5, "axes": ["N"], "gradient": [*GRADIENTS]}
    | {"rivals": [*rivals.SCALED]},
    "closed": _DEVICE | {"rounds": 20},
    "captured": _DEVICE | {"rounds": 7, "rivals": [*rivals.SCALED]},
    "kernels": _DEVICE | {"rounds": 20},
    "gpu": _DEVICE | {"device": "cuda", "quick": False},
    "messages": _DEVICE | {"rounds": 3, "graph": ["CoDEx-S", "WN18RR", "FB15k-237"]}
    | {"batch": [16, 64], "aggregate": ["sum", "pna"]},
    "large": _HERE | _TRAINED | {"entities": 4_600_000, "triples": 20_000_000, "steps": 300}
    | {"ranked": 1000, "chunk": 250, "optimizer": "RowwiseAdagrad", "processes": 1, "folder": Path},
    "distributed": _HERE | _TRAINED | {"threads": 1, "entities": 1_000_000, "steps": 30}
    | {"processes": [1, 2], "sets": [int], "optimizer": "RowwiseAdagrad"},
    "study": {"tiny": False, "experiments": [str], "jobs": 1, "folder": Path("build/study")}
    | {"report": False, "dataset": [str], "model": [str], "loss": [str], "seed": [str]},
    "geometry": {"runs": [Path], "batch": 200, "negatives": 256, "rate": 0.61},
    "report": {"into": Path, "parts": [str]},
}  # fmt: skip
"""Each command's options with their defaults; without a default, a type or a list of one type."""
FOLDERS = ("large", "distributed", "study", "geometry")
"""Commands whose rows have other columns, in folders of their own."""
ANSWERS: dict[str, Any] = CHOICES | {"phases": rivals.PHASES, "axes": steps.SCALES}
ANSWERS["rivals"] = (*rivals.DEFAULT, *trainers.BY_NAME)
HELP = {
    "aggregate": "names; nbfnet: a step of the model's training",
    "chunk": "triples that share a set of negatives, in additional steps",
    "dataset": "only these runs of the study; likewise model, loss and seed",
    "entities": "of a training run: of the synthetic graph, or of each process",
    "folder": "for temporary files: several GB for large",
    "graph": "datasets, or zipf: synthetic",
    "into": "a file, between whose markers to write the tables",
    "parts": "only these: steps, train, train:WN18RR, scale-N, ...",
    "processes": "numbers of processes; of large: above 1, so many train it once more",
    "ranked": "triples of validation and of test, among all entities",
    "report": "only print the tables",
    "rounds": "turns of each rival; 2 if tiny",
    "sets": "numbers of sets of negatives; by default one set for each row, and 8 sets",
    "tiny": "tiny sizes, to see whether it works; saves nothing without --results",
}
_PHASES = "--phases forward backward 'forward + backward'"
_OTHERS = f"--similarity {' '.join(s for s in SIMILARITIES if s != 'dot')}"
_FEW = f"--rounds 10 --rivals {' '.join(rivals.SCALED)}"
_GPU = f"steps {_PHASES} --rounds 10 --batch 1024 --dim"
CONTENTS = {
    "all on cpu": [
        f"steps {_PHASES}",
        f"steps {_OTHERS} {_FEW}",
        f"steps --gradient sparse {_FEW}",
        f"steps --dtype bfloat16 {_FEW}",
        "closed",
        "train --graph FB15k-237 WN18RR",
        "train --graph zipf --rounds 5",
        "scale --axes N --rounds 3",
    ],
    "all on cuda": ["gpu", "captured", "train", "scale --axes N"],
    "gpu": [
        f"{_GPU} {sizes} {kind}"
        for sizes in (
            "512 --dtype float32 bfloat16",
            f"512 {_OTHERS} {_FEW}",  # compiling takes longest
            "512 --dtype float32 bfloat16 --negatives 64 1024",
            "100 1000 --dtype float32 bfloat16 --negatives 64 256 1024",
        )
        for kind in ("", "--gradient sparse --entities 2500000")
    ],
}
"""The commands that other commands consist of."""


def _parser() -> argparse.ArgumentParser:
    raw, defaults = argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser("python -m bench", description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text, formatter_class=defaults)
        folder = results.FOLDER / (name if name in FOLDERS else "")
        command.add_argument("--results", type=Path, default=folder, help="folder of CSV files")
        for option, default in OPTIONS[name].items():
            _add(command, option, default)
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text}")
    return int(text)


def _add(command: argparse.ArgumentParser, name: str, default: Any) -> None:
    listed = isinstance(default, list)
    first = default[0] if listed else default
    kind, default = (first, None) if isinstance(first, type) else (type(first), default)
    given: dict[str, Any] = {"help": HELP.get(name, "default: %(default)s"), "default": default}
    if kind is bool:
        command.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, **given)
        return
    given |= {"type": _count if kind is int else kind}
    if answers := ANSWERS.get(name):
        given |= {"choices": answers, "metavar": "NAME", "help": f"of {', '.join(answers)}"}
    if listed:
        given["nargs"] = "*" if name == "experiments" else "+"
    command.add_argument(name if name in ("experiments", "runs") else f"--{name}", **given)


def _run(options: argparse.Namespace) -> list[Row]:
    """Measure a part. Rows are saved as soon as they are measured."""
    save = not options.tiny or options.results != results.FOLDER
    if options.tiny:
        options.rounds = 2
    torch.set_num_threads(options.threads)
    print(f"{options.command}: {options.threads} threads; {results.device_name(options.device)}")
    measured: list[Row] = []
    say_once = functools.cache(print)
    for setting in getattr(steps, f"of_{options.command}")(options):
        shape = setting.shape.replace(device=options.device)
        shape = shape.tiny() if options.tiny else shape
        here = [r for r in setting.rivals if r.device in (None, torch.device(options.device).type)]
        reasons = {rival: rival.unavailable(shape) for rival in here}
        for rival, reason in reasons.items():
            if reason:
                say_once(f"skipped: {rival.name}: {reason}")
        able = [rival for rival in here if reasons[rival] is None]
        if not able:
            continue
        print(f"\n{shape}", flush=True)
        try:
            for rows in steps.rows(setting._replace(shape=shape, rivals=able), options):
                measured += rows
                if save and rows:
                    path = results.append(options.results, rows)
                    print(f"appended {len(rows)} rows to {path}")
        except FileNotFoundError as error:
            print(f"skipped: {shape}: {error}")
    return measured


def _measure(options: argparse.Namespace) -> list[Row]:
    """Measure a part, or the parts that it consists of, with the options that they share."""
    if options.command not in ("all", "gpu"):
        return _run(options)
    name = "gpu" if options.command == "gpu" else f"all on {torch.device(options.device).type}"
    measured: list[Row] = []
    for command in CONTENTS[name][: 3 if getattr(options, "quick", False) else None]:
        print(f"\n== python -m bench {command}", flush=True)
        part = _parser().parse_args(shlex.split(command))
        vars(part).update({name: getattr(options, name) for name in ("results", *_DEVICE)})
        try:
            measured += _measure(part)
        except (FileNotFoundError, ModuleNotFoundError) as error:
            print(f"skipped: {command}: {error}")
    return measured


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or (given[0].startswith("-") and given[0] not in ("-h", "--help")):
        given.insert(0, "all")
    options = _parser().parse_args(given)
    try:
        if is_gpu(getattr(options, "device", "cpu")):
            results.device_name("cuda")  # raises an error if there is none
        if options.command in ("messages", "report", *FOLDERS):
            return importlib.import_module(f"bench.{options.command}").run(options)
        if not (rows := _measure(options)):
            print("nothing was measured")
            return 1
        try:
            import pandas as pd

            from bench import report

            print(f"\n{report.markdown(pd.DataFrame(rows))}\n")
        except ModuleNotFoundError as error:  # on a GPU's machine
            print(f"no tables of {len(rows)} rows: {error}")
        return 0
    except (ImportError, OSError, ValueError, RuntimeError, AssertionError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
