"""ShardedEntities on one, two and three processes against one table in one process."""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from bench import results
from bench.__main__ import main as bench_main
from bench.distributed import COLUMNS
from emu_kernels import queries
from emu_kernels.optim import RowwiseAdagrad
from emu_kernels.trainer.evaluation import Evaluator
from emu_kernels.trainer.models import MODELS
from tests.integrations import sharded

integration = pytest.importorskip("emu_kernels.integrations.torchrec", exc_type=ImportError)

ROOT = Path(__file__).resolve().parents[2]


def torchrun(processes: int, *arguments: object, script: str = sharded.__file__) -> Any:
    """The finished processes; fails if they hang."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    return subprocess.run(
        [*command, "--nproc-per-node", str(processes), script, *map(str, arguments)],
        env=environment, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip


def one_process(case: sharded.Case, steps: int, rates: list[float]) -> dict[str, Any]:
    """The case with an ordinary table and the joint batches."""
    table = torch.nn.Parameter(sharded.initial(sharded.ENTITIES, sharded.DIM))
    relation = torch.nn.Parameter(sharded.initial(sharded.RELATIONS, case.width))
    kinds: dict[str, Any] = {
        "Adagrad": torch.optim.Adagrad, "RowwiseAdagrad": RowwiseAdagrad, "SGD": torch.optim.SGD
    }  # fmt: skip
    of_table = kinds[case.optimizer]([table], lr=sharded.LR)
    of_relation = torch.optim.Adagrad([relation], lr=sharded.LR)
    losses = []
    for step in range(steps):
        given, kind, positive, negative = sharded.batch(case, step)
        ids = (given, positive, negative)
        of_table.param_groups[0]["lr"] = rates[step]
        loss = sharded.loss_of(case, step, table, relation[kind], ids, 0)
        for optimizer in (of_table, of_relation):
            optimizer.zero_grad()
        loss.backward()
        for optimizer in (of_table, of_relation):
            optimizer.step()
        losses.append(float(loss.detach()))
    return {"table": table.detach(), "relation": relation.detach(), "losses": losses}


def compare(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    for name in ("table", "relation"):
        moved = wanted[name] - sharded.initial(*wanted[name].shape)
        assert moved.abs().max() > 0.01
        torch.testing.assert_close(found[name], wanted[name], rtol=0, atol=5e-6)
    last = len(found["losses"])
    torch.testing.assert_close(found["losses"], wanted["losses"][-last:], rtol=1e-5, atol=1e-6)


def plain_ranks(case: sharded.Case, table: Tensor, relation: Tensor) -> Tensor:
    """Filtered ranks of the first batch, from each score by itself."""
    given, kind, positive, _ = sharded.batch(case, 0)
    query = getattr(queries, case.model)(table[given], relation[kind], "tail").double()
    values = table.double()
    difference = query[:, None] - values
    if case.model == "transe":
        scores = -difference.abs().sum(-1)
    elif case.model == "rotate":
        scores = -torch.hypot(*difference.chunk(2, dim=-1)).sum(-1)
    else:
        scores = query @ values.T
    true = scores.gather(1, positive[:, None])
    others = torch.ones_like(scores, dtype=torch.bool)
    others[sharded.known(torch.arange(len(query)))] = False
    others.scatter_(1, positive[:, None], False)
    return 1.0 + ((scores > true) & others).sum(1).double()


CONSTANT = [sharded.LR] * sharded.STEPS
CHANGED = [*CONSTANT, sharded.LR / 2, sharded.LR / 2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the results of two processes, then of three and of one, which load theirs."""
    folder = tmp_path_factory.mktemp("sharded")
    for task, processes in (("all", 2), ("all", 3), ("resume", 1)):
        ended = torchrun(processes, task, folder)
        assert ended.returncode == 0, ended.stderr
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("case", sharded.CASES, ids=str)
@pytest.mark.parametrize("processes", [2, 3])
def test_the_numbers_are_those_of_one_process(folder, processes, case):
    found = torch.load(folder / f"all-{processes}.pt", weights_only=False)[tuple(case)]
    assert len(found["shards"]) == processes
    assert max(found["shards"]) < sharded.ENTITIES
    compare(found, one_process(case, sharded.STEPS, CONSTANT))
    expected = plain_ranks(case, found["table"], found["relation"])
    torch.testing.assert_close(found["ranks"], expected)


