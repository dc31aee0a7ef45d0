"""A model's query and similarity against its published scoring function."""

from __future__ import annotations

import pytest
import torch

from emu_kernels.trainer.data import DIRECTIONS
from emu_kernels.trainer.models import MODELS, Model

DIM = 6


def make(name: str) -> Model:
    return MODELS[name](9, 4, DIM, torch.Generator().manual_seed(0))


def published_score(name: str, h: torch.Tensor, r: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    if name == "DistMult":
        return (h * r * t).sum(-1)
    assert name == "ComplEx"
    h, r, t = (torch.complex(x[..., :DIM], x[..., DIM:]) for x in (h, r, t))
    return (h * r * t.conj()).sum(-1).real


@pytest.mark.parametrize("name", MODELS)
def test_both_directions_score_a_triple_as_published(name):
    model = make(name)
    head, relation, tail = torch.cartesian_prod(torch.arange(9), torch.arange(4), torch.arange(9)).T
    h, r, t = model.entity[head], model.relation[relation], model.entity[tail]
    expected = published_score(name, h, r, t)
    for direction in DIRECTIONS:
        given, target = (h, tail) if direction == "tail" else (t, head)
        scores = model.score(model.query(given, r, direction), model.entity)
        found = scores.gather(1, target.unsqueeze(1)).squeeze(1)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_initial_values_fill_their_range(name):
    model = MODELS[name](500, 40, 100, torch.Generator().manual_seed(0))
    for parameter in model.parameters():
        assert 0.255 < parameter.abs().max() <= 0.26  # (γ + 2) / d, γ = 24
        assert parameter.mean().abs() < 0.01
