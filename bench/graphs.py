"""Graphs to train on: the public ones, and a synthetic one of any size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import overload

from torch import Tensor

from bench.zipf import zipf_triples
from emu_kernels.trainer.data import Graph
from emu_kernels.trainer.datasets import CHECKSUMS, load_dataset

ZIPF = "zipf"
NAMES = (*CHECKSUMS, ZIPF)


class Numbers(Sequence[str]):
    """The names "0", "1", ..., which take no memory."""

    def __init__(self, count: int) -> None:
        self._range = range(count)

    def __len__(self) -> int:
        return len(self._range)

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> list[str]: ...
    def __getitem__(self, place: int | slice) -> str | list[str]:
        found = self._range[place]
        return str(found) if isinstance(found, int) else [str(i) for i in found]

    def __iter__(self) -> Iterator[str]:
        return map(str, self._range)


def zipf(entities: int, relations: int, triples: int) -> Graph:
    """:func:`bench.zipf.zipf_triples` as a graph."""
    train = zipf_triples(entities, relations, triples)
    return _training_only(Numbers(entities), Numbers(relations), train)


def load(name: str, entities: int, relations: int, triples: int) -> Graph:
    """A graph of training triples alone; the sizes are those of the synthetic one.

    Raises:
        DataError: the dataset is neither there nor to be had.
    """
    if name == ZIPF:
        return zipf(entities, relations, triples)
    graph = load_dataset(name)
    return _training_only(graph.entities, graph.relations, graph.triples["train"])


def _training_only(entities: Sequence[str], relations: Sequence[str], train: Tensor) -> Graph:
    none = train.new_empty((0, 3))
    splits = {"train": train, "valid": none, "test": none}
    return Graph(entities, relations, splits)  # type: ignore[arg-type]
