"""Checkpoints of entities that are spread over several processes, by torch.distributed."""

from __future__ import annotations

import pickle
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
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_shards
from torch.distributed.checkpoint.state_dict_saver import save as save_shards

from . import checkpoint
from .errors import RunError

if TYPE_CHECKING:
    from emu_kernels.integrations.torchrec import ShardedEntities

_ROWS = "entities.rows."  # the rows' name begins with this; the rest is TorchRec's
_DESCRIPTION = {
    "torch": {"Size", "float64", "float32", "float16", "bfloat16"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "_MEM_FORMAT_ENCODING", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
        "TensorProperties", "TensorStorageMetadata",
    },
    "pathlib": {"PosixPath", "WindowsPath"},
    "pathlib._local": {"PosixPath", "WindowsPath"},  # of Python 3.13
}  # fmt: skip
"""All that may occur in .metadata, which torch reads with pickle: of tensors, nothing else."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> object:
        if name not in _DESCRIPTION.get(module, ()):
            raise pickle.UnpicklingError(f".metadata has {module}.{name}, which no tensor needs")
        return super().find_class(module, name)


class _Reader(FileSystemReader):
    """Executes nothing that a file says. Torch reads the tensors themselves with weights_only."""

    # Without arguments: then torch does not look for other files of this kind.
    def read_metadata(self) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            _Unpickler(file).load()
        return super().read_metadata()


@contextmanager
def _said(what: str) -> Iterator[None]:
    """Turn the errors of all processes into one, and hide torch's warnings about TorchRec."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (CheckpointException, OSError, ValueError, pickle.UnpicklingError) as error:
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
        load_shards({"entities": entities}, storage_reader=_Reader(folder))


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
            reader = _Reader(folder)
            stored = reader.read_metadata().state_dict_metadata
            ((key, rows),) = (x for x in stored.items() if x[0].startswith(_ROWS))
            assert isinstance(rows, TensorStorageMetadata)
            size = rows.size
            table = torch.from_file(raw.name, shared=True, size=size.numel()).view(size)
            load_shards({key: table}, storage_reader=reader, no_dist=True)
            checkpoint.save(file, {"entity": table}, {})
    return checkpoint.load(file, mapped=True)[0]["entity"]
