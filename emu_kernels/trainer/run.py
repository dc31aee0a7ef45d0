"""The run folder: a run's results, and what it takes to continue the run.

==========================  ===========================================================
``config.json``             settings, versions, the graph's sizes
``graph.safetensors``       triples and names, so that a run can be moved and continued
``metrics.jsonl``           a JSON object a line: training loss, evaluations
``plot.png``                loss and MRR over steps
``report.html``             the finished run as a page
``last.safetensors``        model and optimizer, to continue from
``best.safetensors``        the model of the best validation, by the metric in the settings
``relations.csv``           the test metrics of each relation
``shards-500/``             with --sharded: the entities at step 500, a part for each process;
                            the checkpoints of that step do not hold them
``embeddings.safetensors``  the best model's embeddings, with names
``entities.tsv``            with --tsv: those of entities as text: a line of name and values each
``relations.tsv``           the same for relations
``lock``                    locked by the program that trains; names its process
==========================  ===========================================================
"""

from __future__ import annotations

import csv
import fcntl
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

import emu_kernels
from emu_kernels.mask import CONTRACT_VERSION
from emu_kernels.negatives import generator

from . import checkpoint
from .breakdown import Line
from .config import Config
from .data import DIRECTIONS, SPLITS, Graph
from .errors import RunError
from .evaluation import METRICS
from .models import SCORERS, Model, Scorer
from .names import Names, encode
from .terminal import quoted

Metric = dict[str, Any]


