"""``emu-train``: train a model on a dataset, evaluate it, leave a run folder."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from emu_kernels.mask import effective_rate
from emu_kernels.mutation import MASK_UNITS

from .config import ADJUSTABLE, BASELINE, CORRUPTIONS, OPTIMIZERS, SAMPLERS, Config
from .data import Graph, load_graph
from .datasets import CHECKSUMS, FOLDER_VARIABLE, load_dataset
from .errors import ConfigError, TrainerError
from .loop import Trainer, settle
from .losses import LOSSES
from .models import MODELS
from .presets import PRESETS
from .report import metrics_table
from .run import RunFolder

INTERRUPTED = 130  # the exit status that shells give to a program ended by Ctrl-C

EXAMPLES = """\
examples:
  emu-train --dataset FB15k-237 --model DistMult
  emu-train --dataset FB15k-237 --model DistMult --loss softmax
  emu-train --preset rotate-fb15k-237 --loss selfadv --margin 9
  emu-train --data my-graph/ --model ComplEx --dim 200 --run-dir runs/mine
  emu-train --resume runs/mine
"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = vars(parser.parse_args(arguments))
    if not options.keys() & {"dataset", "data", "preset", "resume"}:
        parser.error("give one of --dataset, --data, --preset and --resume")
    try:
        return _train(options)
    except TrainerError as error:
        print(f"emu-train: {error}", file=sys.stderr)
        return 1


def _train(options: dict[str, Any]) -> int:
    resume, run_dir = options.pop("resume", None), options.pop("run_dir", None)
    if resume is not None:
        trainer = _resume(Path(resume), options, run_dir)
    else:
        trainer = _start(options, run_dir)
    assert trainer.run is not None
    folder = trainer.run.path
    print(trainer.graph.summary())
    print(_summary(trainer.config))
    print(f"run folder: {folder}", flush=True)
    try:
        finished = trainer.train()
    except KeyboardInterrupt:  # the second Ctrl-C
        finished = False
    if not finished:
        print(f"stopped at step {trainer.step}; go on with: emu-train --resume {folder}")
        return INTERRUPTED
    if metrics := trainer.finish():
        step = trainer.best["step"] if trainer.best else trainer.step
        print(f"test, filtered, both directions, the model of step {step}:")
        print(metrics_table({f"{trainer.config.model} {trainer.config.loss}": metrics}))
    print(f"predict with: emu-predict {folder} --head NAME --relation NAME")
    return 0


def _start(options: dict[str, Any], run_dir: str | None) -> Trainer:
    settings = dict(PRESETS.get(options.pop("preset", ""), {}))
    if "data" in options:
        settings.pop("dataset", None)
    settings |= options
    settings.setdefault("device", "cuda" if torch.cuda.is_available() else "cpu")
    config = settle(Config(**settings))
    graph = load_source(config)
    if run_dir is None:
        name = config.dataset or Path(config.data or "").resolve().name
        stamp = time.strftime("%Y%m%d-%H%M%S")
        run_dir = f"runs/{name}-{config.model}-{config.loss}-{stamp}"
    return Trainer(config, graph, RunFolder.create(Path(run_dir), config, graph))


def _resume(path: Path, settings: dict[str, Any], run_dir: str | None) -> Trainer:
    fixed = [f"--{name.replace('_', '-')}" for name in settings if name not in ADJUSTABLE]
    if run_dir is not None:
        fixed.append("--run-dir")
    if fixed:
        raise ConfigError(
            f"--resume takes the run's own settings, so {', '.join(fixed)} cannot be given; "
            f"what can: {', '.join('--' + name.replace('_', '-') for name in ADJUSTABLE)}"
        )
    run = RunFolder.open(path)
    if "device" in settings:
        settings.setdefault("backend", None)  # the one that suits the new device
    config = settle(dataclasses.replace(run.read_config(), **settings))
    graph = run.read_graph()
    trainer = Trainer.resume(config, graph, run)
    run.write_config(config, graph)
    return trainer


def _summary(config: Config) -> str:
    """What is trained how, on one line."""
    labels = f"β {config.beta:g}, α {config.alpha:g}"
    unit = "" if config.mask_unit == "component" else f" of {config.mask_unit}s"
    method = {
        "emu": f"EMU (mutation rate {effective_rate(config.mutation_rate):.4f}{unit}, {labels})",
        "uls": f"EMU without mutation ({labels})",
        "mixup": f"EMU with Mixup (order {config.mixup_order}, {labels})",
        "softmax": "sampled softmax",
        "selfadv": "self-adversarial negative sampling "
        f"(γ {config.margin:g}, temperature {config.adversarial_temperature:g})",
        "onevsall": "softmax over all entities",
    }[config.loss]
    if config.sampler != "uniform":
        method += f", {config.sampler} negatives ({config.hops} hops)"
    if config.subsampling:
        method += ", subsampling weights"
    norm = f", {config.norm}-norm" if MODELS[config.model].norms else ""
    return (
        f"{config.model}{norm}, d = {config.dim}, {method}; {config.optimizer}, lr {config.lr:g}, "
        f"L3 {config.regularization:g}, seed {config.seed}; backend {config.backend} on "
        f"{config.device}"
    )


