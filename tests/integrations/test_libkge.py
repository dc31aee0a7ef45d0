"""LibKGE: its own kl loss without mutation, each scorer and sampler, jobs from a configuration."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from emu_kernels import Expected, fused_emu_loss, one_vs_all_loss

os.environ.setdefault("NUMBA_DISABLE_JIT", "1")  # compiling takes longer than all the tests
pytest.importorskip(
    "kge",
    reason="LibKGE is not on PyPI: clone https://github.com/uma-pi1/kge and install it from there",
)

from kge import Config, Dataset
from kge.job import Job
from kge.util.io import load_checkpoint

from emu_kernels.integrations.libkge import (
    TrainingJobEMU,
    TrainingJobEMU1vsAll,
    fused_similarity,
)
from emu_kernels.integrations.libkge.scorers import map_model, query_of

ENTITIES, RELATIONS, DIM = 12, 3, 6
SPLITS = {"train": 40, "valid": 6, "test": 6}
K = 4

SCORERS: dict[str, tuple[str, dict[str, Any]]] = {
    "distmult": ("dot", {}),
    "complex": ("dot", {}),
    "transe": ("l1", {"transe.l_norm": 1.0}),
    "transe l2": ("l2", {"transe.l_norm": 2.0}),
    "rotate": ("rotate", {"rotate.l_norm": 1.0}),
    "rotate l2": ("l2", {"rotate.l_norm": 2.0}),
    "rescal": ("dot", {}),
    "cp": ("dot", {}),
    "simple": ("dot", {}),
    "relational_tucker3": (
        "dot",
        {"relational_tucker3.relation_embedder.base_embedder.dim": 4},
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of LibKGE with random triples."""
    folder = tmp_path_factory.mktemp("tiny")
    folder.joinpath("dataset.yaml").write_text(
        f"dataset:\n  name: tiny\n  num_entities: {ENTITIES}\n  num_relations: {RELATIONS}\n"
        "  pickle: False\n"
    )
    torch.manual_seed(0)
    for split, size in SPLITS.items():
        sizes = (ENTITIES, RELATIONS, ENTITIES)
        columns = [torch.randint(high, (size,)).tolist() for high in sizes]
        lines = ["\t".join(map(str, triple)) for triple in zip(*columns, strict=True)]
        folder.joinpath(f"{split}.del").write_text("\n".join(lines) + "\n")
    for name, size in (("entity", ENTITIES), ("relation", RELATIONS)):
        lines = [f"{i}\t{name}{i}" for i in range(size)]
        folder.joinpath(f"{name}_ids.del").write_text("\n".join(lines) + "\n")
    return folder


NewJob = Callable[..., Any]


