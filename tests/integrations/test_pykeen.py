"""PyKEEN: equal scores and losses, every kind of negative sampler, runs of its pipeline."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from pykeen.datasets import UMLS, Dataset, Kinships, Nations
from pykeen.datasets.nations import NationsLiteral
from pykeen.models import (
    CP,
    RESCAL,
    UM,
    ComplEx,
    DistMult,
    ERModel,
    HolE,
    PairRE,
    RotatE,
    SimplE,
    TransD,
    TransE,
    model_resolver,
)
from pykeen.models.baseline.models import MarginalDistributionBaseline
from pykeen.nn.modules import DistMultInteraction
from pykeen.nn.representation import Embedding, TransformedRepresentation
from pykeen.pipeline import PipelineResult, pipeline
from pykeen.sampling import NegativeSampler, negative_sampler_resolver
from pykeen.stoppers import EarlyStopper
from pykeen.trackers import PythonResultTracker
from pykeen.training import SLCWATrainingLoop, TrainingCallback, training_loop_resolver
from pykeen.triples.instances import SLCWABatch
from pykeen.triples.weights import RelationLossWeighter
from pykeen.typing import InductiveMode
from torch import Tensor
from torch.nn.functional import normalize

from emu_kernels import Expected, emu_scores, uls_cross_entropy
from emu_kernels.integrations.pykeen import EMUTrainingLoop, emu_loss, fused_similarity
from emu_kernels.integrations.pykeen import loss as loss_module
from emu_kernels.integrations.pykeen.loss import _parts, _table
from emu_kernels.integrations.pykeen.mapping import flat, map_model
from emu_kernels.integrations.pykeen.sides import split_sides
from emu_kernels.mask import mutation_mask, rate_to_threshold
from emu_kernels.reference import softmax_rows
from emu_kernels.trainer.config import Config
from emu_kernels.trainer.data import Direction
from emu_kernels.trainer.losses import LOSSES, Step
from emu_kernels.trainer.models import MODELS
from emu_kernels.validate import MAX_SEED

SETTINGS: dict[str, Any] = {"mutation_rate": 0.4, "beta": 0.3, "alpha": 0.2}
DIM = 6

FUSED: dict[str, tuple[str, type[ERModel], dict[str, Any]]] = {
    "DistMult": ("dot", DistMult, {}),
    "DistMult normalized": (
        "dot",
        DistMult,
        {
            "entity_representations_kwargs": {
                "normalizer": normalize,
                "normalizer_kwargs": {"dim": -1},  # its default, 1, is wrong in score_t
            }
        },
    ),
    "ComplEx": ("dot", ComplEx, {}),
    "TransE 1": ("l1", TransE, {"scoring_fct_norm": 1}),
    "TransE 1 power": ("l1", TransE, {"scoring_fct_norm": 1, "power_norm": True}),
    "TransE 2": ("l2", TransE, {"scoring_fct_norm": 2}),
    "RotatE": ("l2", RotatE, {}),
    "PairRE 1": ("l1", PairRE, {"p": 1}),
    "PairRE 2": ("l2", PairRE, {"p": 2}),
    "RESCAL": ("dot", RESCAL, {}),
    "CP": ("dot", CP, {"rank": 3}),
    "SimplE": ("dot", SimplE, {}),
}
OTHER: dict[str, tuple[type[ERModel], dict[str, Any]]] = {
    "TransE squared": (TransE, {"scoring_fct_norm": 2, "power_norm": True}),
    "TransE 3": (TransE, {"scoring_fct_norm": 3}),
    "DistMult dropout": (DistMult, {"entity_representations_kwargs": {"dropout": 0.5}}),
    "TransD": (TransD, {"relation_dim": 4}),  # two representations of an entity
    "HolE": (HolE, {}),
    "UM": (UM, {}),  # its relations have no representation
}


def new_model(graph: Dataset, kind: type[ERModel], **settings: Any) -> ERModel:
    torch.manual_seed(0)
    model = kind(triples_factory=graph.training, embedding_dim=DIM, **settings).double()
    model.post_parameter_update()  # apply the constraints in fp64 too
    return model


def fused_model(nations: Nations, name: str) -> ERModel:
    _, kind, settings = FUSED[name]
    return new_model(nations, kind, **settings)


Batch = tuple[Tensor, Tensor, Tensor | None]  # positives, negatives, masks


def sampled(nations: Nations, sampler: str, rows: int, **settings: Any) -> Batch:
    torch.manual_seed(1)
    triples = nations.training.mapped_triples
    made: NegativeSampler = negative_sampler_resolver.make(
        sampler,
        mapped_triples=triples,
        num_entities=nations.num_entities,
        num_relations=nations.num_relations,
        num_negs_per_pos=5,
        **settings,
    )
    positives = triples[torch.randperm(len(triples))[:rows]]
    return positives, *made.sample(positives)


def both_paths(
    monkeypatch: pytest.MonkeyPatch, model: ERModel, batch: Batch
) -> list[tuple[Tensor, list[Tensor]]]:
    """Loss and gradients by the kernels, then by PyKEEN's interaction."""
    found = []
    for force in (False, True):
        with monkeypatch.context() as patch:
            if force:
                patch.setattr(loss_module, "map_model", lambda model: (None, ""))
            model.zero_grad()
            loss = emu_loss(model, *batch, **SETTINGS, seed=7)
            (loss + model.collect_regularization_term()).backward()
        found.append((loss, [p.grad for p in model.parameters() if p.grad is not None]))
    return found


