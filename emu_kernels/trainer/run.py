"""The run folder: everything a run leaves behind, and everything that continuing it needs.

==========================  ===========================================================
``config.json``             settings, versions, the graph's sizes
``graph.safetensors``       triples and names, so that a run can be moved and continued
``metrics.jsonl``           a JSON object a line: training loss, evaluations
``plot.png``                loss and MRR over steps
``last.safetensors``        model and optimizer, to continue from
``best.safetensors``        the model with the best validation MRR
``embeddings.safetensors``  the best model's embeddings, with names
``entities.tsv``            the same as text: name, then values; a line an entity
``relations.tsv``           likewise
==========================  ===========================================================
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import emu_kernels
from emu_kernels.mask import CONTRACT_VERSION

from . import checkpoint
from .batches import generator
from .config import Config
from .data import SPLITS, Graph
from .errors import RunError
from .models import MODELS, Model

Metric = dict[str, Any]


class RunFolder:
    """Paths in a run folder, and how each is written and read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / "config.json"
        self.graph_file = path / "graph.safetensors"
        self.metrics_file = path / "metrics.jsonl"
        self.plot_file = path / "plot.png"
        self.last_file = path / "last.safetensors"
        self.best_file = path / "best.safetensors"

    @classmethod
    def create(cls, path: Path, config: Config, graph: Graph) -> RunFolder:
        """Make the folder; write the settings and the graph.

        Raises:
            RunError: it holds a run already, or cannot be written.
        """
        run = cls(path)
        if run.config_file.exists():
            raise RunError(f"{path} holds a run already: continue it with --resume {path}")
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"the run folder {path} cannot be made: {error}") from error
        run._write_graph(graph)
        run.write_config(config, graph)
        return run

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        run = cls(path)
        if not run.config_file.is_file():
            raise RunError(f"{path} is not a run folder: it holds no {run.config_file.name}")
        return run

    def write_config(self, config: Config, graph: Graph) -> None:
        record = {
            "config": config.to_json(),
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
        """Raises: RunError: the file is damaged."""
        try:
            return Config.from_json(self._read_record()["config"])
        except (KeyError, TypeError) as error:
            raise RunError(f"{self.config_file} cannot be read: {error!r}") from error

    def check_mask_contract(self) -> None:
        """Raises: RunError: the run drew its masks in another way, and cannot be continued."""
        contract = self._read_record().get("mask_contract")
        if contract != CONTRACT_VERSION:
            raise RunError(
                f"{self.path} was made with version {contract} of the mask contract, this is "
                f"version {CONTRACT_VERSION}: the same seed would draw other masks"
            )

    def _read_record(self) -> dict[str, Any]:
        try:
            record = json.loads(self.config_file.read_text())
        except (OSError, ValueError) as error:
            raise RunError(f"{self.config_file} cannot be read: {error}") from error
        if not isinstance(record, dict):
            raise RunError(f"{self.config_file} cannot be read: it is not a JSON object")
        return record

    def _write_graph(self, graph: Graph) -> None:
        tensors = dict(graph.triples)
        tensors["entity_names"] = encode_names(graph.entities)
        tensors["relation_names"] = encode_names(graph.relations)
        checkpoint.save(self.graph_file, tensors, {})

    def read_graph(self) -> Graph:
        tensors, _ = checkpoint.load(self.graph_file)
        try:
            return Graph(
                decode_names(tensors["entity_names"]),
                decode_names(tensors["relation_names"]),
                {split: tensors[split] for split in SPLITS},
            )
        except KeyError as error:
            raise RunError(f"{self.graph_file} is not a run's graph: no {error}") from error

    def append_metrics(self, metrics: Metric) -> None:
        try:
            with self.metrics_file.open("a") as file:
                file.write(json.dumps(metrics) + "\n")
        except OSError as error:
            raise RunError(f"{self.metrics_file} could not be written: {error}") from error

    def read_metrics(self) -> list[Metric]:
        if not self.metrics_file.exists():
            return []
        # A kill can cut the last line short; the steps after the last checkpoint are run again.
        lines = self.metrics_file.read_text().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def forget_metrics_after(self, step: int) -> None:
        """Drop lines logged after the checkpoint that training continues from."""
        kept = [json.dumps(metric) + "\n" for metric in self.read_metrics()]
        kept = [line for line in kept if json.loads(line)["step"] <= step]
        checkpoint.write_atomically(self.metrics_file, lambda file: file.write_text("".join(kept)))

    def load_model(self, graph: Graph, file: Path | None = None) -> tuple[Model, dict[str, Any]]:
        """The best model, or the last one where no evaluation was made; its checkpoint's state."""
        if file is None:
            file = self.best_file if self.best_file.exists() else self.last_file
        tensors, state = checkpoint.load(file)
        model = new_model(self.read_config(), graph)
        restore_model(model, tensors, file)
        return model, state

    def export_embeddings(self, model: Model, graph: Graph) -> None:
        """Write the embeddings with names, as safetensors and as TSV."""
        tables = {
            "entity": (graph.entities, model.entity.detach().cpu()),
            "relation": (graph.relations, model.relation.detach().cpu()),
        }
        tensors = {name: values for name, (_, values) in tables.items()}
        if model.similarity_weights is not None:
            tensors["similarity_weights"] = model.similarity_weights.detach().cpu()
        tensors |= {f"{name}_names": encode_names(names) for name, (names, _) in tables.items()}
        checkpoint.save(self.path / "embeddings.safetensors", tensors, {})
        for file_name, key in (("entities.tsv", "entity"), ("relations.tsv", "relation")):
            names, values = tables[key]
            checkpoint.write_atomically(
                self.path / file_name,
                lambda file, names=names, values=values: _write_tsv(file, names, values),  # type: ignore[misc]
            )


def new_model(config: Config, graph: Graph) -> Model:
    """A model as it is before the first step, the same on every device."""
    cls = MODELS[config.model]
    return cls(
        graph.num_entities,
        graph.num_relations,
        config.dim,
        generator(torch.device("cpu"), config.seed, "init"),
        margin=config.margin,
        norm=config.norm,
        **{name: getattr(config, name) for name in cls.options},
    )


def restore_model(model: Model, tensors: dict[str, Tensor], file: Path) -> None:
    """Fill a model from a checkpoint's tensors, which may hold more (an optimizer's)."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            stored = tensors.get(f"model.{name}")
            if stored is None or stored.shape != parameter.shape:
                found = "nothing" if stored is None else f"shape {tuple(stored.shape)}"
                raise RunError(
                    f"{file}: expected model.{name} of shape {tuple(parameter.shape)}, got {found}"
                )
            parameter.copy_(stored)


def encode_names(names: Iterable[str]) -> Tensor:
    """Names as UTF-8 bytes, a line each: safetensors holds tensors only.

    The format they are read from keeps tabs and line ends out of names.
    """
    return torch.frombuffer(bytearray("\n".join(names), "utf-8"), dtype=torch.uint8)


def decode_names(names: Tensor) -> list[str]:
    return names.numpy().tobytes().decode("utf-8").split("\n")


def _write_tsv(file: Path, names: list[str], values: Tensor) -> None:
    with file.open("w", encoding="utf-8") as stream:
        for name, row in zip(names, values.tolist(), strict=True):
            stream.write(name + "".join(f"\t{value:.9g}" for value in row) + "\n")
