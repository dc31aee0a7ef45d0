"""The settings of a run: one frozen dataclass, checked when it is made, stored as JSON."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from .errors import ConfigError
from .models import MODELS

LOSSES = ("emu", "softmax")
OPTIMIZERS = ("Adagrad", "Adam")

# L3 regularisation is part of the paper's baseline; EMU is trained without it.
DEFAULT_REGULARIZATION = {"emu": 0.0, "softmax": 1e-5}


@dataclass(frozen=True)
class Config:
    """What determines a run's numbers, and a few settings that do not (see ``ADJUSTABLE``)."""

    dataset: str | None = None  # a name of datasets.CHECKSUMS
    data: str | None = None  # or a folder or archive with train.txt, valid.txt and test.txt
    model: str = "DistMult"
    dim: int = 100
    loss: str = "emu"
    mutation_rate: float = 0.61
    beta: float = 0.53
    alpha: float = 0.11
    batch_size: int = 1000
    negatives: int = 256
    filter_negatives: bool = False
    optimizer: str = "Adagrad"
    lr: float = 0.1
    regularization: float | None = None  # None: the loss's default
    steps: int = 20_000
    seed: int = 0
    eval_every: int = 1000
    log_every: int = 100
    device: str = "cpu"
    backend: str | None = None  # None: the fastest that can run on the device

    def __post_init__(self) -> None:
        if (self.dataset is None) == (self.data is None):
            raise ConfigError("give either a dataset's name or a data folder, not both or neither")
        _one_of("model", self.model, tuple(MODELS))
        _one_of("loss", self.loss, LOSSES)
        _one_of("optimizer", self.optimizer, OPTIMIZERS)
        for name in ("dim", "batch_size", "negatives", "steps", "eval_every", "log_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.regularization is None:
            object.__setattr__(self, "regularization", DEFAULT_REGULARIZATION[self.loss])
        for name in ("beta", "alpha", "regularization"):
            value = getattr(self, name)
            if not (value >= 0 and math.isfinite(value)):
                raise ConfigError(f"{name} must be a finite number of at least 0, got {value}")
        if not 0 <= self.mutation_rate <= 1:
            raise ConfigError(f"mutation_rate must be in [0, 1], got {self.mutation_rate}")
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise ConfigError(f"lr must be a finite number above 0, got {self.lr}")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Config:
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ConfigError(f"unknown settings, of a newer version perhaps: {', '.join(unknown)}")
        return cls(**values)


# What --resume may change: none of these changes a step's numbers (a device's generator does).
ADJUSTABLE = ("steps", "eval_every", "log_every", "device", "backend")


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"unknown {name} {value!r}; known: {', '.join(choices)}")
