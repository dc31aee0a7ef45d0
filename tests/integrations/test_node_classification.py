"""The example of node classification: its losses, its data, and a tiny run on a graph made here."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix
from torch import nn
from torch.nn.functional import cross_entropy, normalize

from emu_kernels import uls_cross_entropy
from emu_kernels.trainer.datasets import FOLDER_VARIABLE

from .test_examples import load

CLASSES = 3


@pytest.fixture(scope="module")
def example() -> ModuleType:
    return load("node_classification")


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """Three classes, rings of 60 nodes, with two links between them; and two nodes apart.

    The words of a node tell its class.
    """
    draws = np.random.default_rng(0)
    label = np.arange(180, dtype=np.int8) % CLASSES
    label = np.append(label, [0, 0]).astype(np.int8)
    ahead = [(n, (n + step) % 180) for n in range(180) for step in (3, 6)] + [(0, 1), (1, 2)]
    source, target = np.array([*ahead, (180, 181), (5, 5)]).T
    links = csr_matrix((np.ones(len(source), np.float32), (source, target)), shape=(182, 182))
    words = csr_matrix(draws.random((182, 12)) < 0.2 + 0.6 * (np.arange(12) % 3 == label[:, None]))
    path = tmp_path / "rings.npz"
    parts = {
        f"{name}_{part}": getattr(matrix, part)
        for name, matrix in (("adj", links), ("attr", words.astype(np.float32)))
        for part in ("data", "indices", "indptr", "shape")
    }
    np.savez(path, labels=label, **parts)
    return path


def test_nodes_are_the_largest_component_without_direction(example, archive):
    nodes = example.load(archive)
    assert len(nodes.label) == 180
    assert nodes.classes == CLASSES
    links, words = nodes.links.to_dense(), nodes.words.to_dense()
    assert torch.equal(links, links.T)
    assert links.unique().tolist() == [0, 1]
    assert links.sum(dim=1).tolist() == [5, 6, 5] + [4] * 177  # without the loop of node 5
    lengths = words.norm(dim=1)
    assert torch.allclose(lengths[lengths > 0], torch.ones(()))


def test_split_is_of_each_class_and_disjoint(example, archive):
    label = example.load(archive).label
    train, valid, test = example.split(label, 3)
    assert torch.cat([train, valid, test]).sort().values.tolist() == list(range(180))
    assert label[train].bincount().tolist() == [20] * CLASSES
    assert label[valid].bincount().tolist() == [30] * CLASSES
    assert not torch.equal(train, example.split(label, 4)[0])


@pytest.mark.parametrize("negatives", ["classes", "nodes"])
def test_loss_without_mutation_is_of_the_scores(example, negatives):
    """Cross-entropy + γ ULS over the classes' vectors, or over nodes of other classes."""
    torch.manual_seed(0)
    z, head, label = torch.randn(6, 4), nn.Linear(4, CLASSES), torch.tensor([0, 1, 2, 1, 0, 0])
    against = head.weight if negatives == "classes" else z
    of = torch.arange(CLASSES) if negatives == "classes" else label
    rows = []
    for q, own in zip(z, label, strict=True):
        others = (against[of != own] @ q)[None]
        rows.append(uls_cross_entropy((head.weight[own] @ q)[None], others, beta=0.3))
    expected = cross_entropy(head(z), label) + 2 * torch.stack(rows).mean()
    options = {"beta": 0.3, "gamma": 2.0, "negatives": negatives}
    torch.testing.assert_close(example.emu(z, head, label, rate=0.0, **options), expected)
    torch.testing.assert_close(example.expected(z, head, label, rate=0.0, **options), expected)
    mutated = example.emu(z, head, label, rate=0.5, **options)
    assert not torch.isclose(mutated, expected, rtol=1e-3)


def test_contrastive_loss_is_the_published(example):
    """The mean over anchors of −mean over positives p of log e^{s_p} / Σ_{a ≠ anchor} e^{s_a}."""
    torch.manual_seed(0)
    z, head, label = torch.randn(6, 4), nn.Linear(4, CLASSES), torch.tensor([0, 1, 2, 1, 2, 0])
    score = normalize(z) @ normalize(z).T / 0.3
    score.fill_diagonal_(-torch.inf)
    same = (label == label[:, None]).fill_diagonal_(False)
    expected = -score.log_softmax(dim=1)[same].mean()  # each anchor has one positive
    found = example.contrastive(z, head, label, temperature=0.3, gamma=0.5)
    torch.testing.assert_close(found, cross_entropy(head(z), label) + 0.5 * expected)


def test_it_learns(example, archive, monkeypatch):
    """The rings' words and links tell the class of nearly all nodes."""
    monkeypatch.setattr(example, "read", lambda graph: example.load(archive))
    for contender in ("cross-entropy", "EMU"):
        settings = example.CONTENDERS[contender][1][0]
        job = example.Job("rings", contender, settings, {"drop": 0.5, "decay": 0.0}, 0, steps=30)
        assert example.run(job).test > 80


def test_tiny_prints_its_table(example, archive, monkeypatch, capsys):
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    file = dataclasses.replace(
        example.GRAPHS["Cora"], name=archive.name, checksum=f"sha256:{digest}"
    )
    monkeypatch.setattr(example, "GRAPHS", {"rings": file})
    monkeypatch.setenv(FOLDER_VARIABLE, str(archive.parent))
    example.read.cache_clear()
    assert example.main(["--tiny"]) == 0
    out = capsys.readouterr().out
    assert "rings: 180 nodes, 3 classes, 2 splits" in out
    for name in example.CONTENDERS:
        assert f"\n| {name} " in out


def test_equal_budgets(example):
    budgets = {name: len(settings) for name, (_, settings) in example.CONTENDERS.items()}
    baseline = budgets.pop("cross-entropy")
    assert baseline == 1  # its settings are the encoder's
    assert set(budgets.values()) == {len(example.ENCODER)}


def test_missing_data_is_said(example, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    example.read.cache_clear()
    assert example.main(["--tiny"]) == 1
    assert "cora.npz is missing" in capsys.readouterr().err
