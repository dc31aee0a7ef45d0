"""Shared by the integrations' tests: one thread, and a real graph that is part of PyKEEN."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pykeen.losses  # noqa: F401  # PyKEEN cannot be imported after TorchRec
import pytest
import torch
from pykeen.datasets import Nations

from emu_kernels.trainer.data import SPLITS, Graph


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """A second thread gains nothing on graphs this small, and has to wait on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="package", autouse=True)
def frozen_garbage() -> Iterator[None]:
    """PyKEEN collects garbage after each epoch. Without the imported objects that is fast."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def nations() -> Nations:
    """14 entities, 55 relations, 1592 training triples."""
    return Nations()


@pytest.fixture(scope="session")
def nations_graph(nations: Nations) -> Graph:
    """The same graph in this package's format."""
    factories = (nations.training, nations.validation, nations.testing)
    named = {}
    for split, factory in zip(SPLITS, factories, strict=True):
        assert factory is not None
        named[split] = [(head, relation, tail) for head, relation, tail in factory.triples.tolist()]
    return Graph.from_names(named)
