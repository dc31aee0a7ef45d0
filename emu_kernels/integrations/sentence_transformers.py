"""EMU for text embeddings: a loss of sentence-transformers, :class:`EMURankingLoss`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from emu_kernels import MutationRate, fused_emu_loss, validate
from emu_kernels.integrations._require import require

require("sentence-transformers", (6, 0), extra="sentence-transformers")

from sentence_transformers import SentenceTransformer  # noqa: E402
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss  # noqa: E402
from sentence_transformers.util import cos_sim, dot_score  # noqa: E402


class EMURankingLoss(MultipleNegativesRankingLoss):
    """:func:`emu_kernels.fused_emu_loss` of anchors, their positives, and hard negatives.

    The candidates of an anchor are those of ``MultipleNegativesRankingLoss``: its positive, the
    other positives of the batch, and all hard negatives. Each negative is mutated toward the
    positive in the space where they are compared: with cosine similarity, after normalization. With
    ``mutation_rate=0`` and ``beta=0`` the loss is theirs, times 1/K + ``alpha`` for K negatives.

    Args:
        model: the model to train.
        mutation_rate, beta, alpha, backend: as in :func:`emu_kernels.fused_emu_loss`.
        scale: multiplies the similarities: 1 / temperature.
        similarity_fct: ``sentence_transformers.util``'s ``cos_sim`` or ``dot_score``.

    Raises:
        TypeError, ValueError: an invalid argument; at a call, a batch without positives.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        *,
        mutation_rate: MutationRate,
        beta: float,
        alpha: float,
        scale: float = 20.0,
        similarity_fct: Callable[[Tensor, Tensor], Tensor] = cos_sim,
        backend: str | None = None,
    ) -> None:
        if similarity_fct not in (cos_sim, dot_score):
            raise ValueError(
                f"similarity_fct: expected cos_sim or dot_score, got {similarity_fct!r}"
            )
        validate.rate_or_rule("mutation_rate", mutation_rate)
        super().__init__(model, scale=scale, similarity_fct=similarity_fct)
        self.mutation_rate = mutation_rate
        self.beta = validate.coefficient("beta", beta)
        self.alpha = validate.coefficient("alpha", alpha)
        self.backend = backend

    def compute_loss_from_embeddings(
        self,
        embeddings: list[Tensor],  # each (B, D): of anchors, positives, and each hard negative
        labels: Tensor | None = None,
    ) -> Tensor:
        """The loss: a scalar."""
        if len(embeddings) < 2:
            raise ValueError(f"embeddings: expected anchors and positives, got {len(embeddings)}")
        anchors, table = embeddings[0], torch.cat(embeddings[1:])
        if self.similarity_fct is cos_sim:
            anchors, table = normalize(anchors), normalize(table)
        positive = torch.arange(len(anchors), device=table.device)
        negative = torch.arange(len(table), device=table.device).expand(len(anchors), -1)
        return fused_emu_loss(
            anchors * self.scale,
            table,
            positive,
            negative.where(negative != positive[:, None], -1),
            mutation_rate=self.mutation_rate,
            beta=self.beta,
            alpha=self.alpha,
            backend=self.backend,
        )

    def get_config_dict(self) -> dict[str, Any]:
        """What the card of a trained model says about its loss."""
        own = {name: getattr(self, name) for name in ("mutation_rate", "beta", "alpha")}
        theirs = super().get_config_dict()
        return own | {name: theirs[name] for name in ("scale", "similarity_fct")}

    @property
    def citation(self) -> str:
        """The citation of EMU's paper, for the card."""
        return """
@article{takamoto2025optimal,
    title={Optimal Embedding Guided Negative Sample Generation for Knowledge Graph Link Prediction},
    author={Makoto Takamoto and Daniel O{\\~n}oro-Rubio and Wiem Ben Rim and Takashi Maruyama and Bhushan Kotnis},
    journal={Transactions on Machine Learning Research},
    year={2025},
    eprint={2504.03327},
    archivePrefix={arXiv},
}
"""  # noqa: E501
