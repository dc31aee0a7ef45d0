"""The example of retrieval: its data, samplers, ranks and losses, and a tiny run on made events."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

from emu_kernels import fused_emu_loss, fused_softmax_loss
from emu_kernels.trainer.datasets import FOLDER_VARIABLE

from .test_examples import ROOT, load

USERS, ITEMS, EACH = 20, 30, 8


@pytest.fixture(scope="module")
def example() -> ModuleType:
    return load("retrieval")


@pytest.fixture
def ratings(tmp_path: Path) -> Path:
    """Each user watches a run of items in order; the lines of the file are shuffled."""
    lines = [
        (user + 1, (3 * user + step) % ITEMS + 1, 5, 1000 + 10 * step)
        for user in range(USERS)
        for step in range(EACH)
    ]
    path = tmp_path / "u.data"
    np.savetxt(path, np.random.default_rng(0).permutation(lines), fmt="%d", delimiter="\t")
    return path


def test_the_last_by_time_are_held_out(example, ratings):
    data = example.load(ratings)
    assert (data.users, data.items) == (USERS, ITEMS)
    assert data.test.user.tolist() == list(range(USERS))
    first = 3 * torch.arange(USERS)
    assert torch.equal(data.test.item, (first + EACH - 1) % ITEMS)
    assert torch.equal(data.valid.item, (first + EACH - 2) % ITEMS)
    assert len(data.train.item) == USERS * (EACH - 2)
    before = [(2 * 3 + step) % ITEMS for step in range(EACH - 2, -1, -1)]
    assert data.test.history[2].tolist() == before + [ITEMS] * (example.HISTORY - len(before))
    assert data.train.history[0].tolist() == [ITEMS] * example.HISTORY


def test_ranks(example):
    """Seen items are left out; ties count half."""
    score = torch.tensor([[9.0, 5, 7, 3], [1, 1, 1, 0]])
    seen = torch.tensor([[True, False, False, False], [False] * 4])
    held = example.Events(torch.arange(2), torch.tensor([1, 0]), torch.zeros(2, 1))
    recall, ndcg = example.rank(score, held, seen)
    assert recall.tolist() == [1, 1]
    assert ndcg.tolist() == pytest.approx([1 / np.log2(3), 1 / np.log2(3)])


@pytest.mark.parametrize("kind", ["uniform", "in-batch", "mixed"])
def test_probabilities_are_those_of_the_draws(example, ratings, kind):
    data = example.load(ratings)
    probability = example.log_probability(kind, data).exp()
    torch.manual_seed(0)
    drawn = example.sample(kind, data, data.train.item, 200_000)
    share = drawn.bincount(minlength=ITEMS) / len(drawn)
    torch.testing.assert_close(share, probability, atol=0.003, rtol=0)


def test_corrected_softmax(example):
    """Of scores minus log q; padding is ignored, and a constant log q changes nothing."""
    torch.manual_seed(0)
    query, table, log_q = torch.randn(3, 4), torch.randn(6, 4), torch.randn(6)
    positive, negative = torch.tensor([0, 1, 2]), torch.tensor([[3, 4], [5, -1], [1, 1]])
    rows = [
        cross_entropy((table[ids] @ q - log_q[ids])[None], torch.tensor([0]))
        for q, ids in zip(query, ([0, 3, 4], [1, 5], [2, 1, 1]), strict=True)
    ]
    found = example.softmax(query, table, positive, negative, log_q)
    torch.testing.assert_close(found, torch.stack(rows).mean())
    plain = example.softmax(query, table, positive, negative)
    constant = torch.full((6,), -2.0)
    torch.testing.assert_close(example.softmax(query, table, positive, negative, constant), plain)
    assert not torch.isclose(found, plain)


def test_bpr(example):
    """With one set for the batch, in which a row's own item is ignored."""
    query, table = torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [1.0]])
    loss = example.bpr(query, table, torch.tensor([0, 1]), torch.tensor([[1, -1], [-1, 0]]))
    assert float(loss) == pytest.approx((np.log1p(np.exp(-2)) + np.log1p(np.exp(4))) / 2)


def test_equal_budgets(example):
    assert len({len(settings) for *_, settings in example.CONTENDERS.values()}) == 1


@pytest.mark.parametrize("contender", ["softmax, uniform", "softmax, mixed, logQ", "EMU"])
def test_it_learns(example, ratings, monkeypatch, contender):
    """By chance ten of 30 items are right; the last item watched determines the next."""
    monkeypatch.setattr(example, "read", lambda: example.load(ratings))
    monkeypatch.setattr(example, "BATCH", 60)
    settings = example.CONTENDERS[contender][2][0]
    job = example.Job(contender, {"lr": 0.03, "decay": 0.01} | settings, 0, epochs=30)
    assert float(example.train(job).recall.mean()) > 0.7


def test_tiny_prints_its_table(example, ratings, monkeypatch, capsys):
    checksum = f"sha256:{hashlib.sha256(ratings.read_bytes()).hexdigest()}"
    file = dataclasses.replace(example.RATINGS, name=ratings.name, checksum=checksum)
    monkeypatch.setattr(example, "RATINGS", file)
    monkeypatch.setenv(FOLDER_VARIABLE, str(ratings.parent))
    example.read.cache_clear()
    assert example.main(["--tiny"]) == 0
    out = capsys.readouterr().out
    assert "20 users, 30 items, 2 seeds" in out
    for name in ("popularity", *example.CONTENDERS):
        assert f"\n| {name} " in out


def test_missing_data_is_said(example, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    example.read.cache_clear()
    assert example.main(["--tiny"]) == 1
    assert "u.data is missing" in capsys.readouterr().err


def test_the_page_s_loop_over_sentences_runs():
    """Its lines as they are, with a table of embeddings as the encoder."""
    page = (ROOT / "docs" / "retrieval.md").read_text()
    (block,) = (x for x in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "loader" in x)
    words = torch.nn.Embedding(12, 4)
    names: dict[str, Any] = {
        "loader": [([0, 1], [2, 3], [4, 5, 6, 7])],
        "encode": lambda texts: words(torch.tensor(texts)),
        "normalize": normalize,
        "torch": torch,
        "fused_emu_loss": fused_emu_loss,
    }
    exec(block, names)
    scores = names["query"] @ names["table"].T
    assert names["negative"].tolist() == [[-1, 1, 2, 3, 4, 5], [0, -1, 2, 3, 4, 5]]
    plain = fused_softmax_loss(*(names[x] for x in ("query", "table", "positive", "negative")))
    torch.testing.assert_close(plain, cross_entropy(scores, torch.arange(2)))
    names["loss"].backward()
    assert words.weight.grad is not None
    assert int((words.weight.grad.abs().sum(dim=1) > 0).sum()) == 8
