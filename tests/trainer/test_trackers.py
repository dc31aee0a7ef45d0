"""Trackers hold the same as the run folder's metrics, also after a run is resumed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from emu_kernels.trainer import trackers
from emu_kernels.trainer.config import Config
from emu_kernels.trainer.errors import ConfigError
from emu_kernels.trainer.loop import settle
from emu_kernels.trainer.run import RunFolder
from emu_kernels.trainer.trackers import TRACKERS, Log, Tracker
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
    monkeypatch.setenv("WANDB_PROJECT", "graphs")
    logged, projects = [], []
    keep = wandb.Run.log

    def log(run: wandb.Run, data: dict[str, Any]) -> None:
        logged.append(data)
        projects.append(run.project)
        keep(run, data)

    monkeypatch.setattr(wandb.Run, "log", log)
    run = RunFolder(tmp_path / "run")
    assert train("--data", graph_folder, "--run-dir", run.path, "--tracker", "wandb", *QUICK) == 0
    assert train("--resume", run.path, "--steps", 60) == 0
    assert [line["step"] for line in logged] == [m["step"] for m in run.read_metrics()]
    assert logged[-1]["test/mrr"] == run.read_metrics()[-1]["mrr"]
    folders = list((run.path / "wandb").glob("offline-run-*"))
    assert len(folders) == 2
    assert set(projects) == {"graphs"}
    identity = (run.path / "wandb-id").read_text()
    assert all(folder.name.endswith(identity) for folder in folders)  # one run of its service


def test_a_tracker_that_is_added_gets_what_was_logged(graph_folder, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = RunFolder(tmp_path / "run")
    assert train("--data", graph_folder, "--run-dir", run.path, *QUICK) == 0
    assert train("--resume", run.path, "--tracker", "tensorboard") == 0
    read = EventAccumulator(str(run.path / "tensorboard")).Reload()
    losses = [m["step"] for m in run.read_metrics() if "loss" in m]
    assert [s.step for s in read.Scalars("train/loss")] == losses
    before = sorted((run.path / "tensorboard").iterdir())
    assert train("--resume", run.path, "--steps", 60, "--tracker", "none") == 0
    assert sorted((run.path / "tensorboard").iterdir()) == before


@pytest.mark.parametrize("moment", ["open", "log", "close"])
def test_a_tracker_that_fails(graph_folder, tmp_path, monkeypatch, capsys, moment):
    """A run ends before it has begun, or goes on."""
    logged = []

    @contextmanager
    def failing(*_: Any) -> Iterator[Log]:
        def log(line: dict[str, Any]) -> None:
            logged.append(line["step"])
            if moment == "log" and len(logged) == 2:
                raise ConnectionError("no\nnetwork")

        if moment == "open":
            raise ConnectionError("no\nnetwork")
        yield log
        if moment == "close":
            raise ConnectionError("no\nnetwork")

    monkeypatch.setitem(TRACKERS, "failing", Tracker("", (), "", failing))
    run = RunFolder(tmp_path / "run")
    status = train("--data", graph_folder, "--run-dir", run.path, "--tracker", "failing", *QUICK)
    error = capsys.readouterr().err
    if moment == "open":
        assert status == 1
        assert "failing failed: no network; mend it and go on with: emu-train --resume" in error
        assert train("--resume", run.path, "--tracker", "none") == 0
    else:
        assert status == 0
        assert error.count("tracker: failing failed: no network") == 1
        assert logged == [m["step"] for m in run.read_metrics()][: 2 if moment == "log" else None]
    assert (run.path / "report.html").is_file()


def test_what_is_not_installed(monkeypatch):
    monkeypatch.setitem(TRACKERS, "other", Tracker("", (), "no_such_tracker", trackers._wandb))
    with pytest.raises(ConfigError, match=r"no_such_tracker is not installed: pip install"):
        settle(Config(data="-", tracker="other"))


def test_unknown_tracker():
    with pytest.raises(ConfigError, match=r"unknown tracker 'x'; known: none, tensorboard, wandb"):
        Config(data="-", tracker="x")
