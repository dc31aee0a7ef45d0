"""Presets: settings that work, and that the command line can override."""

from __future__ import annotations

import dataclasses

import pytest

from emu_kernels.trainer.config import Config
from emu_kernels.trainer.presets import DATASETS, PRESETS


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid_settings(name):
    config = Config(**PRESETS[name])
    assert name == f"{config.model}-{config.dataset}".lower()
    assert (config.mutation_rate, config.beta, config.alpha) == (0.61, 0.53, 0.11)
    assert (config.batch_size, config.negatives, config.dim) == (1000, 256, 100)


def test_every_model_of_the_paper_on_every_dataset():
    configs = [Config(**preset) for preset in PRESETS.values()]
    models = ("DistMult", "ComplEx", "TransE", "RotatE", "HAKE")
    assert {(c.model, c.dataset) for c in configs} == {(m, d) for m in models for d in DATASETS}


@pytest.mark.parametrize(
    ("model", "regularization"),
    [("distmult", 1e-5), ("complex", 1e-5), ("transe", 1e-3), ("rotate", 1e-3), ("hake", 0.0)],
)
def test_only_the_baseline_is_regularised(model, regularization):
    preset = PRESETS[f"{model}-fb15k-237"]
    assert Config(**preset | {"loss": "softmax"}).regularization == regularization
    for loss in ("emu", "uls", "mixup", "selfadv", "onevsall"):
        assert Config(**preset | {"loss": loss}).regularization == 0


def test_presets_name_settings_only():
    known = {field.name for field in dataclasses.fields(Config)}
    assert all(preset.keys() <= known for preset in PRESETS.values())
