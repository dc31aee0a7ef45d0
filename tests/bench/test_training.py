"""``python -m bench.training`` on a small graph: rows, the table, and going on where it stopped."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from bench import results, training
from emu_kernels.trainer.data import SPLITS, Graph
from emu_kernels.trainer.presets import PRESETS


@pytest.fixture
def small(monkeypatch):
    """Random triples in the dataset's place, and a model that fits them."""
    generator = torch.Generator().manual_seed(0)

    def triples(count: int) -> torch.Tensor:
        columns = [torch.randint(n, (count,), generator=generator) for n in (20, 3, 20)]
        return torch.stack(columns, dim=1)

    graph = Graph(
        [f"e{i}" for i in range(20)],
        [f"r{i}" for i in range(3)],
        {split: triples(count) for split, count in zip(SPLITS, (100, 20, 20), strict=True)},
    )
    monkeypatch.setattr(training, "load_dataset", lambda name: graph)
    for preset in PRESETS.values():
        monkeypatch.setitem(preset, "dim", 4)
        monkeypatch.setitem(preset, "batch_size", 8)
        monkeypatch.setitem(preset, "negatives", 4)


def test_rows_table_and_resuming(small, tmp_path, capsys, monkeypatch):
    options = ["--presets", "transe-wn18rr", "--steps", "20", "--threads", "1"]
    options += ["--results", str(tmp_path)]
    assert training.main([*options, "--losses", "softmax"]) == 0
    (path,) = tmp_path.iterdir()
    (first,) = results.read_from(path, training.Run)
    assert (first.dataset, first.model, first.loss) == ("WN18RR", "TransE", "softmax")
    assert (first.steps, first.dim, first.lr, first.threads) == (20, 4, 0.05, 1)
    assert 0 < first.mrr <= 1
    assert first.best_step in range(2, 21, 2)

    assert training.main([*options, "--losses", "softmax", "emu"]) == 0
    runs = results.read_from(path, training.Run)
    assert runs[0] == first  # what was done is not done again
    assert [run.loss for run in runs] == ["softmax", "emu"]
    lines = capsys.readouterr().out.splitlines()[-2:]
    for line, run in zip(lines, runs, strict=True):
        assert f" {run.loss} " in line
        assert f" {run.mrr:.4f} " in line

    monkeypatch.setattr(training, "train", None)
    assert training.main([*options, "--losses", "softmax", "emu", "--report"]) == 0


def test_the_table_shows_the_latest_of_repeated_runs():
    columns = {f.name: {"int": 1, "float": 0.25, "str": "x"}[str(f.type)] for f in
               dataclasses.fields(training.Run)}  # fmt: skip
    run = training.Run(**columns | {"loss": "emu"})  # type: ignore[arg-type]
    again = dataclasses.replace(run, mrr=0.5)
    table = training.table([run, again])
    assert "0.5000" in table
    assert len(table.splitlines()) == 3