@pytest.mark.slow
@pytest.mark.parametrize("case", sharded.CASES[:2], ids=str)
@pytest.mark.parametrize(("task", "processes"), [("all", 3), ("resume", 1)])
def test_another_number_of_processes_goes_on(folder, task, processes, case):
    """Trained and saved by two, then with half the rate: Adagrad's sums are read as well."""
    results = torch.load(folder / f"{task}-{processes}.pt", weights_only=False)
    found = results["resumed", tuple(case)]
    assert len(found["shards"]) == processes
    compare(found, one_process(case, sharded.STEPS + 2, CHANGED))


@pytest.mark.slow
def test_a_process_that_dies_ends_all(tmp_path):
    ended = torchrun(2, "die", tmp_path)
    assert ended.returncode != 0
    assert "exitcode  : 3" in ended.stderr
    assert "rank      : 1" in ended.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_process_that_hangs_ends_all(tmp_path):
    """After the group's timeout, with a message."""
    ended = torchrun(2, "hang", tmp_path)
    assert ended.returncode != 0
    assert "Timed out waiting" in ended.stderr
    assert "rank      : 0" in ended.stderr


@pytest.mark.slow
def test_the_benchmark(tmp_path):
    sizes = "--entities 300 --dim 8 --batch 16 --negatives 8 --steps 2 --processes 2 --sets 4"
    assert bench_main(["distributed", *sizes.split(), f"--results={tmp_path}"]) == 0
    (row,) = results.read(tmp_path, COLUMNS).to_dict("records")
    assert float(row["steps_per_second"]) > 0
    rows = 16 + 16 + 4 * 8  # at most, of which half are the other's
    each = 2 * 8 * 4 + 8
    assert 0.1 * rows * each < 1e6 * float(row["moved_mb"]) < 0.9 * rows * each


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """A process group of one."""
    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group")
class TestOneProcess:
    def test_it_trains(self):
        for case in sharded.CASES[:2]:
            run = sharded.Run(case)
            run.train(0, sharded.STEPS)
            compare(run.result(), one_process(case, sharded.STEPS, CONSTANT))

    def test_the_example(self, nations_graph):
        """Its ranks over the shards are the evaluator's of the gathered model."""
        spec = importlib.util.spec_from_file_location("_example", ROOT / "examples/distributed.py")
        assert spec is not None
        assert spec.loader is not None
        example = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(example)
        sizes = {"batch_size": 100, "negatives": 8, "sets": 4}
        options = argparse.Namespace(model="RotatE", dim=6, lr=0.1, seed=0, **sizes)
        training = example.Training(nations_graph, options)
        losses = [float(training.train_step()) for _ in range(60)]
        assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
        relations = nations_graph.num_relations
        model = MODELS["RotatE"](nations_graph.num_entities, relations, 6, torch.Generator())
        model.load_state_dict(
            {"entity": training.entities.local, "relation": training.model.relation.detach()}
        )
        metrics, expected = training.rank("test"), Evaluator(nations_graph).evaluate(model, "test")
        assert vars(metrics) == pytest.approx(vars(expected))

    def test_initial_values(self):
        entities = integration.ShardedEntities(30, 4, bound=0.25, seed=1)
        same = integration.ShardedEntities(30, 4, bound=0.25, seed=1)
        other = integration.ShardedEntities(30, 4, bound=0.25, seed=2)
        assert torch.equal(entities.local, same.local)
        assert not torch.equal(entities.local, other.local)
        assert 0.2 < entities.local.abs().max() <= 0.25

    def test_rows(self):
        entities = integration.ShardedEntities(30, 4)
        given, negative = torch.tensor([7, 3, 29]), torch.tensor([[-1, 3], [0, 7]])
        rows = entities.fetch(given, negative)
        assert rows.entity.tolist() == [0, 3, 7, 29]
        torch.testing.assert_close(rows.table.detach(), entities.local[rows.entity])
        assert [x.tolist() for x in rows.ids] == [[2, 1, 3], [[-1, 1], [0, 2]]]
        assert len(entities.fetch(torch.tensor([-1])).table) == 0

    def test_ties_have_the_mean_rank(self):
        entities = integration.ShardedEntities(30, 4)
        entities.fill(lambda first, last: torch.ones(last - first, 4))
        query, positive = torch.ones(2, 4), torch.tensor([0, 9])
        known = torch.tensor([0, 0, 0]), torch.tensor([0, 1, 2])
        assert entities.ranks(query, positive).tolist() == [15.5, 15.5]
        assert entities.ranks(query, positive, known).tolist() == [14.5, 15.5]
        assert entities.ranks(query[:0], positive[:0]).tolist() == []

    def test_queries_in_parts(self, monkeypatch):
        entities = integration.ShardedEntities(30, 4)
        query, positive = torch.randn(5, 4), torch.arange(5)
        known = torch.tensor([0, 3, 3, 4]), torch.tensor([9, 8, 7, 6])
        whole = entities.ranks(query, positive, known, similarity="l2")
        monkeypatch.setattr(integration, "_SCORES", 60)  # two queries
        assert torch.equal(entities.ranks(query, positive, known, similarity="l2"), whole)

    def test_bad_input(self):
        make = integration.ShardedEntities
        with pytest.raises(ValueError, match="dim: expected a multiple of 4, got 6"):
            make(30, 6)
        with pytest.raises(ValueError, match=r"num_entities: .*got 0"):
            make(0, 4)
        with pytest.raises(ValueError, match=r"optimizer: .*Adagrad.*'adam'"):
            make(30, 4, optimizer="adam")
        entities = make(30, 4)
        with pytest.raises(IndexError, match="below 30, got 30"):
            entities.fetch(torch.tensor([2]), torch.tensor([[30, 1]]))
        with pytest.raises(IndexError, match="at least -1, got -2"):
            entities.fetch(torch.tensor([-2]))
        with pytest.raises(TypeError, match="entities: expected an integer dtype"):
            entities.fetch(torch.tensor([1.5]))
        query, positive = torch.ones(1, 4), torch.tensor([0])
        for bad in (-1, 30):
            with pytest.raises(IndexError, match=f"positive: expected ids from 0 to 29, got {bad}"):
                entities.ranks(query, torch.tensor([bad]))
            with pytest.raises(IndexError, match=f"known: expected ids from 0 to 29, got {bad}"):
                entities.ranks(query, positive, (positive, torch.tensor([bad])))
        with pytest.raises(ValueError, match="weight: expected a number of at least 0"):
            entities.backward(torch.zeros((), requires_grad=True), weight=-1)
        entities.fill(lambda first, last: torch.full((last - first, 4), torch.nan))
        with pytest.raises(ValueError, match="a score is not finite"):
            entities.ranks(torch.ones(1, 4), torch.tensor([0]))

    def test_gradients_must_be_means(self):
        from torchrec.distributed.comm_ops import set_gradient_division

        set_gradient_division(False)
        try:
            with pytest.raises(RuntimeError, match="set_gradient_division"):
                integration.ShardedEntities(30, 4)
        finally:
            set_gradient_division(True)


