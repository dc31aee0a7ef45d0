"""What the integrations' tests share: one thread, and graphs that lie on this machine."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from emu_kernels.trainer.data import Graph
from emu_kernels.trainer.datasets import FOLDER_VARIABLE, load_dataset


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
def load_public() -> Callable[[str], Graph]:
    """``load_dataset`` on the public archives: $EMU_KERNELS_DATA, or the folder beside a checkout;
    skips where there is neither."""
    beside = Path(__file__).parents[3] / "shared" / "data"
    folder = Path(os.environ.get(FOLDER_VARIABLE, beside))

    def load(name: str) -> Graph:
        if not folder.is_dir():
            pytest.skip(f"no public datasets: set {FOLDER_VARIABLE} to a folder that holds them")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(FOLDER_VARIABLE, str(folder))
            return load_dataset(name)

    return load
