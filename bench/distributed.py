"""Steps with the entities on several processes of this machine, by TorchRec.

Each process has its own batch. The data moved is counted, not measured: the rows that a process
fetches from others, which go back as gradients, and their ids.
"""

from __future__ import annotations

import argparse
import importlib
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from bench import results
from bench.results import Row
from emu_kernels import fused_emu_loss

# batch: rows of one process; sets: of negatives, G; steps_per_second: the median step's; moved_mb:
# what the first process sends and receives in a step, on average.
COLUMNS = (
    "date", "commit", "processes", "entities", "dim", "batch", "sets", "negatives", "optimizer",
    "steps", "steps_per_second", "moved_mb", "threads", "device", "emu_kernels", "torch", "python",
)  # fmt: skip
WARM_UP = 3


def work(rank: int, processes: int, sets: int, options: argparse.Namespace, folder: str) -> None:
    """One process; the first one writes (steps a second, bytes moved) to the folder."""
    from emu_kernels.integrations.torchrec import ShardedEntities

    torch.set_num_threads(options.threads)
    dist.init_process_group(
        "gloo", f"file://{folder}/store", rank=rank, world_size=processes,
        timeout=timedelta(minutes=2),
    )  # fmt: skip
    size, batch = options.entities, options.batch
    entities = ShardedEntities(size, options.dim, optimizer=options.optimizer)
    last = entities.first + len(entities.local)
    seconds, moved = [], []
    for step in range(WARM_UP + options.steps):
        draws = torch.Generator().manual_seed(step * processes + rank)
        given, positive = torch.randint(size, (2, batch), generator=draws)
        negative = torch.randint(size, (sets, options.negatives), generator=draws)
        dist.barrier()
        started = time.perf_counter()
        rows = entities.fetch(given, positive, negative)
        given, positive, negative = rows.ids
        loss = fused_emu_loss(
            rows.table[given], rows.table, positive, negative, mutation_rate=0.61, beta=0.53,
            alpha=0.11, seed=step, row_offset=rank * batch,
        )  # fmt: skip
        entities.backward(loss, weight=batch)
        dist.barrier()
        seconds.append(time.perf_counter() - started)
        away = int(((rows.entity < entities.first) | (rows.entity >= last)).sum())
        moved.append(away * (2 * 4 * options.dim + 8))
    if rank == 0:
        torch.save((1 / np.median(seconds[WARM_UP:]), np.mean(moved)), Path(folder) / "measured")
    dist.destroy_process_group()


def run(options: argparse.Namespace) -> int:
    importlib.import_module("emu_kernels.integrations.torchrec")  # or says what to install
    if options.tiny:
        options.entities, options.batch, options.negatives, options.steps = 300, 16, 8, 3
    shared = results.environment() | {
        name: getattr(options, name)
        for name in ("entities", "dim", "batch", "negatives", "optimizer", "steps", "threads")
    }
    rows: list[Row] = []
    for processes in options.processes:
        for sets in options.sets or (options.batch, 8):
            with tempfile.TemporaryDirectory() as folder:
                arguments: Any = (processes, sets, options, folder)
                spawn(work, arguments, nprocs=processes)
                speed, moved = torch.load(Path(folder) / "measured", weights_only=False)
            measured = {"steps_per_second": float(speed), "moved_mb": float(moved) / 1e6}
            rows.append(shared | {"processes": processes, "sets": sets} | measured)
            print(
                f"{processes} processes, {sets} sets of {options.negatives} negatives: "
                f"{speed:.1f} steps a second, {moved / 1e6:.2f} MB moved a step",
                flush=True,
            )
    if not options.tiny:
        print(f"appended {len(rows)} rows to {results.append(options.results, rows, COLUMNS)}")
    return 0
