"""``python -m bench train`` on a tiny graph: every trainer and its rows."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from bench import memory, results, train
from bench.__main__ import TRAINERS, main
from bench.graphs import Numbers, zipf
from bench.libraries import PYKEEN, Library
from bench.loops import FusedLoop, Loop
from bench.results import RATIO, SPEED, TIME
from bench.tasks import Task, tiny
from bench.zipf import zipf_ids
from tests.bench.test_bench import well_formed

TASK = tiny(Task())


@pytest.fixture(autouse=True)
def _one_thread(threads: None) -> None:
    torch.set_num_threads(1)


def test_the_command_line_knows_every_trainer():
    assert tuple(train.BY_NAME) == TRAINERS


@pytest.mark.parametrize("gradient", ["dense", "sparse"])
@pytest.mark.parametrize("model", ["DistMult", "ComplEx", "TransE", "RotatE"])
def test_every_trainer_trains(model, gradient):
    """Parameters move, by as many steps as are asked for."""
    task = TASK.replace(model=model, gradient=gradient)
    graph = task.load()
    for rival in train.RIVALS:
        if (reason := rival.unavailable(task)) is not None:
            assert (rival.name, model) == ("torchkge", "RotatE") or "not installed" in reason
            continue
        run = rival.prepare(rival.settled(task), graph)
        assert run(2) > 0
        assert run(1) > 0
        step = getattr(run, "step", getattr(getattr(run, "trainer", None), "step", 3))
        assert step == 3


def test_rows(tmp_path, capsys):
    options = ["train", "--tiny", "--memory-runs", "0", "--threads", "1"]
    assert main([*options, "--results", str(tmp_path)]) == 0
    rows = results.read(tmp_path)
    names = [r.name for r in train.RIVALS if r.unavailable(TASK) is None]
    assert [(r.rival, r.what) for r in rows] == [
        (n, w) for n in names for w in (TIME, SPEED, RATIO)
    ]
    for r in rows:
        well_formed(r)
        assert (r.B, r.K, r.D, r.N) == (10, 4, 8, 50)
        assert (r.family, r.graph, r.model, r.optimizer) == ("train", "zipf", "DistMult", "Adagrad")
        speed = next(s for s in rows if s.what == SPEED and s.rival == r.rival)
        if r.what == TIME:
            expected = [1000 * r.B / x for x in (r.median, r.q80, r.q20)]
            assert [speed.median, speed.q20, speed.q80] == pytest.approx(expected, rel=1e-4)
    if "pykeen" in names:
        (library,) = {r.library for r in rows if r.rival == "pykeen"}
        assert library == PYKEEN.with_version()
    assert "| **our trainer, EMU** " in capsys.readouterr().out
    assert main(["report", "--results", str(tmp_path)]) == 0
    assert "-train-zipf-50-distmult-8.png)" in capsys.readouterr().out


def test_memory_of_a_run():
    """Three tables at the least (parameters, gradient, sums of squares), of 4 MB each."""
    if (reason := memory.unavailable()) is not None:
        pytest.skip(reason)
    task = TASK.replace(entities=100_000, dim=10)
    orders = (dataclasses.asdict(task), dataclasses.asdict(TASK))
    peak = memory.peak(1, "training", "trainer-emu", *orders)
    table = 4 * task.entities * task.dim
    assert 3 * table < peak < 20 * table
    sparse = dataclasses.asdict(task.replace(gradient="sparse"))
    of_loop = memory.peak(1, "training", "fused-loop-emu", sparse, orders[1])
    assert 2 * table < of_loop < peak  # no dense gradient


def test_what_is_missing_is_said(monkeypatch):
    absent = dataclasses.replace(
        train.BY_NAME["pyg"], library=Library("no_such_module", "no-such-package")
    )
    assert absent.unavailable(TASK) == (
        "no-such-package is not installed (pip install no-such-package)"
    )
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1000)
    reason = train.BY_NAME["trainer-emu"].unavailable(TASK)
    assert reason is not None
    assert "GiB are free" in reason


def test_a_missing_dataset_is_skipped(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("EMU_KERNELS_DATA", str(tmp_path))
    assert main(["train", "--rivals", "loop-emu", "--no-save"]) == 1
    out = capsys.readouterr().out
    assert "skipped: FB15k-237: " in out
    assert "nothing was measured" in out


def test_trainers_that_cannot_choose_have_dense_gradients():
    task = TASK.replace(gradient="sparse")
    settled = {name: rival.settled(task).gradient for name, rival in train.BY_NAME.items()}
    assert {name for name, gradient in settled.items() if gradient == "sparse"} == {
        "trainer-emu", "trainer-softmax",
        "fused-loop-emu", "loop-softmax", "loop-emu", "pyg", "pyg-emu",
    }  # fmt: skip


@pytest.mark.parametrize("changes", [{"optimizer": "Adam"}, {"model": "PairRE"}])
def test_our_trainer_is_dense_where_it_cannot_be_sparse(changes):
    task = TASK.replace(gradient="sparse", **changes)
    ours = train.BY_NAME["trainer-emu"]
    assert ours.settled(task).gradient == "dense"
    assert ours.prepare(ours.settled(task), task.load())(1) > 0


def test_the_two_loops_have_the_same_loss():
    graph = TASK.load()
    for name in ("DistMult", "ComplEx", "TransE", "RotatE"):
        task = TASK.replace(model=name)
        eager, fused = (kind(task, graph, "softmax") for kind in (Loop, FusedLoop))
        fused.model.load_state_dict(eager.model.state_dict())
        query = torch.randn(10, eager.model.entity.shape[1])
        positive, negative = torch.arange(10), torch.arange(40).view(10, 4)
        values = [loop._loss(query, positive, negative) for loop in (eager, fused)]
        torch.testing.assert_close(*values)


def test_zipf_degrees():
    """The share of rank i is close to 1 / (i · ln(N + 1))."""
    ids = zipf_ids(200_000, 1000, torch.Generator().manual_seed(0))
    counts = ids.bincount(minlength=1000).double() / len(ids)
    assert len(counts) == 1000
    rank = torch.arange(1, 1001, dtype=torch.float64)
    expected = ((rank + 1) / rank).log() / torch.tensor(1001.0).double().log()
    torch.testing.assert_close(counts[:20], expected[:20], rtol=0.1, atol=0)
    torch.testing.assert_close(counts[20:].sum(), expected[20:].sum(), rtol=0.02, atol=0)


def test_a_synthetic_graph():
    graph = zipf(1000, 7, 500)
    assert (graph.num_entities, graph.num_relations) == (1000, 7)
    triples = graph.triples["train"]
    assert triples.shape == (500, 3)
    assert int(triples[:, [0, 2]].max()) < 1000
    assert int(triples[:, 1].max()) < 7
    assert torch.equal(triples, zipf(1000, 7, 500).triples["train"])
    names = Numbers(1000)
    assert (names[3], names[1:3], len(list(names))) == ("3", ["1", "2"], 1000)
