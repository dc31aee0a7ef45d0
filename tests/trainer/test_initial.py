"""Entities whose initial vectors come from a file, and which keep them if they are frozen."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from emu_kernels.trainer import cli
from emu_kernels.trainer.config import Config
from emu_kernels.trainer.data import Graph
from emu_kernels.trainer.errors import ConfigError, DataError, RunError
from emu_kernels.trainer.loop import Trainer
from emu_kernels.trainer.losses import LOSSES
from emu_kernels.trainer.models import MODELS
from emu_kernels.trainer.run import RunFolder, new_model
from tests.trainer.support import embeddings

SMALL = Config(data="-", dim=16, batch_size=64, negatives=8, steps=20, eval_every=10, log_every=10)


@pytest.fixture(autouse=True)
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("emu_kernels.trainer.loop.plot_metrics", lambda *_: None)


def write(folder: Path, names: list[str], vectors: Any, file: str = "vectors.npz") -> str:
    numpy.savez(folder / file, names=numpy.array(names), vectors=vectors)
    return str(folder / file)


def vectors_of(count: int, width: int = 16) -> Any:
    return numpy.random.default_rng(0).normal(size=(count, width))


def test_vectors_go_to_their_names(graph, tmp_path, capsys):
    """In another order than the graph's, for some of its entities and for an unknown one."""
    names = [*reversed(graph.entities[3:]), "stranger"]
    vectors = vectors_of(len(names))
    config = dataclasses.replace(SMALL, init_entities=write(tmp_path, names, vectors))
    trainer = Trainer(config, graph)
    drawn = embeddings(new_model(config, graph)).entity
    assert torch.equal(embeddings(trainer.model).entity[:3], drawn[:3])
    for name, vector in zip(names[:-1], vectors, strict=False):
        row = embeddings(trainer.model).entity[graph.entities.index(name)]
        assert torch.equal(row, torch.from_numpy(vector).float())
    said = capsys.readouterr().err
    assert "45 of 48 entities begin with its vectors, 3 are not in it and begin at random" in said
    assert "; 1 of its names are of no entity" in said
    trainer.train()
    assert not torch.equal(embeddings(trainer.model).entity[3:], drawn[3:])


