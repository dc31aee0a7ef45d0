"""Predictions with names, from Python and on the command line."""

from __future__ import annotations

import csv
import io
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import emu_kernels
from emu_kernels.trainer import predict
from emu_kernels.trainer.config import Config
from emu_kernels.trainer.data import PARTS, SPLITS, Graph
from emu_kernels.trainer.loop import Trainer
from emu_kernels.trainer.models import MODELS, Query
from emu_kernels.trainer.names import UnknownNameError
from emu_kernels.trainer.predict import Predictor
from emu_kernels.trainer.run import RunFolder
from tests.trainer.support import embeddings

VARIANTS = [(name, inverse) for name in MODELS for inverse in (False, True)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, graph: Graph) -> Path:
    """A folder with an untrained run of each variant: predictions need only a checkpoint."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("emu_kernels.trainer.loop.plot_metrics", lambda *_: None)
        for name, inverse in VARIANTS:
            config = Config(data="-", model=name, dim=8, inverse_relations=inverse)
            run = RunFolder.create(folder / f"{name}-{inverse}", config, graph)
            Trainer(config, graph, run).save()
    return folder


@pytest.fixture
def run(runs: Path) -> Path:
    return runs / "DistMult-False"


@pytest.fixture
def predictor(run: Path) -> Predictor:
    return emu_kernels.load(run)


def all_scores(predictor: Predictor, name: str, relation: str, direction: str) -> Tensor:
    graph, model = predictor.graph, embeddings(predictor.model)
    row = model.entity[[graph.entities.index(name)]]
    ids = torch.tensor([graph.relations.index(relation)])
    query = model.ask(row, ids, "tail" if direction == "tail" else "head")
    return model.score(query, model.candidates())[0]


@pytest.mark.parametrize(("name", "inverse"), VARIANTS)
def test_every_part_is_predicted_as_the_model_scores_it(runs, name, inverse):
    predictor = emu_kernels.load(runs / f"{name}-{inverse}")
    for head, tail, direction in (("e3", None, "tail"), (None, "e3", "head")):
        best = all_scores(predictor, "e3", "r1", direction).topk(48)
        found = predictor.predict(head, "r1", tail, k=100)
        assert [getattr(p, direction) for p in found] == [
            predictor.graph.entities[i] for i in best.indices.tolist()
        ]
        assert [p.score for p in found] == best.values.tolist()
        assert {(p.head if direction == "tail" else p.tail, p.relation) for p in found} == {
            ("e3", "r1")
        }
        assert [p.rank for p in found] == list(range(1, 49))
    # A relation's score, and that of a whole triple, is the tail's.
    e7 = predictor.graph.entities.index("e7")
    expected = [float(all_scores(predictor, "e3", r, "tail")[e7]) for r in ("r0", "r2", "r3")]
    score = predictor.score([("e3", r, "e7") for r in ("r0", "r2", "r3")])
    torch.testing.assert_close(score, torch.tensor(expected))
    between = predictor.relations("e3", "e7")
    assert sorted(p.relation for p in between) == ["r0", "r1", "r2", "r3"]
    assert [p.score for p in between] == sorted((p.score for p in between), reverse=True)
    by_relation = {p.relation: p.score for p in between}
    assert [by_relation[r] for r in ("r0", "r2", "r3")] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("part", "given"), [(0, (1, 2)), (1, (0, 2)), (2, (0, 1))])
def test_known_answers_are_named_or_left_out(predictor, named_triples, part, given):
    triple = named_triples["valid"][0]
    known: dict[str, str] = {}
    for split in SPLITS:
        for other in named_triples[split]:
            if all(other[i] == triple[i] for i in given):
                known.setdefault(other[part], split)
    query = [name if i in given else None for i, name in enumerate(triple)]
    found = predictor.complete([query], k=48)
    column = PARTS[part]
    assert {getattr(p, column): p.known for p in found if p.known} == known
    new = predictor.complete([query], k=48, filter_known=True)
    expected = [(getattr(p, column), p.score) for p in found if p.known is None]
    assert [(getattr(p, column), p.score) for p in new] == expected
    assert [p.rank for p in new] == list(range(1, len(new) + 1))
    (whole,) = predictor.complete([triple], filter_known=True)
    assert whole[:4] == (None, *triple)
    assert whole.known == known[triple[part]]


def test_many_queries_are_each_alone(predictor, monkeypatch):
    """In any mixture, and computed in any pieces."""
    queries = [
        ("e1", "r1", None),
        (None, "r2", "e9"),
        ("e1", None, "e2"),
        ("e1", "r1", "e2"),
        ("e4", "r0", None),
        ("e1", "r1", None),
    ]
    alone = [p for query in queries for p in predictor.complete([query], 3, filter_known=True)]
    alone = [p._replace(score=pytest.approx(p.score)) for p in alone]
    assert predictor.complete(queries, 3, filter_known=True) == alone
    monkeypatch.setattr(predict, "_FLOATS", 1)
    assert predictor.complete(queries, 3, filter_known=True) == alone
    assert predictor.complete([], 3) == []
    assert predictor.score([]).shape == (0,)
    several = predictor.predict(head=["e1", "e4"], relation="r0", k=2)
    apart = predictor.predict("e1", "r0", k=2) + predictor.predict("e4", ["r0"], k=2)
    assert several == [p._replace(score=pytest.approx(p.score)) for p in apart]


@pytest.mark.parametrize("name", MODELS)
def test_neighbours(runs, name, monkeypatch):
    predictor = emu_kernels.load(runs / f"{name}-False")
    model, names = embeddings(predictor.model), list(predictor.graph.entities)
    rows = model.candidates()
    if model.similarity == "dot":
        scores = torch.cosine_similarity(rows[:, None], rows, dim=2)
    elif name in ("TransE", "PairRE"):
        scores = -torch.cdist(rows, rows, p=1)
    elif name == "RotatE":
        scores = -torch.complex(*(rows[:, None] - rows).chunk(2, dim=-1)).abs().sum(dim=-1)
    else:  # as the kernels' tests have it
        scores = model.score(Query(rows), rows)
    for pieces in (1 << 25, 1):
        monkeypatch.setattr(predict, "_FLOATS", pieces)
        found = predictor.neighbours(["e5", "e0"], k=3)
        assert [n.entity for n in found] == ["e5"] * 3 + ["e0"] * 3
        for at in (0, 3):
            own = scores[names.index(found[at].entity)].clone()
            own[names.index(found[at].entity)] = -torch.inf
            best = own.topk(3)
            assert [n.neighbour for n in found[at : at + 3]] == [names[i] for i in best.indices]
            torch.testing.assert_close(
                torch.tensor([n.score for n in found[at : at + 3]]), best.values
            )
    assert len(predictor.neighbours("e5", k=100)) == 47


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"head": "e1"}, "give two of head, relation and tail"),
        ({"head": "e1", "relation": "r1", "tail": "e1"}, "give two of head, relation and tail"),
        ({"head": ["e1"], "relation": ["r1", "r2"]}, r"as many names in each list, got \[1, 2\]"),
        ({"head": "e1", "relation": "r1", "k": 0}, "k: expected at least 1, got 0"),
        ({"head": "e1", "relation": "r1", "k": "3"}, "k: expected an int, got str"),
        ({"head": 1, "relation": "r1"}, "head: expected a name .* or a list .*, got int"),
        ({"head": ["e1"], "relation": [1]}, r"relation: expected a name \(str\), got int"),
    ],
)
def test_queries_that_make_no_sense(predictor, arguments, said):
    with pytest.raises((ValueError, TypeError), match=said):
        predictor.predict(**arguments)


def test_triples_that_make_no_sense(predictor):
    with pytest.raises(TypeError, match=r"entity: expected a name .*, got int"):
        predictor.neighbours(1)
    with pytest.raises(ValueError, match=r"at most one None, got .* as triple 1"):
        predictor.complete([("e1", "r1", None), ("e1", None, None)])
    with pytest.raises(UnknownNameError, match="no entity 'e99'; did you mean e9"):
        predictor.score([("e1", "r1", "e99")])
    with pytest.raises(ValueError, match="triples: expected no None"):
        predictor.score([("e1", None, "e2")])


def test_a_predictor_is_pickled(run):
    predictor = Predictor(run)
    expected = predictor.predict(head="e1", relation="r1")
    assert pickle.loads(pickle.dumps(predictor)).predict(head="e1", relation="r1") == expected


def emu_predict(run: Path, *arguments: object) -> int:
    return predict.main([str(run), *map(str, arguments)])


QUERIES = [("e1", "r1", ""), ("?", "r2", "e9"), ("e1", "", "e2"), ("e1", "r1", "e2")]


@pytest.mark.parametrize("suffix", ["csv", "CSV", "tsv"])
def test_a_file_of_queries_and_both_outputs(run, predictor, tmp_path, capsys, suffix):
    file = tmp_path / f"queries.{suffix}"
    with file.open("w", newline="") as stream:
        if suffix.lower() == "csv":
            csv.writer(stream).writerows([("head", "relation", "tail"), *QUERIES])
        else:
            stream.write("\n".join("\t".join(query) for query in QUERIES) + "\n\n")
    partial = [[None if x in ("", "?") else x for x in query] for query in QUERIES]
    expected = predictor.complete(partial, k=2)
    assert len(expected) == 7

    assert emu_predict(run, "--input", file, "--top", 2, "--format", "csv") == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert emu_predict(run, "--input", file, "--top", 2, "--format", "jsonl") == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for row, record, p in zip(rows, records, expected, strict=True):
        assert record == pytest.approx(p._asdict())
        assert torch.tensor(record["score"]) == torch.tensor(p.score)  # the same fp32 number
        assert row == {k: "" if v is None else str(v) for k, v in record.items()}


def test_queries_from_standard_input(run, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("\ufeffe1\tr1\te2\n"))
    assert emu_predict(run, "--input", "-") == 0
    title, header, _, row = capsys.readouterr().out.splitlines()
    assert title == "1 queries, the model of step 0"
    assert header.split() == ["rank", "head", "relation", "tail", "score", "known"]
    assert row.split()[:3] == ["e1", "r1", "e2"]


def test_tables_of_one_query(run, predictor, capsys):
    assert emu_predict(run, "--head", "e1", "--tail", "e2", "--top", 1) == 0
    (best,) = predictor.relations("e1", "e2", k=1)
    title, header, _, row = capsys.readouterr().out.splitlines()
    assert title == "(e1, ?, e2), the model of step 0"
    assert header.split() == ["rank", "relation", "score", "known"]
    assert row.split()[:3] == ["1", best.relation, f"{best.score:.4f}"]
    assert emu_predict(run, "--neighbours", "e1", "--top", 1) == 0
    (near,) = predictor.neighbours("e1", k=1)
    row = capsys.readouterr().out.splitlines()[3]
    assert row.split() == ["1", near.neighbour, f"{near.score:.4f}"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"e1\tr1\n", "line 1: expected head, relation and tail separated by tabs"),
        (b"e1\tr1\t?\ne1\t?\t\n", "line 2: expected head, relation and tail"),
        (b"e1\tr1\t\xff\n", "queries.tsv cannot be read"),
        (b"e1\tr9\t?\n", "no relation 'r9'"),
    ],
)
def test_a_bad_file_is_one_clear_line(run, tmp_path, capsys, content, said):
    file = tmp_path / "queries.tsv"
    file.write_bytes(content)
    assert emu_predict(run, "--input", file) == 1
    assert said in capsys.readouterr().err
    assert emu_predict(run, "--input", tmp_path / "none.tsv") == 1
    assert "none.tsv cannot be read" in capsys.readouterr().err


def test_a_full_disk_is_one_clear_line(run):
    command = f"{sys.executable} -m emu_kernels.trainer.predict {run} --neighbours e1 >/dev/full"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "emu-predict: the output cannot be written: " in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [[], ["--head", "e1"], ["--head", "e1", "--neighbours", "e1"], ["--neighbours=e1", "--top=0"]],
)
def test_usage_errors(run, arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        emu_predict(run, *arguments)
    assert caught.value.code == 2
    assert "usage: emu-predict" in capsys.readouterr().err


def test_the_trainer_is_imported_when_a_run_is_loaded():
    code = "import sys, emu_kernels; print([m for m in sys.modules if m.startswith(("
    code += "'emu_kernels.trainer', 'safetensors', 'pooch', 'tabulate'))])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