# --- scores and losses ----------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["tail", "head"])
@pytest.mark.parametrize("name", FUSED)
def test_scores_are_pykeens_own(nations, name, side):
    model = fused_model(nations, name)
    mapping, _ = map_model(model)
    assert mapping is not None
    assert fused_similarity(model) == mapping.similarity == FUSED[name][0]
    triples = nations.training.mapped_triples[:20]
    everyone = torch.arange(nations.num_entities)
    head, relation, tail = (_parts(x) for x in model._get_representations(*triples.T, mode=None))
    query = mapping.query(side, head if side == "tail" else tail, relation)
    indices = model.interaction.tail_indices if side == "tail" else model.interaction.head_indices
    scores = emu_scores(
        flat(query.vector),
        flat([_table(model.entity_representations[i]) for i in indices]),
        triples[:, 2 if side == "tail" else 0],
        everyone,
        similarity=mapping.similarity,
        scale=None if query.scale is None else flat(query.scale),
        mutation_rate=None,
    )
    expected = model.score_t(triples[:, :2]) if side == "tail" else model.score_h(triples[:, 1:])
    torch.testing.assert_close(scores.negative, expected)
    torch.testing.assert_close(scores.positive, model.score_hrt(triples)[:, 0])


def naive_loss(
    model: ERModel, positives: Tensor, negatives: Tensor, masks: Tensor | None
) -> Tensor:
    """The loss from the paper's formulas and PyKEEN's interaction, one negative at a time."""
    rate, beta, alpha = SETTINGS.values()
    total = torch.zeros((), dtype=torch.float64)
    row = 0
    for column in (2, 0):
        for triple, candidates, keep in zip(
            positives, negatives, [None] * len(positives) if masks is None else masks, strict=True
        ):
            valid = [
                k
                for k, candidate in enumerate(candidates)
                if not torch.equal(candidate, triple) and (keep is None or keep[k])
            ]
            mine = [k for k in valid if candidates[k, column] != triple[column]]
            if not mine:
                continue
            h, r, t = (_parts(x) for x in model._get_representations(*triple, mode=None))
            own = t if column == 2 else h
            width = len(flat([x[None] for x in own])[0])
            mask = mutation_mask(
                len(positives) * 2,
                len(candidates),
                width,
                seed=torch.tensor(7),
                row_offset=0,
                threshold=rate_to_threshold(rate),
            )[row]
            row += 1

            def score(h: list[Tensor], r: list[Tensor], t: list[Tensor]) -> Tensor:
                out: Tensor = model.interaction(*(x[0] if len(x) == 1 else x for x in (h, r, t)))
                return out

            plain, mutated = [], []
            for k in mine:
                ch, cr, ct = (
                    _parts(x) for x in model._get_representations(*candidates[k], mode=None)
                )
                plain.append(score(ch, cr, ct))
                other = ct if column == 2 else ch
                mixed, start = [], 0
                for z_pos, z_neg in zip(own, other, strict=True):
                    real_pos, real_neg = (
                        torch.view_as_real(z) if z.is_complex() else z for z in (z_pos, z_neg)
                    )
                    piece = mask[k, start : start + real_pos.numel()].view(real_pos.shape)
                    z = torch.where(piece, real_pos, real_neg)
                    mixed.append(torch.view_as_complex(z) if z_pos.is_complex() else z)
                    start += real_pos.numel()
                mutated.append(score(ch, cr, mixed) if column == 2 else score(mixed, cr, ct))
            positive = score(h, r, t)
            lse = torch.stack([positive, *mutated]).logsumexp(0)
            uls = (lse - positive + beta * sum(lse - s for s in mutated)) / len(mine)
            vanilla = torch.stack([positive, *plain]).logsumexp(0) - positive
            total = total + len(mine) / len(valid) * (uls + alpha * vanilla)
    return total / len(positives)


@pytest.mark.parametrize("sampler", ["basic", "bernoulli", "pseudotyped"])
@pytest.mark.parametrize("name", ["ComplEx", "PairRE 1", "CP", "SimplE"])
def test_loss_is_that_of_the_formulas(nations, sampler, name):
    model = fused_model(nations, name)
    batch = sampled(nations, sampler, rows=7, filtered=True)
    loss = emu_loss(model, *batch, **SETTINGS, seed=7)
    torch.testing.assert_close(loss, naive_loss(model, *batch))


