"""EMURankingLoss against sentence-transformers' own loss, and in its trainer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from sentence_transformers.util import cos_sim, dot_score, euclidean_sim
from torch import Tensor
from torch.nn.functional import cosine_similarity

from emu_kernels import Expected, emu_mutate, uls_cross_entropy
from emu_kernels.integrations.sentence_transformers import EMURankingLoss

WORDS = "red green blue apple leaf sky fruit tree air stone".split()  # noqa: SIM905
TEXTS = {
    "anchor": ["red fruit", "green tree", "blue air", "stone"],
    "positive": ["apple", "leaf", "sky", "stone"],
    "negative": ["sky", "apple", "leaf", "fruit"],
}


@pytest.fixture
def model() -> SentenceTransformer:
    """Means of word vectors: nothing is downloaded."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    tokenizer = Tokenizer(WordLevel({w: i for i, w in enumerate([*WORDS, "?"])}, unk_token="?"))
    tokenizer.pre_tokenizer = Whitespace()
    torch.manual_seed(0)
    return SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=16)], device="cpu")


def features(model: SentenceTransformer, *columns: str) -> list[dict[str, Tensor]]:
    return [model.preprocess(TEXTS[column]) for column in columns]


def evaluate(loss: Any, model: SentenceTransformer, *columns: str) -> tuple[Tensor, Tensor]:
    """The loss and the gradient of the word vectors."""
    model.zero_grad()
    value = loss(features(model, *columns), None)
    value.backward()
    (weight,) = model.parameters()
    assert weight.grad is not None
    return value.detach(), weight.grad.clone()


@pytest.mark.parametrize("similarity", [cos_sim, dot_score])
@pytest.mark.parametrize("columns", [("anchor", "positive"), tuple(TEXTS)])
def test_without_mutation_it_is_theirs(model, columns, similarity):
    ours = EMURankingLoss(
        model, mutation_rate=0.0, beta=0.0, alpha=0.3, scale=7.0, similarity_fct=similarity
    )
    theirs = MultipleNegativesRankingLoss(model, scale=7.0, similarity_fct=similarity)
    negatives = len(TEXTS["anchor"]) * (len(columns) - 1) - 1
    expected = [(1 / negatives + 0.3) * x for x in evaluate(theirs, model, *columns)]
    for actual, wanted in zip(evaluate(ours, model, *columns), expected, strict=True):
        torch.testing.assert_close(actual, wanted)


def test_mutation_of_unit_vectors(model):
    loss = EMURankingLoss(model, mutation_rate=0.5, beta=0.2, alpha=0.0, scale=5.0)
    anchors, positives, hard = (
        torch.nn.functional.normalize(model(x)["sentence_embedding"])
        for x in features(model, *TEXTS)
    )
    candidates = torch.cat([positives, hard])
    others = torch.tensor([[j for j in range(8) if j != i] for i in range(4)])
    torch.manual_seed(3)
    actual = loss(features(model, *TEXTS), None)
    torch.manual_seed(3)  # a mask depends on a negative's place: here that of its padded list
    padded = emu_mutate(positives, candidates.expand(4, -1, -1), mutation_rate=0.5)
    mutated = padded.gather(1, others[:, :, None].expand(-1, -1, 16))
    scores = 5.0 * torch.einsum("bd,bkd->bk", anchors, mutated)
    own = 5.0 * cosine_similarity(anchors, positives)
    torch.testing.assert_close(actual, uls_cross_entropy(own, scores, beta=0.2))


@pytest.mark.parametrize("rate", [0.3, Expected(0.3)])
def test_it_trains(model, rate):
    loss = EMURankingLoss(model, mutation_rate=rate, beta=0.1, alpha=0.5)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        loss(features(model, *TEXTS), None).backward()
        optimizer.step()
    encoded = [model.encode(TEXTS[column]) for column in ("anchor", "positive")]
    assert model.similarity(*encoded).argmax(1).tolist() == [0, 1, 2, 3]
    config = loss.get_config_dict()
    assert config["mutation_rate"] is rate
    assert config["scale"] == 20.0
    assert "2504.03327" in loss.citation


def test_bad_input(model):
    rates: dict[str, Any] = {"mutation_rate": 0.3, "beta": 0.1, "alpha": 0.5}
    with pytest.raises(ValueError, match="similarity_fct: expected cos_sim or dot_score"):
        EMURankingLoss(model, **rates, similarity_fct=euclidean_sim)
    with pytest.raises(ValueError, match=r"mutation_rate: .*1\.5"):
        EMURankingLoss(model, **rates | {"mutation_rate": 1.5})
    with pytest.raises(ValueError, match=r"beta: .*-1"):
        EMURankingLoss(model, **rates | {"beta": -1})
    with pytest.raises(ValueError, match="expected anchors and positives, got 1"):
        EMURankingLoss(model, **rates)(features(model, "anchor"), None)
