"""Training from end to end, trainer against trainer: triples a second and peak memory.

All train the same model at the same dimension, batch, number of negatives (uniform, half of them
heads) and optimiser, on the same triples, with cross-entropy of the positive among its negatives
or with EMU. A step is everything: drawing triples and negatives, loss, gradients, optimiser. What
happens once a run or once an epoch (building loaders, shuffling) is left out for all.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from tqdm import tqdm

from bench import memory, results
from bench.libraries import (
    PYG,
    PYKEEN,
    TORCHKGE,
    Library,
    Pyg,
    PygEmu,
    Pykeen,
    PykeenEmu,
    TorchKge,
)
from bench.loops import FusedLoop, Loop, OurTrainer
from bench.measure import Spread
from bench.results import MEMORY, MIB, RATIO, SPEED, TIME, UNITS, Row
from bench.tasks import Run, Task, tiny
from emu_kernels.trainer.data import Graph
from emu_kernels.trainer.models import MODELS

__all__ = ["BY_NAME", "RIVALS", "Task", "rows", "runnable"]


@dataclass(frozen=True)
class Trainer:
    name: str  # in results and on the command line
    title: str  # in tables
    prepare: Callable[[Task, Graph], Run]
    library: Library | None = None
    models: tuple[str, ...] | None = None  # those that it has, or None for all of ours
    gradients: tuple[str, ...] = ("dense",)
    sparse_if: Callable[[Task], bool] = lambda task: True  # for which tasks it has sparse ones

    def unavailable(self, task: Task) -> str | None:
        """Why it cannot take part here, or None."""
        if self.library is not None and (reason := self.library.missing()):
            return reason
        if self.models is not None and task.model not in self.models:
            return f"has no {task.model}"
        # Parameters, gradients, the optimiser's state and what its step allocates; B·K·D tensors.
        tables = 3 if self.settled(task).gradient == "sparse" else 6
        width = MODELS[task.model].entity_width * task.dim * 4
        rows = task.num_entities * tables + task.batch * task.negatives * 12
        free = memory.free_bytes(task.device)
        if free is not None and rows * width > free:
            return f"needs about {rows * width / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
        return None

    def settled(self, task: Task) -> Task:
        """The task with the gradients that this trainer can make."""
        able = task.gradient in self.gradients
        if able and (task.gradient == "dense" or self.sparse_if(task)):
            return task
        return task.replace(gradient="dense")


BOTH = ("dense", "sparse")
OURS = Trainer(
    "trainer-emu",
    "**our trainer, EMU**",
    OurTrainer.of("emu"),
    gradients=BOTH,
    sparse_if=OurTrainer.can_be_sparse,
)
RIVALS = (
    OURS,
    Trainer(
        "trainer-softmax",
        "our trainer, sampled softmax",
        OurTrainer.of("softmax"),
        gradients=BOTH,
        sparse_if=OurTrainer.can_be_sparse,
    ),
    Trainer(
        "fused-loop-emu",
        "PyTorch loop with our EMU",
        FusedLoop.of("emu"),
        gradients=BOTH,
    ),
    Trainer("loop-softmax", "PyTorch loop", Loop.of("softmax"), gradients=BOTH),
    Trainer("loop-emu", "PyTorch loop with eager EMU", Loop.of("emu"), gradients=BOTH),
    Trainer("pykeen", "PyKEEN, sLCWA", Pykeen, PYKEEN, models=tuple(Pykeen.MODELS)),
    Trainer("pykeen-emu", "PyKEEN with our EMU", PykeenEmu, PYKEEN, models=tuple(Pykeen.MODELS)),
    Trainer("pyg", "PyTorch Geometric", Pyg, PYG, models=tuple(Pyg.MODELS), gradients=BOTH),
    Trainer(
        "pyg-emu",
        "PyTorch Geometric with our EMU",
        PygEmu,
        PYG,
        models=tuple(Pyg.MODELS),
        gradients=BOTH,
    ),
    Trainer("torchkge", "TorchKGE", TorchKge, TORCHKGE, models=tuple(TorchKge.MODELS)),
)
BY_NAME = {rival.name: rival for rival in RIVALS}
OURS_IN = ("trainer-emu", "trainer-softmax", "fused-loop-emu", "pykeen-emu", "pyg-emu")
"""Those with our kernels in them."""


def runnable(names: Sequence[str], task: Task) -> tuple[list[Trainer], dict[str, str]]:
    """Those that can run the task here, and why the others cannot."""
    chosen, reasons = [], {}
    for rival in RIVALS:
        if rival.name in names:
            reason = rival.unavailable(task)
            if reason is None:
                chosen.append(rival)
            else:
                reasons[rival.name] = reason
    return chosen, reasons


TURN_SECONDS = 0.25


def alternate(runs: Mapping[str, Run], rounds: int, min_seconds: float) -> dict[str, list[float]]:
    """Seconds a step of each in each round, after a warm-up; turns of ``min_seconds`` or a step."""
    lengths = {}
    for name, run in tqdm(runs.items(), desc="warm-up", unit="trainer", leave=False):
        run(2)
        lengths[name] = max(1, math.ceil(min_seconds / run(1)))
    names = list(runs)
    times: dict[str, list[float]] = {name: [] for name in names}
    for i in tqdm(range(rounds), desc="time", unit="round", leave=False):
        first = i % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(runs[name](lengths[name]) / lengths[name])
    return times


def rows(
    rivals: Sequence[Trainer],
    task: Task,
    *,
    rounds: int,
    threads: int,
    memory_runs: int,
    min_seconds: float | None = None,
) -> list[Row]:
    """Measure; memory in fresh processes on a CPU, by the allocator on a GPU.

    Args:
        min_seconds: of a turn.
    """
    if min_seconds is None:
        min_seconds = TURN_SECONDS
    graph = task.load()
    on_gpu = torch.device(task.device).type == "cuda"
    common = results.environment(task.device) | {
        "family": "train", "phase": "training step", "graph": task.graph, "model": task.model,
        "optimizer": task.optimizer, "similarity": "", "dtype": "float32", "threads": threads,
        "B": task.batch, "K": task.negatives, "D": task.dim, "N": graph.num_entities,
        "instruction_set": "",
    }  # fmt: skip
    measured: list[Row] = []

    def add(rival: Trainer, what: str, spread: Spread, base: str = "") -> None:
        measured.append(
            Row(
                what=what,
                rival=rival.name,
                base=base,
                gradient=rival.settled(task).gradient,
                library="" if rival.library is None else rival.library.with_version(),
                unit=UNITS[what],
                **spread._asdict(),
                **common,
            )
        )

    runs: dict[str, Run] = {}
    peaks: dict[str, list[float]] = {rival.name: [] for rival in rivals}
    for rival in rivals:
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        runs[rival.name] = rival.prepare(rival.settled(task), graph)
        if on_gpu:
            runs[rival.name](memory.STEPS)
            peaks[rival.name].append((torch.cuda.max_memory_allocated() - before) / MIB)
    times = alternate(runs, rounds, min_seconds)
    runs.clear()
    if memory_runs and not on_gpu:
        small = tiny(task)
        jobs = list(rivals) * memory_runs
        for rival in tqdm(jobs, desc="memory", unit="process", leave=False):
            tasks = (dataclasses.asdict(rival.settled(t)) for t in (task, small))
            peaks[rival.name].append(memory.peak(threads, "training", rival.name, *tasks) / MIB)
    for rival in rivals:
        mine = times[rival.name]
        add(rival, TIME, Spread.of([1000 * t for t in mine]))
        add(rival, SPEED, Spread.of(mine).per(task.batch))
        if OURS.name in times:
            pairs = zip(mine, times[OURS.name], strict=True)
            ratios = Spread.of([theirs / ours for theirs, ours in pairs])
            add(rival, RATIO, ratios, OURS.name)
        if peaks[rival.name]:
            add(rival, MEMORY, Spread.of(peaks[rival.name]))
    return measured