@pytest.mark.parametrize(
    "settings",
    [
        *({"loss": name, "filter_negatives": True} for name in LOSSES),
        *({"model": name, "regularization": 1e-3} for name in MODELS),
        {"sparse": True, "inverse_relations": True},
        {"loss": "expected", "negatives": -1},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_frozen_entities_stay_and_relations_learn(graph, tmp_path, settings):
    config = dataclasses.replace(SMALL, freeze_entities=True, init_entities="-", **settings)
    width = 16 * MODELS[config.model].entity_width
    vectors = vectors_of(graph.num_entities, width).astype(numpy.float32)
    file = write(tmp_path, list(graph.entities), vectors)
    trainer = Trainer(dataclasses.replace(config, init_entities=file), graph)
    relations = embeddings(trainer.model).relation.detach().clone()
    trainer.train()
    assert torch.equal(embeddings(trainer.model).entity, torch.from_numpy(vectors))
    assert embeddings(trainer.model).entity.grad is None
    assert (embeddings(trainer.model).relation != relations).any(dim=1).all()
    parameters = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    assert not any(p is embeddings(trainer.model).entity for p in parameters)


def test_relations_move_as_beside_entities_that_learn(graph, tmp_path):
    """In the first step freezing the entities changes nothing for the relations."""
    file = write(tmp_path, list(graph.entities), vectors_of(graph.num_entities))
    config = dataclasses.replace(SMALL, init_entities=file)
    both = [
        Trainer(dataclasses.replace(config, freeze_entities=frozen), graph)
        for frozen in (False, True)
    ]
    for trainer in both:
        trainer._train_step()
    assert torch.equal(embeddings(both[0].model).relation, embeddings(both[1].model).relation)


@pytest.mark.parametrize("freeze_entities", [False, True])
def test_a_resumed_run_is_exact_without_the_file(graph, tmp_path, freeze_entities):
    file = write(tmp_path, list(graph.entities), vectors_of(graph.num_entities))
    config = dataclasses.replace(
        SMALL, init_entities=file, freeze_entities=freeze_entities, switch_to="Adam"
    )
    straight = Trainer(config, graph)
    straight.train()
    run = RunFolder.create(tmp_path / "run", config, graph)
    first = Trainer(config, graph, run)
    for _ in range(13):
        first._train_step()
    first.save()
    Path(file).unlink()
    second = Trainer.resume(run.read_config(), run.read_graph(), run)
    assert second.step == 13
    second.train()
    for ours, expected in zip(second.model.parameters(), straight.model.parameters(), strict=True):
        assert torch.equal(ours, expected)
    assert second.finish() is not None


def test_from_an_earlier_run(graph, tmp_path):
    """Its embeddings.safetensors is such a file, also for a graph with other entities."""
    run = RunFolder.create(tmp_path / "run", SMALL, graph)
    earlier = Trainer(SMALL, graph, run)
    earlier.train()
    earlier.export()
    part = Graph.from_names({"train": [("e5", "r", "e31")], "valid": [], "test": []})
    file = str(tmp_path / "run" / "embeddings.safetensors")
    trainer = Trainer(dataclasses.replace(SMALL, init_entities=file), part)
    theirs = embeddings(earlier.best_model()).entity
    for name in part.entities:
        mine = embeddings(trainer.model).entity[part.entities.index(name)]
        assert torch.equal(mine, theirs[graph.entities.index(name)])


BAD = numpy.full((48, 16), numpy.nan)


@pytest.mark.parametrize(
    ("names", "vectors", "said"),
    [
        (48, vectors_of(48, 20), r"width 20, and with --dim 16 .* width 16 \(1 x dim\); --dim 20"),
        (47, vectors_of(47), "lacks 1 of the 48 entities, such as 'e9': frozen"),
        (48, BAD, "not finite"),
        (48, 1j * vectors_of(48), "complex vectors: expected real parts, then imaginary parts"),
        (0, vectors_of(48)[:0], r"a vector for each of 0 names, got \(0, 16\)"),
        (48, vectors_of(47), r"a vector for each of 48 names, got \(47, 16\)"),
        (48, vectors_of(48)[:, 0], r"a vector for each of 48 names, got \(48,\)"),
        (48, numpy.array([None] * 48), "Object arrays cannot be loaded"),
    ],
)
def test_files_that_do_not_fit(graph, tmp_path, names, vectors, said):
    file = write(tmp_path, list(graph.entities[:names]), vectors)
    config = dataclasses.replace(SMALL, init_entities=file, freeze_entities=True)
    with pytest.raises(DataError, match=said):
        Trainer(config, graph)


def test_names_that_do_not_fit(graph, tmp_path):
    for names, said in (
        (["a", "b"], "holds no entity of the graph: its names are like 'a', the graph's like 'e0'"),
        (["e1", "e2", "e1"], "holds 'e1' more than once"),
    ):
        file = write(tmp_path, names, vectors_of(len(names)))
        with pytest.raises(DataError, match=said):
            Trainer(dataclasses.replace(SMALL, init_entities=file), graph)


def test_other_files(graph, tmp_path):
    (tmp_path / "text.npz").write_text("no archive")
    (tmp_path / "text.safetensors").write_text("no tensors")
    numpy.save(tmp_path / "one.npy", vectors_of(3))
    numpy.savez(tmp_path / "half.npz", vectors=vectors_of(3))
    for name, error, said in (
        ("none.npz", DataError, "No such file"),
        ("text.npz", DataError, "expected numpy.savez"),
        ("one.npy", DataError, "expected numpy.savez"),
        ("half.npz", DataError, "names is not a file in the archive"),
        ("text.safetensors", RunError, "cannot be read"),
    ):
        config = dataclasses.replace(SMALL, init_entities=str(tmp_path / name))
        with pytest.raises(error, match=said):
            Trainer(config, graph)


def test_freezing_needs_vectors():
    with pytest.raises(ConfigError, match="freeze_entities needs init_entities"):
        Config(data="-", freeze_entities=True)


def test_on_the_command_line(graph, graph_folder, tmp_path, capsys):
    file = write(tmp_path, list(graph.entities), vectors_of(graph.num_entities, 8))
    command = ["--data", str(graph_folder), "--run-dir", str(tmp_path / "run"), "--dim=8"]
    command += ["--batch-size=64", "--negatives=8", "--steps=4", "--init-entities", file]
    assert cli.main([*command, "--freeze-entities"]) == 0
    assert f"{file}: 48 of 48 entities begin with its vectors\n" in capsys.readouterr().err
    config = RunFolder.open(tmp_path / "run").read_config()
    assert (config.init_entities, config.freeze_entities) == (file, True)
