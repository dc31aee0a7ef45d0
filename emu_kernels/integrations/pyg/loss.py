"""EMU's loss of a PyG model and a batch of its loader."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch_geometric.nn.kge import ComplEx, DistMult, KGEModel, RotatE, TransE

from emu_kernels import fused_emu_loss, validate

CORRUPT = ("both", "head", "tail")

SideName = Literal["head", "tail"]
LookUp = Callable[[nn.Embedding], Tensor]  # -> (..., its width): some of its rows, or all


class _Kind(NamedTuple):
    """How a model scores, as a similarity of a query and a candidate."""

    similarity: Callable[[Any], str]
    entity: Callable[[Any, LookUp], Tensor]  # -> (..., D), as the model's score meets entities
    query: Callable[[Any, SideName, Tensor, Tensor], Tensor]  # of entities (B, D), rel_type (B,)


def emu_loss(
    model: KGEModel,
    head_index: Tensor,  # (B,)
    rel_type: Tensor,  # (B,)
    tail_index: Tensor,  # (B,)
    *,
    mutation_rate: float | Tensor,
    beta: float | Tensor,
    alpha: float | Tensor,
    num_negatives: int | None = None,
    negative: Tensor | None = None,  # (B, K)
    corrupt: str = "both",
    seed: int | Tensor | None = None,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """:func:`emu_kernels.fused_emu_loss` of a PyG model and a batch: takes ``model.loss``'s place.

    A model with ``sparse=True`` gets sparse gradients, and nothing of size N·D is allocated: only
    the rows that the batch touches are gathered.

    Args:
        model: ``TransE`` (with ``p_norm`` 1 or 2), ``DistMult``, ``ComplEx`` or ``RotatE``.
        head_index, rel_type, tail_index: (B,) int64, as the model's own loader yields them.
        num_negatives: K uniform negatives for each triple, from torch's default generator.
        negative: (B, K) int64 ids instead; −1 is padding.
        corrupt: "both" replaces the head in the first half of the batch and the tail in the rest,
            as the model's own ``random_sample`` does; "head" or "tail" that one in all.
        mutation_rate, beta, alpha, seed, reduction, backend: as in
            :func:`emu_kernels.fused_emu_loss`.

    Returns:
        The loss: a scalar, or (B,) for reduction "none".

    Raises:
        TypeError: another model.
        ValueError: another ``p_norm``, both or neither of ``num_negatives`` and ``negative``, or
            shapes that do not fit.
        IndexError: an id out of range.
    """
    kind = _kind(model)
    validate.one_of("corrupt", corrupt, CORRUPT)
    size = len(head_index)
    if negative is None and num_negatives is not None:
        negative = torch.randint(model.num_nodes, (size, num_negatives), device=head_index.device)
    elif negative is None or num_negatives is not None:
        raise ValueError("negative: expected it or num_negatives, not both and not neither")
    if negative.ndim != 2 or len(negative) != size:
        raise ValueError(
            f"negative: expected shape ({size}, K), a set for each triple, "
            f"got {tuple(negative.shape)}"
        )
    heads = {"both": size // 2, "head": size, "tail": 0}[corrupt]  # rows that lose their head
    positive = torch.cat([head_index[:heads], tail_index[heads:]])
    given = torch.cat([tail_index[:heads], head_index[heads:]])
    rows = kind.entity(model, lambda embedding: embedding(given))
    query = torch.cat(
        [
            kind.query(model, "head", rows[:heads], rel_type[:heads]),
            kind.query(model, "tail", rows[heads:], rel_type[heads:]),
        ]
    )
    if model.node_emb.sparse:
        touched, positive, negative = _touched(positive, negative)
        table = kind.entity(model, lambda embedding: embedding(touched))
    else:
        table = kind.entity(model, lambda embedding: embedding.weight)
    return fused_emu_loss(
        query,
        table,
        positive,
        negative,
        similarity=kind.similarity(model),
        mutation_rate=mutation_rate,
        beta=beta,
        alpha=alpha,
        seed=seed,
        reduction=reduction,
        backend=backend,
    )


def _kind(model: KGEModel) -> _Kind:
    # By the exact class: a subclass may score in another way.
    if type(model) not in _KINDS:
        known = ", ".join(kind.__name__ for kind in _KINDS)
        raise TypeError(
            f"model: expected one of torch_geometric.nn.kge's {known}, got "
            f"{type(model).__name__}; for another, see emu_kernels.emu_mutate"
        )
    return _KINDS[type(model)]


def _touched(positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The batch's distinct ids, and positive and negative as places among them."""
    ids, place = torch.cat([positive, negative.flatten()]).unique(return_inverse=True)
    positive, negative = place[: len(positive)], place[len(positive) :].view_as(negative)
    padding = (ids < 0).sum()  # 0 or 1: ids are sorted, and −1 comes first
    return ids.clamp(min=0), positive, torch.where(negative < padding, -1, negative)


def _p_norm(model: TransE) -> str:
    if model.p_norm not in (1, 2):
        raise ValueError(f"model: expected TransE with p_norm 1 or 2, got {model.p_norm}")
    return f"l{int(model.p_norm)}"


def _real(model: DistMult, look_up: LookUp) -> Tensor:
    return look_up(model.node_emb)


def _normalized(model: TransE, look_up: LookUp) -> Tensor:
    return normalize(look_up(model.node_emb), p=model.p_norm, dim=-1)


def _complex(model: ComplEx | RotatE, look_up: LookUp) -> Tensor:
    """re‖im."""
    return torch.cat([look_up(model.node_emb), look_up(model.node_emb_im)], dim=-1)


def _product(model: DistMult, side: SideName, given: Tensor, rel_type: Tensor) -> Tensor:
    out: Tensor = given * model.rel_emb(rel_type)
    return out


def _translation(model: TransE, side: SideName, given: Tensor, rel_type: Tensor) -> Tensor:
    relation: Tensor = model.rel_emb(rel_type)
    return given + relation if side == "tail" else given - relation


def _complex_product(model: ComplEx, side: SideName, given: Tensor, rel_type: Tensor) -> Tensor:
    return _times(given, model.rel_emb(rel_type), model.rel_emb_im(rel_type), side)


def _rotation(model: RotatE, side: SideName, given: Tensor, rel_type: Tensor) -> Tensor:
    phase: Tensor = model.rel_emb(rel_type)
    return _times(given, phase.cos(), phase.sin(), side)


def _times(given: Tensor, re: Tensor, im: Tensor, side: SideName) -> Tensor:
    """given · (re + i·im), or for heads given · (re − i·im), as re‖im."""
    if side == "head":
        im = -im
    g_re, g_im = given.chunk(2, dim=-1)
    return torch.cat([g_re * re - g_im * im, g_re * im + g_im * re], dim=-1)


_KINDS: dict[type[KGEModel], _Kind] = {
    TransE: _Kind(_p_norm, _normalized, _translation),
    DistMult: _Kind(lambda _: "dot", _real, _product),
    ComplEx: _Kind(lambda _: "dot", _complex, _complex_product),
    # The plain 2-norm over all components, not the sum of moduli; its margin cancels in a softmax.
    RotatE: _Kind(lambda _: "l2", _complex, _rotation),
}
