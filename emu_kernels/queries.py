"""The queries of published models: all of a score except the entity that is predicted.

Each function takes rows of the given entity and of the relation, and ``to``, the entity to predict:
with "tail" the query is of (head, relation, ?), with "head" of (?, relation, tail). Its similarity
to a row of the entity table is the model's score, in both directions::

    query = queries.rotate(entity[head], phase[relation])
    loss = fused_emu_loss(query, entity, tail, negative, similarity="rotate", ...)

Rows have shape (B, D), or any shape (..., D). A complex vector is stored as its d real parts, then
its d imaginary parts. Everything is differentiable, and nothing is normalized. Another ``to``, and
widths that do not fit, raise a ValueError.

CP (Hitchcock, 1927; Lacroix et al., 2018) has two embeddings of each entity, as head and as tail:
use :func:`distmult` of rows of the one table, with the other table as candidates.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from emu_kernels import validate

__all__ = [
    "complex",
    "distmult",
    "hake",
    "pairre",
    "protate",
    "rescal",
    "rotate",
    "simple",
    "transe",
    "tucker",
]

Side = Literal["tail", "head"]


def distmult(entity: Tensor, relation: Tensor, to: Side = "tail") -> Tensor:
    """DistMult, Σ_j h_j r_j t_j (Yang et al., "Embedding Entities and Relations for Learning and
    Inference in Knowledge Bases", ICLR 2015).

    Args:
        entity, relation: (B, D).

    Returns:
        (B, D), for similarity "dot".
    """
    _check(entity, relation, to, _width(entity))
    return entity * relation


def complex(entity: Tensor, relation: Tensor, to: Side = "tail") -> Tensor:
    """ComplEx, Re Σ_j h_j r_j conj(t_j) (Trouillon et al., "Complex Embeddings for Simple Link
    Prediction", ICML 2016).

    Args:
        entity, relation: (B, 2d), re‖im.

    Returns:
        (B, 2d), re‖im, for similarity "dot".
    """
    _check(entity, relation, to, _width(entity), even=True)
    re, im = relation.chunk(2, dim=-1)
    return _product(entity, re, -im if to == "head" else im)


def transe(entity: Tensor, relation: Tensor, to: Side = "tail") -> Tensor:
    """TransE, −‖h + r − t‖ (Bordes et al., "Translating Embeddings for Modeling Multi-relational
    Data", NeurIPS 2013).

    Args:
        entity, relation: (B, D).

    Returns:
        (B, D), for similarity "l1" or "l2".
    """
    _check(entity, relation, to, _width(entity))
    return entity + relation if to == "tail" else entity - relation


def rotate(entity: Tensor, phase: Tensor, to: Side = "tail") -> Tensor:
    """RotatE, −Σ_j |h_j e^{iθ_j} − t_j| (Sun et al., "RotatE: Knowledge Graph Embedding by
    Relational Rotation in Complex Space", ICLR 2019).

    Args:
        entity: (B, 2d), re‖im.
        phase: (B, d), θ of the relation in radians. (The authors' program stores θ (γ+2)/(πd).)

    Returns:
        (B, 2d), re‖im, for similarity "rotate"; or for "l2", the norm over all components, which
        some libraries use.
    """
    _check(entity, phase, to, _width(entity) // 2, even=True)
    sine = phase.sin()
    return _product(entity, phase.cos(), -sine if to == "head" else sine)


def protate(entity: Tensor, relation: Tensor, to: Side = "tail") -> Tensor:
    """pRotatE, −w Σ_j |sin((h_j + r_j − t_j) κ/2)| (Sun et al., ICLR 2019, as :func:`rotate`).

    Args:
        entity, relation: (B, D) phases, in units of 1/κ.

    Returns:
        (B, D), for similarity "protate" with ``phase_scale`` κ and ``similarity_weights`` (w,).
    """
    return transe(entity, relation, to)


def pairre(entity: Tensor, relation: Tensor, to: Side = "tail") -> tuple[Tensor, Tensor]:
    """PairRE, −‖h ⊙ r_h − t ⊙ r_t‖ (Chao et al., "PairRE: Knowledge Graph Embeddings via Paired
    Relation Vectors", ACL 2021). The paper normalizes h and t: pass normalized rows here, and a
    normalized table to the loss.

    Args:
        entity: (B, D).
        relation: (B, 2D), r_h‖r_t.

    Returns:
        The query (B, D) and ``scale`` (B, D), for similarity "l1" or "l2".
    """
    _check(entity, relation, to, 2 * _width(entity))
    of_head, of_tail = relation.chunk(2, dim=-1)
    if to == "head":
        of_head, of_tail = of_tail, of_head
    return entity * of_head, of_tail


def hake(entity: Tensor, relation: Tensor, to: Side = "tail") -> tuple[Tensor, Tensor]:
    """HAKE, −w_0 Σ_j |sin((h_p + r_p − t_p)_j κ/2)| − w_1 ‖h_m (|r_m| + r_b) − t_m (1 − r_b)‖₂
    (Zhang et al., "Learning Hierarchy-Aware Knowledge Graph Embeddings for Link Prediction", AAAI
    2020). r_b is clamped to [−|r_m|, 1], as in the authors' program.

    Args:
        entity: (B, 2d), phases h_p in units of 1/κ, then moduli h_m.
        relation: (B, 3d), phases r_p, moduli r_m, biases r_b.

    Returns:
        The query (B, 2d) and ``scale`` (B, d), for similarity "hake" with ``phase_scale`` κ and
        ``similarity_weights`` w.
    """
    _check(entity, relation, to, _width(entity) // 2 * 3, even=True)
    phase, modulus = entity.chunk(2, dim=-1)
    r_phase, r_modulus, r_bias = relation.chunk(3, dim=-1)
    r_modulus = r_modulus.abs()
    r_bias = torch.maximum(r_bias.clamp(max=1.0), -r_modulus)
    of_head, of_tail = r_modulus + r_bias, 1.0 - r_bias
    if to == "tail":
        return torch.cat((phase + r_phase, modulus * of_head), dim=-1), of_tail
    return torch.cat((phase - r_phase, modulus * of_tail), dim=-1), of_head


def simple(entity: Tensor, relation: Tensor, to: Side = "tail") -> Tensor:
    """SimplE, ½ Σ_j (h¹_j r_j t²_j + t¹_j r'_j h²_j) (Kazemi and Poole, "SimplE Embedding for Link
    Prediction in Knowledge Graphs", NeurIPS 2018).

    Args:
        entity: (B, 2d), the entity as head, then as tail.
        relation: (B, 2d), r, then its inverse r'.

    Returns:
        (B, 2d), for similarity "dot".
    """
    _check(entity, relation, to, _width(entity), even=True)
    as_head, as_tail = entity.chunk(2, dim=-1)
    forward, inverse = relation.chunk(2, dim=-1)
    if to == "head":
        forward, inverse = inverse, forward
    return torch.cat((as_tail * inverse, as_head * forward), dim=-1) * 0.5


def rescal(entity: Tensor, relation: Tensor, to: Side = "tail") -> Tensor:
    """RESCAL, hᵀ R t (Nickel et al., "A Three-Way Model for Collective Learning on Multi-Relational
    Data", ICML 2011).

    Args:
        entity: (B, D).
        relation: (B, D·D), the matrix R, row by row.

    Returns:
        (B, D), for similarity "dot".
    """
    dim = _width(entity)
    _check(entity, relation, to, dim * dim)
    matrix = relation.unflatten(-1, (dim, dim))
    return (entity.unsqueeze(-2) @ (matrix if to == "tail" else matrix.mT)).squeeze(-2)


def tucker(entity: Tensor, relation: Tensor, core: Tensor, to: Side = "tail") -> Tensor:
    """TuckER, W ×₁ h ×₂ r ×₃ t (Balažević et al., "TuckER: Tensor Factorization for Knowledge Graph
    Completion", EMNLP 2019).

    Args:
        entity: (B, D).
        relation: (B, D_r).
        core: (D, D_r, D), W.

    Returns:
        (B, D), for similarity "dot".
    """
    dim = _width(entity)
    if validate.any_tensor("core", core).ndim != 3 or core.shape[::2] != (dim, dim):
        raise ValueError(f"core: expected shape ({dim}, D_r, {dim}), got {tuple(core.shape)}")
    _check(entity, relation, to, core.shape[1])
    matrix = torch.einsum("...r,irj->...ij", relation, core)
    return rescal(entity, matrix.flatten(-2), to)


def _product(x: Tensor, re: Tensor, im: Tensor) -> Tensor:
    """x · (re + i·im) of (..., 2d) re‖im and (..., d) parts, as re‖im."""
    x_re, x_im = x.chunk(2, dim=-1)
    return torch.cat((x_re * re - x_im * im, x_re * im + x_im * re), dim=-1)


def _width(entity: Tensor) -> int:
    if validate.any_tensor("entity", entity).ndim == 0:
        raise ValueError("entity: expected rows (..., D), got a single number")
    return entity.shape[-1]


def _check(entity: Tensor, relation: Tensor, to: str, width: int, *, even: bool = False) -> None:
    validate.one_of("to", to, ("tail", "head"))
    if even and entity.shape[-1] % 2:
        raise ValueError(f"entity: expected rows of two halves, got shape {tuple(entity.shape)}")
    if validate.any_tensor("relation", relation).ndim == 0 or relation.shape[-1] != width:
        raise ValueError(
            f"relation: expected {width} values per row with entity {tuple(entity.shape)}, "
            f"got shape {tuple(relation.shape)}"
        )