@pytest.mark.parametrize("sampler", ["basic", "bernoulli", "pseudotyped"])
@pytest.mark.parametrize("name", FUSED)
def test_kernels_and_interaction_agree(nations, monkeypatch, sampler, name):
    model = fused_model(nations, name)
    batch = sampled(nations, sampler, rows=33, filtered=sampler != "basic")
    (fused, gradients), (other, expected) = both_paths(monkeypatch, model, batch)
    torch.testing.assert_close(fused, other)
    assert len(gradients) == len(expected) == len(list(model.parameters()))
    for gradient, wanted in zip(gradients, expected, strict=True):
        if name == "RotatE" and gradient.shape[0] == nations.num_relations:
            # |h r − t| and |h − conj(r) t| are equal only on the unit circle, where r always is.
            gradient, wanted = (tangential(model, g) for g in (gradient, wanted))
        torch.testing.assert_close(gradient, wanted)


def tangential(model: ERModel, gradient: Tensor) -> Tensor:
    """The part of a gradient of RotatE's relations that is tangential to the unit circle."""
    relation = model.relation_representations[0](None).detach()
    return (torch.view_as_complex(gradient.view(*relation.shape, 2)) * relation.conj()).imag


@pytest.mark.parametrize("name", OTHER)
def test_other_models_take_the_building_blocks(nations, name):
    kind, settings = OTHER[name]
    model = new_model(nations, kind, **settings).eval()  # without dropout
    assert fused_similarity(model) is None
    batch = sampled(nations, "bernoulli", rows=7, filtered=True)
    loss = emu_loss(model, *batch, **SETTINGS, seed=7)
    torch.testing.assert_close(loss, naive_loss(model, *batch))
    loss.backward()
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()


REFUSED = {"cooccurrencefiltered", "fixed", "inductivenodepiecegnn"}
NEEDS: dict[str, dict[str, Any]] = {
    "inductivenodepiece": {"inference_factory": Nations(create_inverse_triples=True).training},
    "inductivenodepiecegnn": {"inference_factory": Nations(create_inverse_triples=True).training},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(model_resolver.lookup_dict))
def test_every_model_of_pykeens(name):
    """Without mutation its loss is that of its own scores; or it is refused."""
    graph = NationsLiteral if "literal" in name else Nations
    inverse = name in ("compgcn", "nodepiece", "inductivenodepiece", "inductivenodepiecegnn")
    triples = graph(create_inverse_triples=inverse).training
    torch.manual_seed(0)
    if name == "distmultliteralgated":
        pytest.skip("PyKEEN 1.11.1 cannot make it: GatedCombination has no entity_embedding_dim")
    model = model_resolver.make(name, {"triples_factory": triples, **NEEDS.get(name, {})})
    positives = triples.mapped_triples[:4]
    negatives = positives[:, None].repeat(1, 3, 1)
    if name in REFUSED:
        with pytest.raises(TypeError, match="model: "):
            emu_loss(model, positives, negatives, **SETTINGS)
        return
    mode: InductiveMode | None = "training" if name in NEEDS else None
    model.eval()  # without dropout and statistics of a batch
    for column in (0, 2):
        model.post_parameter_update()  # forgets what graph networks keep of a forward pass
        candidates = negatives.clone()
        candidates[..., column] += torch.arange(1, 4)
        candidates[..., column] %= triples.num_entities
        plain = SETTINGS | {"mutation_rate": 0.0, "mode": mode}
        loss = emu_loss(model, positives, candidates, **plain)
        positive = model.score_hrt(positives, mode=mode)[:, 0]
        scores = model.score_hrt(candidates.reshape(-1, 3), mode=mode).view(4, 3)
        expected = uls_cross_entropy(positive, scores, beta=0.3, reduction="none")
        expected = expected + 0.2 * softmax_rows(positive, scores)
        torch.testing.assert_close(loss, expected.mean())
        emu_loss(model, positives, candidates, **SETTINGS, mode=mode).backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_the_closed_form(nations):
    batch = sampled(nations, "basic", rows=8)
    model = fused_model(nations, "DistMult")
    plain, closed = (
        emu_loss(model, *batch, **SETTINGS | {"mutation_rate": rate}) for rate in (0.0, Expected(0))
    )
    torch.testing.assert_close(plain, closed)
    with pytest.raises(TypeError, match=r"ConvE cannot train in closed form \(Expected\)"):
        EMUTrainingLoop(
            model=model_resolver.make("ConvE", triples_factory=nations.training),
            triples_factory=nations.training,
            optimizer="sgd",
            **SETTINGS | {"mutation_rate": Expected(0.4)},
        )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["ComplEx", "TransE 1", "PairRE 2", "TransD"])
