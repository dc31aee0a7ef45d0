"""Study and message passing: experiments work, a stopped run goes on to the same rows."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import study
from bench.__main__ import main
from bench.experiments import EXPERIMENTS, tiny
from emu_kernels.trainer.datasets import FOLDER_VARIABLE
from emu_kernels.trainer.loop import Trainer


@pytest.fixture(autouse=True)
def data(monkeypatch: pytest.MonkeyPatch) -> None:
    beside = Path(__file__).parents[3] / "shared" / "data"
    if not beside.is_dir():
        pytest.skip("no public datasets beside the checkout")
    monkeypatch.setenv(FOLDER_VARIABLE, str(beside))
    monkeypatch.setattr("emu_kernels.trainer.loop.plot_metrics", lambda *_: None)


@pytest.mark.parametrize("name", EXPERIMENTS)
@pytest.mark.slow
def test_every_experiment(name, tmp_path, capsys):
    options = ["--tiny", "--results", str(tmp_path), "--folder", str(tmp_path / "runs")]
    assert main(["study", name, "--seed", "0", *options]) == 0
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(table) == 1 + len(list(EXPERIMENTS[name].lines()))
    rows = study.read(tmp_path)
    runs = len(rows[rows["split"] == "test"])
    assert list(rows["split"]) == ["valid", "valid", "test"] * runs
    assert main(["study", name, "--seed", "0", *options]) == 0  # nothing is left to train
    assert len(study.read(tmp_path)) == len(rows)


def test_a_stopped_run_goes_on(tmp_path, monkeypatch, capsys):
    settings, _ = EXPERIMENTS["losses"].runs()[0]
    straight = study.train(tmp_path / "straight", tiny(settings))
    train = Trainer.train
    monkeypatch.setattr(Trainer, "train", lambda self: train(self, until=2) and False)
    options = ["--tiny", "--loss", "softmax", "--model", "DistMult", "--seed", "0"]
    options += ["--results", str(tmp_path / "rows"), "--folder", str(tmp_path / "runs")]
    assert main(["study", "losses", *options]) == 130
    assert list((tmp_path / "runs").iterdir())
    monkeypatch.setattr(Trainer, "train", train)
    assert main(["study", "losses", *options]) == 0
    assert not list((tmp_path / "runs").iterdir())
    rows = study.read(tmp_path / "rows")[:3]
    assert straight is not None
    assert list(rows["mrr"]) == pytest.approx([row["mrr"] for row in straight], rel=1e-5)
    assert list(rows["step"]) == [row["step"] for row in straight]


def test_messages(capsys):
    options = ["--tiny", "--graph", "nations", "--batch", "2", "--rounds", "1", "--no-memory"]
    assert main(["messages", *options]) == 0
    out = capsys.readouterr().out
    assert out.count("gather, multiply, scatter: time ratio") == 2


def test_an_unknown_experiment(capsys):
    assert main(["study", "loses"]) == 1
    assert "no experiment loses; known: schedules, losses" in capsys.readouterr().err
