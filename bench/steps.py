"""One training step, rival against rival: time, memory, and the share of the copy bandwidth.

The share is the time in which a copy would move the bytes that the step must move, over the step's
time. Memory moves in lines: 64 bytes on a CPU, 32-byte sectors on a GPU. A step must move:

forward   the ids; the query; the row of every id, as often as it occurs (every line that the row
          overlaps: rows of 400 bytes straddle lines).
backward  the ids and the query again; the table's gradient once (all N rows where dense, the
          touched rows and their ids where sparse); the query's gradient; and, except for dot, whose
          derivative does not need them, the touched rows again.

Where the table fits a cache, rows are mostly read from there, and the share may exceed 1.
"""

from __future__ import annotations

import functools
import gc
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench import measure
from bench.inputs import GRADIENTS, SIMILARITIES, SIZES, Inputs, Shape, is_gpu, make
from bench.measure import Step
from bench.results import BANDWIDTH, MEMORY, SHARE, Recorder, Row
from bench.rivals import BY_NAME, PHASES, RIVALS, WHOLE, Rival, base_of, instruction_set

COPY = "copy"  # the rival of rows of the copy bandwidth; it takes its turns like the others
GPU_TABLES = ("main", "similarities", "plans")
ENTITIES = {"dense": 14541, "sparse": 2_500_000}
"""On a GPU: FB15k-237, whose gradient is dense, and a large graph with sparse gradients."""
SCALES: dict[str, tuple[int, ...]] = {
    "N": (10_000, 100_000, 1_000_000, 10_000_000),
    "D": (32, 64, 128, 256, 512, 1024),
    "K": (16, 64, 256, 1024),
    "B": (64, 256, 1024, 4096),
}


class Setting(NamedTuple):
    """A step to measure, on which rivals, in which phases."""

    shape: Shape
    rivals: Sequence[str]
    phases: Sequence[str] = PHASES
    family: str = "steps"

    def tiny(self, device: str) -> Setting:
        """With the other sizes tiny where one is an axis."""
        kept = {f: getattr(self.shape, f) for a, f in SIZES.items() if self.family == f"scale-{a}"}
        return self._replace(shape=self.shape.tiny().replace(device=device, **kept))


def product(**values: Sequence[Any]) -> Iterator[Shape]:
    """Every combination of the given fields of a shape."""
    for combination in itertools.product(*values.values()):
        yield Shape(**dict(zip(values, combination, strict=True)))


def scale(
    axis: str, values: Sequence[int], gradients: Sequence[str], rivals: Sequence[str]
) -> list[Setting]:
    """From small to large, with each gradient at each size."""
    sizes: dict[str, Sequence[Any]] = {"batch": [256 if axis in "DK" else Shape.batch]}
    shapes = product(**sizes | {SIZES[axis]: sorted(values), "gradient": gradients})
    return [Setting(shape, rivals, (WHOLE,), f"scale-{axis}") for shape in shapes]


def gpu_settings(table: str, *, quick: bool) -> list[Setting]:
    """Of one of ``GPU_TABLES``; quick: fewer."""
    every = [rival.name for rival in RIVALS if rival.plan is None]
    not_compiled = [name for name in every if name != "compiled-emu"]
    counts, dims = ([256], [512]) if quick else ([64, 256, 1024], [100, 512, 1000])
    dtypes = ["float32", "bfloat16"]
    values: dict[str, Sequence[Any]] = {"batch": [1024]}
    if table == "plans":
        values |= {"dtype": dtypes[:1] if quick else dtypes, "entities": list(ENTITIES.values())}
        rivals = [rival.name for rival in RIVALS if rival.plan is not None]
        shapes = product(**values, dim=dims, negatives=counts)
        return [Setting(shape, rivals, family="plans") for shape in shapes]
    if table == "similarities":
        values |= {"gradient": GRADIENTS[:1] if quick else GRADIENTS, "dim": [512]}
        values["similarity"] = [s for s in SIMILARITIES if s != "dot"]  # dot is in the main table
    else:
        values |= {"dtype": dtypes, "gradient": GRADIENTS, "dim": [100, 512] if quick else dims}
        values["negatives"] = counts
    settings = []
    for shape in product(**values):
        compiled = not quick or (shape.dim, shape.dtype) == (512, "float32")
        rivals = every if compiled and table == "main" else not_compiled
        settings.append(Setting(shape.replace(entities=ENTITIES[shape.gradient]), rivals))
    return settings


