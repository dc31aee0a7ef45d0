"""Losses: what a step minimizes, given the model's query and the ids to compare it with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from emu_kernels import (
    EmuScores,
    Expected,
    Mixup,
    emu_scores,
    fused_emu_loss,
    fused_softmax_loss,
    one_vs_all_loss,
)
from emu_kernels.mask import MAX_MIXUP_ORDER, effective_rate
from emu_kernels.mutation import MASK_UNITS, mask_unit
from emu_kernels.reference import reduce
from emu_kernels.similarity import SIMILARITIES

from .models import Model, Query
from .settings import AT_LEAST_0, SHARE, Choice, setting

if TYPE_CHECKING:
    from .config import Config


class Compared(Protocol):
    """A batch's positives and negatives, as the losses ask for them."""

    @property
    def config(self) -> Config: ...

    @property
    def sample_weight(self) -> Tensor | None:
        """(B,); the loss is their weighted mean."""

    def emu(self, mutation_rate: float | Mixup | Expected) -> Tensor:
        """L_emu + α L_van."""

    def softmax(self) -> Tensor:
        """L_van."""

    def scores(self) -> EmuScores:
        """Scores of positives and unmutated negatives; those of a distance plus the margin."""


class Step(NamedTuple):
    """The inputs of a loss, for a model that has embeddings of entities."""

    config: Config
    model: Model
    query: Query  # of B rows
    table: Tensor  # (N, D), the model's candidates
    positive: Tensor  # (B,)
    negative: Tensor  # (G, K), G dividing B; −1 is padding; K = 0 where all entities are negatives
    sample_weight: Tensor | None  # (B,); the loss is their weighted mean
    seed: int  # of the masks
    known: tuple[Tensor, Tensor] | None = None  # entities that are not negatives, if all others are
    row_offset: int = 0  # of the first row, in the joint batch of all processes

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments that emu_scores and both fused losses take."""
        sampled = {"negative": self.negative, "sparse_grad": self.config.sparse}
        return self.of_all_entities | sampled

    @property
    def of_all_entities(self) -> dict[str, Any]:
        """Those of :attr:`arguments` that one_vs_all_loss takes too."""
        return {
            "query": self.query.vector,
            "table": self.table,
            "positive": self.positive,
            "backend": self.config.backend,
            **self.model.phi(self.query),
        }

    def emu(self, mutation_rate: float | Mixup | Expected) -> Tensor:
        unit = self.config.mask_unit
        if isinstance(mutation_rate, Expected):  # which takes the unit from the similarity
            unit = mask_unit(pairs=SIMILARITIES[self.model.similarity].coupled)
        options: dict[str, Any] = {
            "mutation_rate": mutation_rate,
            "beta": self.config.beta,
            "alpha": self.config.alpha,
            "mask_unit": unit,
            "sample_weight": self.sample_weight,
        }
        if self.config.over_all:
            return one_vs_all_loss(**self.of_all_entities, known=self.known, **options)
        return fused_emu_loss(
            **self.arguments, seed=self.seed, row_offset=self.row_offset, **options
        )

    def softmax(self) -> Tensor:
        return fused_softmax_loss(**self.arguments, sample_weight=self.sample_weight)

    def scores(self) -> EmuScores:
        bilinear = SIMILARITIES[self.model.similarity].bilinear
        margin = 0.0 if bilinear else self.model.margin
        return emu_scores(**self.arguments, mutation_rate=None, margin=margin)


@dataclass(frozen=True)
class Loss(Choice):
    """A loss: maps a step to a scalar."""

    function: Callable[[Any], Tensor]
    regularized: bool  # by default, like the models' baselines in EMU's paper
    all_entities: bool  # its negatives are always all entities, whatever the setting
    takes_all: bool  # its negatives can be all entities
    masks: bool  # it draws masks by the mutation rate if negatives are sampled

    def __call__(self, step: Compared) -> Tensor:
        return self.function(step)


LOSSES: dict[str, Loss] = {}


def loss(
    help: str,
    *options: str,
    regularized: bool = False,
    all_entities: bool = False,
    takes_all: bool = False,
    masks: bool = False,
) -> Callable[[Callable[[Any], Tensor]], Loss]:
    """Enter a function into :data:`LOSSES` under its own name."""

    def enter(function: Callable[[Any], Tensor]) -> Loss:
        entry = Loss(help, options, function, regularized, all_entities, takes_all, masks)
        return LOSSES.setdefault(function.__name__, entry)

    return enter


@dataclass(frozen=True)
class LossOptions:
    """loss"""

    loss: str = setting("emu", "what a step minimizes", choices=LOSSES)
    mutation_rate: float = setting(
        0.61,
        "share of components taken from the positive; masks have it in steps of 1/256",
        limit=SHARE,
        show=lambda rate, config: (
            f"{effective_rate(rate):.4f}" if config.draws_masks else f"{rate:g}"
        ),
    )
    mask_unit: str = setting(
        "component",
        "what is mutated as a whole; a pair is a complex number's two parts",
        choices=MASK_UNITS,
    )
    mixup_order: int = setting(
        Mixup.order,
        "negatives' share in Mixup is drawn from Beta(order, 1)",
        choices=range(1, MAX_MIXUP_ORDER + 1),
    )
    beta: float = setting(0.53, "label of a mutated negative", limit=AT_LEAST_0)
    alpha: float = setting(0.11, "weight of the vanilla term beside EMU", limit=AT_LEAST_0)
    adversarial_temperature: float = setting(
        1.0, "of selfadv; 0 gives all negatives equal weights", limit=AT_LEAST_0
    )


@loss("EMU", "mutation_rate", "mask_unit", "beta", "alpha", takes_all=True, masks=True)
def emu(step: Compared) -> Tensor:
    """Embedding mutation under unbounded label smoothing (Takamoto et al., 2025).

    If the negatives are all entities, it is in closed form, as no masks can be drawn for these.
    """
    rate = step.config.mutation_rate
    return step.emu(Expected(rate) if step.config.over_all else rate)


@loss("EMU in closed form, without masks", "mutation_rate", "beta", "alpha", takes_all=True)
def expected(step: Compared) -> Tensor:
    return step.emu(Expected(step.config.mutation_rate))


@loss("EMU without mutation", "beta", "alpha", takes_all=True)
def uls(step: Compared) -> Tensor:
    return step.emu(Expected(0.0) if step.config.over_all else 0.0)


@loss("EMU with Mixup in place of mutation", "mixup_order", "beta", "alpha")
def mixup(step: Compared) -> Tensor:
    return step.emu(Mixup(step.config.mixup_order))


@loss("sampled softmax", regularized=True, takes_all=True)
def softmax(step: Compared) -> Tensor:
    """Cross-entropy of the positive among the sampled negatives: the baseline of EMU's paper."""
    if step.config.over_all:
        return onevsall(step)
    return step.softmax()


@loss("self-adversarial negative sampling", "margin", "adversarial_temperature")
def selfadv(step: Compared) -> Tensor:
    """−log σ(γ + s⁺) − Σ_k p_k log σ(−γ − s⁻_k), p = softmax(temperature · s⁻) without gradient.

    RotatE's equation 6 (arXiv 1902.10197), with distances −s. As in the authors' program, there is
    no margin γ with the dot product. A row without negatives has the first term only.
    """
    scores = step.scores()
    real = scores.negative != float("-inf")
    negative = scores.negative.masked_fill(~real, 0.0)
    logits = step.config.adversarial_temperature * negative.detach()
    share = logits.masked_fill(~real, torch.finfo(logits.dtype).min).softmax(dim=1)
    rows = -logsigmoid(scores.positive) - (share * real * logsigmoid(-negative)).sum(dim=1)
    return reduce(rows, step.sample_weight, "mean")


@loss("softmax over all entities", all_entities=True, takes_all=True)
def onevsall(step: Step) -> Tensor:
    """logsumexp over all entities of s − s⁺ (Lacroix et al., 2018); no sampled negatives."""
    return one_vs_all_loss(
        **step.of_all_entities, known=step.known, sample_weight=step.sample_weight
    )