def test_a_gpu_gives_the_same(nations, name):
    def model() -> ERModel:
        if name in OTHER:
            return new_model(nations, OTHER[name][0], **OTHER[name][1])
        return fused_model(nations, name)

    batch = sampled(nations, "bernoulli", rows=33, filtered=True)
    losses, gradients = [], []
    for each in (model(), model().cuda()):
        loss = emu_loss(each, *batch, **SETTINGS, seed=7)
        loss.backward()
        losses.append(loss.cpu())
        gradients.append([p.grad.cpu() for p in each.parameters() if p.grad is not None])
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(gradients[0], gradients[1])


OURS: dict[str, tuple[type[ERModel], dict[str, Any], dict[str, Any]]] = {
    "DistMult": (DistMult, {"entity_constrainer": None, "regularizer": None}, {}),
    "ComplEx": (ComplEx, {"regularizer": None}, {}),
    "TransE 1": (TransE, {"scoring_fct_norm": 1, "entity_constrainer": None}, {"norm": 1}),
    "TransE 2": (TransE, {"scoring_fct_norm": 2, "entity_constrainer": None}, {"norm": 2}),
    "PairRE 1": (PairRE, {"p": 1}, {"norm": 1}),
    "PairRE 2": (PairRE, {"p": 2}, {"norm": 2}),
}


@pytest.mark.parametrize("dataset", [Nations, Kinships, UMLS])
@pytest.mark.parametrize("name", OURS)
def test_loss_equals_our_trainers(dataset, name):
    """Three steps of SGD, with the same initial values, batches and seeds.

    PyKEEN's ComplEx alternates real and imaginary parts, our trainer's has them in two halves, so
    equal seeds give different masks. A rate of 0 or 1 for each component makes them equal.
    """
    graph = dataset()
    kind, settings, ours_settings = OURS[name]
    theirs = new_model(graph, kind, **settings).float()
    config = Config(data="-", model=name.split()[0], dim=DIM, **SETTINGS, **ours_settings)
    ours = MODELS[config.model](
        graph.num_entities, graph.num_relations, DIM, torch.Generator(), norm=config.norm
    )
    loop = EMUTrainingLoop(
        model=theirs,
        triples_factory=graph.training,
        optimizer="sgd",
        optimizer_kwargs={"lr": 0.5},
        **SETTINGS,
    )
    order = torch.arange(ours.entity.shape[1])
    if name == "ComplEx":
        order = torch.cat([order[::2], order[1::2]])  # alternating parts to halves
        loop.mutation_rate = torch.arange(2 * DIM).remainder(3).eq(0).float()
    with torch.no_grad():
        ours.entity.copy_(flat([_table_raw(r) for r in theirs.entity_representations])[:, order])
        relations = flat([_table_raw(r) for r in theirs.relation_representations])
        ours.relation.copy_(relations[:, order] if name == "ComplEx" else relations)
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.5)
    triples = graph.training.mapped_triples
    directions: tuple[Direction, ...] = ("tail", "head", "tail")
    for step, direction in enumerate(directions):
        column = 2 if direction == "tail" else 0
        positives = triples[step * 50 : step * 50 + 50]
        draws = torch.randint(1, graph.num_entities, (50, 8))
        ids = (positives[:, column, None] + draws) % graph.num_entities  # never the positive
        negatives = positives[:, None].repeat(1, 8, 1)
        negatives[..., column] = ids

        torch.manual_seed(step)
        loss = loop._process_batch(SLCWABatch(positives=positives, negatives=negatives), 0, 50)
        torch.manual_seed(step)
        seed = int(torch.randint(MAX_SEED - 1, (), dtype=torch.int64))
        given = positives[:, 0 if direction == "tail" else 2]
        query = ours.query(ours.entity[given], ours.relation[positives[:, 1]], direction)
        if isinstance(loop.mutation_rate, Tensor):
            object.__setattr__(config, "mutation_rate", loop.mutation_rate[order])
        expected = LOSSES["emu"](
            Step(config, ours, query, ours.candidates(), positives[:, column], ids, None, seed)
        )
        torch.testing.assert_close(loss.squeeze(), expected, rtol=1e-5, atol=1e-6)
        for each, update in ((loss, loop.optimizer), (expected, optimizer)):
            update.zero_grad()
            each.backward()
            update.step()


def _table_raw(representation: Any) -> Tensor:
    out: Tensor = representation._plain_forward()
    return out


# --- errors and warnings --------------------------------------------------------------------------


def a_loop(nations: Nations, **settings: Any) -> EMUTrainingLoop:
    model = settings.pop("model", None) or fused_model(nations, "DistMult")
    return EMUTrainingLoop(
        model=model, triples_factory=nations.training, **{**SETTINGS, **settings}
    )


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"mutation_rate": 1.5}, ValueError, r"mutation_rate: expected a number in \[0, 1\]"),
        ({"beta": -1.0}, ValueError, "beta: expected a finite number >= 0"),
        ({"alpha": "x"}, TypeError, "alpha: expected a number"),
        ({"backend": "gpu"}, ValueError, "backend: expected one of 'reference'"),
    ],
)
def test_bad_settings(nations, settings, error, message):
    with pytest.raises(error, match=message):
        a_loop(nations, **settings)


