"""The examples: EMU in a hand-written loop and with a black-box scorer."""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import runpy
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from pykeen.datasets import Nations
from torch import Tensor
from torch.nn.functional import cross_entropy

from emu_kernels.trainer.config import Config
from emu_kernels.trainer.data import DIRECTIONS, SPLITS, Graph
from emu_kernels.trainer.evaluation import Evaluator
from emu_kernels.trainer.losses import LOSSES, Step
from emu_kernels.trainer.models import MODELS
from emu_kernels.validate import MAX_SEED

ROOT = Path(__file__).resolve().parents[2]


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look up their annotations
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def loop() -> ModuleType:
    return load("loop")


@pytest.fixture(scope="module")
def black_box() -> ModuleType:
    return load("black_box")


def test_the_page_shows_what_changes(loop):
    """A diff of the two losses' bodies, with as many lines as the README says."""
    names = ("vanilla_loss", "emu_loss")
    before, after = (inspect.getsource(getattr(loop, x)).splitlines()[1:] for x in names)
    diff = list(difflib.unified_diff(before, after, *names, lineterm="", n=1))
    assert "\n".join(diff) in (ROOT / "docs/hand-written-loop.md").read_text()
    assert sum(line[0] in "+-" for line in diff[2:]) == 9


def test_loss_equals_our_trainers(loop, nations_graph):
    """Three steps of SGD on a real graph, with the same initial values, batches and seeds."""
    graph = nations_graph
    config = Config(data="-", model="RotatE", mutation_rate=0.61, beta=0.53, alpha=0.11)
    ours = MODELS["RotatE"](
        graph.num_entities, graph.num_relations, 6, torch.Generator(), margin=loop.MARGIN
    )
    theirs = loop.RotatE(graph.num_entities, graph.num_relations, 6)
    theirs.load_state_dict({"entity": ours.entity, "relation": ours.relation})
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.5) for model in (theirs, ours)]
    triples = graph.triples["train"]
    for step, direction in enumerate(DIRECTIONS + DIRECTIONS[:1]):
        positive = triples[step * 50 : step * 50 + 50]
        negative, weight = torch.randint(graph.num_entities, (50, 8)), torch.rand(50)
        torch.manual_seed(step)
        loss = loop.emu_loss(theirs, (positive, negative, weight, f"{direction}-batch"))
        torch.manual_seed(step)
        seed = int(torch.randint(MAX_SEED - 1, (), dtype=torch.int64))
        given, target = (0, 2) if direction == "tail" else (2, 0)
        query = ours.query(
            ours.entity[positive[:, given]], ours.relation[positive[:, 1]], direction
        )
        expected = LOSSES["emu"](
            Step(config, ours, query, ours.entity, positive[:, target], negative, weight, seed)
        )
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
        for each, optimizer in zip((loss, expected), optimizers, strict=True):
            optimizer.zero_grad()
            each.backward()
            optimizer.step()


def test_scores_and_ranks_are_our_trainers(loop, nations_graph):
    graph = nations_graph
    ours = MODELS["RotatE"](graph.num_entities, graph.num_relations, 6, torch.Generator(), margin=6)
    theirs = loop.RotatE(graph.num_entities, graph.num_relations, 6)
    theirs.load_state_dict({"entity": ours.entity, "relation": ours.relation})
    known = torch.cat([graph.triples[split] for split in SPLITS])
    found = loop.filtered_mrr(theirs, graph.triples["test"], known)
    assert found == pytest.approx(Evaluator(graph).evaluate(ours, "test").mrr, abs=1e-4)


def test_batches(loop, nations_graph):
    train, entities = nations_graph.triples["train"], nations_graph.num_entities
    source = loop.batches(train, entities, size=1000, negatives=3)
    seen = [next(source) for _ in range(4)]
    assert [mode for *_, mode in seen] == ["tail-batch", "head-batch"] * 2
    assert [tuple(negative.shape) for _, negative, *_ in seen] == [(1000, 3)] * 2 + [(592, 3)] * 2
    (head, relation, tail), weight = seen[0][0][0], seen[0][2][0]
    of_head = ((train[:, 0] == head) & (train[:, 1] == relation)).sum()
    of_tail = ((train[:, 2] == tail) & (train[:, 1] == relation)).sum()
    assert float(weight) == pytest.approx(float(of_head + of_tail + 4) ** -0.5)


