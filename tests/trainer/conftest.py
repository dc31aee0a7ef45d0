"""Graphs to train on. None of the trainer's tests needs a network."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from emu_kernels.trainer.data import SPLITS, Graph, NamedTriple
from emu_kernels.trainer.datasets import FOLDER_VARIABLE, load_dataset


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """A second thread gains nothing on graphs this small, and has to wait on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The public datasets' archives: $EMU_KERNELS_DATA, or shared/data beside the checkout."""
    beside = Path(__file__).parents[3] / "shared" / "data"
    folder = Path(os.environ.get(FOLDER_VARIABLE) or beside)
    if not folder.is_dir():
        pytest.skip(f"no public datasets: set {FOLDER_VARIABLE} to a folder that holds them")
    return folder


@pytest.fixture(scope="session")
def named_triples() -> dict[str, list[NamedTriple]]:
    """A graph that can be learned: relation i leads from a cluster c to cluster c + i."""
    draws = torch.Generator().manual_seed(0)
    clusters, members, relations = 6, 8, 4
    pairs = torch.cartesian_prod(
        torch.arange(clusters * members), torch.arange(relations), torch.arange(members)
    )
    pairs = pairs[torch.randperm(len(pairs), generator=draws)[:1100]]
    triples = [
        (f"e{head}", f"r{relation}", f"e{(head // members + relation) % clusters * members + i}")
        for head, relation, i in pairs.tolist()
    ]
    return {"train": triples[:900], "valid": triples[900:1000], "test": triples[1000:]}


@pytest.fixture(scope="session")
def graph(named_triples: dict[str, list[NamedTriple]]) -> Graph:
    return Graph.from_names(named_triples)


@pytest.fixture
def graph_folder(tmp_path: Path, named_triples: dict[str, list[NamedTriple]]) -> Path:
    folder = tmp_path / "graph"
    folder.mkdir()
    for split in SPLITS:
        lines = ["\t".join(triple) + "\n" for triple in named_triples[split]]
        (folder / f"{split}.txt").write_text("".join(lines))
    return folder


@pytest.fixture(scope="session")
def nations(data_folder: Path) -> Graph:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(FOLDER_VARIABLE, str(data_folder))
        return load_dataset("nations")
