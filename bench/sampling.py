"""What structure-aware negatives cost before training: the random walks from every entity."""

from __future__ import annotations

import contextlib
import io
import time

from tqdm import tqdm

from bench import graphs, results
from bench.measure import Spread
from bench.results import TIME, UNITS, Row
from emu_kernels.trainer.neighbourhood import adjacency, random_walks

FAMILY = "sampling"


def rows(graph: str, *, hops: int, walks: int, rounds: int, threads: int) -> list[Row]:
    """Seconds from the training triples to the neighbourhoods, nothing cached.

    K is the number of walks an entity.
    """
    loaded = graphs.load(graph, entities=1000, relations=10, triples=5000)
    environment = results.environment()
    times = []
    for seed in tqdm(range(rounds), desc="walks", unit="round", leave=False):
        start = time.perf_counter()
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bar is for a terminal
            edges = adjacency(loaded.triples["train"], loaded.num_entities)
            random_walks(edges, hops, walks, seed)
        times.append(1000 * (time.perf_counter() - start))
    return [
        Row(
            family=FAMILY, what=TIME, rival="random-walks", phase=f"{hops} hops", base="",
            graph=graph, model="", optimizer="", similarity="", B=0, K=walks, D=0,
            N=loaded.num_entities, dtype="", gradient="", threads=threads, unit=UNITS[TIME],
            instruction_set="", library="", **Spread.of(times)._asdict(), **environment,
        )
    ]  # fmt: skip
