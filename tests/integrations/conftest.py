"""What the integrations' tests share: one thread, and a real graph that PyKEEN brings along."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch
from pykeen.datasets import Nations

from emu_kernels.trainer.data import SPLITS, Graph


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """Graphs this small gain nothing from a second thread, and a busy machine makes it wait."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="package", autouse=True)
def frozen_garbage() -> Iterator[None]:
    """PyKEEN collects garbage at each epoch's end: half a second each, unless what the imports left
    is out of its way."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def nations() -> Nations:
    """14 entities, 55 relations, 1592 training triples."""
    return Nations()


@pytest.fixture(scope="session")
def nations_graph(nations: Nations) -> Graph:
    """The same as this package's trainer has it."""
    factories = (nations.training, nations.validation, nations.testing)
    named = {}
    for split, factory in zip(SPLITS, factories, strict=True):
        assert factory is not None
        named[split] = [(head, relation, tail) for head, relation, tail in factory.triples.tolist()]
    return Graph.from_names(named)
