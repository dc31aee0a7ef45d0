"""One training step, rival against rival: time and memory."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from bench import measure
from bench.inputs import CHOICES, GRADIENTS, SIMILARITIES, SIZES, Shape, is_gpu, make
from bench.results import MEMORY, Recorder, Row
from bench.rivals import (
    BACKENDS,
    BY_NAME,
    DEFAULT,
    FUSED,
    OPERATORS,
    PHASES,
    PRODUCTS,
    SCALED,
    TRAINING,
    WHOLE,
    base_of,
    ours,
)

ENTITIES = {"dense": 14541, "sparse": 2_500_000}
"""On a GPU: FB15k-237, whose gradient is dense, and a large graph with sparse gradients."""
SCALES: dict[str, tuple[int, ...]] = {
    "N": (10_000, 100_000, 1_000_000, 10_000_000),
    "D": (32, 64, 128, 256, 512, 1024),
    "K": (16, 64, 256, 1024),
    "B": (64, 256, 1024, 4096),
}


def for_memory(name: str, shape: Shape) -> Callable[[], None]:
    """Temporaries, tensors kept for backward, and the gradients."""
    step = BY_NAME[name].prepare(shape, make(shape), WHOLE)

    def run() -> None:
        for _ in range(measure.MEMORY_STEPS):
            step()()

    return run


class Setting(NamedTuple):
    """A step to measure, on which rivals, in which phases."""

    shape: Shape
    rivals: Sequence[str]
    phases: Sequence[str] = PHASES
    family: str = "steps"
    base: str | None = None  # whom the others are compared with, if not with EMU; "" with nobody
    for_memory: measure.Prepare = for_memory

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
        yield Setting(shape, options.rivals, [p for p in PHASES if p in options.phases])


def closed_settings(options: Any) -> Iterator[Setting]:
    """Of the command ``closed``: a set of negatives a row; one for the batch, and all entities."""
    here = [
        name for name, device in BACKENDS.items() if device == torch.device(options.device).type
    ]
    yield Setting(Shape(), SCALED, (WHOLE,), "closed", ours("expected", here[0]))
    a_row = [ours(loss, backend) for backend in here for loss in FUSED]
    names = [*(rival.name for rival in PRODUCTS), *a_row]
    yield Setting(Shape(negatives=1024), names, (WHOLE,), "closed", names[0])


def scale_settings(options: Any) -> Iterator[Setting]:
    """From small to large, with each gradient at each size."""
    for axis in options.axes:
        values = (5, 10) if options.tiny else SCALES[axis]
        sizes: dict[str, Sequence[Any]] = {"batch": [256 if axis in "DK" else Shape.batch]}
        sizes |= {SIZES[axis]: values, "gradient": options.gradient}
        for shape in product(**sizes):
            yield Setting(shape, options.rivals, (WHOLE,), f"scale-{axis}")


def gpu_settings(options: Any) -> Iterator[Setting]:
    """Dot at all sizes, then the other similarities; quick: fewer."""
    quick = options.quick
    dims, counts = ([100, 512], [256]) if quick else ([100, 512, 1000], [64, 256, 1024])
    sizes: dict[str, Sequence[Any]] = {
        "batch": [1024],
        "dtype": ["float32", "bfloat16"],
        "gradient": GRADIENTS,
    }
    others: dict[str, Sequence[Any]] = {
        "dtype": ["float32"],
        "gradient": GRADIENTS[:1] if quick else GRADIENTS,
    }
    others |= {"dim": [512], "similarity": [s for s in SIMILARITIES if s != "dot"]}
    main = product(**sizes | {"dim": dims, "negatives": counts})
    for shape in itertools.chain(main, product(**sizes | others)):
        # Compiling takes longest.
        compiled = shape.similarity == "dot"
        compiled &= not quick or (shape.dim, shape.dtype) == (512, "float32")
        names = [name for name in DEFAULT if compiled or name != "compiled-emu"]
        yield Setting(shape.replace(entities=ENTITIES[shape.gradient]), names)


def kernels_settings(options: Any) -> Iterator[Setting]:
    """The paper's shape on FB15k-237, and long rows of a large table, which lie in no cache."""
    names = [ours("emu", backend) for backend in BACKENDS]
    for shape in (Shape(), Shape(1024, 256, 512, ENTITIES["sparse"], gradient="sparse")):
        yield Setting(shape, names, OPERATORS, "kernels", base="")


def rows(rivals: Sequence[Any], setting: Setting, options: Any) -> Iterator[list[Row]]:
    """Measure, with the options of the command line; the rows of one phase after the other."""
    shape, data = setting.shape.load()
    record = Recorder(
        shape.device, family=setting.family, threads=options.threads, **shape.columns()
    )
    for phase in setting.phases:
        compared = {rival.name: rival for rival in rivals if phase in rival.phases}
        times, peaks = _measured(compared, shape, data, phase, options)
        base = base_of(times) if setting.base is None else setting.base
        for name in times:
            here = {"rival": name, "phase": phase, **compared[name].columns(shape)}
            batch = shape.batch if phase == TRAINING else 0
            record.add_times(times, base, batch=batch, **here)
            if name in peaks:
                record.add(MEMORY, [peaks[name]], **here)
        yield record.taken()
    del data
    gc.collect()
    if is_gpu(shape.device):
        torch.cuda.empty_cache()  # the next shape's tensors have other sizes
    elif options.memory and phase in (WHOLE, TRAINING):
        for name in times:
            peak = measure.peak(setting.for_memory, name, shape, options.threads)
            record.add(MEMORY, [peak], rival=name, phase=phase, **compared[name].columns(shape))
        yield record.taken()


def _measured(
    rivals: Mapping[str, Any], shape: Shape, data: Any, phase: str, options: Any
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds of each rival, and on a GPU the MiB that it needs."""
    peaks: dict[str, float] = {}

    def start(name: str) -> measure.Turn:
        turn, peak = rivals[name].start(shape, data, phase, tiny=options.tiny)
        if peak is not None and options.memory:
            peaks[name] = peak
        return turn

    return measure.alternate(rivals, start, options.rounds), peaks
