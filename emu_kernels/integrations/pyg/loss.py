"""EMU's loss of a PyG model and a batch of its loader."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch_geometric.nn.kge import ComplEx, DistMult, KGEModel, RotatE, TransE

from emu_kernels import MutationRate, fused_emu_loss, queries, validate
from emu_kernels.values import check_ids

CORRUPT = ("both", "head", "tail")

MODELS = (TransE, DistMult, ComplEx, RotatE)

Side = Literal["head", "tail"]  # the side of a triple that is corrupted


def emu_loss(
    model: KGEModel,
    head_index: Tensor,  # (B,)
    rel_type: Tensor,  # (B,)
    tail_index: Tensor,  # (B,)
    *,
    mutation_rate: MutationRate,
    beta: float | Tensor,
    alpha: float | Tensor,
    num_negatives: int | None = None,
    negative: Tensor | None = None,  # (B, K)
    corrupt: str = "both",
    seed: int | Tensor | None = None,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """:func:`emu_kernels.fused_emu_loss` of a PyG model and a batch, to replace ``model.loss``.

    A model with ``sparse=True`` gets sparse gradients, and nothing of size N·D is allocated: only
    the rows that the batch uses are gathered.

    Args:
        model: ``TransE`` (with ``p_norm`` 1 or 2), ``DistMult``, ``ComplEx`` or ``RotatE``.
        head_index, rel_type, tail_index: (B,) int64, as the model's own loader yields them.
        num_negatives: K uniform negatives for each triple, from torch's default generator.
        negative: (B, K) int64 ids to use instead of drawn ones; −1 is padding.
        corrupt: "both" replaces the head in the first half of the batch and the tail in the rest,
            as the model's own ``random_sample`` does; "head" or "tail" replaces that side in all
            rows.
        mutation_rate, beta, alpha, seed, reduction, backend: as in
            :func:`emu_kernels.fused_emu_loss`.

    Returns:
        The loss: a scalar, or (B,) for reduction "none".

    Raises:
        TypeError: an unsupported model.
        ValueError: an unsupported ``p_norm``, both or neither of ``num_negatives`` and
            ``negative``, or shapes that do not fit.
        IndexError: an id out of range.
    """
    if type(model) not in MODELS:  # the exact class: a subclass may score in another way
        known = ", ".join(kind.__name__ for kind in MODELS)
        raise TypeError(
            f"model: expected one of torch_geometric.nn.kge's {known}, got "
            f"{type(model).__name__}; for another, see emu_kernels.emu_mutate"
        )
    validate.one_of("corrupt", corrupt, CORRUPT)
    size = len(head_index)
    if negative is None and num_negatives is not None:
        validate.at_least(0, "num_negatives", num_negatives)
        negative = torch.randint(model.num_nodes, (size, num_negatives), device=head_index.device)
    elif negative is None or num_negatives is not None:
        raise ValueError("negative: expected either it or num_negatives, got both or neither")
    if negative.ndim != 2 or len(negative) != size:
        raise ValueError(
            f"negative: expected shape ({size}, K), a set for each triple, "
            f"got {tuple(negative.shape)}"
        )
    heads = {"both": size // 2, "head": size, "tail": 0}[corrupt]  # rows whose head is corrupted
    positive = torch.cat([head_index[:heads], tail_index[heads:]])
    given = _entities(model, torch.cat([tail_index[:heads], head_index[heads:]]))
    query = torch.cat(
        [
            _query(model, "head", given[:heads], rel_type[:heads]),
            _query(model, "tail", given[heads:], rel_type[heads:]),
        ]
    )
    used = None
    if model.node_emb.sparse:
        used, positive, negative = _used_entities(positive, negative, model.num_nodes)
    return fused_emu_loss(
        query,
        _entities(model, used),
        positive,
        negative,
        similarity=_similarity(model),
        mutation_rate=mutation_rate,
        beta=beta,
        alpha=alpha,
        seed=seed,
        reduction=reduction,
        backend=backend,
    )


def _used_entities(positive: Tensor, negative: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """The batch's distinct ids, and positive and negative as indices into them."""
    for name, given, lowest in (("positive", positive, 0), ("negative", negative, -1)):
        validate.integer(name, given)
        check_ids(name, given, rows=rows, lowest=lowest)
    ids, index = torch.cat([positive, negative.flatten()]).unique(return_inverse=True)
    padding = int((ids[:1] < 0).sum())  # 0 or 1: ids are sorted, and −1 comes first
    index = index - padding  # padding is −1 again
    return ids[padding:], index[: len(positive)], index[len(positive) :].view_as(negative)


def _similarity(model: KGEModel) -> str:
    if isinstance(model, TransE):
        if model.p_norm not in (1, 2):
            raise ValueError(f"model: expected TransE with p_norm 1 or 2, got {model.p_norm}")
        return f"l{int(model.p_norm)}"
    # RotatE is the plain 2-norm over all components, not the sum of moduli; its margin cancels in
    # a softmax.
    return "l2" if isinstance(model, RotatE) else "dot"


def _entities(model: KGEModel, ids: Tensor | None) -> Tensor:
    """(..., D): entities as the model's score takes them, re‖im if complex; all of them for None.

    DistMult's whole table is not copied.
    """

    def rows(embedding: torch.nn.Embedding) -> Tensor:
        return embedding.weight if ids is None else embedding(ids)

    entities = rows(model.node_emb)
    if isinstance(model, TransE):
        return normalize(entities, p=model.p_norm, dim=-1)
    if isinstance(model, (ComplEx, RotatE)):
        return torch.cat([entities, rows(model.node_emb_im)], dim=-1)
    return entities


def _query(model: KGEModel, side: Side, given: Tensor, rel_type: Tensor) -> Tensor:
    """(B, D): the query for candidates on `side`, of the given entities (B, D) and relations."""
    relation: Tensor = model.rel_emb(rel_type)
    if isinstance(model, DistMult):
        return queries.distmult(given, relation, side)
    if isinstance(model, TransE):
        return queries.transe(given, relation, side)
    if isinstance(model, RotatE):
        return queries.rotate(given, relation, side)
    relation = torch.cat([relation, model.rel_emb_im(rel_type)], dim=-1)
    return queries.complex(given, relation, side)