def test_a_model_without_representations(nations):
    model = MarginalDistributionBaseline(triples_factory=nations.training)
    with pytest.raises(TypeError, match=r"expected a pykeen\.models\.ERModel, .* got Marginal"):
        emu_loss(model, *sampled(nations, "basic", rows=3), **SETTINGS)


def test_a_model_with_look_ups_of_its_own(nations):
    class Own(DistMult):
        def _get_representations(self, *args: Any, **keywords: Any) -> Any:
            return super()._get_representations(*args, **keywords)

    with pytest.raises(TypeError, match="Own looks representations up in a way of its own"):
        a_loop(nations, model=new_model(nations, Own))


def test_an_interaction_of_ones_own_is_not_taken_for_its_parent(nations):
    class Twice(DistMultInteraction):
        def forward(self, h: Tensor, r: Tensor, t: Tensor) -> Tensor:
            return 2 * super().forward(h, r, t)

    model = fused_model(nations, "DistMult")
    model.interaction = Twice()
    assert fused_similarity(model) is None
    batch = sampled(nations, "basic", rows=5)
    loss = emu_loss(model, *batch, **SETTINGS, seed=7)
    torch.testing.assert_close(loss, naive_loss(model, *batch))


@pytest.mark.parametrize("scheme", [("relation",), ("head", "relation", "tail")])
def test_corrupted_relations(nations, scheme):
    batch = sampled(nations, "basic", rows=6, corruption_scheme=scheme)
    with pytest.raises(ValueError, match="another relation, which EMU does not mutate"):
        emu_loss(fused_model(nations, "DistMult"), *batch, **SETTINGS)


def test_both_entities_corrupted(nations):
    positives, negatives, _ = sampled(nations, "basic", rows=6)
    negatives[2, 3, ::2] = (positives[2, ::2] + 1) % nations.num_entities
    negatives[2, 3, 1] = positives[2, 1]
    with pytest.raises(ValueError, match="got one with both"):
        emu_loss(fused_model(nations, "DistMult"), positives, negatives, **SETTINGS)


def test_label_smoothing_and_slicing(nations):
    loop = a_loop(nations)
    positives, negatives, _ = sampled(nations, "basic", rows=4)
    batch = SLCWABatch(positives=positives, negatives=negatives)
    with pytest.raises(ValueError, match=r"label_smoothing: expected 0, got 0\.1"):
        loop._process_batch(batch, 0, 4, label_smoothing=0.1)
    with pytest.raises(AttributeError, match="Slicing is not possible"):
        loop._process_batch(batch, 0, 4, slice_size=1)


@pytest.mark.parametrize("fused", [True, False])
def test_nothing_left_of_a_batch(nations, monkeypatch, fused):
    if not fused:
        monkeypatch.setattr(loss_module, "map_model", lambda model: (None, ""))
    model = fused_model(nations, "CP")
    positives, negatives, _ = sampled(nations, "basic", rows=4)
    loss = emu_loss(model, positives, negatives, torch.zeros(4, 5, dtype=torch.bool), **SETTINGS)
    loss.backward()
    assert float(loss) == 0
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)


def test_a_line_says_which_way_a_model_takes(nations, caplog):
    with caplog.at_level(logging.WARNING):
        a_loop(nations)
        assert not [r for r in caplog.records if r.name.startswith("emu_kernels")]
        a_loop(nations, model=new_model(nations, TransD, relation_dim=4))
    (line,) = [r.getMessage() for r in caplog.records if r.name.startswith("emu_kernels")]
    assert "TransD trains with EMU by PyKEEN's own interaction" in line
    assert "TransDInteraction is not a similarity that the kernels know" in line


# --- sides, sub-batches, weights, regularizers ----------------------------------------------------


def test_sides_of_a_mixed_batch():
    positives = torch.tensor([[0, 0, 1], [2, 1, 3], [4, 0, 5]])
    negatives = positives[:, None].repeat(1, 4, 1)
    negatives[0, :3, 2] = torch.tensor([7, 8, 9])  # three tails and the positive itself
    negatives[1, 0, 2] = 7  # one tail, three heads of which one is masked
    negatives[1, 1:, 0] = torch.tensor([7, 8, 9])
    negatives[2, :, 0] = 6  # heads, all masked
    masks = torch.ones(3, 4, dtype=torch.bool)
    masks[1, 2] = masks[2, :] = False
    tail, head = split_sides(positives, negatives, masks, torch.tensor([1.0, 3.0, 5.0]))
    assert (tail.name, head.name) == ("tail", "head")
    assert tail.row.tolist() == [0, 1]
    assert tail.positive.tolist() == [1, 3]
    assert tail.negative.tolist() == [[7, 8, 9, -1], [7, -1, -1, -1]]
    torch.testing.assert_close(tail.weight, torch.tensor([1.0, 1.0]).double())
    assert head.row.tolist() == [1]
    assert head.positive.tolist() == [2]
    assert head.negative.tolist() == [[-1, 7, -1, 9]]
    torch.testing.assert_close(head.weight, torch.tensor([2.0]).double())
    for bad in (masks.int(), masks[:2]):
        with pytest.raises(ValueError, match=r"masks: expected bool of shape \(3, 4\)"):
            split_sides(positives, negatives, bad, None)
    with pytest.raises(ValueError, match=r"weights: expected shape \(3,\)"):
        split_sides(positives, negatives, masks, torch.ones(3, 1))


