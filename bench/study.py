"""The study: named lists of training runs, which can be stopped and resumed, and their tables.

``python -m bench study losses --jobs 2`` trains the runs that have no rows yet, in processes of one
thread. A run that was stopped goes on from its last checkpoint. Rows are identified by a run's
settings, so that experiments share runs. The lists are in :mod:`bench.experiments`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import shutil
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from tabulate import tabulate

from bench import mask_rules, results
from bench.experiments import EXPERIMENTS, Run, Settings, tiny
from bench.results import Row
from emu_kernels.trainer import datasets
from emu_kernels.trainer.config import Config
from emu_kernels.trainer.errors import TrainerError
from emu_kernels.trainer.evaluation import METRICS, Metrics
from emu_kernels.trainer.loop import Trainer, settle
from emu_kernels.trainer.run import RunFolder

# settings: emu-train's, except those with a column, as JSON; split: valid, a row for each
# validation, or test, for the step that was best in validation; seconds: of the steps until then,
# without evaluation, on one core of the device.
COLUMNS = (
    "date", "commit", "dataset", "model", "loss", "settings", "seed", "split", "step", *METRICS,
    "seconds", "device", "emu_kernels", "torch", "python",
)  # fmt: skip
NUMBERS = dict.fromkeys(("seed", "step"), "int64") | dict.fromkeys((*METRICS, "seconds"), "float64")
RUN = ["dataset", "model", "loss", "settings", "seed"]


def key(settings: Settings) -> Row:
    """The columns that identify a run in its rows."""
    others = {name: value for name, value in sorted(settings.items()) if name not in RUN}
    named: Row = {name: settings[name] for name in ("dataset", "model", "loss")}
    return named | {"settings": json.dumps(others), "seed": settings.get("seed", 0)}


def _place(folder: Path, name: Row) -> Path:
    """Where a run is until its rows are written."""
    return folder / hashlib.sha256(json.dumps(name).encode()).hexdigest()[:16]


@mask_rules.entered()
def train(folder: Path, settings: Settings) -> list[Row] | None:
    """The rows of a run, which goes on where it was stopped; None if it was stopped again."""
    torch.set_num_threads(1)
    name = key(settings)
    path = _place(folder, name)
    config = settle(Config(**settings))
    if (path / "config.json").exists():
        run = RunFolder.open(path)
        trainer = Trainer.resume(config, run.read_graph(), run)
    else:
        graph = datasets.load_dataset(config.dataset or "")
        trainer = Trainer(config, graph, RunFolder.create(path, config, graph))
    if not trainer.train():
        return None
    ranks = trainer.finish()
    assert trainer.run is not None
    assert ranks is not None
    test = Metrics.of(ranks)
    shared = name | results.environment()
    logged = trainer.run.read_metrics()
    seconds = {m["step"]: m["seconds"] for m in logged if "seconds" in m}
    rows = [shared | m for m in logged if m.get("split") == "valid"]
    rows.append(shared | vars(test) | {"split": "test", "step": trainer.best_step})
    return [row | {"seconds": seconds.get(row["step"], trainer.seconds)} for row in rows]


def read(path: Path) -> pd.DataFrame:
    return results.read(path, COLUMNS, NUMBERS)


def _missing(runs: Sequence[Settings], done: pd.DataFrame) -> Iterator[Settings]:
    """The runs without a test row, each once."""
    seen = {tuple(row) for row in done.loc[done["split"] == "test", RUN].itertuples(index=False)}
    for settings in runs:
        name = tuple(key(settings)[column] for column in RUN)
        if name not in seen:
            seen.add(name)
            yield settings


def tested(runs: Sequence[Run], rows: pd.DataFrame) -> tuple[list[str], pd.DataFrame]:
    """The names of the runs' labels, and the test rows with these labels as a column "line"."""
    names = list(dict.fromkeys(name for _, label in runs for name in label))
    wanted = pd.DataFrame([key(settings) | {"line": label} for settings, label in runs])
    wanted["line"] = [tuple(label.get(name, "") for name in names) for label in wanted["line"]]
    tests = rows[rows["split"] == "test"].drop_duplicates(RUN, keep="last")
    return names, wanted.drop_duplicates([*RUN, "line"]).merge(tests, on=RUN)


def table(runs: Sequence[Run], rows: pd.DataFrame) -> str:
    """A line for each setting: test metrics as mean ± deviation over the seeds that have rows."""
    names, found = tested(runs, rows)
    found["minutes"] = found["seconds"] / 60
    lines = []
    for line, group in found.groupby("line", sort=False):
        cells = [*line]
        for metric in (*METRICS, "minutes"):
            digits = 0 if metric in ("mr", "minutes") else 4
            spread = f" ± {group[metric].std():.{digits}f}" if len(group) > 1 else ""
            cells.append(f"{group[metric].mean():.{digits}f}{spread}")
        lines.append([*cells, f"{group['step'].mean():,.0f}", len(group)])
    titles = [*names, "MRR", "Hits@1", "Hits@3", "Hits@10", "mean rank", "minutes", "best at"]
    return tabulate(lines, [*titles, "seeds"], "pipe", disable_numparse=True) + "\n"


def run(options: argparse.Namespace) -> int:
    names = options.experiments or list(EXPERIMENTS)
    if unknown := sorted(set(names) - set(EXPERIMENTS)):
        raise ValueError(f"no experiment {', '.join(unknown)}; known: {', '.join(EXPERIMENTS)}")
    lists = {name: EXPERIMENTS[name].runs() for name in names}
    if options.tiny:
        lists = {name: [(tiny(run[0]), run[1]) for run in runs] for name, runs in lists.items()}
    chosen = [settings for runs in lists.values() for settings, _ in runs]
    for column in ("dataset", "model", "loss", "seed"):
        if wanted := getattr(options, column):
            chosen = [settings for settings in chosen if str(key(settings)[column]) in wanted]
    options.results.mkdir(parents=True, exist_ok=True)
    todo = [] if options.report else list(_missing(chosen, read(options.results)))
    work = partial(train, options.folder)
    try:
        if options.jobs > 1 and len(todo) > 1:
            with multiprocessing.get_context("spawn").Pool(options.jobs) as pool:
                _collect(pool.imap_unordered(work, todo), len(todo), options)
                pool.close()
                pool.join()
        else:
            _collect(map(work, todo), len(todo), options)
    except TrainerError as error:
        raise RuntimeError(str(error)) from error
    except KeyboardInterrupt:
        print("stopped: run the same command to go on", file=sys.stderr)
        return 130
    rows = read(options.results)
    for name, runs in lists.items():
        print(f"\n## {name}\n\n{EXPERIMENTS[name].text}\n\n{table(runs, rows)}")
    return 0


def _collect(runs: Iterator[list[Row] | None], count: int, options: argparse.Namespace) -> None:
    for done, rows in enumerate(runs, 1):
        if rows is None:
            raise KeyboardInterrupt
        results.append(options.results, rows, COLUMNS)
        test = rows[-1]
        shutil.rmtree(_place(options.folder, {column: test[column] for column in RUN}))
        name = f"{test['dataset']} {test['model']} {test['loss']} seed {test['seed']}"
        print(f"{done} of {count}: {name}: test MRR {test['mrr']:.4f}", flush=True)
