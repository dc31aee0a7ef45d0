"""Losses: what a step minimises, given the model's query and the ids to compare it with.

==============  ==================================================================================
``emu``         embedding mutation under unbounded label smoothing (Takamoto et al., 2025)
``uls``         the same without mutation
``mixup``       the same with Mixup in the place of mutation
``softmax``     cross-entropy of the positive among the sampled negatives: the paper's baseline
``selfadv``     self-adversarial negative sampling (Sun et al., 2019)
``onevsall``    cross-entropy of the positive among all entities (Lacroix et al., 2018)
==============  ==================================================================================
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid

from emu_kernels import Mixup, emu_scores, fused_emu_loss, fused_softmax_loss
from emu_kernels.reference import reduce

if TYPE_CHECKING:
    from .config import Config
    from .models import Model, Query


class Step(NamedTuple):
    """What a loss is computed from."""

    config: Config
    model: Model
    query: Query  # of B rows
    table: Tensor  # (N, D), the model's candidates
    positive: Tensor  # (B,)
    negative: Tensor  # (G, K), G dividing B; −1 is padding
    sample_weight: Tensor | None  # (B,); the loss is the mean that they weight
    seed: int  # of the masks

    @property
    def arguments(self) -> dict[str, Any]:
        """What all operators take."""
        config = self.config
        return {
            "query": self.query.vector,
            "table": self.table,
            "positive": self.positive,
            "negative": self.negative,
            "backend": config.backend,
            "sparse_grad": config.sparse,
            **self.model.phi(self.query),
        }


def _emu(step: Step, mutation_rate: float | Mixup) -> Tensor:
    return fused_emu_loss(
        **step.arguments,
        mutation_rate=mutation_rate,
        beta=step.config.beta,
        alpha=step.config.alpha,
        mask_unit=step.config.mask_unit,
        sample_weight=step.sample_weight,
        seed=step.seed,
    )


def emu(step: Step) -> Tensor:
    return _emu(step, step.config.mutation_rate)


def uls(step: Step) -> Tensor:
    return _emu(step, 0.0)


def mixup(step: Step) -> Tensor:
    return _emu(step, Mixup(step.config.mixup_order))


def softmax(step: Step) -> Tensor:
    return fused_softmax_loss(**step.arguments, sample_weight=step.sample_weight)


def selfadv(step: Step) -> Tensor:
    """−log σ(γ + s⁺) − Σ_k p_k log σ(−γ − s⁻_k), p = softmax(temperature · s⁻) without gradient.

    RotatE's equation 6 (arXiv 1902.10197), with distances −s. γ belongs to a distance: the dot
    product has none, as in the authors' program. A row without negatives keeps its first term.
    """
    margin = 0.0 if step.model.similarity == "dot" else step.config.margin
    scores = emu_scores(**step.arguments, mutation=None, margin=margin)
    real = scores.negative != float("-inf")
    negative = scores.negative.masked_fill(~real, 0.0)
    logits = step.config.adversarial_temperature * negative.detach()
    share = logits.masked_fill(~real, torch.finfo(logits.dtype).min).softmax(dim=1)
    rows = -logsigmoid(scores.positive) - (share * real * logsigmoid(-negative)).sum(dim=1)
    return reduce(rows, step.sample_weight, "mean")


def onevsall(step: Step) -> Tensor:
    """logsumexp over all entities of s − s⁺. Takes B·N scores, and no sampled negatives."""
    if step.model.similarity == "dot":
        scores = step.model.score(step.query, step.table)  # (B, N)
    else:
        everyone = torch.arange(len(step.table), device=step.table.device)
        arguments = {**step.arguments, "negative": everyone}
        scores = emu_scores(**arguments, mutation=None).negative
    rows = cross_entropy(scores, step.positive, reduction="none")
    return reduce(rows, step.sample_weight, "mean")


LOSSES: dict[str, Callable[[Step], Tensor]] = {
    "emu": emu,
    "uls": uls,
    "mixup": mixup,
    "softmax": softmax,
    "selfadv": selfadv,
    "onevsall": onevsall,
}