def test_reductions_and_sub_batches(nations):
    """The losses of sub-batches add up; without mutation, so that no masks differ."""
    model = fused_model(nations, "TransE 2")
    batch = sampled(nations, "bernoulli", rows=12)
    rates = {**SETTINGS, "mutation_rate": 0.0}
    mean = emu_loss(model, *batch, **rates)
    torch.testing.assert_close(emu_loss(model, *batch, **rates, reduction="sum"), mean * 12)
    pieces = [emu_loss(model, *(b[i:j] for b in batch[:2]), **rates) for i, j in ((0, 5), (5, 12))]
    torch.testing.assert_close(pieces[0] * 5 / 12 + pieces[1] * 7 / 12, mean)
    with pytest.raises(ValueError, match="reduction: expected one of 'mean', 'sum'"):
        emu_loss(model, *batch, **rates, reduction="none")


def test_loss_weights(nations):
    weights = torch.arange(nations.num_relations).double() / 10
    loop = a_loop(nations)
    positives, negatives, _ = sampled(nations, "bernoulli", rows=8)
    weighter = RelationLossWeighter(weights)
    batch = SLCWABatch(
        positives=positives,
        negatives=negatives,
        pos_weights=weighter.weight_triples(positives),
        neg_weights=weighter.weight_triples(negatives),
    )
    torch.manual_seed(3)
    loss = loop._process_batch(batch, 0, 8)
    expected = torch.zeros(1, dtype=torch.float64)
    torch.manual_seed(3)
    seed = int(torch.randint(MAX_SEED - 1, (), dtype=torch.int64))
    mean = emu_loss(
        loop.model, positives, negatives, weights=weights[positives[:, 1]], seed=seed, **SETTINGS
    )
    torch.testing.assert_close(loss, mean + loop.model.collect_regularization_term())
    plain = {**SETTINGS, "mutation_rate": 0.0}
    for i in range(8):
        row = emu_loss(loop.model, positives[i : i + 1], negatives[i : i + 1], **plain)
        expected += weights[positives[i, 1]] * row / 8
    weighted = emu_loss(loop.model, positives, negatives, weights=weights[positives[:, 1]], **plain)
    torch.testing.assert_close(weighted, expected.squeeze())
    batch["neg_weights"][0, 0] += 1
    with pytest.raises(ValueError, match="loss_weighter: expected a weight for each positive"):
        loop._process_batch(batch, 0, 8)


def test_regularizers_see_the_positives(nations):
    """Each representation of heads, relations and tails once."""
    model = new_model(nations, ComplEx)
    regularizer = model.entity_representations[0].regularizer
    assert regularizer is not None
    positives, negatives, _ = sampled(nations, "basic", rows=8)
    emu_loss(model, positives, negatives, **SETTINGS)
    term = model.collect_regularization_term()
    h, r, t = model._get_representations(*positives.T, mode=None)
    expected = regularizer.weight * sum(regularizer(x) for x in (h, r, t))
    model.collect_regularization_term()
    torch.testing.assert_close(term, expected.to(term.dtype).expand_as(term))


def inside_another(nations: Nations, **settings: Any) -> ERModel:
    """DistMult on entities that are computed from a table."""
    base = Embedding(max_id=nations.num_entities, shape=(DIM,), **settings)
    return ERModel(
        triples_factory=nations.training,
        interaction="distmult",
        entity_representations=TransformedRepresentation(torch.nn.Tanh(), base=base),
        relation_representations=Embedding,
        relation_representations_kwargs={"shape": (DIM,)},
    )


@pytest.mark.parametrize("fused", [True, False])
def test_regularizers_inside_representations(nations, monkeypatch, fused):
    model = inside_another(nations, regularizer="lp").train()
    assert fused_similarity(model) == "dot"
    if not fused:
        monkeypatch.setattr(loss_module, "map_model", lambda model: (None, ""))
    positives, negatives, _ = sampled(nations, "basic", rows=8)
    emu_loss(model, positives, negatives, **SETTINGS)
    term = model.collect_regularization_term()
    model.score_hrt(positives)
    torch.testing.assert_close(term, model.collect_regularization_term())
    assert term != 0


