"""The report of a run, read as a browser reads it."""

from __future__ import annotations

import base64
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from emu_kernels.trainer.breakdown import Line
from emu_kernels.trainer.data import SPLITS, Graph
from emu_kernels.trainer.evaluation import Metrics
from emu_kernels.trainer.page import relation_ends, roles
from emu_kernels.trainer.run import RunFolder
from tests.trainer.support import QUICK, train

EVIL = {"e0": "<script>alert(0)</script>", "e1": "$x_{", "r0": "a & <b> $y^{ ${body}"}


class Page(HTMLParser):
    """What a page holds: its tags, the cells of its tables, its pictures."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.tags = set[str]()
        self.linked = list[str]()
        self.rows = list[list[str]]()
        self.headings = list[str]()
        self.text = ""
        self._in = ""
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self._in = tag
        self.tags.add(tag)
        self.linked += [v or "" for k, v in attributes if k in ("src", "href", "action", "data")]
        assert not [k for k, _ in attributes if k.startswith("on")]
        if tag == "tr":
            self.rows.append([])

    def handle_data(self, data: str) -> None:
        if self._in != "style":
            self.text += data
        if not data.strip():
            return
        if self._in in ("td", "th"):
            self.rows[-1].append(data.strip())
        elif self._in == "h2":
            self.headings.append(data)

    def pictures(self) -> list[str]:
        """The words of each picture, which is a complete document."""
        start = "data:image/svg+xml;base64,"
        assert all(link.startswith(start) for link in self.linked)
        trees = [ElementTree.fromstring(base64.b64decode(x[len(start) :])) for x in self.linked]
        return [" ".join(x.strip() for x in tree.itertext() if x.strip()) for tree in trees]


def write_graph(folder: Path, splits: dict[str, list[tuple[str, str, str]]]) -> Path:
    folder.mkdir()
    for split in SPLITS:
        lines = ["\t".join(EVIL.get(name, name) for name in triple) for triple in splits[split]]
        (folder / f"{split}.txt").write_text("".join(f"{line}\n" for line in lines))
    return folder


def test_a_run_leaves_a_page_that_needs_nothing_else(named_triples, tmp_path, capsys):
    data, run = write_graph(tmp_path / "<i>", named_triples), tmp_path / "run"
    assert train("--data", data, "--run-dir", run, *QUICK) == 0
    assert f"report: {run / 'report.html'}\n" in capsys.readouterr().out
    page = Page(run / "report.html")
    assert not page.tags & {"script", "link", "iframe", "object", "i", "b"}
    assert "DistMult with emu on <i>" in page.text
    assert page.headings == ["Test", "Training", "Ranks", "Relations", "Entities", "Settings"]
    training, ranks, entities = page.pictures()
    assert "training loss" in training
    assert "validation MRR" in training
    assert "tails heads" in ranks
    assert "of the variance" in entities

    rows = {row[0]: row[1:] for row in page.rows}
    tested = RunFolder(run).read_metrics()[-1]
    assert rows["both directions"][0] == f"{tested['mrr']:.4f}"
    halves = (float(rows["tails"][0]) + float(rows["heads"][0])) / 2
    assert halves == pytest.approx(tested["mrr"], abs=1e-4)
    assert int(rows["n-n"][0].replace(",", "")) == len(named_triples["test"])
    assert rows[EVIL["r0"]][0] == str(sum(t[1] == "r0" for t in named_triples["test"]))
    assert f"head of {EVIL['r0']}" in page.text
    assert rows["--batch-size"] == ["64"]
    assert rows["--beta"] == ["0.53"]
    given, defaults = page.text.split("The others")
    assert "--batch-size" in given
    for name in ("--backend", "--regularization", "--lr"):  # which nobody gave
        assert name in defaults


def test_a_finished_run_gets_it_again(graph_folder, tmp_path):
    run = tmp_path / "run"
    assert train("--data", graph_folder, "--run-dir", run, *QUICK) == 0
    before = (run / "report.html").read_bytes()
    (run / "report.html").unlink()
    assert train("--resume", run) == 0
    assert (run / "report.html").read_bytes() == before


def test_without_a_test_split_or_embeddings(named_triples, tmp_path):
    data = write_graph(tmp_path / "graph", named_triples | {"test": []})
    assert train("--data", data, "--run-dir", tmp_path / "untested", *QUICK) == 0
    page = Page(tmp_path / "untested/report.html")
    assert page.headings == ["Training", "Entities", "Settings"]
    assert train("--data", data, "--model=NBFNet", "--run-dir", tmp_path / "nbf", *QUICK) == 0
    assert Page(tmp_path / "nbf/report.html").headings == ["Training", "Settings"]


def line(name: str, triples: int, mrr: float) -> Line:
    metrics = Metrics(mrr, 0, 0, 0, 1)
    return Line(name, "n-n", triples, {"tail": metrics, "head": metrics})


def test_the_best_and_the_worst_relations():
    lines = [line(f"r{i}", 10, (i * 7 % 25) / 25) for i in range(25)]
    rare = line("rare", 9, 1.0)
    (_, best), (_, worst) = relation_ends([*lines, rare])
    ordered = sorted(lines, key=lambda x: x.metrics["tail"].mrr)
    assert worst == ordered[:10]
    assert best == ordered[:-11:-1]
    ((_, few),) = relation_ends([*lines[:3], rare])
    assert few == sorted(lines[:3], key=lambda x: -x.metrics["tail"].mrr)
    ((_, all_rare),) = relation_ends([rare])
    assert all_rare == [rare]


def test_roles():
    train = [("a", "r", "b"), ("a", "r", "c"), ("a", "s", "b"), ("b", "r", "c"), ("c", "s", "b")]
    graph = Graph.from_names({"train": train, "valid": [("d", "r", "a")], "test": []})
    assert (graph.entities[3], graph.num_relations) == ("d", 2)
    # a is twice a head of r, b twice a tail of s, c twice a tail of r; d is not in training.
    assert roles(graph, torch.arange(4)).tolist() == [0, 3, 2, -1]
    assert roles(graph, torch.tensor([2, 0])).tolist() == [2, 0]
