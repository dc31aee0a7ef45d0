"""EMU's loss of a PyKEEN model and a batch of PyKEEN's positives and negatives."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from pykeen.models import ERModel, Model
from pykeen.nn.modules import Interaction
from pykeen.nn.representation import Representation
from pykeen.typing import InductiveMode
from torch import Tensor

from emu_kernels import (
    Expected,
    emu_mutate,
    fused_emu_loss,
    prepare,
    uls_cross_entropy,
    validate,
)
from emu_kernels.reference import softmax_rows

from .mapping import Mapping, Parts, Query, flat, map_model
from .sides import Side, split_sides

REDUCTIONS = ("mean", "sum")


def emu_loss(
    model: Model,
    positives: Tensor,  # (B, 3)
    negatives: Tensor,  # (B, K, 3)
    masks: Tensor | None = None,  # (B, K)
    *,
    mutation_rate: float | Tensor | Expected,
    beta: float | Tensor,
    alpha: float | Tensor,
    weights: Tensor | None = None,  # (B,)
    seed: int | Tensor | None = None,
    mode: InductiveMode | None = None,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """:func:`emu_kernels.fused_emu_loss` of a PyKEEN model and a batch of its samplers.

    Runs the fused kernels if :func:`fused_similarity` names a similarity, else
    :func:`emu_kernels.emu_mutate` and PyKEEN's own interaction, with tensors of size B·K·D.
    Regularizers of representations see the positives; ``model.collect_regularization_term()``
    returns their term, which is not part of the loss.

    Args:
        model: an ``ERModel``.
        positives: (B, 3) integer triples. On the CPU, where PyKEEN's loader leaves them, the checks
            do not have to wait for a GPU.
        negatives: (B, K, 3) with the head or the tail replaced.
        masks: (B, K) bool, False where a filter drops the negative.
        mutation_rate, beta, alpha, seed, backend: as in :func:`emu_kernels.fused_emu_loss`.
        weights: (B,) of each positive's loss. As in PyKEEN, the mean does not divide by their sum.
        mode: PyKEEN's inductive mode.
        reduction: "mean", over the B positives, or "sum".

    Returns:
        The loss, a scalar on the model's device.

    Raises:
        TypeError, ValueError: a model or a batch that cannot be mutated, or an argument that
            :func:`emu_kernels.fused_emu_loss` refuses.
    """
    model = checked_model(model)
    validate.one_of("reduction", reduction, REDUCTIONS)
    device = model.device
    sides = [side.to(device) for side in split_sides(positives, negatives, masks, weights)]
    triples = positives.to(device, non_blocking=True)
    # Looked up once for both sides, so that regularizers see each representation once.
    head, relation, tail = (
        _parts(x)
        for x in model._get_representations(
            h=triples[:, 0], r=triples[:, 1], t=triples[:, 2], mode=mode
        )
    )
    if seed is None:
        seed = torch.randint(validate.MAX_SEED - 1, (), dtype=torch.int64, device=device)
    batch = _Batch(
        model.interaction,
        model._get_entity_representations_from_inductive_mode(mode=mode),
        head,
        relation,
        tail,
        beta,
        alpha,
        {"mutation_rate": mutation_rate, "seed": seed, "backend": backend},
    )
    mapping, _ = map_model(model)
    total = batch.by_interaction(sides) if mapping is None else batch.fused(mapping, sides)
    return total / max(len(positives), 1) if reduction == "mean" else total


def checked_model(model: object) -> ERModel:
    """The model, if its score is an interaction of representations; otherwise TypeError."""
    if not isinstance(model, ERModel):
        raise TypeError(
            "model: expected a pykeen.models.ERModel, whose entities have representations to "
            f"mutate, got {type(model).__name__}"
        )
    if type(model)._get_representations is not ERModel._get_representations:
        raise TypeError(
            f"model: {type(model).__name__} looks representations up in a way of its own, which "
            "EMU cannot follow"
        )
    return model


class _Batch(NamedTuple):
    """A batch: the model's representations of its positives, and the loss's settings."""

    interaction: Interaction
    entities: Sequence[Representation]  # all entities
    head: Parts
    relation: Parts
    tail: Parts
    beta: float | Tensor
    alpha: float | Tensor
    mutation: dict[str, Any]  # rate, seed and backend

    def fused(self, mapping: Mapping, sides: list[Side]) -> Tensor:
        """The sum of the rows' losses, by the kernels.

        One call for both sides, tails first, unless heads and tails have different tables.
        """
        tail, head = map(self._candidates, sides)
        total, offset = torch.zeros((), device=self.head[0].device), 0
        for group in [sides] if tail == head else [[side] for side in sides]:
            queries = [self._query(mapping, side) for side in group]
            vector = torch.cat([flat(query.vector) for query in queries])
            scales = [flat(query.scale) for query in queries if query.scale is not None]
            total = total + fused_emu_loss(
                vector,
                flat([_table(self.entities[i]) for i in self._candidates(group[0])]),
                torch.cat([side.positive for side in group]),
                torch.cat([side.negative for side in group]),
                similarity=mapping.similarity,
                scale=torch.cat(scales) if scales else None,
                sample_weight=torch.cat([side.weight for side in group]),
                beta=self.beta,
                alpha=self.alpha,
                row_offset=offset,
                reduction="sum",
                **self.mutation,
            )
            offset += len(vector)
        return total

    def by_interaction(self, sides: list[Side]) -> Tensor:
        """The sum of the rows' losses by PyKEEN's interaction, one side at a time."""
        scores = self.interaction(
            h=_unpack(self.head), r=_unpack(self.relation), t=_unpack(self.tail)
        )
        total, offset = scores[:0].sum(), 0  # 0 that depends on the scores
        for side in sides:
            if len(side.row):
                total = total + self._side_by_interaction(side, scores[side.row], offset)
                offset += len(side.row)
        return total

    def _side_by_interaction(self, side: Side, positive: Tensor, row_offset: int) -> Tensor:
        own, other = (self.tail, self.head) if side.name == "tail" else (self.head, self.tail)
        padding = side.negative < 0
        ids = side.negative.clamp(min=0)
        candidates = [_look_up(self.entities[i], ids) for i in self._candidates(side)]
        mutated = _split_like(
            emu_mutate(
                flat([x[side.row] for x in own]),
                flat(candidates, batch_dims=2),
                row_offset=row_offset,
                **self.mutation,
            ),
            candidates,
        )
        given = _unpack([x[side.row, None] for x in other])
        relation = _unpack([x[side.row, None] for x in self.relation])

        def score(parts: Parts) -> Tensor:
            entities = {"h": given, "t": given, side.name[0]: _unpack(parts)}
            out: Tensor = self.interaction(r=relation, **entities)
            return out.masked_fill(padding, float("-inf"))

        rows = uls_cross_entropy(positive, score(mutated), beta=self.beta, reduction="none")
        alpha = prepare.usable_coefficient("alpha", self.alpha, positive)
        rows = rows + alpha * softmax_rows(positive, score(candidates))
        return (side.weight.to(rows.dtype) * rows).sum()

    def _query(self, mapping: Mapping, side: Side) -> Query:
        given = self.head if side.name == "tail" else self.tail
        return mapping.query(
            side.name, [x[side.row] for x in given], [x[side.row] for x in self.relation]
        )

    def _candidates(self, side: Side) -> list[int]:
        """Indices of the entity representations that this side's candidates consist of."""
        interaction = self.interaction
        return list(interaction.tail_indices if side.name == "tail" else interaction.head_indices)


