"""Checkpoints of entities that are spread over several processes, by torch.distributed."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_shards
from torch.distributed.checkpoint.state_dict_saver import save as save_shards

from . import checkpoint
from .errors import RunError

if TYPE_CHECKING:
    from emu_kernels.integrations.torchrec import ShardedEntities

_ROWS = "entities.rows."  # the rows' name begins with this; the rest is TorchRec's


@contextmanager
def _said(what: str) -> Iterator[None]:
    """Turn the errors of all processes into one, and hide torch's warnings about TorchRec."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (CheckpointException, OSError, ValueError) as error:
        raise RunError(f"{what}: {error}") from error


def save(folder: Path, entities: ShardedEntities) -> None:
    """Write each process's rows and optimizer state. They can be read once all have written.

    Raises:
        RunError: a process could not write.
    """
    with _said(f"{folder} could not be written"):
        save_shards({"entities": entities}, checkpoint_id=folder)


def load(folder: Path, entities: ShardedEntities) -> None:
    """Read what any number of processes saved.

    Raises:
        RunError: the folder is missing or damaged.
    """
    with _said(f"{folder} cannot be read as shards"):
        load_shards({"entities": entities}, checkpoint_id=folder)


def whole_table(folder: Path) -> Tensor:
    """(N, D): the rows that were saved, mapped from a file, which is made if it is missing.

    Call it in one process; it has the rows of one process in memory at a time.
    """
    file = folder / "entity.safetensors"
    if not file.exists():
        with (
            _said(f"{folder} cannot be read as shards"),
            tempfile.NamedTemporaryFile(dir=folder) as raw,
        ):
            stored = FileSystemReader(folder).read_metadata().state_dict_metadata
            ((key, rows),) = (x for x in stored.items() if x[0].startswith(_ROWS))
            assert isinstance(rows, TensorStorageMetadata)
            size = rows.size
            table = torch.from_file(raw.name, shared=True, size=size.numel()).view(size)
            load_shards({key: table}, checkpoint_id=folder, no_dist=True)
            checkpoint.save(file, {"entity": table}, {})
    return checkpoint.load(file, mapped=True)[0]["entity"]
