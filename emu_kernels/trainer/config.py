"""The settings of a run: one frozen dataclass, checked when it is made, stored as JSON."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from emu_kernels.mutation import RULES

from .data import PARTS
from .datasets import DATASETS, FOLDER_VARIABLE
from .errors import ConfigError
from .evaluation import EvaluationOptions
from .losses import LOSSES, LossOptions
from .models import MODELS, SCORERS, Model, ModelOptions
from .nbfnet import NBFNetOptions
from .reading import FORMATS, Layout
from .sampling import ALL, CORRUPTIONS, SAMPLERS, SamplingOptions
from .schedule import SCHEDULES
from .settings import ABOVE_0, AT_LEAST_0, AT_LEAST_1, Choice, Limit, check, setting
from .trackers import TRACKERS


@dataclass(frozen=True)
class SourceOptions:
    """data"""

    dataset: str | None = setting(
        None,
        f"a dataset to download, verify and cache; read from the folder {FOLDER_VARIABLE} if set",
        choices=DATASETS.keys(),
    )
    data: str | None = setting(
        None,
        "a folder (or archive, tar or zip) with train, valid and test, or one file: "
        f"{', '.join(FORMATS)}; all may be gzipped (.gz), except Parquet",
    )


@dataclass(frozen=True)
class ReadingOptions:
    """reading of --data"""

    columns: str | None = setting(
        None,
        "the columns of head, relation and tail, separated by commas: numbers from 1, or names in "
        "the first line (default the only three columns)",
    )
    weight_column: str | None = setting(
        None,
        "the column of training triples' weights in the loss, at least 0: a number from 1, or a "
        "name if columns are names (default equal weights)",
    )
    numbered: bool = setting(False, "the files hold ids from 0: use them as rows of the table")
    hold_out: float = setting(
        0.05,
        "if data is one file, the share of triples for validation, and as many for test; every "
        "entity and relation keeps a triple to be trained on",
        limit=Limit("above 0 and below 0.5", lambda x: 0 < x < 0.5),
    )
    split_seed: int = setting(0, "the seed by which triples are held out")


OPTIMIZERS = {
    "Adagrad": Choice("a sum of squares for each component", ()),
    "Adam": Choice("two moments for each component", ()),
    "RowwiseAdagrad": Choice("Adagrad with a sum for each row, 1/d of the state", ()),
}

_RATES = ", ".join(f"{x} {y.defaults['lr']:g}" for x, y in SCORERS.items() if "lr" in y.defaults)


@dataclass(frozen=True)
class OptimizationOptions:
    """optimization"""

    optimizer: str = setting("Adagrad", "the optimizer", choices=OPTIMIZERS)
    lr: float = setting(0.1, f"learning rate; with {_RATES}", limit=ABOVE_0)
    schedule: str = setting("constant", "the learning rate over the steps", choices=SCHEDULES)
    decay_steps: int | None = setting(
        None, "steps of the schedule (default all; a third of them for step)", limit=AT_LEAST_1
    )
    warmup: int = setting(0, "steps in which the rate rises to its value", limit=AT_LEAST_0)
    switch_to: str | None = setting(
        None, "switch to this optimizer, at a tenth of the rate", choices=OPTIMIZERS
    )
    switch_at: int | None = setting(
        None, "the step at which to switch (default after half of all steps)", limit=AT_LEAST_1
    )
    sparse: bool = setting(
        False,
        "read and write only the entities of the batch: for tables much larger than batch times "
        "negatives",
    )
    sharded: bool = setting(
        False,
        "spread the entities over the processes of torchrun, by TorchRec (default if there are "
        "several); triples then share sets of negatives, unless rows_per_set is given",
    )
    regularization: float | None = setting(
        None,
        "L3 (cubic) regularization of both tables (default with "
        + ", ".join(name for name, loss in LOSSES.items() if loss.regularized)
        + ": "
        + ", ".join(f"{m.regularization:g} for {n}" for n, m in MODELS.items() if m.regularization)
        + "; otherwise 0)",
        limit=AT_LEAST_0,
    )
    seed: int = setting(0, "the same seed repeats a run exactly, on the same device and versions")


@dataclass(frozen=True)
class RunningOptions:
    """running (can be given with --resume)"""

    steps: int = setting(20_000, "training steps", limit=AT_LEAST_1)
    eval_every: int = setting(1000, "steps between validations and checkpoints", limit=AT_LEAST_1)
    patience: int | None = setting(
        None,
        "stop after this many validations in a row without a better one (default never)",
        limit=AT_LEAST_1,
    )
    tracker: str | None = setting("none", "where to log the metrics as well", choices=TRACKERS)
    tsv: bool = setting(False, "also write the embeddings as text, for other programs")
    log_every: int = setting(100, "steps between lines in metrics.jsonl", limit=AT_LEAST_1)
    device: str = setting("cpu", "cpu, cuda, cuda:1, ... (default cuda if it can run, else cpu)")
    backend: str | None = setting(None, "kernels to use (default the fastest that can run)")


# Settings that --resume may change. They do not change what a step computes, except device, whose
# generator draws other numbers, and lr, which is meant for a run that went wrong.
ADJUSTABLE = (*(f.name for f in fields(RunningOptions)), "lr")


@dataclass(frozen=True)
class Config(
    SourceOptions,
    ReadingOptions,
    ModelOptions,
    NBFNetOptions,
    LossOptions,
    SamplingOptions,
    OptimizationOptions,
    EvaluationOptions,
    RunningOptions,
):
    """All settings of a run. The bases' docstrings are the headings of ``emu-train --help``.

    Raises:
        ConfigError: a value, or a combination of values, is invalid; says why.
    """

    def __post_init__(self) -> None:
        if (self.dataset is None) == (self.data is None):
            raise ConfigError("give either a dataset's name or a data folder, not both or neither")
        check(self)
        self._check_columns()
        model, loss = SCORERS[self.model], LOSSES[self.loss]
        self._check_options()
        for name, value in model.settle(self).items():
            object.__setattr__(self, name, value)
        if self.regularization is None:
            default = model.regularization if loss.regularized else 0.0
            object.__setattr__(self, "regularization", default)
        if self.batch_size % self.rows_per_set:
            raise ConfigError(
                f"rows_per_set must divide the batch size {self.batch_size}, "
                f"got {self.rows_per_set}"
            )
        if self.rows_per_set > 1 and not SAMPLERS[self.sampler].shares_sets:
            raise ConfigError(f"rows_per_set: {self.sampler} negatives cannot be shared")
        if self.norm not in (model.norms or (1,)):
            raise ConfigError(f"norm must be left out: {self.model} has no choice")
        if RULES[self.mask_unit].pairs and MODELS[self.model].entity_width * self.dim % 2:
            raise ConfigError(f"mask_unit {self.mask_unit!r} needs an even dim with {self.model}")
        if self.freeze_entities and self.init_entities is None:
            raise ConfigError("freeze_entities needs init_entities, the vectors to keep")
        if CORRUPTIONS[self.corruption].inverse:
            self._check_inverse()
        self._settle_schedule()
        if self.sharded:
            self._check_sharded()
        if self.negatives == ALL:
            self._check_all()
        if self.sparse:
            self._check_sparse("sparse")

    @property
    def layout(self) -> Layout:
        """The layout of the data's files."""
        columns, weight = tuple(self.columns.split(",")) if self.columns else (), self.weight_column
        if weight is not None:
            columns = columns or (("1", "2", "3") if weight.isdecimal() else PARTS)
            columns = (*columns, weight)
        return Layout(columns, self.numbered)

    def _check_columns(self) -> None:
        columns, own = self.layout.columns, self.columns.split(",") if self.columns else [*PARTS]
        if len(set(own)) != 3 or len(own) != 3 or {"", "0"} & {*own}:
            raise ConfigError(
                "columns must be three names, or numbers from 1, with commas between, of head, "
                f"relation and tail; got {self.columns}"
            )
        weight = self.weight_column
        if weight is not None and (
            weight in ("", "0", *columns[:3]) or len({name.isdecimal() for name in columns}) > 1
        ):
            raise ConfigError(
                f"weight_column must be one beside {', '.join(columns[:3])}, by name or by number "
                f"as they are; got {weight!r}"
            )
        if self.dataset is not None and (columns or self.numbered):
            raise ConfigError(
                "columns, weight_column and numbered are for data, not for a dataset by name"
            )

    @property
    def over_all(self) -> bool:
        """Whether the negatives are all entities."""
        return self.negatives == ALL or LOSSES[self.loss].all_entities

    @property
    def draws_masks(self) -> bool:
        """Whether the mutation rate is that of drawn masks, not of the closed form."""
        return LOSSES[self.loss].masks and not self.over_all

    def _check_options(self) -> None:
        """Check that no settings of other models are given."""
        for other, model in SCORERS.items():
            for name in set(model.options) - set(SCORERS[self.model].options):
                if getattr(self, name) is not None:
                    raise ConfigError(f"{name} must be left out: it is a setting of {other}")

    def _check_inverse(self) -> None:
        """Check that this run can train on batches with inverse relations."""
        if not self.inverse_relations:
            raise ConfigError(f"corruption {self.corruption!r} needs inverse_relations")
        if self.subsampling:
            raise ConfigError(f"subsampling: corruption {self.corruption!r} has no weights")

    def _settle_schedule(self) -> None:
        """Store what the schedule derives from the steps, as --resume may change these later."""
        if self.decay_steps is None and self.schedule != "constant":
            steps = self.steps if self.schedule == "cosine" else math.ceil(self.steps / 3)
            object.__setattr__(self, "decay_steps", steps)
        if self.switch_at is None and self.switch_to is not None:
            object.__setattr__(self, "switch_at", max(1, self.steps // 2))
        if self.decay_steps is not None and self.schedule == "constant":
            raise ConfigError("decay_steps needs a schedule other than constant")
        if self.switch_at is not None and self.switch_to is None:
            raise ConfigError("switch_at needs switch_to, the optimizer to go on with")

    def _check_all(self) -> None:
        """Check that the negatives of this run can be all entities."""
        takers = [name for name, loss in LOSSES.items() if loss.takes_all]
        if self.loss not in takers:
            raise ConfigError(f"negatives: all needs a loss among {', '.join(takers)}")
        if self.rows_per_set > 1 or self.sampler != "uniform":
            raise ConfigError("negatives: all does not go with sampler and rows_per_set")

    def _check_sharded(self) -> None:
        """Check that the entities can be spread over several processes."""
        if self.model not in MODELS:
            raise ConfigError(f"sharded: {self.model} has no table of entities to spread")
        for name in ("init_entities", "switch_to"):
            if getattr(self, name) is not None:
                raise ConfigError(f"sharded: {name} needs all entities in one process")
        width = MODELS[self.model].entity_width
        if width * self.dim % 4:
            raise ConfigError(
                f"sharded: TorchRec needs rows of a multiple of 4 numbers, got dim {self.dim}, "
                f"which gives {self.model} rows of {width * self.dim}"
            )
        self._check_sparse("sharded")

    def _check_sparse(self, what: str) -> None:
        """Check that a step of this run touches only some entities and can be sparse."""
        for name in (self.optimizer, self.switch_to):
            if name not in ("Adagrad", "RowwiseAdagrad", None):
                raise ConfigError(f"{what} needs Adagrad: {name} moves every entity each step")
        if self.over_all:
            raise ConfigError(f"{what}: the loss {self.loss} touches every entity at each step")
        if self.regularization:
            raise ConfigError(
                f"{what}: regularization touches every entity at each step; set it to 0, "
                f"got {self.regularization:g}"
            )
        if MODELS[self.model].candidates is not Model.candidates:
            raise ConfigError(f"{what}: {self.model} computes its candidates from all entities")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Config:
        """Read :meth:`to_json`'s result; a setting that is missing gets its default.

        Raises:
            ConfigError: a setting is unknown or cannot work.
        """
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ConfigError(f"unknown settings, of a newer version perhaps: {', '.join(unknown)}")
        return cls(**values)
