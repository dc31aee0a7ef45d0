"""docs/swap-in.md: TorchKGE's scores are those of the query and the table that the page names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from emu_kernels import emu_scores, queries

models: Any = pytest.importorskip("torchkge.models")

N, R, D = 9, 4, 6


def both(re: Any, im: Any) -> Tensor:
    return torch.cat([re.weight, im.weight], dim=1)


def make(name: str) -> tuple[Any, Tensor, Tensor, Any, str]:
    """A model, the table and all relations as the page gives them, query and similarity."""
    torch.manual_seed(0)
    if name == "TransE":
        model = models.TransEModel(D, N, R, dissimilarity_type="L1")
    else:
        model = getattr(models, f"{name}Model")(D, N, R)
    if name == "ComplEx":
        table = both(model.re_ent_emb, model.im_ent_emb)
        return model, table, both(model.re_rel_emb, model.im_rel_emb), queries.complex, "dot"
    torch.nn.init.normal_(model.ent_emb.weight)  # not normalized, as after a step
    table = normalize(model.ent_emb.weight, dim=1)
    if name == "TransE":
        return model, table, model.rel_emb.weight, queries.transe, "l1"
    return model, table, model.rel_emb.weight, queries.distmult, "dot"


@pytest.mark.parametrize("name", ["DistMult", "TransE", "ComplEx"])
def test_scores_are_torchkges(name: str) -> None:
    model, table, relations, query_of, similarity = make(name)
    head, tail, relation = torch.randint(N, (5,)), torch.randint(N, (5,)), torch.randint(R, (5,))
    expected = model.scoring_function(head, tail, relation)
    for given, positive, to in ((head, tail, "tail"), (tail, head, "head")):
        query = query_of(table[given], relations[relation], to)
        scores = emu_scores(
            query, table, positive, torch.arange(N), similarity=similarity, mutation_rate=None
        )
        torch.testing.assert_close(scores.positive, expected)
        candidates = torch.arange(N).repeat(5)
        ends = [given.repeat_interleave(N), candidates]
        wanted = model.scoring_function(
            *(ends if to == "tail" else ends[::-1]), relation.repeat_interleave(N)
        )
        torch.testing.assert_close(scores.negative.flatten(), wanted)
