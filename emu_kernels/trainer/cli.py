"""``emu-train``: train a model on a dataset, evaluate it, leave a run folder."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from . import trackers
from .breakdown import by_kind
from .config import ADJUSTABLE, Config, RunningOptions
from .data import Graph
from .datasets import load_dataset
from .errors import ConfigError, RunError, TrainerError
from .evaluation import Metrics
from .loop import Trainer, check_graph, settle
from .losses import LOSSES
from .models import SCORERS
from .page import write_page
from .presets import PRESETS
from .reading import is_one_file, load_graph
from .report import lines_table, metrics_table, seeds_table
from .run import RunFolder
from .sampling import SAMPLERS, rows_per_set
from .settings import add_options, flag, unread
from .terminal import degrade_output, only_first_prints, processes, quoted, say

INTERRUPTED = 130  # the exit status that shells give to a program ended by Ctrl-C

EXAMPLES = """\
examples:
  emu-train --dataset FB15k-237 --model DistMult
  emu-train --dataset FB15k-237 --model DistMult --loss softmax
  emu-train --preset rotate-fb15k-237 --loss selfadv --margin 9
  emu-train --data graph.parquet --columns subject,predicate,object
  emu-train --data my-graph/ --model ComplEx --dim 200 --run-dir runs/mine
  emu-train --resume runs/mine
  emu-train --dataset CoDEx-S --seeds 3 --run-dir runs/codex
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``emu-train``.

    Returns:
        The exit status: 0; 1 after an error that a person can act on; 130 after Ctrl-C.
    """
    degrade_output()
    with only_first_prints():
        parser = _parser()
        options = vars(parser.parse_args(arguments))
        if not options.keys() & {"dataset", "data", "preset", "resume"}:
            parser.error("give one of --dataset, --data, --preset and --resume")
        seeds = options.pop("seeds", None)
        try:
            return _train(options)[0] if seeds is None else _train_seeds(options, seeds)
        except TrainerError as error:
            print(f"emu-train: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:  # before the first step, or after the last one
            print("emu-train: stopped", file=sys.stderr)
            return INTERRUPTED


def _train(options: dict[str, Any]) -> tuple[int, Metrics | None]:
    """The exit status, and the metrics of the test split if there is one."""
    with contextlib.ExitStack() as stack:
        trainer = (_resume if "resume" in options else _start)(options, stack)
        assert trainer.run is not None
        stack.callback(trainer.run.unlock)
        return _train_and_report(trainer, trainer.run.path)


def _open(
    config: Config, make: Callable[[], tuple[RunFolder, Graph]], stack: contextlib.ExitStack
) -> tuple[type[Trainer], RunFolder, Graph]:
    """The class that trains with these settings, the run folder and the graph.

    `make` makes the last two; with several processes, in the first one only.
    """
    if not config.sharded:
        if processes() > 1:
            raise ConfigError("this run is not sharded: it goes on in one process only")
        return Trainer, *make()
    try:
        from . import distributed
    except ImportError as error:
        raise ConfigError(f"sharded: {error}") from error
    stack.enter_context(distributed.group(config))
    return distributed.ShardedTrainer, *distributed.first_makes(make)


def _train_seeds(options: dict[str, Any], count: int) -> int:
    """Train runs that differ only by their seed, in folders of one, and print mean metrics."""
    if processes() > 1:
        raise ConfigError("--seeds needs one process; give several --seed, one run after another")
    if count < 1 or "resume" in options or "run_dir" not in options:
        raise ConfigError(
            "--seeds needs a number of at least 1, and --run-dir, a folder for the runs: the same "
            "command goes on where it was stopped"
        )
    parent, first = Path(options.pop("run_dir")), options.pop("seed", 0)
    tested = []
    for seed in range(first, first + count):
        folder = parent / f"seed-{seed}"
        given = options | {"seed": seed, "run_dir": folder}
        if RunFolder(folder).config_file.exists():
            before, now = RunFolder.open(folder).read_config(), _config(options | {"seed": seed})
            for name in sorted(vars(now).keys() - vars(RunningOptions()).keys()):
                if getattr(before, name) != getattr(now, name):
                    raise ConfigError(
                        f"{folder} is a run with {flag(name)} {getattr(before, name)}, not "
                        f"{getattr(now, name)}: give another --run-dir"
                    )
            given = {k: v for k, v in options.items() if k in ADJUSTABLE} | {"resume": folder}
        status, metrics = _train(given)
        if status:
            say("or with the same command, for the other seeds, too")
            return status
        tested += [metrics] if metrics else []
    if tested:
        say(f"test, mean ± standard deviation over the seeds {first} to {first + count - 1}:")
        say(seeds_table(tested))
    return 0


def _train_and_report(trainer: Trainer, folder: Path) -> tuple[int, Metrics | None]:
    say(trainer.graph.summary())
    say(textwrap.fill(_summary(trainer.config), 79, subsequent_indent="  "))
    say(f"run folder: {folder}")
    config = trainer.config
    with contextlib.ExitStack() as stack:
        logged = RunFolder(folder).read_metrics()
        trainer.tracker = stack.enter_context(
            trackers.opened(config.tracker or "none", folder, config.to_json(), logged)
        )
        try:
            finished = trainer.train()
            ranks = trainer.finish() if finished else None
        except KeyboardInterrupt:  # the second Ctrl-C, or one while the test split is ranked
            finished = False
        if not finished:
            say(
                f"stopped, saved at step {trainer.saved_step}; go on with: "
                f"emu-train --resume {quoted(folder)}"
            )
            return INTERRUPTED, None
        metrics = None
        if ranks:
            metrics = Metrics.of(ranks)
            what = f"test, filtered, both directions{config.ranked}"
            say(f"{what}, the model of step {trainer.best_step}:")
            say(metrics_table({f"{config.model} {config.loss}": metrics}))
            say("by kind of relation (each relation: relations.csv):")
            graph, ranked = trainer.graph.of_split("test"), trainer.evaluator.ranked("test")
            say(lines_table(by_kind(graph, ranked, ranks)))
    if (model := trainer.export()) is not None:
        say(f"report: {write_page(trainer, model, ranks)}")
    say(f"predict with: emu-predict {quoted(folder)} --head NAME --relation NAME")
    return 0, metrics


def _config(options: dict[str, Any]) -> Config:
    """The settings of a new run: the options, and where they are silent the preset's or model's."""
    options = dict(options)
    preset = PRESETS.get(options.pop("preset", ""), {})
    model = options.get("model", preset.get("model"))
    settings = {**(SCORERS[model].defaults if model else {}), **preset}
    if "data" in options:
        settings.pop("dataset", None)
    settings |= options
    settings.setdefault("device", "cuda" if torch.cuda.is_available() else "cpu")
    settings.setdefault("sharded", processes() > 1)
    if settings["sharded"]:
        settings.setdefault("rows_per_set", rows_per_set(settings, processes()))
    return settle(Config(**settings))


def _start(options: dict[str, Any], stack: contextlib.ExitStack) -> Trainer:
    run_dir = options.pop("run_dir", None)
    config = _config(options)
    given = options.keys() - {*SCORERS[config.model].keywords}
    unused = unread(given, config)
    if config.data is None or not is_one_file(Path(config.data)):
        unused |= dict.fromkeys(given & {"hold_out", "split_seed"}, "a graph in several files")
    if LOSSES[config.loss].all_entities:
        sampled = {"negatives", "sampler", "rows_per_set", "hops", "walks"}
        unused |= dict.fromkeys(given & sampled, f"loss {config.loss}")
    for name, chosen in unused.items():
        print(f"emu-train: warning: {chosen} does not use {flag(name)}", file=sys.stderr)

    def make() -> tuple[RunFolder, Graph]:
        if config.dataset is not None:
            name, graph = config.dataset, load_dataset(config.dataset)
        else:
            folder = Path(str(config.data))
            graph = load_graph(
                folder, config.layout, hold_out=config.hold_out, split_seed=config.split_seed
            )
            name = folder.resolve().name
        check_graph(config, graph)
        for doubt in graph.doubts():
            print(f"emu-train: warning: {doubt}", file=sys.stderr)
        stamp = time.strftime("%Y%m%d-%H%M%S")
        run_name = f"runs/{name}-{config.model}-{config.loss}-{stamp}"
        path = _new_folder(Path(run_name)) if run_dir is None else Path(run_dir)
        return RunFolder.create(path, config, graph), graph

    trainer, run, graph = _open(config, make, stack)
    return trainer(config, graph, run)


def _new_folder(path: Path) -> Path:
    """Make the folder, or if it exists one with a number after its name."""
    for suffix in itertools.chain([""], (f"-{number}" for number in itertools.count(2))):
        folder = path.with_name(path.name + suffix)
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise RunError(f"the run folder {folder} cannot be made: {error}") from error
        return folder
    raise AssertionError


def _resume(settings: dict[str, Any], stack: contextlib.ExitStack) -> Trainer:
    path = Path(settings.pop("resume"))
    if fixed := [flag(name) for name in settings if name not in ADJUSTABLE]:
        raise ConfigError(
            f"--resume takes the run's own settings, so {', '.join(fixed)} cannot be given; "
            f"only {', '.join(map(flag, ADJUSTABLE))} can"
        )
    folder = RunFolder.open(path)
    if "device" in settings:
        settings.setdefault("backend", None)  # choose one for the new device
    before = folder.read_config()
    config = settle(dataclasses.replace(before, **settings))

    def make() -> tuple[RunFolder, Graph]:
        folder.lock()
        return folder, folder.read_graph()

    if config.schedule == "cosine" and config.steps > (config.decay_steps or 0):
        print(
            f"emu-train: warning: the cosine ends at step {config.decay_steps}, after which the "
            "learning rate is 0",
            file=sys.stderr,
        )
    kind, run, graph = _open(config, make, stack)
    trainer = kind.resume(config, graph, run)
    changes = {k: v for k, v in config.to_json().items() if v != getattr(before, k)}
    history = run.read_history() + ([{"step": trainer.step, **changes}] if changes else [])
    run.write_config(config, graph, history)
    return trainer


def _summary(config: Config) -> str:
    """Model, loss, negatives, optimizer and backend in one sentence."""
    model = SCORERS[config.model]
    norm = f", {config.norm}-norm" if model.norms else ""
    own = "".join(f", {x.replace('_', ' ')} {getattr(config, x)}" for x in model.options)
    inverse = ", inverse relations" if config.inverse_relations else ""
    drawn = f"negatives from {SAMPLERS[config.sampler].summary(config)}"
    negatives = "all entities as negatives" if config.over_all else drawn
    weights = ", subsampling weights" if config.subsampling else ""
    l3 = f", L3 {config.regularization:g}" if "regularization" not in model.without else ""
    return (
        f"{config.model}{norm}, d = {config.dim}{own}{inverse}, "
        f"{LOSSES[config.loss].summary(config, model.without)}, {negatives}{weights}; "
        f"{config.optimizer}, lr {config.lr:g}{l3}, seed {config.seed}; "
        f"backend {config.backend} on {config.device}"
    )


def _parser() -> argparse.ArgumentParser:
    presets = textwrap.indent("\n".join(PRESETS), "  ")
    parser = argparse.ArgumentParser(
        prog="emu-train",
        usage="%(prog)s (--dataset NAME | --data PATH | --preset NAME | --resume RUN)\n"
        "                 [options]",
        description="Train knowledge-graph embeddings with the fused EMU loss.",
        epilog=f"presets:\n{presets}\n\n{EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # a misspelt option is an error, also if it begins like another
        argument_default=argparse.SUPPRESS,  # an option that is not given is absent, not None
    )
    parser.add_argument(
        "--preset",
        type=str.lower,
        choices=PRESETS,
        metavar="NAME",
        help="use one of the presets listed below; options given with it override it",
    )
    parser.add_argument(
        "--run-dir", metavar="FOLDER", help="where to write; default runs/NAME-MODEL-LOSS-TIME"
    )
    parser.add_argument(
        "--seeds",
        type=int,
        metavar="N",
        help="N runs, with --seed and the seeds after it, in folders of --run-dir; prints the mean",
    )
    source, *groups = Config.__bases__
    exclusive = parser.add_mutually_exclusive_group()
    add_options(exclusive, source)
    exclusive.add_argument("--resume", metavar="RUN", help="continue a run folder where it stopped")
    for group in groups:
        add_options(parser.add_argument_group(group.__doc__), group)
    return parser


if __name__ == "__main__":
    sys.exit(main())