def test_the_minimum_is_that_of_the_extra():
    line = f'torchrec = ["torchrec>={".".join(map(str, integration.MINIMUM))}"]'
    assert line in (ROOT / "pyproject.toml").read_text().splitlines()


def test_no_process_group():
    with pytest.raises(RuntimeError, match="init_process_group"):
        integration.ShardedEntities(30, 4)


@pytest.mark.parametrize(
    ("torch_version", "found", "wrong"),
    [
        ("2.13.0+cpu", {"torchrec": "1.6.0", "fbgemm-gpu": "1.8.0"}, "torchrec 1.6.0"),
        ("2.13.0", {"torchrec": "1.8.0", "fbgemm-gpu": "1.7.0"}, "fbgemm-gpu 1.7.0"),
        ("2.13.0", {"torchrec": "1.8.0", "fbgemm-gpu-cpu": "1.80"}, "fbgemm-gpu-cpu 1.80"),
        ("2.13.0", {"torchrec": "1.8.0"}, "fbgemm-gpu none"),
    ],
)
def test_a_wrong_pair_names_the_right_one(monkeypatch, torch_version, found, wrong):
    def version(name: str) -> str:
        if name not in found:
            raise PackageNotFoundError(name)
        return str(found[name])

    monkeypatch.setattr(torch, "__version__", torch_version)
    monkeypatch.setattr(integration, "version", version)
    with pytest.raises(ImportError, match=rf"goes with torchrec 1\.8 .*{wrong} is installed"):
        integration._require_pair()


@pytest.mark.parametrize(("torch_version", "pair"), [("2.11.0", "1.6.0"), ("2.13.1", "1.8.0+cpu")])
def test_a_right_pair(monkeypatch, torch_version, pair):
    monkeypatch.setattr(torch, "__version__", torch_version)
    monkeypatch.setattr(integration, "version", lambda name: pair)
    integration._require_pair()