def runnable(names: Sequence[str], shape: Shape) -> tuple[list[Rival], dict[str, str]]:
    """The rivals that can run such a step here, and why the others for this device cannot."""
    kind = torch.device(shape.device).type
    asked = [r for r in RIVALS if r.name in names and r.device in (None, kind)]
    reasons = {r.name: reason for r in asked if (reason := r.unavailable(shape)) is not None}
    return [r for r in asked if r.name not in reasons], reasons


def row_bytes(ids: Tensor, row: int, line: int) -> int:
    """Of the lines that the given rows of ``row`` bytes overlap, counted for each row."""
    first = ids * row
    return int(((first + row - 1) // line - first // line + 1).sum()) * line


def step_bytes(inputs: Inputs) -> dict[str, int]:
    """What a step must move, by phase."""
    shape = inputs.shape
    line = 32 if is_gpu(shape.device) else 64
    row = shape.table_bytes // shape.entities

    def whole_lines(size: int) -> int:
        return -(-size // line) * line

    every = torch.cat([inputs.positive, inputs.negative.flatten()])
    touched = every.unique()
    ids, query = whole_lines(every.nbytes), whole_lines(shape.batch * row)
    forward = ids + query + row_bytes(every, row, line)
    backward = ids + 2 * query
    if shape.sparse:
        backward += whole_lines(len(touched) * row) + whole_lines(touched.nbytes)
    else:
        backward += whole_lines(shape.table_bytes)
    if shape.similarity != "dot":
        backward += row_bytes(touched, row, line)
    return {"forward": forward, "backward": backward, WHOLE: forward + backward}


def _copy(size: int, device: str) -> tuple[Step, int]:
    """A copy of more than any cache holds, and the bytes that it moves, read and written."""
    source, target = torch.ones(size, device=device), torch.empty(size, device=device)
    return Step(lambda _: target.copy_(source)), 2 * source.nbytes


def for_memory(name: str, shape: Shape) -> Callable[[], None]:
    """Temporaries, tensors kept for backward, and the gradients."""
    BY_NAME[name].prepare(make(shape.tiny()), WHOLE)()
    step = BY_NAME[name].prepare(make(shape), WHOLE)

    def run() -> None:
        for _ in range(measure.MEMORY_STEPS):
            step()

    return run


def rows(rivals: Sequence[Rival], setting: Setting, options: Any) -> list[Row]:
    """Measure, with the options of the command line."""
    shape, device = setting.shape, setting.shape.device
    record = Recorder(device, family=setting.family, threads=options.threads, **shape.columns())
    columns = {rival.name: rival.columns(device) for rival in rivals}
    inputs = make(shape)
    must_move = step_bytes(inputs)
    copy, copied = _copy(2**18 if options.tiny else 2**28 if is_gpu(device) else 2**26, device)
    steps: dict[str, Step] = {}
    for phase in setting.phases:
        steps = {r.name: r.prepare(inputs, phase) for r in rivals if phase in r.phases}
        if not steps:
            continue
        base = base_of(steps)
        steps[COPY] = copy
        shortest = 0.0 if options.tiny else None
        turns = {n: measure.turn_of(s, device, shortest) for n, s in steps.items()}
        times = measure.alternate(turns, options.rounds)
        for name, step in list(steps.items())[:-1]:
            here = {"phase": phase, **columns[name]}
            record.add_times(name, times, base, **here)
            pairs = zip(times[name], times[COPY], strict=True)
            share = must_move[phase] / copied
            record.add(SHARE, [share * copying / t for t, copying in pairs], rival=name, **here)
            if options.memory_runs and is_gpu(device):
                peak = measure.cuda_peak(functools.partial(step.run, step.before()))[1]
                record.add(MEMORY, [peak], rival=name, **here)
        here = {"phase": phase, "instruction_set": instruction_set(device)}
        record.add(BANDWIDTH, [copied / t / 1e9 for t in times[COPY]], rival=COPY, **here)
        del step, turns
    del inputs, copy
    steps.clear()  # they hold the inputs
    gc.collect()
    if is_gpu(device):
        torch.cuda.empty_cache()  # the next shape's tensors have other sizes
    elif WHOLE in setting.phases:
        for name, values in measure.peaks(options, for_memory, list(columns), shape).items():
            record.add(MEMORY, values, rival=name, phase=WHOLE, **columns[name])
    return record.rows
