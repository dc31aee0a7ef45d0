"""One training step, rival against rival: time, memory, and the share of the copy bandwidth."""

from __future__ import annotations

import dataclasses
import gc
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from tqdm import tqdm

from bench import measure, memory, results, roofline
from bench.inputs import Shape, make
from bench.measure import Spread, Step
from bench.results import BANDWIDTH, MEMORY, MIB, RATIO, SHARE, TIME, UNITS, Row
from bench.rivals import RIVALS, WHOLE, Rival, base_of, eager_instruction_set

COPY = "copy"
"""Takes its turn like a rival."""


def product(**values: Sequence[Any]) -> Iterator[Shape]:
    """Every combination of the given fields of a shape."""
    for combination in itertools.product(*values.values()):
        yield Shape(**dict(zip(values, combination, strict=True)))


def runnable(names: Sequence[str], shape: Shape) -> tuple[list[Rival], dict[str, str]]:
    """Those of the rivals that can run such a step here, and why the others cannot.

    Who is for another kind of device is not spoken of.
    """
    chosen, reasons = [], {}
    for rival in RIVALS:
        if rival.name not in names:
            continue
        if rival.device not in (None, torch.device(shape.device).type):
            continue
        reason = rival.unavailable(shape) or _too_large(rival, shape)
        if reason is None:
            chosen.append(rival)
        else:
            reasons[rival.name] = reason
    return chosen, reasons


def _too_large(rival: Rival, shape: Shape) -> str | None:
    free = memory.free_bytes(shape.device)
    tables = 1 + (rival.dense_gradients if shape.gradient == "dense" else 0)
    tiles = rival.tiles * shape.batch * shape.negatives * shape.dim * 4
    needed = int(tables * shape.table_bytes + tiles)
    if free is None or needed < free:
        return None
    return f"needs about {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"


def rows(
    rivals: Sequence[Rival],
    shape: Shape,
    *,
    phases: Sequence[str] = (WHOLE,),
    rounds: int,
    threads: int,
    memory_runs: int,
    family: str = "steps",
    copy_bytes: int | None = None,
    min_seconds: float | None = None,
) -> list[Row]:
    """Measure; the shape's device must have room (:func:`runnable`).

    Args:
        memory_runs: fresh processes a rival on a CPU, where they measure whole steps only; 0 for
            no memory. On a GPU every phase is measured once.
        copy_bytes: of the copy that the bandwidth is measured with.
        min_seconds: of a turn.
    """
    inputs = make(shape)
    must_move = roofline.step_bytes(inputs)
    copy, copied = roofline.copy_step(shape.device, copy_bytes)
    on_gpu = torch.device(shape.device).type == "cuda"
    common = results.environment(shape.device) | {
        "family": family, "graph": "", "model": "", "optimizer": "",
        "similarity": shape.similarity, "dtype": shape.dtype, "gradient": shape.gradient,
        "B": shape.batch, "K": shape.negatives, "D": shape.dim, "N": shape.entities,
        "threads": threads,
    }  # fmt: skip
    measured: list[Row] = []

    def add(
        rival: Rival | None, phase: str, what: str, values: Sequence[float], base: str = ""
    ) -> None:
        measured.append(
            Row(
                what=what,
                rival=COPY if rival is None else rival.name,
                phase=phase,
                base=base,
                unit=UNITS[what],
                library="" if rival is None else rival.library(),
                instruction_set=(eager_instruction_set if rival is None else rival.instruction_set)(
                    shape.device
                ),
                **Spread.of(values)._asdict(),
                **common,
            )
        )

    steps: dict[str, Step] = {}
    for phase in phases:
        taking_part = [rival for rival in rivals if phase in rival.phases]
        if not taking_part:
            continue
        steps = {rival.name: rival.prepare(inputs, phase) for rival in taking_part}
        times = measure.alternate(
            {**steps, COPY: copy}, rounds, shape.device, min_seconds=min_seconds
        )
        base = base_of(list(steps))
        for rival in taking_part:
            mine = times[rival.name]
            add(rival, phase, TIME, [1000 * t for t in mine])
            if base is not None:
                pairs = zip(mine, times[base], strict=True)
                add(rival, phase, RATIO, [theirs / ours for theirs, ours in pairs], base)
            share = must_move[phase] / copied
            copies = zip(mine, times[COPY], strict=True)
            add(rival, phase, SHARE, [share * copying / t for t, copying in copies])
            if memory_runs and on_gpu:
                add(rival, phase, MEMORY, [memory.cuda_peak(steps[rival.name]) / MIB])
        add(None, phase, BANDWIDTH, [copied / t / 1e9 for t in times[COPY]])
    del inputs, copy
    steps = {}  # they hold the inputs
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()  # the next shape's tensors are of other sizes
    if memory_runs and not on_gpu and WHOLE in phases:
        peaks: dict[str, list[float]] = {rival.name: [] for rival in rivals}
        jobs = [rival.name for rival in rivals] * memory_runs
        for name in tqdm(jobs, desc="memory", unit="process", leave=False):
            order = (name, dataclasses.asdict(shape))
            peaks[name].append(memory.peak(threads, "step", *order) / MIB)
        for rival in rivals:
            add(rival, WHOLE, MEMORY, peaks[rival.name])
    return measured
