"""The settings of a run: one frozen dataclass, checked when it is made, stored as JSON."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from emu_kernels import Mixup
from emu_kernels.mutation import MASK_UNITS

from .errors import ConfigError
from .losses import LOSSES
from .models import MARGIN, MODELS, Model

OPTIMIZERS = ("Adagrad", "Adam")
SAMPLERS = ("uniform", "structure-aware")
CORRUPTIONS = ("alternate", "bernoulli")

BASELINE = "softmax"  # its L3 regularisation is the model's own; other losses have none by default

_COUNTS = (
    "dim",
    "batch_size",
    "negatives",
    "steps",
    "eval_every",
    "log_every",
    "hops",
    "rows_per_set",
)


@dataclass(frozen=True)
class Config:
    """What determines a run's numbers, and a few settings that do not (see ``ADJUSTABLE``)."""

    dataset: str | None = None  # a name of datasets.CHECKSUMS
    data: str | None = None  # or a folder or archive with train.txt, valid.txt and test.txt
    model: str = "DistMult"
    dim: int = 100
    norm: int = 1
    margin: float = MARGIN
    loss: str = "emu"
    mutation_rate: float = 0.61
    mask_unit: str = "component"
    mixup_order: int = Mixup.order
    beta: float = 0.53
    alpha: float = 0.11
    adversarial_temperature: float = 1.0
    subsampling: bool = False
    batch_size: int = 1000
    negatives: int = 256
    filter_negatives: bool = False
    sampler: str = "uniform"
    hops: int = 3  # of the structure-aware sampler
    walks: int = 1000  # an entity; 0 for the exact neighbourhood
    rows_per_set: int = 1  # consecutive rows that share a set of negatives
    corruption: str = "alternate"
    optimizer: str = "Adagrad"
    lr: float = 0.1
    sparse: bool = False  # gradients and steps of touched entities only
    regularization: float | None = None  # None: the default of model and loss
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
        _one_of("loss", self.loss, tuple(LOSSES))
        _one_of("mask_unit", self.mask_unit, MASK_UNITS)
        _one_of("optimizer", self.optimizer, OPTIMIZERS)
        _one_of("sampler", self.sampler, SAMPLERS)
        _one_of("corruption", self.corruption, CORRUPTIONS)
        for name in _COUNTS:
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.walks < 0:
            raise ConfigError(f"walks must be at least 0, got {self.walks}")
        if self.batch_size % self.rows_per_set:
            raise ConfigError(
                f"rows_per_set must divide the batch size {self.batch_size}, "
                f"got {self.rows_per_set}"
            )
        if self.rows_per_set > 1 and self.sampler != "uniform":
            raise ConfigError("rows_per_set: only uniform negatives can be shared between rows")
        if self.regularization is None:
            default = MODELS[self.model].regularization if self.loss == BASELINE else 0.0
            object.__setattr__(self, "regularization", default)
        for name in ("beta", "alpha", "margin", "adversarial_temperature", "regularization"):
            value = getattr(self, name)
            if not (value >= 0 and math.isfinite(value)):
                raise ConfigError(f"{name} must be a finite number of at least 0, got {value}")
        if not 0 <= self.mutation_rate <= 1:
            raise ConfigError(f"mutation_rate must be in [0, 1], got {self.mutation_rate}")
        try:
            Mixup(self.mixup_order)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"mixup_order: {error}") from error
        norms = MODELS[self.model].norms
        if self.norm not in (norms or (1,)):
            known = f"1 or 2, got {self.norm}" if norms else f"left out: {self.model} has no choice"
            raise ConfigError(f"norm must be {known}")
        if self.sparse:
            self._check_sparse()
        if self.mask_unit == "pair" and MODELS[self.model].entity_width * self.dim % 2:
            raise ConfigError(f"mask_unit 'pair' needs an even dim with {self.model}")
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise ConfigError(f"lr must be a finite number above 0, got {self.lr}")

    def _check_sparse(self) -> None:
        """Whether a step of this run touches few entities, and in a way that can be sparse."""
        if self.optimizer != "Adagrad":
            raise ConfigError(
                f"sparse needs Adagrad: {self.optimizer} moves every entity each step"
            )
        if self.loss == "onevsall":
            raise ConfigError("sparse: the loss onevsall touches every entity at each step")
        if self.regularization:
            raise ConfigError(
                "sparse: regularization touches every entity at each step; set it to 0, "
                f"got {self.regularization:g}"
            )
        if MODELS[self.model].candidates is not Model.candidates:
            raise ConfigError(f"sparse: {self.model} computes its candidates from all entities")

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
