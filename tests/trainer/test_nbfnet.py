"""NBFNet against the paper's equations, edge by edge, and on its way through the trainer."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import emu_kernels
from emu_kernels import emu_mutate
from emu_kernels.negatives import KnownTriples
from emu_kernels.trainer.batches import AlternatingBatches, Batch, InverseBatches
from emu_kernels.trainer.cli import main
from emu_kernels.trainer.config import Config
from emu_kernels.trainer.data import DIRECTIONS, Graph, with_inverses
from emu_kernels.trainer.errors import ConfigError, DataError, TrainerError
from emu_kernels.trainer.evaluation import Evaluator
from emu_kernels.trainer.loop import Trainer
from emu_kernels.trainer.losses import LOSSES
from emu_kernels.trainer.nbfnet import Candidates, Edges, Facts, NBFNet, Readout
from emu_kernels.trainer.predict import Predictor
from emu_kernels.trainer.reading import load_graph
from emu_kernels.trainer.run import RunFolder, new_model
from emu_kernels.trainer.sampling import StrictNegatives

N, R, DIM = 7, 2, 4
TAKEN = ("emu", "expected", "selfadv", "softmax", "uls")

# (1, 0, 2) occurs twice, (4, 1, 4) is a loop, 6 has no edge.
TRIPLES = torch.tensor(
    [[0, 0, 1], [1, 0, 2], [1, 0, 2], [2, 1, 0], [3, 1, 2], [4, 1, 4], [4, 0, 5], [0, 1, 5]]
)


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small(**settings: Any) -> Config:
    given = NBFNet.defaults | {"dim": 8, "layers": 2, "batch_size": 32, "negatives": 4}
    given |= {"steps": 12, "eval_every": 6}
    return Config(data="-", model="NBFNet", **(given | settings))


def net(layers: int = 2, **options: Any) -> NBFNet:
    return NBFNet(N, R, DIM, draws(), layers=layers, **options).double()


def message(kind: str, x: Tensor, r: Tensor) -> Tensor:
    if kind == "distmult":
        return x * r
    if kind == "transe":
        return x + r
    product = torch.complex(*x.chunk(2)) * torch.complex(*r.chunk(2))
    return torch.cat([product.real, product.imag])


def extreme(messages: Tensor, name: str) -> Tensor:
    """(d,) of (M, d): each message that is the extreme gets the whole gradient, as in the authors'
    code."""
    value: Tensor = getattr(messages.detach(), name)(0)
    return value + ((messages - messages.detach()) * (messages == value)).sum(0)


def by_the_paper(
    model: NBFNet, triples: Tensor, given: int, relation: int, kind: str, aggregate: str
) -> Tensor:
    """(N,) scores of one query: equations 2 and 6, node by node and edge by edge."""
    edges = with_inverses(triples, R).tolist()
    query = model.query.weight[relation]
    boundary = [query if v == given else torch.zeros_like(query) for v in range(N)]
    log_degree = [
        torch.tensor(1.0 + sum(t == v for *_, t in edges)).double().log() for v in range(N)
    ]
    mean_log_degree = torch.stack(log_degree).mean()
    nodes = boundary
    for layer in model.layers:
        assert isinstance(layer.linear, torch.nn.Linear)
        if isinstance(layer.relation, torch.nn.Embedding):
            relations = layer.relation.weight
        else:
            relations = layer.relation(query).view(2 * R, DIM)  # type: ignore[operator]
        new = []
        for v in range(N):
            received = [boundary[v]]
            received += [message(kind, nodes[h], relations[r]) for h, r, t in edges if t == v]
            all_of = torch.stack(received)
            if aggregate == "pna":
                mean = all_of.mean(0)
                deviation = (all_of.square().mean(0) - mean.square()).clamp(min=1e-6).sqrt()
                ends = [extreme(all_of, name) for name in ("amin", "amax")]
                four = torch.cat([mean, *ends, deviation])
                scale = log_degree[v] / mean_log_degree
                features = torch.cat([four, scale * four, four / scale.clamp(min=1e-2)])
            elif aggregate in ("min", "max"):
                features = extreme(all_of, f"a{aggregate}")
            else:
                features = getattr(all_of, aggregate)(0)
            z = layer.linear(torch.cat([nodes[v], features]))
            new.append(nodes[v] + layer.norm(z).relu())  # type: ignore[operator]
        nodes = new
    readout = model.readout
    features = torch.stack([torch.cat([node, query]) for node in nodes])
    scores: Tensor = readout.score(readout.hidden(features).relu())[:, 0]
    return scores


@pytest.mark.parametrize(
    "options",
    [
        {"aggregate": "pna"},
        {"aggregate": "sum"},
        {"aggregate": "mean", "relation_features": "table"},
        {"aggregate": "max", "message": "transe"},
        {"aggregate": "min", "message": "rotate"},
        {"aggregate": "pna", "message": "rotate", "relation_features": "table"},
    ],
    ids=lambda options: "-".join(options.values()),
)
@pytest.mark.parametrize("batch", [2, 6])  # fewer and more queries than dimensions
@pytest.mark.parametrize("masked", [False, True])
def test_scores_and_gradients_are_the_papers(options, batch, masked):
    """fp64, so that only a different formula can differ by more than 1e-9."""
    model = net(**options)
    given = torch.tensor([0, 2, 4, 6, 3, 0])[:batch]
    relation = torch.tensor([0, 3, 2, 1, 0, 1])[:batch]
    keep = torch.arange(len(TRIPLES)) % 3 != 0 if masked else None
    edges = Facts(TRIPLES, N, R).edges(keep)
    ours = model.readout(*model.features(edges, given, relation))  # (N, B)
    kept = TRIPLES if keep is None else TRIPLES[keep]
    kind, aggregate = options.get("message", "distmult"), options["aggregate"]
    pairs = zip(given.tolist(), relation.tolist(), strict=True)
    theirs = torch.stack([by_the_paper(model, kept, *pair, kind, aggregate) for pair in pairs], 1)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    upstream = torch.rand(N, batch, generator=draws(1), dtype=torch.float64)
    parameters = list(model.parameters())
    found = torch.autograd.grad(ours, parameters, upstream, allow_unused=True)
    expected = torch.autograd.grad(theirs, parameters, upstream, allow_unused=True)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(
            torch.zeros(()) if one is None else one,
            torch.zeros(()) if other is None else other,
            rtol=1e-7,
            atol=1e-9,
        )


def test_scores_without_any_edge_are_finite():
    """A batch may hold all triples of a graph."""
    edges = Facts(TRIPLES, N, R).edges(torch.zeros(len(TRIPLES), dtype=torch.bool))
    scores = net().readout(*net().features(edges, torch.tensor([0]), torch.tensor([1])))
    assert scores.isfinite().all()


def test_own_edges_are_left_out_in_both_directions():
    facts = Facts(TRIPLES, N, R)
    batch = torch.tensor([[1, 0, 2], [0, 1 + R, 2], [4, 1, 4]])  # the second from its tail
    kept = facts.kept(*batch.T)
    assert kept.tolist() == [True, False, False, False, True, False, True, True]
    edges = facts.edges(kept)
    assert edges.keep is not None
    left = with_inverses(TRIPLES[kept], R)
    graph = edges.graph
    ours = torch.stack([graph.edge_index[0], graph.edge_type, graph.edge_index[1]], 1)[edges.keep]
    assert torch.equal(ours, left)


def test_one_hop_edges_are_left_out_whatever_their_relation():
    far = Facts(TRIPLES, N, R).far(torch.tensor([0, 5]), torch.tensor([[1, 2], [4, 6]]))
    assert far.tolist() == [False, True, True, False, True, True, False, True]


@pytest.mark.parametrize("removed_edges", ["own", "one-hop"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_training_step_scores_as_on_a_graph_without_its_triples(removed_edges, direction):
    graph = Graph([*"abcdefg"], [*"rs"], {"train": TRIPLES})
    model = net(removed_edges=removed_edges)
    head, relation, tail = TRIPLES[[3, 6]].T
    batch = Batch(head, relation, tail, direction)
    negative = torch.tensor([[6, 3, -1]])  # a set for both rows, with padding
    scores = model.comparer(small(), graph)(batch, negative, None, 0).scores()
    near = {3, 6}
    if removed_edges == "one-hop" and direction == "tail":
        near |= {4}  # between 2 and its candidate 3
    left = TRIPLES[[i for i in range(len(TRIPLES)) if i not in near]]
    edges = Facts(left, N, R).edges()
    asked = relation + R if direction == "head" else relation
    expected = model.readout(*model.features(edges, batch.given, asked)).T
    torch.testing.assert_close(scores.positive, expected.gather(1, batch.positive[:, None])[:, 0])
    torch.testing.assert_close(scores.negative[:, :2], expected[:, [6, 3]])
    assert (scores.negative[:, 2] == float("-inf")).all()


# --- negatives and batches ------------------------------------------------------------------------


def test_strict_negatives_are_uniform_among_what_is_not_true():
    triples = torch.tensor([[0, 0, 1], [0, 0, 4], [0, 0, 0], [2, 1, 3]])
    draw = StrictNegatives(KnownTriples(triples, 6, 2), 6, 4000, seed=3)
    batch = Batch(torch.tensor([0, 2]), torch.tensor([0, 1]), torch.tensor([1, 3]), "tail")
    counts = [row.bincount(minlength=6) for row in draw(0, batch)]
    for count, others in zip(counts, ([2, 3, 5], [0, 1, 2, 4, 5]), strict=True):
        assert count.nonzero()[:, 0].tolist() == others
        expected = 4000 / len(others)  # five standard deviations of a binomial
        assert ((count[others] - expected).abs() < 5 * expected**0.5).all()
    assert torch.equal(draw(0, batch), draw(0, batch))
    assert not torch.equal(draw(0, batch), draw(1, batch))
    heads = draw(0, batch._replace(direction="head"))  # of (?, 0, 1) and (?, 1, 3)
    assert [sorted(set(row.tolist())) for row in heads] == [[1, 2, 3, 4, 5], [0, 1, 3, 4, 5]]


def test_a_row_whose_answers_are_all_entities_has_no_negatives():
    triples = torch.tensor([[0, 0, 0], [0, 0, 1], [1, 0, 0]])
    draw = StrictNegatives(KnownTriples(triples, 2, 1), 2, 3, seed=0)
    batch = Batch(torch.tensor([0, 1]), torch.tensor([0, 0]), torch.tensor([1, 0]), "tail")
    assert draw(0, batch).tolist() == [[-1, -1, -1], [1, 1, 1]]


def test_a_step_draws_no_true_negative(graph):
    """In either half of a batch, by the sampler that the settings make."""
    trainer = Trainer(small(batch_size=200, negatives=48), graph)
    known = {tuple(x) for x in with_inverses(graph.triples["train"], graph.num_relations).tolist()}
    batch = trainer._batches(0)
    negative = trainer._negatives(0, batch)
    assert (negative >= 0).all()
    for head, relation, row in zip(batch.head, batch.relation, negative, strict=True):
        assert not known & {(int(head), int(relation), x) for x in row.tolist()}


def test_half_of_a_batch_predicts_tails_half_heads():
    """Of an odd number of triples, the larger part is either in turn."""
    plain, both = AlternatingBatches(TRIPLES, 5, seed=2), InverseBatches(TRIPLES, R, 5, seed=2)
    for step, half in ((3, 3), (4, 2)):
        head, relation, tail, *_ = plain(step)
        batch = both(step)
        assert batch.direction == "tail"
        assert batch.head.tolist() == [*head[:half], *tail[half:]]
        assert batch.tail.tolist() == [*tail[:half], *head[half:]]
        assert batch.relation.tolist() == [*relation[:half], *relation[half:] + R]


# --- losses ---------------------------------------------------------------------------------------


def candidates(**settings: Any) -> Candidates:
    """Four rows of three negatives, one of them padding."""
    config = small(dim=DIM, **settings)
    torch.manual_seed(0)
    real = torch.ones(4, 3, dtype=torch.bool)
    real[0, 1] = False
    weight = torch.tensor([1.0, 2.0, 0.5, 1.0])
    inputs = torch.randn(4, DIM), torch.randn(4, DIM), torch.randn(4, 3, DIM)
    return Candidates(config, Readout(DIM), *inputs, real, weight, seed=11)


def score(step: Candidates, features: Tensor) -> Tensor:
    """(B, K) from (B, K, d), by torch's own layers."""
    query = step.query[:, None].expand_as(features)
    layers = step.readout
    scores: Tensor = layers.score(layers.hidden(torch.cat([features, query], -1)).relu())
    return scores[..., 0].masked_fill(~step.real[:, : features.shape[1]], float("-inf"))


