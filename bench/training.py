"""Train the paper's models with and without EMU for equal steps, and compare their test metrics.

``python -m bench.training`` trains what has no row yet in ``results/training/`` (so it may be
stopped and run again) and prints the table; ``--report`` only prints it. The settings are those of
``emu-train --preset``; each run is judged by its checkpoint with the best validation MRR.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tabulate import tabulate

from bench import results
from emu_kernels.trainer.config import Config
from emu_kernels.trainer.datasets import load_dataset
from emu_kernels.trainer.errors import TrainerError
from emu_kernels.trainer.loop import Trainer, settle
from emu_kernels.trainer.losses import LOSSES
from emu_kernels.trainer.presets import PRESETS
from emu_kernels.trainer.run import RunFolder

FOLDER = results.FOLDER / "training"


@dataclass(frozen=True)
class Run:
    """A trained model's test metrics: filtered, both directions, ties by the mean rank."""

    date: str  # when it began, UTC
    commit: str
    dataset: str
    model: str
    loss: str
    dim: int
    negatives: int
    batch_size: int
    lr: float
    regularization: float
    mutation_rate: float
    beta: float
    alpha: float
    steps: int
    best_step: int  # by validation MRR
    seed: int
    valid_mrr: float
    mrr: float
    hits_at_1: float
    hits_at_3: float
    hits_at_10: float
    mr: float
    seconds: float  # of the steps, evaluation left out
    threads: int
    device: str
    emu_kernels: str
    torch: str
    python: str


def settings(preset: str, loss: str, steps: int, seed: int) -> Config:
    evaluations = max(1, steps // 10)
    options = PRESETS[preset] | {
        "loss": loss,
        "steps": steps,
        "seed": seed,
        "eval_every": evaluations,
    }
    return settle(Config(**options))


def train(config: Config, threads: int) -> Run:
    """Train, evaluate the best checkpoint on the test split."""
    torch.set_num_threads(threads)
    assert config.dataset is not None
    environment = results.environment()
    graph = load_dataset(config.dataset)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(config, graph, RunFolder.create(Path(folder), config, graph))
        if not trainer.train():
            raise KeyboardInterrupt
        metrics = trainer.finish()
    assert metrics is not None
    assert trainer.best is not None
    known = {field.name for field in dataclasses.fields(Run)}
    return Run(
        **{name: value for name, value in config.to_json().items() if name in known - {"device"}},
        **environment,
        **vars(metrics),
        best_step=trainer.best["step"],
        valid_mrr=trainer.best["mrr"],
        seconds=trainer.seconds,
        threads=threads,
    )


def table(runs: Sequence[Run]) -> str:
    """A line for each run, EMU below what it is compared with; of repeated runs the latest."""
    latest = {(r.dataset, r.model, r.steps, r.loss, r.seed): r for r in runs}
    order = list(LOSSES)
    body = [
        [
            r.dataset,
            r.model,
            r.loss,
            f"{r.steps:,}",
            f"{r.best_step:,}",
            *(f"{x:.4f}" for x in (r.mrr, r.hits_at_1, r.hits_at_3, r.hits_at_10)),
            f"{r.mr:.0f}",
        ]
        for r in sorted(
            latest.values(),
            key=lambda r: (r.dataset, r.model, r.steps, r.loss == "emu", order.index(r.loss)),
        )
    ]
    header = [
        "dataset",
        "model",
        "loss",
        "steps",
        "best",
        "MRR",
        "Hits@1",
        "Hits@3",
        "Hits@10",
        "MR",
    ]
    align = ["left"] * 3 + ["right"] * (len(header) - 3)
    return tabulate(body, header, "pipe", disable_numparse=True, colalign=align)


def done(path: Path) -> list[Run]:
    return results.read_from(path, Run) if path.exists() else []


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.training", description=__doc__)
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=list(PRESETS))
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=["softmax", "uls", "emu"])
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--results", type=Path, default=FOLDER)
    parser.add_argument("--report", action="store_true", help="print the table of what is done")
    options = parser.parse_args(arguments)
    path: Path = options.results / f"{results.slug(results.device())}.csv"
    try:
        for preset in [] if options.report else options.presets:
            for loss in options.losses:
                config = settings(preset, loss, options.steps, options.seed)
                key = (config.dataset, config.model, config.steps, config.loss, config.seed)
                if key in {(r.dataset, r.model, r.steps, r.loss, r.seed) for r in done(path)}:
                    continue
                print(f"{preset}, {loss}, {options.steps} steps", flush=True)
                results.append_to(path, [train(config, options.threads)])
    except (TrainerError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped: run the same command to go on", file=sys.stderr)
        return 130
    files = sorted(options.results.glob("*.csv"))
    print(table([run for file in files for run in results.read_from(file, Run)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