def splits(graph: Graph) -> dict[str, Tensor]:
    return {split: graph.triples[split] for split in SPLITS}


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


@pytest.mark.slow
def test_the_loop_learns_as_well_with_emu(loop, nations_graph):
    """Over seeds 0 to 4 the mean (and standard deviation) of the filtered MRR was 0.570 (0.015)
    with the self-adversarial loss and 0.624 (0.007) with EMU. So the difference of two means of two
    seeds has a standard deviation of 0.012; up to three of those may be chance.
    """
    runs = [
        [loop.run(splits(nations_graph), steps=150, seed=seed, emu=emu) for seed in range(2)]
        for emu in (False, True)
    ]
    assert mean(runs[1]) > mean(runs[0]) - 3 * 0.012
    assert mean(runs[1]) > 0.5


@pytest.mark.slow
def test_the_black_box_learns_as_well_with_emu(black_box, nations_graph):
    """Over seeds 0 to 4 the mean (and standard deviation) of the filtered MRR after 200 steps was
    0.701 (0.027) without EMU and 0.692 (0.024) with it, after 400 steps 0.723 (0.018) and 0.725
    (0.032). So the difference of two means of two seeds has a standard deviation of 0.026 after 200
    steps; up to three of those may be chance.
    """
    graph = nations_graph
    known = torch.cat([graph.triples[split] for split in SPLITS])
    found: dict[bool, list[float]] = {False: [], True: []}
    for with_emu, values in found.items():
        for seed in range(2):
            model = black_box.train(
                graph.triples["train"], graph.num_entities, graph.num_relations,
                steps=200, seed=seed, emu=with_emu,
            )  # fmt: skip
            values.append(black_box.filtered_mrr(model, graph.triples["test"], known))
    assert mean(found[True]) > mean(found[False]) - 3 * 0.026
    assert mean(found[True]) > 0.6


def test_black_box_loss_without_mutation_is_of_the_scores(black_box, nations_graph, monkeypatch):
    """It is ULS plus the vanilla term of the same scores."""
    monkeypatch.setattr(black_box, "MUTATION_RATE", 0.0)
    torch.manual_seed(0)
    graph = nations_graph
    triples = graph.triples["train"]
    model = black_box.LinkPredictor(triples, graph.num_entities, graph.num_relations)
    negative = torch.randint(graph.num_entities, (9, 5))
    x = model.features()
    for heads in (False, True):
        rows: list[Tensor] = []
        for triple, ids in zip(triples[:9], negative, strict=True):
            candidates = triple.repeat(6, 1)
            candidates[1:, 0 if heads else 2] = ids
            head, relation, tail = candidates.T
            rows.append(model(x[head], relation, x[tail]))
        scores = torch.stack(rows)
        lse = scores.logsumexp(dim=1)
        uls = (lse - scores[:, 0] + 0.53 * (lse[:, None] - scores[:, 1:]).sum(dim=1)) / 5
        vanilla = cross_entropy(scores, torch.zeros(9, dtype=torch.int64))
        loss = black_box.step_loss(model, triples[:9], negative, heads=heads, emu=True)
        torch.testing.assert_close(loss, uls.mean() + 0.11 * vanilla)
        without = black_box.step_loss(model, triples[:9], negative, heads=heads, emu=False)
        torch.testing.assert_close(without, vanilla)


@pytest.fixture
def folder(nations: Nations, tmp_path: Path) -> Path:
    factories: Any = (nations.training, nations.validation, nations.testing)
    for split, factory in zip(SPLITS, factories, strict=True):
        lines = ["\t".join(triple) + "\n" for triple in factory.triples[:100].tolist()]
        (tmp_path / f"{split}.txt").write_text("".join(lines))
    return tmp_path


@pytest.mark.parametrize(
    "command",
    [["loop"], ["loop", "--vanilla"], ["black_box"], ["black_box", "--vanilla"]],
    ids=" ".join,
)
def test_they_run_as_programs(folder, command, monkeypatch, capsys):
    name, *options = command
    monkeypatch.setattr("sys.argv", [name, str(folder), "--steps", "3", *options])
    runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    assert "filtered MRR of the test split: 0." in capsys.readouterr().out