class RunFolder:
    """Paths in a run folder, and how each is written and read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / "config.json"
        self.graph_file = path / "graph.safetensors"
        self.metrics_file = path / "metrics.jsonl"
        self.plot_file = path / "plot.png"
        self.report_file = path / "report.html"
        self.relations_file = path / "relations.csv"
        self.last_file = path / "last.safetensors"
        self.best_file = path / "best.safetensors"
        self._lock: TextIO | None = None

    @classmethod
    def create(cls, path: Path, config: Config, graph: Graph) -> RunFolder:
        """Make the folder; write the settings and the graph.

        Raises:
            RunError: it holds a run already, or cannot be written.
        """
        run = cls(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"the run folder {path} cannot be made: {error}") from error
        run.lock()
        if run.config_file.exists():
            raise RunError(f"{path} holds a run already: continue it with --resume {quoted(path)}")
        checkpoint.save(run.graph_file, _tensors(graph), {})
        run.write_config(config, graph)
        return run

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """An existing run folder.

        Raises:
            RunError: the folder holds no run.
        """
        run = cls(path)
        if not run.config_file.is_file():
            raise RunError(f"{path} is not a run folder: it holds no {run.config_file.name}")
        return run

    def write_config(
        self, config: Config, graph: Graph, history: Sequence[dict[str, Any]] = ()
    ) -> None:
        """Args: history: what --resume has changed, and at which step."""
        record = {
            "config": config.to_json(),
            "history": list(history),
            "mask_contract": CONTRACT_VERSION,
            "versions": {
                "emu-kernels": emu_kernels.__version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
            "graph": {
                "entities": graph.num_entities,
                "relations": graph.num_relations,
                "triples": {split: len(graph.triples[split]) for split in SPLITS},
                "unseen_in_training": {split: graph.unseen(split) for split in SPLITS[1:]},
            },
        }
        text = json.dumps(record, indent=2) + "\n"
        checkpoint.write_atomically(self.config_file, lambda file: file.write_text(text))

    def read_config(self) -> Config:
        """The settings of the run.

        Raises:
            RunError: the file is damaged.
            ConfigError: a setting is unknown or cannot work.
        """
        try:
            return Config.from_json(self._read("config"))
        except TypeError as error:
            raise RunError(f"{self.config_file} cannot be read: {error}") from error

    def read_history(self) -> list[dict[str, Any]]:
        """What --resume has changed so far."""
        try:
            return list(self._read("history"))
        except RunError:  # written by an older version
            return []

    def check_mask_contract(self) -> None:
        """Raises: RunError: the run drew its masks in another way, and cannot be continued."""
        contract = self._read("mask_contract")
        if contract != CONTRACT_VERSION:
            raise RunError(
                f"{self.path} was made with version {contract} of the mask contract, this is "
                f"version {CONTRACT_VERSION}: the same seed would draw other masks"
            )

    def _read(self, key: str) -> Any:
        try:
            return json.loads(self.config_file.read_text())[key]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(f"{self.config_file} cannot be read: {error!r}") from error

    def read_graph(self) -> Graph:
        tensors, _ = checkpoint.load(self.graph_file, mapped=True)
        try:
            return _graph(tensors)
        except KeyError as error:
            raise RunError(f"{self.graph_file} is not a run's graph: no {error}") from error

    def append_metrics(self, metrics: Metric) -> None:
        try:
            with self.metrics_file.open("a") as file:
                file.write(json.dumps(metrics) + "\n")
        except OSError as error:
            raise RunError(f"{self.metrics_file} could not be written: {error}") from error

    def save(self, file: Path, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Write a checkpoint."""
        checkpoint.save(file, tensors, state)

    def shards(self, step: int) -> Path:
        """The folder for the entities of a step that are spread over processes."""
        return self.path / f"shards-{step}"

    def read_metrics(self) -> list[Metric]:
        if not self.metrics_file.exists():
            return []
        # The last line may be incomplete if the program was killed; its step is run again.
        try:
            lines = self.metrics_file.read_text().splitlines(keepends=True)
            metrics = [json.loads(line) for line in lines if line.endswith("\n")]
        except ValueError as error:
            raise RunError(f"{self.metrics_file} is damaged: {error}") from error
        if not all(isinstance(metric, dict) and "step" in metric for metric in metrics):
            raise RunError(f"{self.metrics_file} is damaged: a line lacks its step")
        return metrics

    def write_relations(self, lines: Sequence[Line]) -> None:
        """Write the test metrics of each relation, for both directions."""

        def write(path: Path) -> None:
            with path.open("w", encoding="utf-8", newline="") as file:
                writer = csv.writer(file)
                columns = [f"{d}_{name}" for d in DIRECTIONS for name in METRICS]
                writer.writerow(["relation", "kind", "triples", *columns])
                for line in lines:
                    values = [
                        getattr(line.metrics[d], name) for d in DIRECTIONS for name in METRICS
                    ]
                    writer.writerow([line.name, line.kind, line.triples, *values])

        checkpoint.write_atomically(self.relations_file, write)

    def forget_metrics_after(self, step: int) -> None:
        """Drop lines logged after the checkpoint that training continues from."""
        kept = [json.dumps(m) + "\n" for m in self.read_metrics() if m["step"] <= step]
        checkpoint.write_atomically(self.metrics_file, lambda file: file.write_text("".join(kept)))

    def load_model(self, graph: Graph) -> tuple[Scorer, dict[str, Any]]:
        """The best model, or the last one if there was no evaluation; and its checkpoint's state.

        Its tables are mapped from the file: only what is used is loaded.
        """
        file = self.best_file if self.best_file.exists() else self.last_file
        tensors, state = checkpoint.load(file, mapped=True)
        parts = self.shards(state["step"])
        if parts.exists():
            from .shards import whole_table  # here, as its imports take more than a second

            tensors["model.entity"] = whole_table(parts)
        with torch.device("meta"):
            model = new_model(self.read_config(), graph)
        restore_model(model, tensors, file, assign=True)
        return model, state

    def lock(self) -> None:
        """Keep other processes from training here until this one ends, however it ends.

        Raises:
            RunError: another process holds the folder.
        """
        try:
            self._lock = (self.path / "lock").open("a+")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if self._lock is None or not isinstance(error, BlockingIOError):
                raise RunError(f"the run folder {self.path} cannot be locked: {error}") from error
            self._lock.seek(0)
            raise RunError(
                f"{self.path} is in use by {self._lock.read().strip() or 'another process'}: wait "
                "for it, stop it, or give another --run-dir"
            ) from error
        self._lock.truncate(0)
        self._lock.write(f"process {os.getpid()} on {platform.node()}\n")
        self._lock.flush()

    def unlock(self) -> None:
        """Let other processes train here."""
        if self._lock is not None:
            self._lock.close()

    def export_embeddings(self, model: Model, graph: Graph, *, tsv: bool = False) -> None:
        """Write the embeddings with names, as safetensors and, if ``tsv``, as text."""
        if model.inverse_relations:
            suffix = "_inverse"
            while {name + suffix for name in graph.relations} & {*graph.relations}:
                suffix += "_inverse"
            inverse = [name + suffix for name in graph.relations]
            graph = replace(graph, relations=[*graph.relations, *inverse])
        tensors = dict(model.named_parameters()) | _names(graph)
        checkpoint.save(self.path / "embeddings.safetensors", tensors, {})
        if tsv:
            _write_tsv(self.path / "entities.tsv", graph.entities, model.entity)
            _write_tsv(self.path / "relations.tsv", graph.relations, model.relation)


