"""A graph of Wikidata5M's size on this machine: from a Parquet file to predictions.

The graph is synthetic: degrees by Zipf's law, names like Wikidata's. Each part's row has its wall
time and processor time, the process's peak of resident memory (mapped files included), and the
machine's load. Reading and all that follows runs in one process, as in emu-train; predictions run
in another. With ``--processes 2`` it is trained once more, by emu-train on so many processes.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow
import torch
from pyarrow import parquet

from bench import results
from bench.measure import MIB, in_process, reset_peak, system_bytes
from bench.results import Row
from bench.trainers import RELATIONS, zipf_triples
from emu_kernels.trainer.config import Config
from emu_kernels.trainer.loop import Trainer, settle
from emu_kernels.trainer.predict import Predictor
from emu_kernels.trainer.reading import load_graph
from emu_kernels.trainer.run import RunFolder

# amount: steps of train, triples of rank, queries of predict; load: of the last minute.
COLUMNS = (
    "date", "commit", "part", "entities", "triples", "dim", "batch", "negatives", "optimizer",
    "amount", "seconds", "cpu_seconds", "peak_mib", "load", "threads", "device", "emu_kernels",
    "torch", "python",
)  # fmt: skip
SETTINGS = ("entities", "triples", "dim", "batch", "negatives", "optimizer", "threads")
QUERIES = 100
WARM_UP = 10  # steps, the first of which shuffles the epoch
WHOLE = "train, checkpoint, rank"


class Parts:
    """Measures one part after the other."""

    def __init__(self, options: argparse.Namespace) -> None:
        torch.set_num_threads(options.threads)
        self._shared = results.environment() | {name: getattr(options, name) for name in SETTINGS}
        self.rows: list[Row] = []

    @contextmanager
    def part(self, name: str, amount: int = 0, who: int = resource.RUSAGE_SELF) -> Iterator[None]:
        reset_peak()
        started, before = time.perf_counter(), resource.getrusage(who)
        yield
        seconds, used = time.perf_counter() - started, resource.getrusage(who)
        cpu = used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime
        self.add(name, amount, seconds, cpu, who)

    def add(
        self,
        name: str,
        amount: int,
        seconds: float,
        cpu: float | str = "",
        who: int = resource.RUSAGE_SELF,
    ) -> None:
        own = who == resource.RUSAGE_SELF
        peak = system_bytes("VmHWM") if own else resource.getrusage(who).ru_maxrss * 1024
        measured = {"seconds": seconds, "cpu_seconds": cpu, "peak_mib": peak / MIB}
        load = {"load": os.getloadavg()[0]}
        self.rows.append(self._shared | {"part": name, "amount": amount} | measured | load)
        print(f"{name}: {seconds:.1f} s, {measured['peak_mib']:,.0f} MiB", flush=True)


def make(options: argparse.Namespace, path: Path) -> None:
    """Write a graph in which every entity is a head."""
    triples = zipf_triples(options.entities, RELATIONS, options.triples)
    draws = torch.Generator().manual_seed(1)
    triples[: options.entities, 0] = torch.randperm(options.entities, generator=draws)
    numbers = torch.randperm(10 * options.entities, generator=draws)[: options.entities]
    names = [pyarrow.array([f"{letter}{n}" for n in x.tolist()], pyarrow.string())
             for letter, x in (("Q", numbers), ("P", torch.arange(RELATIONS)))]  # fmt: skip
    parts = ("head", "relation", "tail")
    with parquet.ParquetWriter(
        path, pyarrow.schema([(x, pyarrow.string()) for x in parts])
    ) as file:
        for rows in triples.split(1 << 20):
            columns = [names[i % 2].take(pyarrow.array(rows[:, i].numpy())) for i in range(3)]
            file.write_table(pyarrow.table(columns, parts))


def settings(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    return {
        "data": str(folder / "graph.parquet"), "hold_out": 0.001, "optimizer": options.optimizer,
        "dim": options.dim, "batch_size": options.batch, "negatives": options.negatives,
        "steps": options.steps, "eval_every": options.steps, "eval_triples": options.ranked,
    }  # fmt: skip


def train(options: argparse.Namespace, folder: Path) -> list[Row]:
    """What ``emu-train`` does."""
    config = settle(Config(sparse=True, **settings(options, folder)))
    parts = Parts(options)
    with parts.part("read"):
        graph = load_graph(Path(str(config.data)), config.layout, hold_out=config.hold_out)
    with parts.part("check"):
        graph.summary()
        graph.doubts()
    with parts.part("start"):
        run = RunFolder.create(folder / "run", config, graph)
        trainer = Trainer(config, graph, run)
    with parts.part(WHOLE, options.steps):
        if not trainer.train():
            raise KeyboardInterrupt
    parts.add("steps of these", options.steps, trainer.seconds)
    with parts.part("rank", options.ranked):
        trainer.finish()
    with parts.part("export"):
        trainer.export()
    none = graph.triples["valid"][:0]
    graph = dataclasses.replace(graph, triples=graph.triples | {"valid": none})
    del trainer  # its tables
    blocks(parts, Trainer(dataclasses.replace(config, rows_per_set=options.chunk), graph))
    return parts.rows


def blocks(parts: Parts, trainer: Trainer) -> None:
    """Steps in which blocks of triples share sets of negatives, as in DGL-KE, PBG and Marius."""
    config = trainer.config
    trainer.train(WARM_UP)
    before = trainer.seconds
    trainer.train(WARM_UP + config.steps)
    seconds = trainer.seconds - before
    parts.add(f"steps, {config.rows_per_set} triples a set of negatives", config.steps, seconds)
    work = config.steps * config.batch_size * config.negatives * config.dim
    rate = work / seconds / torch.get_num_threads()
    print(f"triples × negatives × d a second and thread: {rate:.3g}", flush=True)


def predict(options: argparse.Namespace, folder: Path) -> list[Row]:
    """What ``emu-predict`` does, for one query and for many."""
    parts = Parts(options)
    with parts.part("open, predict one", 1):
        predictor = Predictor(folder / "run")
        graph = predictor.graph
        ids = graph.triples["test"][:QUERIES].tolist()
        queries = [(graph.entities[head], graph.relations[kind], None) for head, kind, _ in ids]
        predictor.complete(queries[:1])
    with parts.part("predict many", len(queries)):
        predictor.complete(queries)
    return parts.rows


def spread(options: argparse.Namespace, folder: Path) -> list[Row]:
    """What ``emu-train`` does under ``torchrun``; its memory is the largest process's."""
    parts = Parts(options)
    run = folder / "spread"
    flags = settings(options, folder) | {"run_dir": run, "log_every": options.steps}
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads // options.processes or 1)}
    name = f"emu-train on {options.processes} processes"
    with parts.part(name, options.steps, resource.RUSAGE_CHILDREN):
        subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone",
             f"--nproc-per-node={options.processes}", "-m", "emu_kernels.trainer",
             *(f"--{name.replace('_', '-')}={value}" for name, value in flags.items())],
            env=environment, check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
    logged = RunFolder.open(run).read_metrics()
    seconds = max(row.get("seconds", 0) for row in logged)
    name = f"steps on {options.processes} processes"
    parts.add(name, options.steps, seconds, who=resource.RUSAGE_CHILDREN)
    return parts.rows


def run(options: argparse.Namespace) -> int:
    if options.tiny:
        options.entities, options.triples, options.steps, options.ranked = 2000, 9000, 20, 5
    if options.triples < 2 * options.entities:
        raise ValueError("--triples: expected at least twice as many as entities")
    if options.processes > 1:
        importlib.import_module("emu_kernels.integrations.torchrec")  # or says what to install
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        in_process(make, options, folder / "graph.parquet")
        rows = in_process(train, options, folder) + in_process(predict, options, folder)
        if options.processes > 1:
            rows += in_process(spread, options, folder)
    if not options.tiny:
        print(f"appended {len(rows)} rows to {results.append(options.results, rows, COLUMNS)}")
    return 0