def expected_rows(name: str, step: Candidates) -> Tensor:
    config, real = step.config, step.real
    positive, negative = score(step, step.positive[:, None])[:, 0], score(step, step.negative)
    if name == "selfadv":  # as NBFNet's authors write it, with 1/T for the temperature
        target = torch.zeros(4, 4)
        target[:, 0] = 1
        logits = torch.cat([positive[:, None], negative.masked_fill(~real, 0)], 1)
        rows = torch.nn.functional.binary_cross_entropy_with_logits(
            logits, target, reduction="none"
        )
        share = torch.softmax(negative.detach() * config.adversarial_temperature, dim=1)
        return (rows * torch.cat([torch.ones(4, 1), share], 1)).sum(1)
    softmax = torch.cat([positive[:, None], negative], 1).logsumexp(1) - positive
    if name == "softmax":
        return softmax
    mutated = negative
    if name == "emu":
        rate = config.mutation_rate
        features = emu_mutate(step.positive, step.negative, mutation_rate=rate, seed=11)
        mutated = score(step, features)
    lse = torch.cat([positive[:, None], mutated], 1).logsumexp(1)
    gaps = ((lse[:, None] - mutated.masked_fill(~real, 0)) * real).sum(1)
    return (lse - positive + config.beta * gaps) / real.sum(1) + config.alpha * softmax


