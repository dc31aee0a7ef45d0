"""Train DistMult on FB15k-237 with the vanilla sampled softmax and with EMU, and compare.

Both use the same kernels, model, batches, negatives and optimizer. The table shows test metrics of
the checkpoint with the best validation MRR. The baseline trains at least as long as EMU, both in
steps and in seconds.

Run it with `make demo` or `python examples/demo.py`; `--uls` adds EMU's loss without mutation.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from pathlib import Path
from typing import Any

from emu_kernels.trainer.config import Config
from emu_kernels.trainer.data import Graph
from emu_kernels.trainer.datasets import FOLDER_VARIABLE, load_dataset
from emu_kernels.trainer.errors import TrainerError
from emu_kernels.trainer.evaluation import Metrics
from emu_kernels.trainer.loop import Trainer, settle
from emu_kernels.trainer.presets import PRESETS
from emu_kernels.trainer.report import metrics_table
from emu_kernels.trainer.run import RunFolder

SETTINGS = Config(**PRESETS["distmult-fb15k-237"] | {"steps": 5000, "eval_every": 1000})

LOCAL_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"  # beside a checkout


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--uls", action="store_true", help="also unbounded label smoothing alone (mutation rate 0)"
    )
    with_uls = parser.parse_args().uls
    if LOCAL_DATA.is_dir():
        os.environ.setdefault(FOLDER_VARIABLE, str(LOCAL_DATA))
    folder = Path("runs") / time.strftime("demo-%Y%m%d-%H%M%S")
    try:
        graph = load_dataset("FB15k-237")
        print(graph.summary(), flush=True)
        emu = train(graph, folder / "emu", loss="emu")
        rows = {
            "vanilla softmax": train(graph, folder / "vanilla", loss="softmax", seconds=emu.seconds)
        }
        if with_uls:
            rows["ULS alone"] = train(
                graph, folder / "uls", loss="emu", mutation_rate=0.0, seconds=emu.seconds
            )
        rows["EMU"] = emu
    except TrainerError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    print("\nFB15k-237 test, filtered, both directions; DistMult, d = 100:")
    print(
        metrics_table(
            {name: test_metrics(trainer) for name, trainer in rows.items()},
            steps=[f"{trainer.step:,}" for trainer in rows.values()],
            best=[f"{trainer.best_step:,}" for trainer in rows.values()],
            training=[f"{trainer.seconds:.0f} s" for trainer in rows.values()],
        )
    )
    print(f"runs: {folder}; predict with: emu-predict {folder / 'emu'} --head NAME --relation NAME")
    return 0


def train(graph: Graph, folder: Path, *, seconds: float = 0.0, **settings: Any) -> Trainer:
    """Train for the settings' number of steps, then until `seconds` have been spent on training."""
    config = settle(dataclasses.replace(SETTINGS, regularization=None, **settings))
    print(f"\n{folder.name}: backend {config.backend} on {config.device}", flush=True)
    trainer = Trainer(config, graph, RunFolder.create(folder, config, graph))
    finished = trainer.train()
    while finished and trainer.seconds < seconds:
        finished = trainer.train(until=trainer.step + config.eval_every)
    if not finished:
        raise SystemExit(f"stopped; go on with: emu-train --resume {folder}")
    return trainer


def test_metrics(trainer: Trainer) -> Metrics:
    ranks = trainer.finish()
    assert ranks is not None
    return Metrics.of(ranks)


if __name__ == "__main__":
    sys.exit(main())