def _parts(representations: Tensor | Sequence[Tensor]) -> Parts:
    return [representations] if isinstance(representations, Tensor) else list(representations)


def _unpack(parts: Parts) -> Tensor | Parts:
    return parts[0] if len(parts) == 1 else parts


@contextmanager
def _hidden(representation: Representation) -> Iterator[None]:
    """No regularizer sees what is looked up, not even those of representations inside it."""
    parts = [x for x in representation.modules() if isinstance(x, Representation)]
    regularizers = [part.regularizer for part in parts]
    for part in parts:
        part.regularizer = None
    try:
        yield
    finally:
        for part, regularizer in zip(parts, regularizers, strict=True):
            part.regularizer = regularizer


def _table(representation: Representation) -> Tensor:
    """All rows as an interaction takes them, without dropout, hidden from regularizers."""
    with _hidden(representation):
        table = representation._plain_forward()
    return table if representation.normalizer is None else representation.normalizer(table)


def _look_up(representation: Representation, ids: Tensor) -> Tensor:
    """``representation(ids)``, hidden from regularizers.

    Ids are flattened to a list, as in PyKEEN's loop: torch's ``normalize`` acts on dimension 1 by
    default.
    """
    rows, inverse = ids.flatten(), None
    if representation.unique:
        rows, inverse = rows.unique(return_inverse=True)
    with _hidden(representation):
        x = representation._plain_forward(indices=rows)
    if representation.normalizer is not None:
        x = representation.normalizer(x)
    if inverse is not None:
        x = x[inverse]
    if representation.dropout is not None:
        x = representation.dropout(x)
    return x.reshape(*ids.shape, *x.shape[1:])


def _split_like(rows: Tensor, parts: Parts) -> Parts:
    """Split (B, K, D) into parts of the shapes of ``parts``: the inverse of :func:`flat`."""
    widths = [x[0, 0].numel() * (2 if x.is_complex() else 1) for x in parts]
    return [
        torch.view_as_complex(piece.reshape(*like.shape, 2))
        if like.is_complex()
        else piece.reshape(like.shape)
        for piece, like in zip(rows.split(widths, dim=-1), parts, strict=True)
    ]