@pytest.mark.parametrize("name", [name for name in TAKEN if name != "expected"])
def test_losses_follow_their_formulas(name):
    step = candidates(loss=name, adversarial_temperature=2.0)
    rows, weight = expected_rows(name, step), step.sample_weight
    assert weight is not None
    found = LOSSES[name](step)
    torch.testing.assert_close(found, (rows * weight).sum() / weight.sum())
    assert all(x is not None for x in torch.autograd.grad(found, list(step.readout.parameters())))


def test_closed_form_has_the_moments_of_all_masks():
    """Exactly, if no ReLU opens or closes in between: a large bias keeps half of them open."""
    step = candidates(loss="expected", mutation_rate=0.3)
    with torch.no_grad():
        step.readout.hidden.bias.copy_(torch.tensor([100.0, -100.0]).repeat(DIM))
    masks = torch.tensor([*itertools.product([0.0, 1.0], repeat=DIM)])  # (16, d)
    share = torch.where(masks == 1, 0.3, 0.7).prod(1)
    scores = torch.stack(
        [score(step, m * step.positive[:, None] + (1 - m) * step.negative) for m in masks]
    )
    mean = torch.einsum("m,mbk->bk", share, scores)
    variance = torch.einsum("m,mbk->bk", share, (scores - mean).square())
    positive = score(step, step.positive[:, None])[:, 0]
    negative = score(step, step.negative)
    cumulant = (mean + variance / 2).masked_fill(~step.real, float("-inf"))
    lse = torch.cat([positive[:, None], cumulant], 1).logsumexp(1)
    gaps = ((lse[:, None] - mean.masked_fill(~step.real, 0)) * step.real).sum(1)
    rows = (lse - positive + step.config.beta * gaps) / step.real.sum(1)
    rows = rows + step.config.alpha * (
        torch.cat([positive[:, None], negative], 1).logsumexp(1) - positive
    )
    weight = step.sample_weight
    assert weight is not None
    # Scores of about 100 in fp32 leave 1e-5 of their differences.
    torch.testing.assert_close(
        LOSSES["expected"](step), (rows * weight).sum() / weight.sum(), rtol=1e-4, atol=1e-4
    )


