"""Train the paper's models with and without EMU for equal steps, and compare their test metrics.

Trains whatever has no row yet, so that it can be stopped and run again, and prints the table. The
settings are those of emu-train --preset; of each run the checkpoint with the best validation MRR is
evaluated.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from pathlib import Path

import pandas as pd
import torch
from tabulate import tabulate

from bench import results
from bench.results import Row
from emu_kernels.trainer import datasets
from emu_kernels.trainer.config import Config
from emu_kernels.trainer.errors import TrainerError
from emu_kernels.trainer.evaluation import Metrics
from emu_kernels.trainer.loop import Trainer, settle
from emu_kernels.trainer.presets import PRESETS
from emu_kernels.trainer.run import RunFolder

# commit ... mutation_rate ... alpha: settings; best_step: by validation MRR; mrr to mr: on the test
# split, filtered, ties by the mean rank; seconds: of the steps, without evaluation.
COLUMNS = (
    "date", "commit", "dataset", "model", "loss", "dim", "negatives", "batch_size", "lr",
    "regularization", "mutation_rate", "beta", "alpha", "steps", "best_step", "seed", "valid_mrr",
    "mrr", "hits_at_1", "hits_at_3", "hits_at_10", "mr", "seconds", "threads", "device",
    "emu_kernels", "torch", "python",
)  # fmt: skip
NUMBERS = dict.fromkeys(COLUMNS[5:23], "float64")
NUMBERS |= dict.fromkeys(
    ("dim", "negatives", "batch_size", "steps", "best_step", "seed", "threads"), "int64"
)
KEY = ["dataset", "model", "steps", "loss", "seed"]
LOSSES = (
    "uls",
    "mixup",
    "softmax",
    "selfadv",
    "onevsall",
    "emu",
    "expected",
)  # as the table orders them


def train(config: Config, threads: int) -> Row:
    """Train, and evaluate the best checkpoint on the test split."""
    torch.set_num_threads(threads)
    row = {name: getattr(config, name, None) for name in COLUMNS} | results.environment()
    graph = datasets.load_dataset(config.dataset or "")
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(config, graph, RunFolder.create(Path(folder), config, graph))
        if not trainer.train():
            raise KeyboardInterrupt
        ranks = trainer.finish()
    assert trainer.best is not None
    assert ranks is not None
    row |= {name: value for name, value in vars(Metrics.of(ranks)).items() if name in COLUMNS}
    row |= {"best_step": trainer.best["step"], "valid_mrr": trainer.best["mrr"]}
    return row | {"seconds": trainer.seconds, "threads": threads}


def read(path: Path) -> pd.DataFrame:
    return results.read(path, COLUMNS, NUMBERS)


def table(runs: pd.DataFrame) -> str:
    """A line for each run, EMU below its baselines; of repeated runs the latest."""
    shown = runs.drop_duplicates(KEY, keep="last")
    shown = shown.assign(order=shown["loss"].map(LOSSES.index), best=shown["best_step"])
    shown = shown.sort_values(["dataset", "model", "steps", "order"], kind="stable")
    names = ["dataset", "model", "loss", "steps", "best", "mrr"]
    names += ["hits_at_1", "hits_at_3", "hits_at_10", "mr"]
    titles = [*names[:5], "MRR", "Hits@1", "Hits@3", "Hits@10", "MR"]
    digits = (*[""] * 5, *[".4f"] * 4, ".0f")
    return tabulate(shown[names], titles, "pipe", digits, intfmt=",", showindex=False)


def run(options: argparse.Namespace) -> int:
    path = options.results / f"{results.slug(results.device_name())}.csv"
    chosen = [] if options.report else options.presets or list(PRESETS)
    if unknown := set(chosen) - set(PRESETS):
        raise ValueError(f"--presets: no {', '.join(unknown)}; known: {', '.join(PRESETS)}")
    try:
        for preset, loss in itertools.product(chosen, options.losses):
            changes = {"loss": loss, "steps": options.steps, "seed": options.seed}
            changes["eval_every"] = max(1, options.steps // 10)
            config = settle(Config(**PRESETS[preset] | changes))
            this = [getattr(config, name) for name in KEY]
            if path.exists() and (read(path)[KEY] == this).all(axis=1).any():
                continue
            print(f"{preset}, {loss}, {options.steps} steps", flush=True)
            results.append(options.results, [train(config, options.threads)], COLUMNS)
    except TrainerError as error:
        raise RuntimeError(str(error)) from error
    except KeyboardInterrupt:
        print("stopped: run the same command to continue", file=sys.stderr)
        return 130
    print(table(read(options.results)))
    return 0
