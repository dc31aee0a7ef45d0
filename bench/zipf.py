"""Random triples with the degrees of a real graph, at any size."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def zipf_ids(count: int, size: int, generator: torch.Generator) -> Tensor:
    """(count,) of [0, size), the id of rank i with a probability close to 1 / i.

    Zipf's law with exponent 1 is nearly that of (size + 1)^u, rounded down, for uniform u.
    """
    uniform = torch.rand(count, generator=generator, dtype=torch.float64)
    rank = uniform.mul_(math.log(size + 1)).exp_().long()
    return rank.clamp_(1, size) - 1


def zipf_triples(entities: int, relations: int, triples: int, seed: int = 0) -> Tensor:
    """(triples, 3) of ids: entities and relations have degrees by Zipf's law.

    Which entities are frequent is random, so that their rows lie apart, as in a real table.
    """
    generator = torch.Generator().manual_seed(seed)
    name = torch.randperm(entities, generator=generator)
    columns = [
        name[zipf_ids(triples, entities, generator)],
        zipf_ids(triples, relations, generator),
        name[zipf_ids(triples, entities, generator)],
    ]
    return torch.stack(columns, dim=1)