def test_uls_is_emu_without_mutation():
    assert LOSSES["uls"](candidates(loss="uls")) == LOSSES["emu"](
        candidates(loss="emu", mutation_rate=0.0)
    )


# --- the trainer ----------------------------------------------------------------------------------


def same_parameters(one: Trainer, other: Trainer) -> bool:
    pairs = zip(one.model.parameters(), other.model.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("loss", TAKEN)
def test_a_resumed_run_gives_the_same_numbers(graph, tmp_path, loss):
    config = small(loss=loss)
    straight = Trainer(config, graph)
    straight.train()
    run = RunFolder.create(tmp_path, config, graph)
    first = Trainer(config, graph, run)
    for _ in range(7):
        first._train_step()
    first.save()
    second = Trainer.resume(run.read_config(), run.read_graph(), run)
    second.train()
    assert second.step == straight.step
    assert same_parameters(second, straight)


@pytest.mark.parametrize(
    "settings",
    [
        {"corruption": "alternate"},
        {"corruption": "bernoulli", "subsampling": True, "loss": "emu"},
        {"sampler": "uniform", "rows_per_set": 8, "filter_negatives": True},
        {"aggregate": "sum", "message": "transe", "removed_edges": "one-hop"},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_other_settings_train(graph, settings):
    trainer = Trainer(small(**settings), graph)
    before = [x.clone() for x in trainer.model.parameters()]
    assert trainer.train()
    pairs = zip(before, trainer.model.parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in pairs)


def test_initial_values_are_the_seeds(graph):
    """And drawing them leaves torch's own generator alone."""
    torch.manual_seed(5)
    models = [new_model(small(seed=seed), graph) for seed in (1, 1, 2)]
    drawn = torch.rand(())
    torch.manual_seed(5)
    assert drawn == torch.rand(())
    first, same, other = (list(model.parameters()) for model in models)
    assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
    assert not any(
        torch.equal(a, b) for a, b in zip(first, other, strict=True) if len(a.unique()) > 1
    )


def test_it_learns(graph):
    """A graph of 48 entities and rules of one hop: by chance the MRR is about 0.1."""
    trainer = Trainer(small(steps=60, eval_every=60, batch_size=64, lr=0.02), graph)
    before = trainer.evaluator.evaluate(trainer.model, "test").mrr
    trainer.train()
    after = trainer.evaluator.evaluate(trainer.model, "test").mrr
    assert after > max(0.3, 1.5 * before)


def test_ranks_are_filtered_in_both_directions(graph):
    model = new_model(small(), graph)
    triples = graph.triples["test"][:10]
    everything = {tuple(x) for split in graph.triples.values() for x in split.tolist()}
    for direction in DIRECTIONS:
        ranks = Evaluator(graph).ranks(model, triples, direction)
        side = 2 if direction == "tail" else 0
        for triple, rank in zip(triples.tolist(), ranks.tolist(), strict=True):
            given = torch.tensor([triple[2 - side]])
            with torch.no_grad():
                scores = model.scorer(graph)(given, torch.tensor([triple[1]]), direction)[0]
            true = triple[side]
            better = 0.0
            for entity in range(graph.num_entities):
                other = list(triple)
                other[side] = entity
                if entity != true and tuple(other) not in everything:
                    better += float(scores[entity] > scores[true])
                    better += 0.5 * float(scores[entity] == scores[true])
            assert rank == 1 + better


# --- two graphs -----------------------------------------------------------------------------------


def write(folder: Path, **splits: list[tuple[str, str, str]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for split, triples in splits.items():
        (folder / f"{split}.txt").write_text("".join("\t".join(x) + "\n" for x in triples))


@pytest.fixture
def two_graphs(graph_folder: Path) -> Path:
    """Besides the graph of conftest.py, one with the same rules and other entities."""
    clusters, members = 6, 4
    triples = [
        (f"x{head}", f"r{r}", f"x{(head // members + r) % clusters * members + i}")
        for head in range(clusters * members)
        for r in range(4)
        for i in range(members)
        if (head + r + i) % 3
    ]
    write(graph_folder / "ind", train=triples[::2], valid=triples[1::4], test=triples[3::4])
    return graph_folder


SMALL = ["--model", "NBFNet", "--dim", "8", "--layers", "2", "--steps", "8", "--eval-every", "4"]


def test_inductive_run_from_beginning_to_end(two_graphs, tmp_path, capsys):
    folder = str(tmp_path / "run")
    assert main(["--data", str(two_graphs), "--run-dir", folder, *SMALL]) == 0
    shown = "".join(capsys.readouterr())
    assert "tested on: 24 entities, 4 relations" in shown
    assert "layers 2, message distmult, aggregate pna" in shown
    assert "margin" not in shown
    assert "L3" not in shown
    run = RunFolder.open(Path(folder))
    graph = run.read_graph()
    assert graph.inductive is not None
    model, _ = run.load_model(graph)
    second = Evaluator(graph.inductive).evaluate(model, "test")
    (test,) = [line for line in run.read_metrics() if line.get("split") == "test"]
    assert {k: test[k] for k in vars(second)} == vars(second)
    first = Evaluator(dataclasses.replace(graph, inductive=None)).evaluate(model, "valid")
    valid = max(
        (line for line in run.read_metrics() if line.get("split") == "valid"),
        key=lambda line: line["mrr"],
    )
    assert {k: valid[k] for k in vars(first)} == vars(first)
    assert not (Path(folder) / "embeddings.safetensors").exists()

    predictor = emu_kernels.load(folder)
    assert list(predictor.graph.entities) == list(graph.inductive.entities)
    check_predictions(predictor)
    assert main(["--resume", folder, "--steps", "12"]) == 0
    assert json.loads((Path(folder) / "config.json").read_text())["config"]["steps"] == 12


def check_predictions(predictor: Predictor) -> None:
    """The best answers, scores of triples and relations agree with the scores of all entities."""
    graph, model = predictor.graph, predictor.model
    name, relation = graph.entities[3], graph.relations[1]
    for direction in DIRECTIONS:
        head, tail = (name, None) if direction == "tail" else (None, name)
        scores = model.scorer(graph)(torch.tensor([3]), torch.tensor([1]), direction)[0]
        best = scores.topk(4)
        found = predictor.predict(head, relation, tail, k=4)
        torch.testing.assert_close(torch.tensor([x.score for x in found]), best.values)
        assert [graph.entities.index(getattr(x, direction)) for x in found] == best.indices.tolist()
    tail = graph.entities[5]
    one = predictor.score([(name, relation, tail)])
    scores = model.scorer(graph)(torch.tensor([3]), torch.tensor([1]), "tail")[0]
    torch.testing.assert_close(one[0], scores[5])
    of_relations = predictor.relations(name, tail)
    assert len(of_relations) == 4
    (same,) = [x.score for x in of_relations if x.relation == relation]
    assert same == pytest.approx(float(one), abs=1e-5)
    with pytest.raises(TrainerError, match="NBFNet has no embeddings"):
        predictor.neighbours(name)


def test_prediction_on_one_graph(graph, tmp_path):
    config = small()
    Trainer(config, graph, RunFolder.create(tmp_path, config, graph)).save()
    check_predictions(emu_kernels.load(tmp_path))


def test_other_models_need_one_graph(two_graphs, tmp_path, capsys):
    arguments = ["--data", str(two_graphs), "--run-dir", str(tmp_path / "run"), "--dim", "8"]
    assert main([*arguments, "--model", "DistMult"]) == 1
    said = capsys.readouterr().err
    assert "DistMult has no embeddings for the entities of a second graph" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"train": [("a", "new", "b")], "test": []}, r"relation 'new' of \(a, new, b\) is not one"),
        (
            {"train": [("a", "r1", "b")], "test": [("b", "new", "a")]},
            "test.txt: the relation 'new'",
        ),
        ({"train": [], "test": [("a", "r1", "b")]}, "train.txt holds no triples"),
        ({"train": [("a", "r1", "b")]}, "holds no test.txt; a graph to test on must hold"),
        ({"test": [("a", "r1", "b")]}, "holds no train.txt; a graph to test on must hold"),
    ],
)
def test_second_graphs_that_cannot_be_tested_on(graph_folder, splits, message):
    write(graph_folder / "ind", **splits)
    with pytest.raises(DataError, match=message):
        load_graph(graph_folder)


def test_a_relation_of_the_first_graph_that_is_not_trained_on_is_unknown(graph_folder):
    with (graph_folder / "valid.txt").open("a") as file:
        file.write("e0\tonly here\te1\n")
    write(graph_folder / "ind", train=[("a", "only here", "b")], test=[])
    with pytest.raises(DataError, match=r"'only here' .* 4 relations that are trained on"):
        load_graph(graph_folder)


# --- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"norm": 2}, "norm must be left out: NBFNet"),
        ({"margin": 9.0}, "margin must be left out: NBFNet"),
        ({"sparse": True}, "sparse must be left out: NBFNet"),
        ({"regularization": 1e-3}, "regularization must be left out: NBFNet"),
        ({"init_entities": "x.npz"}, "init_entities must be left out: NBFNet"),
        ({"freeze_entities": True}, "freeze_entities must be left out: NBFNet"),
        ({"tsv": True}, "tsv must be left out: NBFNet"),
        ({"mask_unit": "pair"}, "mask_unit must be left out: NBFNet"),
        ({"loss": "onevsall"}, "NBFNet needs one with sampled negatives"),
        ({"loss": "softmax", "negatives": -1}, "NBFNet needs one with sampled negatives"),
        ({"loss": "mixup"}, "NBFNet needs one with sampled negatives, other than mixup"),
        ({"layers": 0}, "layers must be at least 1"),
        ({"aggregate": "median"}, "unknown aggregate 'median'"),
        ({"message": "rotate", "dim": 7}, "message 'rotate' needs an even dim, got 7"),
        ({"subsampling": True}, "subsampling: corruption 'both' has no weights"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_settings_that_make_no_sense_with_it(settings, message):
    with pytest.raises(ConfigError, match=message):
        small(**settings)


def test_other_models_have_none_of_its_settings():
    with pytest.raises(ConfigError, match="layers must be left out: it is a setting of NBFNet"):
        Config(data="-", model="DistMult", layers=3)
    assert Config(data="-").layers is None


def test_batches_of_both_directions_need_inverse_relations(graph):
    with pytest.raises(ConfigError, match="corruption 'both' needs inverse_relations"):
        Config(data="-", corruption="both")
    config = Config(
        data="-", dim=8, corruption="both", inverse_relations=True, sampler="strict", steps=2
    )
    assert Trainer(dataclasses.replace(config, batch_size=32), graph).train()


def test_a_stored_config_can_be_read():
    config = small(loss="emu")
    assert Config.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_edges_of_a_graph_are_kept_whole_without_a_mask():
    edges = Facts(TRIPLES, N, R).edges()
    assert isinstance(edges, Edges)
    assert edges.keep is None
    torch.testing.assert_close(edges.scalers[:, 1].mean(), torch.tensor(1.0, dtype=torch.float64))