def load_source(config: Config) -> Graph:
    """The graph that a config names."""
    if config.dataset is not None:
        return load_dataset(config.dataset)
    assert config.data is not None
    return load_graph(Path(config.data))


def _parser() -> argparse.ArgumentParser:
    presets = textwrap.indent("\n".join(PRESETS), "  ")
    parser = argparse.ArgumentParser(
        prog="emu-train",
        description="Train knowledge-graph embeddings with the fused EMU loss.",
        epilog=f"presets:\n{presets}\n\n{EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,  # what is not given is absent, not None
    )
    defaults = {field.name: field.default for field in dataclasses.fields(Config)}

    parser.add_argument(
        "--preset",
        choices=tuple(PRESETS),
        metavar="NAME",
        help="a model on a dataset as the paper trains it, of those below; options given beside "
        "it override it",
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--dataset",
        choices=tuple(CHECKSUMS),
        help=f"downloaded, verified and cached; taken from the folder {FOLDER_VARIABLE} if set",
    )
    source.add_argument(
        "--data", metavar="PATH", help="a folder (or tar archive) with train/valid/test.txt"
    )
    source.add_argument("--resume", metavar="RUN", help="continue a run folder where it stopped")
    parser.add_argument(
        "--run-dir", metavar="FOLDER", help="where to write; default runs/NAME-MODEL-LOSS-TIME"
    )

    def add(group: argparse._ArgumentGroup, name: str, help: str, **keywords: Any) -> None:
        default = defaults[name]
        if default is not None and not isinstance(default, bool):
            help = f"{help} (default {default})"
            keywords.setdefault("type", type(default))
            if "choices" not in keywords:
                keywords.setdefault("metavar", "X")
        group.add_argument(f"--{name.replace('_', '-')}", help=help, **keywords)

    group = parser.add_argument_group("model")
    add(group, "model", "the scoring function", choices=tuple(MODELS))
    add(group, "dim", "dimension d")
    add(group, "norm", "p-norm of the distance (TransE, PairRE)", choices=(1, 2))
    add(group, "margin", "γ: initial values are in ±(γ+2)/d; selfadv's margin, with distances")

    regularization = ", ".join(
        f"{model.regularization:g} for {name}"
        for name, model in MODELS.items()
        if model.regularization
    )
    group = parser.add_argument_group("loss")
    add(
        group,
        "loss",
        "EMU, EMU without mutation or with Mixup, sampled softmax, self-adversarial negative "
        "sampling, softmax over all entities",
        choices=tuple(LOSSES),
    )
    add(group, "mutation_rate", "share of components taken from the positive, in steps of 1/256")
    add(
        group,
        "mask_unit",
        "what is mutated as a whole; a pair is a complex number's two parts",
        choices=MASK_UNITS,
    )
    add(group, "mixup_order", "negatives' share in Mixup is drawn from Beta(order, 1)")
    add(group, "beta", "label of a mutated negative")
    add(group, "alpha", "weight of the vanilla term beside EMU")
    add(
        group,
        "regularization",
        f"L3 (cubic) regularisation of both tables (default with {BASELINE}: {regularization}; "
        "otherwise 0)",
        type=float,
        metavar="X",
    )

    add(group, "adversarial_temperature", "of selfadv; 0 weights all negatives alike")
    add(
        group,
        "subsampling",
        "weight triples by 1/√frequency, as RotatE's trainer does",
        action="store_true",
    )

    group = parser.add_argument_group("negatives and batches")
    add(group, "batch_size", "triples a step")
    add(
        group,
        "corruption",
        "predict tails and heads in turn, or by the relation's Bernoulli probability",
        choices=CORRUPTIONS,
    )
    add(group, "negatives", "negatives a triple")
    add(
        group,
        "sampler",
        "negatives from all entities, or from the given entity's neighbourhood (SAN), which are "
        "best filtered",
        choices=SAMPLERS,
    )
    add(group, "hops", "of the neighbourhood")
    add(group, "walks", "random walks an entity that find its neighbourhood; 0 for all of it")
    add(group, "rows_per_set", "consecutive triples that share one set of uniform negatives")
    add(group, "filter_negatives", "leave out negatives true in training", action="store_true")

    group = parser.add_argument_group("optimisation")
    add(group, "optimizer", "the optimizer", choices=OPTIMIZERS)
    add(group, "lr", "learning rate")
    add(
        group,
        "sparse",
        "read and write only the entities of the batch: for tables much larger than batch times "
        "negatives",
        action="store_true",
    )
    add(group, "steps", "training steps")
    add(group, "seed", "repeats a run exactly, on the same device and versions")

    group = parser.add_argument_group("running")
    add(group, "eval_every", "steps between validations and checkpoints")
    add(group, "log_every", "steps between lines in metrics.jsonl")
    group.add_argument("--device", help="cpu, cuda, cuda:1, ... (default cuda where there is one)")
    group.add_argument("--backend", help="kernels to use (default the fastest that can run)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