def new_model(config: Config, graph: Graph, draws: torch.Generator | None = None) -> Scorer:
    """A model with its initial values, the same on every device."""
    cls = SCORERS[config.model]
    return cls(
        graph.num_entities,
        graph.num_relations,
        config.dim,
        draws or generator(torch.device("cpu"), config.seed, "init"),
        **{name: getattr(config, name) for name in (*cls.keywords, *cls.options)},
    )


def restore_model(
    model: Scorer, tensors: dict[str, Tensor], file: Path, *, assign: bool = False
) -> None:
    """Fill a model from a checkpoint's tensors, which may include others (an optimizer's).

    Args:
        assign: make the tensors the model's parameters, instead of copying them.
    """
    prefix = "model."
    values = {k.removeprefix(prefix): x for k, x in tensors.items() if k.startswith(prefix)}
    try:
        model.load_state_dict(values, assign=assign)
    except RuntimeError as error:
        raise RunError(f"{file} is a checkpoint of another model: {error}") from error


_INDUCTIVE = "inductive."  # the names of the second graph's tensors begin with this


def _tensors(graph: Graph) -> dict[str, Tensor]:
    second = {} if graph.inductive is None else _tensors(graph.inductive)
    second.pop("relation_names", None)  # they are the first graph's
    weights = {} if graph.weights is None else {"weights": graph.weights}
    return graph.triples | weights | _names(graph) | {_INDUCTIVE + k: x for k, x in second.items()}


def _graph(tensors: dict[str, Tensor]) -> Graph:
    second = {k.removeprefix(_INDUCTIVE): x for k, x in tensors.items() if k.startswith(_INDUCTIVE)}
    relations = tensors["relation_names"]
    return Graph(
        Names(tensors["entity_names"]),
        Names(relations),
        {split: tensors[split] for split in SPLITS},
        weights=tensors.get("weights"),
        inductive=_graph(second | {"relation_names": relations}) if second else None,
    )


def _names(graph: Graph) -> dict[str, Tensor]:
    kinds = {"entity_names": graph.entities, "relation_names": graph.relations}
    return {kind: encode(names) for kind, names in kinds.items()}


def _write_tsv(path: Path, names: Sequence[str], table: Tensor) -> None:
    def write(file: Path) -> None:
        with file.open("w", encoding="utf-8") as stream:
            named = iter(names)
            for part in table.detach().split(4096):  # never the whole table as Python numbers
                for row in part.tolist():
                    stream.write(next(named) + "".join(f"\t{value:.9g}" for value in row) + "\n")

    checkpoint.write_atomically(path, write)
