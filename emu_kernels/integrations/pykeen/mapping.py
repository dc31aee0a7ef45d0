"""PyKEEN's interactions as similarities of a query and a candidate.

Complex numbers stay in PyKEEN's order, re and im alternating, which changes neither a dot product
nor a 2-norm.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from pykeen.models import ERModel
from pykeen.nn.modules import (
    ClampedInteraction,
    ComplExInteraction,
    CPInteraction,
    DistMultInteraction,
    Interaction,
    NormBasedInteraction,
    PairREInteraction,
    RESCALInteraction,
    RotatEInteraction,
    SimplEInteraction,
    TransEInteraction,
)
from pykeen.nn.representation import Representation
from pykeen.utils import ensure_complex
from torch import Tensor

from emu_kernels import queries

from .sides import SideName

Parts = list[Tensor]  # representations of one kind, each (..., *its shape)


class Query(NamedTuple):
    """What candidates are compared with, in the interaction's shapes."""

    vector: Parts  # each (B, ...)
    scale: Parts | None = None


MakeQuery = Callable[[SideName, Parts, Parts], Query]
"""(corrupted side, given entity, relation) -> query"""


def flat(parts: Parts, batch_dims: int = 1) -> Tensor:
    """(..., D): the parts concatenated as real numbers; a complex number is re, then im."""
    reals = [torch.view_as_real(x) if x.is_complex() else x for x in parts]
    # A representation may be a single number (ConvE's bias), which has no dimension to flatten.
    rows = [x.reshape(*x.shape[:batch_dims], math.prod(x.shape[batch_dims:])) for x in reals]
    return rows[0] if len(rows) == 1 else torch.cat(rows, dim=-1)


def _product(side: SideName, given: Parts, relation: Parts) -> Query:
    return Query([given[0] * (relation[0] if side == "tail" else relation[0].conj())])


def _rotation(side: SideName, given: Parts, relation: Parts) -> Query:
    return _product(side, list(ensure_complex(*given)), list(ensure_complex(*relation)))


def _translation(side: SideName, given: Parts, relation: Parts) -> Query:
    return Query([queries.transe(given[0], relation[0], side)])


def _pair(side: SideName, given: Parts, relation: Parts) -> Query:
    query, scale = queries.pairre(given[0], torch.cat(relation, dim=-1), side)
    return Query([query], [scale])


def _bilinear(side: SideName, given: Parts, relation: Parts) -> Query:
    return Query([queries.rescal(given[0], relation[0].flatten(start_dim=1), side)])


def _average(side: SideName, given: Parts, relation: Parts) -> Query:
    return Query([0.5 * x * r for x, r in zip(given, relation, strict=True)])


def _norm(interaction: Interaction) -> str | None:
    assert isinstance(interaction, NormBasedInteraction)
    if interaction.p == 1:
        return "l1"  # with or without power_norm
    return "l2" if interaction.p == 2 and not interaction.power_norm else None


class Mapping(NamedTuple):
    """The kernels' name of a similarity, and the query for it."""

    similarity: str
    query: MakeQuery


_QUERIES: dict[type[Interaction], tuple[Callable[[Interaction], str | None], MakeQuery]] = {
    DistMultInteraction: (lambda _: "dot", _product),
    ComplExInteraction: (lambda _: "dot", _product),
    CPInteraction: (lambda _: "dot", _product),
    SimplEInteraction: (lambda _: "dot", _average),
    RESCALInteraction: (lambda _: "dot", _bilinear),
    TransEInteraction: (_norm, _translation),
    # Its forward uses the plain 2-norm, whatever its p is.
    RotatEInteraction: (lambda _: "l2", _rotation),
    PairREInteraction: (_norm, _pair),
}


def map_model(model: ERModel) -> tuple[Mapping | None, str]:
    """The mapping of a model, or None and the reason.

    It depends on the interaction's exact class: a subclass may score in another way.
    """
    interaction = model.interaction
    if type(interaction) is ClampedInteraction and interaction.clamp_score is None:
        interaction = interaction.base  # SimplE's default
    name = type(interaction).__name__
    if type(interaction) not in _QUERIES:
        return None, f"{name} is not a similarity that the kernels know"
    similarity_of, query = _QUERIES[type(interaction)]
    similarity = similarity_of(interaction)
    if similarity is None:
        assert isinstance(interaction, NormBasedInteraction)
        return None, (
            f"{name} with p={interaction.p}, power_norm={interaction.power_norm} is not a "
            "similarity that the kernels know"
        )
    parts = [part for x in model.entity_representations for part in x.modules()]
    if any(isinstance(part, Representation) and part.dropout is not None for part in parts):
        return None, "the entity representations have a dropout, drawn at each look-up"
    return Mapping(similarity, query), ""


def fused_similarity(model: ERModel) -> str | None:
    """The similarity by which the kernels score ``model``; None if they cannot."""
    mapping, _ = map_model(model)
    return None if mapping is None else mapping.similarity
