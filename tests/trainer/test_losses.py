"""Each loss against its formula, with padding and with weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from emu_kernels import EmuScores, Expected, Mixup, emu_scores, uls_cross_entropy
from emu_kernels.trainer.config import Config
from emu_kernels.trainer.losses import LOSSES, Step
from emu_kernels.trainer.models import MODELS
from emu_kernels.trainer.sampling import ALL

ENTITIES, RELATIONS, ROWS, NEGATIVES, DIM = 11, 3, 6, 5, 8


def step_of(
    model_name: str = "RotatE", weight: Tensor | None = None, sets: int = ROWS, **settings: Any
) -> Step:
    """A batch with one padded negative in row 0, and only padding in row 1."""
    draws = torch.Generator().manual_seed(0)
    config = Config(data="-", model=model_name, dim=DIM, **settings)
    model = MODELS[model_name](ENTITIES, RELATIONS, DIM, draws, margin=config.margin)
    given, positive = torch.randint(ENTITIES, (2, ROWS), generator=draws)
    relation = torch.randint(RELATIONS, (ROWS,), generator=draws)
    negative = torch.randint(ENTITIES, (sets, NEGATIVES), generator=draws)
    if sets == ROWS:
        negative[0, 2] = -1
        negative[1] = -1
    return Step(
        config=config,
        model=model,
        query=model.query(model.entity[given], model.relation[relation], "tail"),
        table=model.candidates(),
        positive=positive,
        negative=negative,
        sample_weight=weight,
        seed=7,
    )


def scores_of(step: Step, mutation: float | Mixup | Expected = 0.0) -> EmuScores:
    return emu_scores(**step.arguments, mutation_rate=mutation, seed=step.seed)


def expected_rows(name: str, step: Step) -> Tensor:
    """(B,): each loss computed from emu_scores, or from the scores of all entities."""
    config = step.config
    if name == "onevsall":
        scores = step.model.score(step.query, step.table)
        return scores.logsumexp(1) - scores.gather(1, step.positive[:, None])[:, 0]
    mutations: dict[str, float | Mixup | Expected] = {
        "emu": config.mutation_rate,
        "expected": Expected(config.mutation_rate),
        "mixup": Mixup(config.mixup_order),
    }
    positive, negative, mutated, cumulant = scores_of(step, mutations.get(name, 0.0))
    if name == "selfadv":
        margin = 0.0 if step.model.similarity == "dot" else step.model.margin
        rows = []
        for plus, row in zip(positive, negative, strict=True):
            real = row[row > float("-inf")]
            share = (config.adversarial_temperature * real).softmax(0).detach()
            rows.append(-(margin + plus).sigmoid().log() - share @ (-margin - real).sigmoid().log())
        return torch.stack(rows)
    softmax = torch.cat([positive[:, None], negative], 1).logsumexp(1) - positive
    if name == "softmax":
        return softmax
    rows_of_emu = uls_cross_entropy(
        positive, mutated, cumulant=cumulant, beta=config.beta, reduction="none"
    )
    return rows_of_emu + config.alpha * softmax


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("model", ["DistMult", "TransE", "HAKE", "PairRE"])
@pytest.mark.parametrize("weighted", [False, True])
def test_values_and_gradients(name, model, weighted):
    weight = torch.tensor([0.5, 1.0, 2.0, 0.0, 3.0, 1.5]) if weighted else None
    step = step_of(model, weight, margin=4.0, adversarial_temperature=0.7, mixup_order=3)
    rows = expected_rows(name, step)
    factor = torch.ones(ROWS) if weight is None else weight
    expected = (rows * factor).sum() / factor.sum()
    found = LOSSES[name](step)
    torch.testing.assert_close(found, expected)
    parameters = list(step.model.parameters())
    gradients = [torch.autograd.grad(x, parameters, retain_graph=True) for x in (found, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        assert ours.abs().max() > 0


@pytest.mark.parametrize("name", LOSSES)
def test_negatives_shared_by_blocks_of_rows(name):
    shared = step_of(sets=2)
    repeated = shared._replace(negative=shared.negative.repeat_interleave(ROWS // 2, dim=0))
    torch.testing.assert_close(LOSSES[name](shared), LOSSES[name](repeated))


def test_uls_is_emu_without_mutation():
    step = step_of()
    assert LOSSES["uls"](step) == LOSSES["emu"](step_of(mutation_rate=0.0))
    assert LOSSES["uls"](step) != LOSSES["emu"](step)


@pytest.mark.parametrize("changes", [{"mask_unit": "pair"}, {"mutation_rate": 0.2}, {"beta": 0.1}])
def test_settings_reach_the_loss(changes):
    assert LOSSES["emu"](step_of(**changes)) != LOSSES["emu"](step_of())


def test_only_the_positives_term_is_left_without_negatives():
    step = step_of(margin=4.0)
    alone = step._replace(negative=torch.full((ROWS, NEGATIVES), -1))
    positive = scores_of(alone).positive
    expected = -(4.0 + positive).sigmoid().log().mean()
    torch.testing.assert_close(LOSSES["selfadv"](alone), expected)


def test_temperature_0_weights_negatives_alike():
    step = step_of(margin=4.0, adversarial_temperature=0.0, sets=1)
    positive, negative, *_ = scores_of(step)
    expected = -(4 + positive).sigmoid().log() - (-4 - negative).sigmoid().log().mean(1)
    torch.testing.assert_close(LOSSES["selfadv"](step), expected.mean())


@pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if loss.takes_all])
@pytest.mark.parametrize("model", ["DistMult", "TransE"])
@pytest.mark.parametrize("filtered", [False, True])
def test_all_entities(name, model, filtered):
    """As with a set for each row that has all entities except the answer and the known ones."""
    drawn = {"emu": "expected", "onevsall": "softmax"}.get(name, name)
    step = step_of(model, loss=name, negatives=ALL)
    offsets, ids = torch.tensor([0, 2, 3, 3, 3, 4, 7]), torch.tensor([1, 4, 0, 9, 2, 3, 10])
    negative = torch.arange(ENTITIES).repeat(ROWS, 1)
    for row in range(ROWS):
        negative[row, step.positive[row]] = -1
        if filtered:
            negative[row, ids[offsets[row] : offsets[row + 1]]] = -1
    step = step._replace(known=(offsets, ids) if filtered else None)
    sampled = step_of(model, loss=drawn)._replace(negative=negative)
    torch.testing.assert_close(LOSSES[name](step), LOSSES[drawn](sampled))


@pytest.mark.parametrize("settings", [{"loss": "expected"}, {"loss": "emu", "negatives": ALL}])
def test_the_closed_form_takes_the_models_unit(settings):
    step, other = (step_of("ComplEx", mask_unit=unit, **settings) for unit in ("pair", "component"))
    assert LOSSES[settings["loss"]](step) == LOSSES[settings["loss"]](other)