def test_dropout_inside_representations(nations):
    assert fused_similarity(inside_another(nations, dropout=0.5)) is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_are_exact(nations, dtype):
    model = new_model(nations, DistMult).to(dtype)
    positives, negatives, _ = sampled(nations, "basic", rows=1)
    plain = emu_loss(model, positives, negatives, **SETTINGS, seed=3)
    for weight in (1 / 3, 1e-8, 1e5):
        weights = torch.tensor([weight], dtype=torch.float64)
        found = emu_loss(model, positives, negatives, weights=weights, **SETTINGS, seed=3)
        torch.testing.assert_close(found, plain * weight, rtol=1e-6, atol=0)


def test_many_finite_scores_in_half_precision(nations):
    """Off the kernels, the sum of the positives' scores is above what fp16 can hold."""
    model = new_model(nations, TransD, relation_dim=4)
    positives, negatives, _ = sampled(nations, "basic", rows=1200)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(9)
    scores = model.half().score_hrt(positives)
    assert scores.isfinite().all()
    assert scores.sum().isinf()
    assert emu_loss(model, positives, negatives, **SETTINGS).isfinite()


@pytest.mark.parametrize(
    ("alpha", "error"),
    [(-1.0, ValueError), (float("nan"), ValueError), (None, TypeError), ("0.2", TypeError)],
)
@pytest.mark.parametrize("kind", [DistMult, TransD])
def test_a_bad_coefficient(nations, kind, alpha, error):
    batch = sampled(nations, "basic", rows=4)
    with pytest.raises(error, match="alpha: expected"):
        emu_loss(new_model(nations, kind), *batch, **SETTINGS | {"alpha": alpha})


# --- runs -----------------------------------------------------------------------------------------


def run(nations: Nations, kind: str = "DistMult", **settings: Any) -> PipelineResult:
    training = {"num_epochs": 3, "batch_size": 400, "use_tqdm": False}
    options: dict[str, Any] = {
        "dataset": nations,
        "model": kind,
        "model_kwargs": {"embedding_dim": DIM},
        "training_loop": EMUTrainingLoop,
        "training_loop_kwargs": SETTINGS,
        "negative_sampler_kwargs": {"num_negs_per_pos": 6},
        "optimizer": "Adagrad",
        "optimizer_kwargs": {"lr": 0.2},
        "random_seed": 1,
        "device": "cpu",
        "evaluation_kwargs": {"use_tqdm": False, "batch_size": 256},
    }
    options["training_kwargs"] = {**training, **settings.pop("training_kwargs", {})}
    return pipeline(**{**options, **settings})


def weights_of(result: PipelineResult) -> list[Tensor]:
    return [p.detach().clone() for p in result.model.parameters()]


def test_pykeen_knows_it_by_name():
    assert training_loop_resolver.lookup("emu") is EMUTrainingLoop
    assert training_loop_resolver.lookup(None) is SLCWATrainingLoop


@pytest.mark.parametrize(
    "settings",
    [
        {"training_loop": "emu", "negative_sampler": "bernoulli"},
        {"negative_sampler": "pseudotyped"},
        {"negative_sampler_kwargs": {"num_negs_per_pos": 6, "filtered": True}},
        {
            "negative_sampler_kwargs": {
                "num_negs_per_pos": 6,
                "filtered": True,
                "filterer": "python-set",
            }
        },
        {"optimizer": "Adam", "optimizer_kwargs": {"lr": 0.1}, "kind": "ComplEx"},
        {"lr_scheduler": "ExponentialLR", "lr_scheduler_kwargs": {"gamma": 0.9}, "kind": "RotatE"},
        {"kind": "PairRE", "loss": "marginranking", "loss_kwargs": {"reduction": "sum"}},
        {"kind": "TransE", "regularizer": "Lp"},
        {
            "training_kwargs": {"sub_batch_size": 100},
            "training_loop_kwargs": SETTINGS | {"automatic_memory_optimization": False},
        },
        {"kind": "TransD", "model_kwargs": {"embedding_dim": DIM, "relation_dim": 4}},
        {"kind": "ERMLP"},
        {"kind": "ConvE"},
        {"training_loop_kwargs": SETTINGS | {"mutation_rate": Expected(0.4)}},
    ],
    ids=str,
)
def test_runs_through_the_pipeline(nations, settings):
    result = run(nations, **settings)
    assert len(result.losses) == 3
    assert result.losses[2] < result.losses[0]
    assert 0 < result.get_metric("mrr") <= 1


def test_constraints_hold_during_training(nations):
    result = run(nations)
    assert isinstance(result.model, ERModel)
    norms = result.model.entity_representations[0](None).norm(dim=-1)
    torch.testing.assert_close(norms, torch.ones_like(norms))


def test_inverse_relations(nations):
    result = run(nations, dataset_kwargs={"create_inverse_triples": True}, dataset="nations")
    assert result.model.num_relations == 2 * nations.num_relations
    assert result.losses[2] < result.losses[0]