@pytest.fixture
def new_job(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> NewJob:
    """A function of a model's name, a training type and options that makes LibKGE's job."""
    # LibKGE's checkpoints hold its objects, which torch.load refuses by default.
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    count = 0

    def make(
        model: str,
        train_type: str = "emu",
        options: dict[str, Any] | None = None,
        *,
        reciprocal: bool = False,
        **keywords: Any,
    ) -> Any:
        nonlocal count
        count += 1
        name = model.split()[0]
        config = Config(folder=str(tmp_path / f"job{count}"))
        config.load_options(
            {
                "modules": ["emu_kernels.integrations.libkge"],
                "import": [name, "projection_embedder", "emu", "emu_1vsAll"],
                "model": "reciprocal_relations_model" if reciprocal else name,
            }
        )
        if reciprocal:
            config.set("reciprocal_relations_model.base_model.type", name)
        given: dict[str, Any] = {
            "job.device": "cpu",
            "console.quiet": True,
            "train.type": train_type,
            "train.max_epochs": 1,
            "train.batch_size": 16,
            "valid.every": 0,
            "valid.last": False,
            "lookup_embedder.dim": DIM,
            "negative_sampling.num_samples.s": K,
            "dataset.name": "tiny",
        }
        config.set_all({**given, **(SCORERS.get(model, ("", {}))[1]), **(options or {})}, True)
        config.init_folder()
        torch.manual_seed(0)
        dataset = Dataset.create(config, folder=str(folder))
        return Job.create(config, dataset, **keywords)

    return make


Step = tuple[float, dict[str, Tensor]]


def step(job: Any, batch: Any) -> Step:
    """The loss of a batch, and the gradients of the model's parameters."""
    job.model.zero_grad()
    result = job._process_batch(0, batch)
    grads = {
        name: (p.grad.to_dense() if p.grad.is_sparse else p.grad).clone()
        for name, p in job.model.named_parameters()
        if p.grad is not None
    }
    return result.avg_loss, grads


def first_batch(job: Any) -> Any:
    if not job._is_prepared:
        job._prepare()
        job._is_prepared = True
    return next(iter(job.loader))


def both(ours: Any, theirs: Any) -> tuple[Step, Step]:
    """The same batch in two jobs of one model."""
    theirs.model.load_state_dict(ours.model.state_dict())
    first_batch(ours)
    batch = first_batch(theirs)
    copy = {**batch}
    return step(ours, batch), step(theirs, copy)


def assert_same(ours: Step, theirs: Step, tolerance: float = 2e-5) -> None:
    assert ours[0] == pytest.approx(theirs[0], rel=tolerance)
    assert ours[1].keys() == theirs[1].keys()
    for name, grad in theirs[1].items():
        torch.testing.assert_close(ours[1][name], grad, rtol=10 * tolerance, atol=tolerance)


SOFTMAX = {"emu.mutation_rate": 0.0, "emu.beta": 0.0, "emu.alpha": 1 - 1 / K}
SIDES = {
    "both": {},
    "s": {"negative_sampling.num_samples.o": 0},
    "o": {"negative_sampling.num_samples.s": 0, "negative_sampling.num_samples.o": K},
}


# --- sampled negatives ----------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["s", "o"])
@pytest.mark.parametrize("reciprocal", [False, True], ids=["", "reciprocal"])
@pytest.mark.parametrize("model", SCORERS)
def test_without_mutation_it_is_libkges_kl(new_job, model, reciprocal, side):
    ours = new_job(model, "emu", {**SOFTMAX, **SIDES[side]}, reciprocal=reciprocal)
    theirs = new_job(model, "negative_sampling", SIDES[side], reciprocal=reciprocal)
    assert fused_similarity(ours.model) == SCORERS[model][0]
    assert_same(*both(ours, theirs))


SAMPLERS: dict[str, dict[str, Any]] = {
    "filtered": {"filtering.s": True, "filtering.o": True},
    "many": {"num_samples.s": 40},
    "shared": {"shared": True},
    "shared distinct": {"shared": True, "with_replacement": False},
    "naive": {"shared": True, "shared_type": "naive"},
    "naive distinct": {"shared": True, "shared_type": "naive", "with_replacement": False},
    "all": {"implementation": "all"},
}


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samplers(new_job, sampler):
    options = {f"negative_sampling.{name}": value for name, value in SAMPLERS[sampler].items()}
    count = options.get("negative_sampling.num_samples.s", K)
    ours = new_job("complex", "emu", {**SOFTMAX, **options, "emu.alpha": 1 - 1 / count})
    theirs = new_job("complex", "negative_sampling", options)
    assert_same(*both(ours, theirs))


def test_naively_shared_negatives_are_one_set(new_job, monkeypatch):
    options = {"negative_sampling.shared": True, "negative_sampling.shared_type": "naive"}
    job = new_job("distmult", "emu", options)
    shapes = []
    forward = job.emu_loss.forward

    def recorded(query: Tensor, table: Tensor, positive: Tensor, negative: Tensor, **more: Any):
        shapes.append(tuple(negative.shape))
        return forward(query, table, positive, negative, **more)

    monkeypatch.setattr(job.emu_loss, "forward", recorded)
    step(job, first_batch(job))
    assert shapes == [(K,), (K,)]


@pytest.mark.parametrize("expected", [False, True])
@pytest.mark.parametrize("model", ["distmult", "rotate", "cp"])
def test_the_loss_is_emus(new_job, model, expected):
    job = new_job(model, "emu", {"emu.expected": expected})
    batch = first_batch(job)
    loss, _ = step(job, batch)
    mapping = map_model(job.model)
    total = 0.0
    for slot in (0, 2):
        query, side = query_of(job.model, mapping, batch["triples"], slot)
        total += fused_emu_loss(
            query,
            mapping.candidates(job.model.get_s_embedder().embed_all(), side),
            batch["triples"][:, slot],
            batch["negative_samples"][slot].samples(),
            similarity=mapping.similarity,
            mutation_rate=Expected(0.61) if expected else 0.61,
            beta=0.53,
            alpha=0.11,
            mask_unit="pair" if expected and model == "rotate" else "component",
            seed=batch["seeds"][slot],
        ).item()
    assert loss == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("shared", [False, True])
def test_subbatches_change_nothing(new_job, monkeypatch, shared):
    options = {"negative_sampling.shared": shared, "negative_sampling.shared_type": "naive"}
    job = new_job("complex", "emu", options)
    batch = first_batch(job)
    monkeypatch.setattr(torch, "randint", lambda *_, **__: torch.tensor([5, 6, 7]))
    whole = step(job, batch)
    job._max_subbatch_size = 5
    assert_same(step(job, batch), whole)


@pytest.mark.parametrize("train_type", ["emu", "emu_1vsAll"])
def test_projected_embeddings(new_job, train_type):
    options = {
        **SOFTMAX,
        "emu_1vsAll.softmax": True,
        "distmult.entity_embedder.type": "projection_embedder",
        "projection_embedder.regularize_args.weighted": False,  # LibKGE reads it for all entities
        "eval.type": "training_loss",
        "valid.metric": "avg_loss",
        "valid.metric_max": False,
    }
    theirs = "negative_sampling" if train_type == "emu" else "1vsAll"
    ours = new_job("distmult", train_type, options)
    assert_same(*both(ours, new_job("distmult", theirs, options)))
    assert ours.valid_job.run()["avg_loss"] > 0


def test_dropped_embeddings(new_job):
    dropped = new_job("distmult", "emu", {"distmult.entity_embedder.dropout": 0.5})
    plain = new_job("distmult", "emu", {})
    plain.model.load_state_dict(dropped.model.state_dict())
    batch = first_batch(dropped)
    first_batch(plain)
    changed, _ = step(dropped, batch)
    dropped.model.eval()
    torch.manual_seed(3)
    still = step(dropped, batch)
    torch.manual_seed(3)
    assert_same(still, step(plain, batch))
    assert changed != pytest.approx(still[0])


@pytest.mark.parametrize("train_type", ["emu", "emu_1vsAll"])
@pytest.mark.parametrize("model", ["complex", "cp"])
def test_sparse_embeddings(new_job, model, train_type):
    options = {"lookup_embedder.sparse": True, "emu.alpha": 0.4}
    sparse, dense = (
        new_job(model, train_type, options),
        new_job(model, train_type, {"emu.alpha": 0.4}),
    )
    dense.model.load_state_dict(sparse.model.state_dict())
    batch = first_batch(sparse)
    first_batch(dense)
    torch.manual_seed(3)
    ours = step(sparse, batch)
    assert all(p.grad.is_sparse for p in sparse.model.parameters())
    torch.manual_seed(3)
    assert_same(ours, step(dense, batch))


# --- all entities ---------------------------------------------------------------------------------


@pytest.mark.parametrize("softmax", [True, False])
@pytest.mark.parametrize("model", SCORERS)
def test_1vsall_is_libkges_kl(new_job, model, softmax):
    options = {
        "emu_1vsAll.softmax": softmax,
        "emu_1vsAll.mutation_rate": 0.0,
        "emu_1vsAll.beta": 0.0,
        "emu_1vsAll.alpha": 1 - 1 / (ENTITIES - 1),
    }
    ours, theirs = new_job(model, "emu_1vsAll", options), new_job(model, "1vsAll")
    assert_same(*both(ours, theirs))


def test_1vsall_reciprocal_and_mutated(new_job):
    job = new_job("complex", "emu_1vsAll", reciprocal=True)
    batch = first_batch(job)
    loss, _ = step(job, batch)
    total, mapping = 0.0, map_model(job.model)
    for slot in (0, 2):
        query, _ = query_of(job.model, mapping, batch["triples"], slot)
        total += one_vs_all_loss(
            query,
            job.model.get_s_embedder().embed_all(),
            batch["triples"][:, slot],
            mutation_rate=Expected(0.61),
            beta=0.53,
            alpha=0.11,
        ).item()
    assert loss == pytest.approx(total, rel=1e-5)


# --- jobs -----------------------------------------------------------------------------------------

KINDS: dict[str, Any] = {"emu": TrainingJobEMU, "emu_1vsAll": TrainingJobEMU1vsAll}


@pytest.mark.parametrize("reciprocal", [False, True], ids=["", "reciprocal"])
@pytest.mark.parametrize("train_type", KINDS)
def test_a_run_validates_and_resumes(new_job, train_type, reciprocal):
    options = {
        f"{train_type}.mutation_rate": 0.3,
        "valid.every": 1,
        "lookup_embedder.regularize_weight": 0.01,
        "train.subbatch_size": 7,
    }
    job = new_job("complex", train_type, options, reciprocal=reciprocal)
    assert type(job) is KINDS[train_type]
    before = {name: p.clone() for name, p in job.model.named_parameters()}
    job.run()
    assert all(not torch.equal(p, before[name]) for name, p in job.model.named_parameters())
    trace = job.model.meta["train_trace_entry"]
    assert trace["type"] == train_type
    assert math.isfinite(trace["avg_loss"])
    assert trace["avg_penalty"] > 0
    assert 0 < job.valid_trace[0]["mean_reciprocal_rank_filtered"] <= 1

    more = Config(load_default=False)
    more.set("train.max_epochs", 2, create=True)
    checkpoint = load_checkpoint(job.config.checkpoint_file(1))
    resumed = Job.create_from(checkpoint, new_config=more, dataset=job.dataset)
    assert type(resumed) is KINDS[train_type]
    assert resumed.config.get(f"{train_type}.mutation_rate") == 0.3
    for name, p in resumed.model.named_parameters():
        assert torch.equal(p, job.model.get_parameter(name))
    resumed.run()
    assert resumed.epoch == 2
    assert len(resumed.valid_trace) == 2


def test_a_grid_search(new_job):
    job = new_job(
        "distmult",
        "emu",
        {
            "job.type": "search",
            "search.type": "grid_search",
            "valid.every": 1,
            "grid_search.parameters": {"emu.mutation_rate": [0.1, 0.6]},
        },
    )
    job.run()
    losses = set()
    for folder in sorted(Path(job.config.folder).glob("mr*")):
        checkpoint = load_checkpoint(str(folder / "checkpoint_00001.pt"))
        losses.add(checkpoint["model"][1]["train_trace_entry"]["avg_loss"])
    assert len(losses) == 2


def test_the_pages_configuration_loads(tmp_path):
    page = Path(__file__).resolve().parents[2].joinpath("docs", "libkge.md").read_text()
    _, first, second, *_ = page.split("```diff\n")
    for text, name in ((first, "emu"), (second, "emu_1vsAll")):
        lines = text.split("```")[0].splitlines()
        file = tmp_path / f"{name}.yaml"
        file.write_text("\n".join(line[1:] for line in lines if line[0] != "-"))
        config = Config()
        config.load(str(file))
        assert config.get("train.type") == name
        for option in config.get(name):
            assert option == "class_name" or f"`{option}`" in page
    assert "model: complex" in first


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"negative_sampling.num_samples.p": 2}, "num_samples.p: .* expected 0, got 2"),
        ({"train.loss": "bce"}, "train.loss: .* expected kl, .* got bce"),
        ({"emu.mutation_rate": 1.5}, r"emu.mutation_rate: expected a number in \[0, 1\], got 1.5"),
        ({"emu.beta": -1.0}, "emu.beta: "),
        ({"emu.alpha": -1.0}, "emu.alpha: "),
        ({"emu.mask_unit": "row"}, "emu.mask_unit"),
        ({"emu.backend": "tpu"}, "emu.backend: "),
    ],
)
def test_options_that_do_not_fit(new_job, options, message):
    with pytest.raises(ValueError, match=message):
        new_job("distmult", "emu", options)


@pytest.mark.parametrize("train_type", KINDS)
def test_scorers_that_are_no_similarity(new_job, train_type):
    for model, reciprocal in (("transh", False), ("conve", True), ("transformer", True)):
        with pytest.raises(ValueError, match=r"does not compare .* set train.type to neg"):
            new_job(model, train_type, {"lookup_embedder.dim": 8}, reciprocal=reciprocal)
    with pytest.raises(ValueError, match=r"l_norm: TransEScorer .* for 1 and 2, got 3"):
        new_job("transe", train_type, {"transe.l_norm": 3.0})
