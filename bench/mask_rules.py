"""Losses for the study to compare: rates that differ between components, and a part of EMU.

Within :func:`entered` each is a loss of the trainer: EMU in closed form, with a rate for each
component, or without the variance. Over a row the rates are 0.61 (the setting ``mutation_rate``) on
average, except that they are limited to [0, 1]. What a rule learns is in its model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from emu_kernels import Expected, emu_scores, uls_cross_entropy
from emu_kernels.trainer.data import Direction
from emu_kernels.trainer.losses import LOSSES, Loss, Step
from emu_kernels.trainer.models import MODELS, SCORERS, DistMult, Model, Query

OPTIONS = ("mutation_rate", "beta", "alpha")


class LearnedRates(DistMult):
    """DistMult that learns how to distribute what is kept of a row, (1 − ρ) · D, to components."""

    by_relation = False

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        rows = 2 * self.num_relations if self.by_relation else 1
        self.logits = nn.Parameter(torch.zeros(rows, self.dim))
        self._row = torch.zeros(1, dtype=torch.int64)

    def ask(self, entity: Tensor, relation: Tensor, direction: Direction) -> Query:
        if self.by_relation:
            self._row = relation + self.num_relations * (direction == "head")
        return super().ask(entity, relation, direction)

    def rates(self, rate: float) -> Tensor:
        """(D,), or (B, D) for the batch of the last :meth:`ask`."""
        shares = self.logits[self._row].softmax(dim=1) * self.logits.shape[1]
        rates = 1 - ((1 - rate) * shares).clamp(max=1)
        return rates if self.by_relation else rates[0]


class RatesByRelation(LearnedRates):
    """Learns this for each relation and direction separately."""

    by_relation = True


def _by_size(of_large: bool, size: Callable[[Step], Tensor]) -> Callable[[Step], Tensor]:
    """Rates in proportion to a size (B, D), or, if not ``of_large``, kept shares in proportion."""

    def loss(step: Step) -> Tensor:
        sizes = size(step).detach().abs()
        relative = sizes / sizes.mean(dim=1, keepdim=True)
        rate = step.config.mutation_rate
        if of_large:
            return step.emu(Expected((rate * relative).clamp(max=1)))
        return step.emu(Expected(1 - ((1 - rate) * relative).clamp(max=1)))

    return loss


def _query(step: Step) -> Tensor:
    return step.query.vector


def _share(step: Step) -> Tensor:
    return step.query.vector * step.table[step.positive]


def _learned(step: Step) -> Tensor:
    assert isinstance(step.model, LearnedRates)
    return step.emu(Expected(step.model.rates(step.config.mutation_rate)))


def _adversarial(step: Step) -> Tensor:
    """The rates that are worst for the model: their gradient is reversed."""
    assert isinstance(step.model, LearnedRates)
    rates = step.model.rates(step.config.mutation_rate)
    return step.emu(Expected((2 * rates.detach() - rates).clamp(0, 1)))


def _mean_alone(step: Step) -> Tensor:
    """EMU as if each mutant scored the mean over its masks, ρ s⁺ + (1 − ρ) s⁻."""
    config = step.config
    scores = emu_scores(**step.arguments, mutation_rate=Expected(config.mutation_rate))
    positive, negative = scores.positive, scores.negative
    vanilla = torch.logaddexp(positive, negative.logsumexp(dim=1)) - positive
    smoothed = uls_cross_entropy(positive, scores.mutated, beta=config.beta)
    return smoothed + config.alpha * vanilla.mean()


RULES: dict[str, Callable[[Step], Tensor]] = {
    "large-query": _by_size(True, _query),
    "small-query": _by_size(False, _query),
    "large-share": _by_size(True, _share),
    "small-share": _by_size(False, _share),
    "learned": _learned,
    "adversarial": _adversarial,
    "mean-alone": _mean_alone,
}
MODELS_WITH_RATES: dict[str, type[Model]] = {
    "DistMult, rates": LearnedRates,
    "DistMult, rates by relation": RatesByRelation,
}

LINES = (
    ("of large query components", "DistMult", "large-query"),
    ("of small query components", "DistMult", "small-query"),
    ("of components with a large share of the positive's score", "DistMult", "large-share"),
    ("of components with a small share of the positive's score", "DistMult", "small-share"),
    ("learned", "DistMult, rates", "learned"),
    ("learned against the model", "DistMult, rates", "adversarial"),
    ("learned by relation", "DistMult, rates by relation", "learned"),
    ("learned by relation against the model", "DistMult, rates by relation", "adversarial"),
)
"""For each line: what is mutated more, the model, its loss."""


@contextmanager
def entered() -> Iterator[None]:
    """Within it, the trainer has these rules and models."""
    losses = {name: Loss("", OPTIONS, rule, *[False] * 4) for name, rule in RULES.items()}
    LOSSES.update(losses)
    SCORERS.update(MODELS_WITH_RATES)
    MODELS.update(MODELS_WITH_RATES)
    try:
        yield
    finally:
        for registry, names in (
            (LOSSES, losses),
            (SCORERS, MODELS_WITH_RATES),
            (MODELS, MODELS_WITH_RATES),
        ):
            for name in names:
                del registry[name]
