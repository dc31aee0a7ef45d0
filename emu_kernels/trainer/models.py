"""Models: how an entity and a relation become a query, and what the query is compared with.

A model scores φ(query, candidate), where the query is all of the model except the entity that is
predicted. Only φ over many candidates is heavy, and it lives in the kernels; what is here is a
table of entities, a table of relations, and a small piece of ordinary PyTorch between them.

A new model is one subclass and one entry in :data:`MODELS`.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from .data import Direction

MARGIN = 24.0  # γ: in a softmax loss it matters for the initialisation only


class Model(nn.Module):
    """Two embedding tables and the query between them.

    Args:
        num_entities: N.
        num_relations: R.
        dim: d, the model's dimension; a row may be wider (ComplEx stores 2d reals).
        generator: draws the initial values, U(−(γ+2)/d, (γ+2)/d), on the CPU.
    """

    similarity: ClassVar[str]  # φ, by the name the kernels know it by
    entity_width: ClassVar[int] = 1  # reals an entity row holds for each dimension
    relation_width: ClassVar[int] = 1

    def __init__(
        self, num_entities: int, num_relations: int, dim: int, generator: torch.Generator
    ) -> None:
        super().__init__()
        bound = (MARGIN + 2.0) / dim
        self.dim = dim

        def table(rows: int, width: int) -> nn.Parameter:
            values = torch.empty(rows, width * dim)
            return nn.Parameter(values.uniform_(-bound, bound, generator=generator))

        self.entity = table(num_entities, self.entity_width)  # (N, D)
        self.relation = table(num_relations, self.relation_width)  # (R, D_r)

    def query(self, entity: Tensor, relation: Tensor, direction: Direction) -> Tensor:
        """The query for (entity, relation, ?) where `direction` is "tail", else for (?, r, e).

        Args:
            entity: (B, D) rows of the entity that is given.
            relation: (B, D_r) rows of the relation.

        Returns:
            (B, D).
        """
        raise NotImplementedError

    def score(self, query: Tensor, candidates: Tensor) -> Tensor:
        """φ of each query (B, D) with each candidate (C, D), as (B, C)."""
        raise NotImplementedError


class DotProduct(Model):
    """Models whose φ is the dot product."""

    similarity = "dot"

    def score(self, query: Tensor, candidates: Tensor) -> Tensor:
        return query @ candidates.T


class DistMult(DotProduct):
    """⟨h, r, t⟩ (Yang et al., 2015)."""

    def query(self, entity: Tensor, relation: Tensor, direction: Direction) -> Tensor:
        return entity * relation


class ComplEx(DotProduct):
    """Re⟨h, r, conj(t)⟩ (Trouillon et al., 2016). A row holds d real parts, then d imaginary."""

    entity_width = 2
    relation_width = 2

    def query(self, entity: Tensor, relation: Tensor, direction: Direction) -> Tensor:
        e_re, e_im = entity.chunk(2, dim=-1)
        r_re, r_im = relation.chunk(2, dim=-1)
        if direction == "head":
            r_im = -r_im  # conj(r)·t
        return torch.cat((e_re * r_re - e_im * r_im, e_re * r_im + e_im * r_re), dim=-1)


MODELS: dict[str, type[Model]] = {"DistMult": DistMult, "ComplEx": ComplEx}
