"""What the commands measure, rival against rival: time and memory."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from bench import measure, results, rivals
from bench.inputs import CHOICES, SIZES, Shape, is_gpu
from bench.results import MEMORY, Row
from bench.rivals import BACKENDS, PHASES, PRODUCTS, TRAINING, WHOLE, ours
from bench.trainers import CAPTURED, TRAINERS, WHOLE_STEPS, ZIPF, Task

SCALES: dict[str, tuple[int, ...]] = {
    "N": (10_000, 100_000, 1_000_000, 10_000_000),
    "D": (32, 64, 128, 256, 512, 1024),
    "K": (16, 64, 256, 1024),
    "B": (64, 256, 1024, 4096),
}
_EMU = tuple(ours("emu", backend) for backend in BACKENDS)


class Setting(NamedTuple):
    """A step to measure, on which rivals, in which phases."""

    shape: Shape
    rivals: Sequence[Any]
    phases: Sequence[str] = PHASES
    family: str = "steps"
    bases: Sequence[str] = _EMU  # the first of these that is measured is what others compare with


def named(names: Sequence[str], among: Sequence[Any] = rivals.RIVALS) -> list[Any]:
    return [rival for rival in among if rival.name in names]


def of_steps(options: Any) -> Iterator[Setting]:
    phases = [phase for phase in PHASES if phase in options.phases]
    fields = (getattr(options, name) for name in (*SIZES.values(), *CHOICES))  # in Shape's order
    for values in itertools.product(*fields):
        yield Setting(Shape(*values), named(options.rivals), phases)


def of_closed(options: Any) -> Iterator[Setting]:
    """A set of negatives for each row; one set for the batch, and all entities."""
    bases = [ours("expected", backend) for backend in BACKENDS]
    yield Setting(Shape(), named(rivals.SCALED), (WHOLE,), "closed", bases)
    compared = (*rivals.OURS, *PRODUCTS)
    yield Setting(Shape(negatives=1024), compared, (WHOLE,), "closed", [PRODUCTS[0].name])


def of_scale(options: Any) -> Iterator[Setting]:
    """From small to large, with each gradient at each size."""
    for axis in options.axes:
        values = (3, 5) if options.tiny else SCALES[axis]
        base = Shape(256 if axis in "DK" else Shape.batch)
        for size, gradient in itertools.product(values, options.gradient):
            shape = base.replace(**{SIZES[axis]: size, "gradient": gradient})
            yield Setting(shape, named(options.rivals), (WHOLE,), f"scale-{axis}")


def of_kernels(options: Any) -> Iterator[Setting]:
    """The paper's shape on FB15k-237, and long rows of a large table, which fits in no cache."""
    for shape in (Shape(), Shape(1024, 256, 512, 2_500_000, gradient="sparse")):
        yield Setting(shape, named(_EMU), rivals.OPERATORS, "kernels", bases=())


def of_captured(options: Any) -> Iterator[Setting]:
    names = [name + suffix for name in options.rivals for suffix in ("", CAPTURED)]
    bases = [name + suffix for suffix in (CAPTURED, "") for name in _EMU]
    yield Setting(Shape(), named(names, WHOLE_STEPS), (TRAINING,), "captured", bases)


def of_train(options: Any) -> Iterator[Setting]:
    sizes = {field: getattr(options, field) for field in SIZES.values()}
    for graph, model in itertools.product(options.graph, options.model):
        gradient = options.gradient or ("sparse" if graph == ZIPF else "dense")
        task = Task(graph=graph, model=model, gradient=gradient, **sizes)
        among = named(options.rivals, TRAINERS)
        yield Setting(task, among, (TRAINING,), "train", [TRAINERS[0].name])


def steps_of(rival: Any, phase: str, shape: Shape) -> Callable[[], float]:
    """The step whose memory is measured: trainers' parameters, gradients, temporaries; no data."""
    shape, data = shape.load()
    return lambda: rival.start(shape, data, phase, True)()


def rows(setting: Setting, options: Any) -> Iterator[list[Row]]:
    """Measure with the options of the command line; yields the rows phase by phase."""
    shape, data = setting.shape.load()
    shared = dict.fromkeys(results.COLUMNS, "") | results.environment(shape.device)
    shared |= shape.columns() | {"family": setting.family, "threads": options.threads}
    for phase in setting.phases:
        compared = {rival.name: rival for rival in setting.rivals if phase in rival.phases}
        starts = {
            name: partial(rival.start, shape, data, phase, options.tiny)
            for name, rival in compared.items()
        }
        times = measure.alternate(starts, options.rounds)
        base = next((name for name in setting.bases if name in times), None)
        batch = shape.batch if phase == TRAINING else 0
        own = {name: shared | {"phase": phase} | compared[name].columns(shape) for name in times}
        yield [
            own[name] | row for name in times for row in results.of_times(times, base, name, batch)
        ]
    del data, starts
    gc.collect()
    if is_gpu(shape.device):
        torch.cuda.empty_cache()  # the next tensors have other sizes
    if options.memory and phase in (WHOLE, TRAINING):
        for name in times:
            peak = measure.peak(partial(steps_of, compared[name], phase), shape, options.threads)
            yield [own[name] | results.of_values(MEMORY, [peak], rival=name)]
