"""Trackers hold the same as the run folder's metrics, also after a run is resumed."""

from __future__ import annotations

import json
from typing import Any

import pytest

from emu_kernels.trainer import trackers
from emu_kernels.trainer.config import Config
from emu_kernels.trainer.errors import ConfigError
from emu_kernels.trainer.loop import settle
from emu_kernels.trainer.run import RunFolder
from emu_kernels.trainer.trackers import TRACKERS, Tracker
from tests.trainer.support import QUICK, train


def test_tensorboard(graph_folder, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = RunFolder(tmp_path / "run")
    assert (
        train("--data", graph_folder, "--run-dir", run.path, "--tracker", "tensorboard", *QUICK)
        == 0
    )
    assert train("--resume", run.path, "--steps", 60) == 0
    read = EventAccumulator(str(run.path / "tensorboard")).Reload()
    assert json.loads(run.config_file.read_text())["config"]["tracker"] == "tensorboard"
    for name, split in (("loss", None), ("mrr", "valid"), ("hits_at_10", "test")):
        lines = [m for m in run.read_metrics() if m.get("split") == split and name in m]
        scalars = read.Scalars(f"{split or 'train'}/{name}")
        assert [(s.step, s.value) for s in scalars] == [
            (line["step"], pytest.approx(line[name])) for line in lines
        ]
    assert len(lines) == 2  # a test after 40 steps, and after 60


@pytest.mark.slow  # starts a program of its own
def test_wandb(graph_folder, tmp_path, monkeypatch):
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    logged = []
    keep = wandb.Run.log

    def log(run: wandb.Run, data: dict[str, Any]) -> None:
        logged.append(data)
        keep(run, data)

    monkeypatch.setattr(wandb.Run, "log", log)
    run = RunFolder(tmp_path / "run")
    assert train("--data", graph_folder, "--run-dir", run.path, "--tracker", "wandb", *QUICK) == 0
    assert train("--resume", run.path, "--steps", 60) == 0
    assert [line["step"] for line in logged] == [m["step"] for m in run.read_metrics()]
    assert logged[-1]["test/mrr"] == run.read_metrics()[-1]["mrr"]
    folders = list((run.path / "wandb").glob("offline-run-*"))
    assert len(folders) == 2
    identity = (run.path / "wandb-id").read_text()
    assert all(folder.name.endswith(identity) for folder in folders)  # one run of its service


def test_what_is_not_installed(monkeypatch):
    monkeypatch.setitem(TRACKERS, "other", Tracker("", (), "no_such_tracker", trackers._wandb))
    with pytest.raises(ConfigError, match=r"no_such_tracker is not installed: pip install"):
        settle(Config(data="-", tracker="other"))


def test_unknown_tracker():
    with pytest.raises(ConfigError, match=r"unknown tracker 'x'; known: tensorboard, wandb"):
        Config(data="-", tracker="x")