def test_the_seed_determines_everything(nations):
    first, same, other = (weights_of(run(nations, random_seed=seed)) for seed in (1, 1, 2))
    assert all(torch.equal(x, y) for x, y in zip(first, same, strict=True))
    assert not all(torch.equal(x, y) for x, y in zip(first, other, strict=True))


@pytest.mark.parametrize("kind", ["DistMult", "TransE"])
def test_resumed_run_equals_the_uninterrupted_one(nations, tmp_path, kind):
    def checkpointed(folder: Path, epochs: int) -> PipelineResult:
        return run(
            nations,
            kind,
            training_kwargs={
                "num_epochs": epochs,
                "checkpoint_directory": folder,
                "checkpoint_name": "run.pt",
                "checkpoint_frequency": 0,
            },
        )

    straight = checkpointed(tmp_path / "straight", 6)
    checkpointed(tmp_path / "cut", 2)
    resumed = checkpointed(tmp_path / "cut", 6)
    assert resumed.losses == straight.losses
    assert all(
        torch.equal(x, y) for x, y in zip(weights_of(resumed), weights_of(straight), strict=True)
    )


def test_early_stopping_returns_to_the_best(nations):
    result = run(
        nations,
        stopper="early",
        stopper_kwargs={
            "frequency": 1,
            "patience": 1,
            "relative_delta": 10.0,  # no model improves so much: stops at the second evaluation
            "evaluation_batch_size": 256,
        },
        training_kwargs={"num_epochs": 20},
    )
    assert isinstance(result.stopper, EarlyStopper)
    assert result.stopper.stopped
    assert len(result.losses) < 20


def test_trackers_get_settings_losses_and_metrics(nations):
    tracker = PythonResultTracker()
    result = run(nations, result_tracker=tracker)
    logged = tracker.configuration
    assert logged["training_loop"] == "EMUTrainingLoop"
    settings = logged["training_loop_kwargs"]
    assert {name: settings[name] for name in SETTINGS} == SETTINGS
    losses = [m["loss"] for m in tracker.metrics.values() if "loss" in m]
    assert losses == result.losses


def test_settings_may_change_between_epochs(nations):
    seen: list[float] = []

    class Schedule(TrainingCallback):
        def pre_batch(self, **keywords: Any) -> None:
            assert isinstance(self.training_loop, EMUTrainingLoop)
            assert isinstance(self.training_loop.mutation_rate, float)
            seen.append(self.training_loop.mutation_rate)

        def post_epoch(self, epoch: int, epoch_loss: float, **keywords: Any) -> None:
            assert isinstance(self.training_loop, EMUTrainingLoop)
            self.training_loop.mutation_rate = 0.1 * epoch

    run(nations, training_kwargs={"callbacks": Schedule()})
    assert sorted(set(seen)) == pytest.approx([0.1, 0.2, 0.4])


def trained(nations: Nations, kind: str, seed: int, **settings: Any) -> float:
    """Filtered MRR on the test split after 30 epochs of 256 positives with 32 negatives each."""
    start: dict[str, dict[str, Any]] = {
        "DistMult": {"entity_constrainer": None, "regularizer": None},
        "ComplEx": {
            "entity_initializer": "xavier_uniform",
            "relation_initializer": "xavier_uniform",
            "regularizer": None,
        },
    }
    result = run(
        nations,
        kind,
        model_kwargs={"embedding_dim": 32, **start.get(kind, {})},
        negative_sampler_kwargs={"num_negs_per_pos": 32},
        optimizer_kwargs={"lr": 0.1},
        training_kwargs={"num_epochs": 30, "batch_size": 256},
        random_seed=seed,
        **settings,
    )
    return float(result.get_metric("mrr"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["DistMult", "ComplEx", "TransE", "PairRE"])
def test_it_learns_as_well_as_in_pykeens_own_loop(nations, kind):
    """Compared with softmax cross-entropy of the same samples, after as many steps.

    Over seeds 0 to 4 the mean (and standard deviation) of the MRR was, PyKEEN's loop first:
    DistMult 0.710 (0.013) and 0.747 (0.009), ComplEx 0.682 (0.014) and 0.757 (0.003), TransE 0.468
    (0.013) and 0.507 (0.018), PairRE 0.759 (0.009) and 0.745 (0.023). So the difference of two
    means of three seeds has a standard deviation of at most 0.015; up to three of those may be
    chance.
    """
    settings = {"mutation_rate": 0.61, "beta": 0.53, "alpha": 0.11}
    vanilla, emu = [], []
    for seed in range(3):
        own: dict[str, Any] = {
            "training_loop": "slcwa",
            "training_loop_kwargs": None,
            "loss": "crossentropy",
        }
        vanilla.append(trained(nations, kind, seed, **own))
        emu.append(trained(nations, kind, seed, training_loop_kwargs=settings))
    assert sum(emu) / 3 > sum(vanilla) / 3 - 3 * 0.015
    assert sum(emu) / 3 > 0.44
