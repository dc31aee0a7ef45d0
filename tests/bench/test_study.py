"""Study: experiments work, a stopped run goes on to the same rows; where negatives lie."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bench import geometry, mask_rules, results, study
from bench.__main__ import main
from bench.experiments import EXPERIMENTS, tiny
from emu_kernels.trainer import datasets
from emu_kernels.trainer.config import Config
from emu_kernels.trainer.datasets import FOLDER_VARIABLE
from emu_kernels.trainer.loop import Trainer, settle
from emu_kernels.trainer.run import RunFolder


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


def test_an_unknown_experiment(capsys):
    assert main(["study", "loses"]) == 1
    assert "no experiment loses; known: schedules, losses" in capsys.readouterr().err


def test_geometry(tmp_path, capsys):
    settings = tiny(EXPERIMENTS["losses"].runs()[0][0])
    graph = datasets.load_dataset(settings["dataset"])
    config = settle(Config(**settings))
    run = RunFolder.create(tmp_path / "run", config, graph)
    Trainer(config, graph, run).train()
    assert main(["geometry", str(tmp_path / "run"), "--results", str(tmp_path / "rows")]) == 0
    rows = results.read(tmp_path / "rows", geometry.COLUMNS, geometry.NUMBERS)
    rows = rows.set_index("negatives")
    assert list(rows.index) == ["uniform", "structure-aware", "mutants"]
    assert rows[list(geometry.EDGES)].sum(axis=1).to_list() == pytest.approx([1, 1, 1], abs=1e-4)
    assert rows.loc["mutants", "cosine"] > rows.loc["uniform", "cosine"] + 0.1
    points = results.read(
        tmp_path / "rows" / "points", geometry.POINT_COLUMNS, geometry.POINT_NUMBERS
    )
    assert points.groupby("negatives").size().to_dict() == dict.fromkeys(rows.index, 64)
    distance = points[["x", "y"]].pow(2).sum(axis=1).groupby(points["negatives"]).mean()
    assert distance["mutants"] < distance["uniform"]


def test_spectrum():
    line = torch.tensor([1.0, 2.0, -2.0])[:, None] * torch.tensor([3.0, 0.0, 4.0])
    assert geometry.spectrum(line[None]) == pytest.approx((1, 1 / 3))
    cross = torch.cat([torch.eye(3), -torch.eye(3)])[None]
    assert geometry.spectrum(cross) == pytest.approx((2 / 3, 1))


@mask_rules.entered()
def test_the_means_alone_are_emu_without_variance():
    """A mask that keeps every component, or none, leaves no variance."""

    def loss(name: str, **settings: Any) -> float:
        config = settle(Config(dataset="nations", dim=6, negatives=5, loss=name, **settings))
        trainer = Trainer(config, datasets.load_dataset("nations"))
        trainer._train_step()
        return trainer._mean_loss()

    assert loss("mean-alone", mutation_rate=0) == pytest.approx(loss("uls"), rel=1e-6)
    assert loss("mean-alone", mutation_rate=1) == pytest.approx(
        loss("expected", mutation_rate=1), rel=1e-6
    )
    between = loss("mean-alone", mutation_rate=0.5)
    assert between < loss("expected", mutation_rate=0.5)
