"""LibKGE's scorers as similarities of a query and a candidate.

LibKGE stores a complex vector as its real parts, then its imaginary parts, as
:mod:`emu_kernels.queries` does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from kge.model import KgeModel, LookupEmbedder, ReciprocalRelationsModel
from kge.model.complex import ComplExScorer
from kge.model.cp import CPScorer
from kge.model.distmult import DistMultScorer
from kge.model.kge_model import KgeEmbedder, RelationalScorer
from kge.model.rescal import RescalScorer
from kge.model.rotate import RotatEScorer
from kge.model.simple import SimplEScorer
from kge.model.transe import TransEScorer
from torch import Tensor

from emu_kernels import queries
from emu_kernels.queries import Side

S, P, O = 0, 1, 2  # noqa: E741
"""LibKGE's slots of a triple: subject, relation, object."""

MakeQuery = Callable[[Tensor, Tensor, Side], Tensor]
"""(given entity, relation, entity to predict) -> query, each (B, ...)"""


class Mapping(NamedTuple):
    """The kernels' name of a similarity, the query for it, and the part of a candidate to use."""

    similarity: str
    query: MakeQuery
    halved: bool = False
    """A candidate is the first half of its row as a subject, the second half as an object."""

    def candidates(self, rows: Tensor, to: Side) -> Tensor:
        if not self.halved:
            return rows
        as_subject, as_object = rows.chunk(2, dim=-1)
        return as_object if to == "tail" else as_subject


def _cp(given: Tensor, relation: Tensor, to: Side) -> Tensor:
    as_subject, as_object = given.chunk(2, dim=-1)
    return queries.distmult(as_subject if to == "tail" else as_object, relation, to)


_DOT: dict[type[RelationalScorer], Mapping] = {
    DistMultScorer: Mapping("dot", queries.distmult),
    ComplExScorer: Mapping("dot", queries.complex),
    CPScorer: Mapping("dot", _cp, halved=True),
    SimplEScorer: Mapping("dot", queries.simple),
    RescalScorer: Mapping("dot", queries.rescal),  # also the scorer of relational_tucker3
}
_DISTANCE: dict[type[RelationalScorer], tuple[MakeQuery, dict[float, str]]] = {
    TransEScorer: (queries.transe, {1: "l1", 2: "l2"}),
    RotatEScorer: (queries.rotate, {1: "rotate", 2: "l2"}),
}
_SCORES = ("score_spo", "score_sp", "score_po")


def map_model(model: KgeModel) -> Mapping:
    """The mapping of a model.

    It depends on the scorer's exact class: a subclass may score in another way.

    Raises:
        ValueError: the kernels cannot score the model.
    """
    scorer = model.get_scorer()
    kind = type(scorer)
    if kind in _DOT:
        mapping = _DOT[kind]
    elif kind in _DISTANCE:
        query, similarities = _DISTANCE[kind]
        norm = scorer.get_option("l_norm")
        if norm not in similarities:
            raise ValueError(f"l_norm: {kind.__name__} trains with EMU for 1 and 2, got {norm}")
        mapping = Mapping(similarities[norm], query)
    else:
        known = ", ".join(
            sorted(each.__name__.removesuffix("Scorer") for each in (*_DOT, *_DISTANCE))
        )
        raise ValueError(
            f"model: {kind.__name__} does not compare one query with the embedding of each entity "
            f"in a way that EMU's kernels know. They know {known} and RelationalTucker3; for this "
            "model set train.type to negative_sampling, 1vsAll or KvsAll"
        )
    if not isinstance(model, ReciprocalRelationsModel):
        own = [x for x in _SCORES if getattr(type(model), x) is not getattr(KgeModel, x)]
        if own:
            raise ValueError(
                f"model: {type(model).__name__} scores in a way of its own ({', '.join(own)}), "
                "which EMU cannot follow; set train.type to negative_sampling, 1vsAll or KvsAll"
            )
    return mapping


def fused_similarity(model: KgeModel) -> str | None:
    """The similarity by which the kernels score ``model``; None if they cannot."""
    try:
        return map_model(model).similarity
    except ValueError:
        return None


def query_of(
    model: KgeModel,
    mapping: Mapping,
    triples: Tensor,  # (B, 3)
    slot: int,
) -> tuple[Tensor, Side]:
    """A batch's queries for the entity in ``slot``, S or O, and its side as the mapping has it."""
    subject, relation, object_ = triples.unbind(dim=1)
    reciprocal = isinstance(model, ReciprocalRelationsModel)
    to: Side = "tail" if slot == O or reciprocal else "head"
    if slot == O:
        given = model.get_s_embedder().embed(subject)
    else:
        given = model.get_o_embedder().embed(object_)
        if reciprocal:  # (o, p⁻¹, ?) instead of (?, p, o)
            relation = relation + model.dataset.num_relations()
    return mapping.query(given, model.get_p_embedder().embed(relation), to), to


def embedder_of(model: KgeModel, slot: int) -> KgeEmbedder:
    """The embedder of the entities in ``slot``, S or O."""
    return model.get_s_embedder() if slot == S else model.get_o_embedder()


def plain_table(embedder: KgeEmbedder) -> Tensor | None:
    """The parameter whose rows are the embeddings; None if they are computed (dropout)."""
    if type(embedder) is LookupEmbedder and embedder.dropout.p <= 0:
        return embedder._embeddings.weight
    return None
