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
from bench.inputs import CHOICES, GRADIENTS, SIMILARITIES, SIZES, Inputs, Shape, is_gpu, make
from bench.measure import Step
from bench.results import BANDWIDTH, MEMORY, SHARE, Recorder, Row
from bench.rivals import (
    BY_NAME,
    DEFAULT,
    FUSED,
    PHASES,
    PRODUCTS,
    RIVALS,
    SCALED,
    WHOLE,
    Rival,
    base_of,
    instruction_set,
    ours,
)

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
    base: str | None = None  # whom the others are compared with, if not with EMU

    def tiny(self) -> Setting:
        """With the other sizes tiny where one is an axis."""
        kept = {f: getattr(self.shape, f) for a, f in SIZES.items() if self.family == f"scale-{a}"}
        return self._replace(shape=self.shape.tiny().replace(**kept))


def product(**values: Sequence[Any]) -> Iterator[Shape]:
    """Every combination of the given fields of a shape."""
    for combination in itertools.product(*values.values()):
        yield Shape(**dict(zip(values, combination, strict=True)))


def settings(options: Any) -> Iterator[Setting]:
    """Of the command ``steps``."""
    fields = (*SIZES.values(), *CHOICES)
    for shape in product(**{field: getattr(options, field) for field in fields}):
        yield Setting(shape, options.rivals, options.phases)


def closed_settings(options: Any) -> Iterator[Setting]:
    """Of the command ``closed``: a set of negatives a row; one for the batch, and all entities."""
    yield Setting(Shape(), SCALED, (WHOLE,), "closed", ours("expected", "cpu"))
    a_row = [ours(loss, "cpu") for loss in FUSED]
    names = [*(rival.name for rival in PRODUCTS), *a_row]
    yield Setting(Shape(negatives=1024), names, (WHOLE,), "closed", names[0])


def scale_settings(options: Any) -> Iterator[Setting]:
    """From small to large, with each gradient at each size."""
    if options.values and len(options.axes) > 1:
        raise ValueError("--values: give a single axis")
    for axis in options.axes:
        values = (5, 10) if options.tiny else options.values or SCALES[axis]
        sizes: dict[str, Sequence[Any]] = {"batch": [256 if axis in "DK" else Shape.batch]}
        sizes |= {SIZES[axis]: sorted(values), "gradient": options.gradient}
        for shape in product(**sizes):
            yield Setting(shape, options.rivals, (WHOLE,), f"scale-{axis}")


def gpu_settings(options: Any) -> Iterator[Setting]:
    """Of some of ``GPU_TABLES``; quick: fewer."""
    quick, plans = options.quick, [rival.name for rival in RIVALS if rival.plan is not None]
    dims, counts = ([512], [256]) if quick else ([100, 512, 1000], [64, 256, 1024])
    for table in options.tables:
        values: dict[str, Sequence[Any]] = {"batch": [1024], "dtype": ["float32", "bfloat16"]}
        if table == "plans":
            values |= {"dim": dims, "negatives": counts, "entities": list(ENTITIES.values())}
            values |= {"dtype": ["float32"]} if quick else {}
            yield from (Setting(shape, plans, family="plans") for shape in product(**values))
            continue
        if table == "main":
            values |= {"gradient": GRADIENTS, "dim": [100, 512] if quick else dims}
            values |= {"negatives": counts}
        else:  # dot is in the main table
            values |= {"dtype": ["float32"], "gradient": GRADIENTS[:1] if quick else GRADIENTS}
            values |= {"dim": [512], "similarity": [s for s in SIMILARITIES if s != "dot"]}
        for shape in product(**values):
            # Compiling takes longest.
            compiled = table == "main"
            compiled &= not quick or (shape.dim, shape.dtype) == (512, "float32")
            names = [name for name in DEFAULT if compiled or name != "compiled-emu"]
            yield Setting(shape.replace(entities=ENTITIES[shape.gradient]), names)


def row_bytes(ids: Tensor, row: int, line: int) -> int:
    """Of the lines that the given rows of ``row`` bytes overlap, counted for each row."""
    first = ids * row
    return int(((first + row - 1) // line - first // line + 1).sum()) * line


def step_bytes(shape: Shape, inputs: Inputs) -> dict[str, int]:
    """What a step must move, by phase."""
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


def for_memory(name: str, shape: Shape) -> Callable[[], None]:
    """Temporaries, tensors kept for backward, and the gradients."""
    step = BY_NAME[name].prepare(shape, make(shape), WHOLE)

    def run() -> None:
        for _ in range(measure.MEMORY_STEPS):
            step()

    return run


def rows(rivals: Sequence[Rival], setting: Setting, options: Any) -> list[Row]:
    """Measure, with the options of the command line."""
    shape = setting.shape
    record = Recorder(
        shape.device, family=setting.family, threads=options.threads, **shape.columns()
    )
    columns = {rival.name: rival.columns(shape) for rival in rivals}
    _add_times(record, rivals, setting, options)
    gc.collect()
    if is_gpu(shape.device):
        torch.cuda.empty_cache()  # the next shape's tensors have other sizes
    elif WHOLE in setting.phases:
        for name, values in measure.peaks(options, for_memory, columns, shape).items():
            record.add(MEMORY, values, rival=name, phase=WHOLE, **columns[name])
    return record.rows


def _add_times(record: Recorder, rivals: Sequence[Rival], setting: Setting, options: Any) -> None:
    """What it allocates is free when it returns."""
    shape, device = setting.shape, setting.shape.device
    inputs = make(shape)
    must_move = step_bytes(shape, inputs)
    # A copy of more than any cache holds; its bytes are read and written.
    source = torch.ones(
        2**18 if options.tiny else 2**28 if is_gpu(device) else 2**26, device=device
    )
    target, copied = torch.empty_like(source), 2 * source.nbytes
    copy = Step(lambda _: target.copy_(source))
    for phase in setting.phases:
        compared = [rival for rival in rivals if phase in rival.phases]
        if not compared:
            continue
        steps = {rival.name: rival.prepare(shape, inputs, phase) for rival in compared}
        shortest = 0.0 if options.tiny else None
        turns = {n: measure.turn_of(s, device, shortest) for n, s in (steps | {COPY: copy}).items()}
        times = measure.alternate(turns, options.rounds)
        for rival in compared:
            here = {"rival": rival.name, "phase": phase, **rival.columns(shape)}
            record.add_times(times, setting.base or base_of(steps), **here)
            pairs = zip(times[rival.name], times[COPY], strict=True)
            share = must_move[phase] / copied
            record.add(SHARE, [share * copying / t for t, copying in pairs], **here)
            if options.memory_runs and is_gpu(device):
                step = steps[rival.name]
                peak = measure.cuda_peak(functools.partial(step.run, step.before()))[1]
                record.add(MEMORY, [peak], **here)
        here = {"rival": COPY, "phase": phase, "instruction_set": instruction_set(device)}
        record.add(BANDWIDTH, [copied / t / 1e9 for t in times[COPY]], **here)
