"""Files that stay readable if the program is killed at any moment, and that run no code when read.

Each is written under a temporary name in the same folder, flushed to the disk, and renamed over the
previous one: a reader finds the complete old or new file. Tensors are stored as safetensors,
everything else as JSON in the file's metadata.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load as deserialize
from safetensors.torch import save_file
from torch import Tensor

from .errors import RunError


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file, then rename it to `path`.

    Raises:
        RunError: it could not be written (a full disk, say); a previous `path` is untouched.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write(temporary)
        _flush_to_disk(temporary)
        temporary.replace(path)
        _flush_to_disk(path.parent)  # the renaming itself
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        kept = "; the previous one is intact" if path.exists() else ""
        raise RunError(f"{path} could not be written: {error}{kept}") from error


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save(path: Path, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Write tensors, on any device, and a JSON-serializable state as one file."""
    contents = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    def write(file: Path) -> None:
        file.touch()
        mode = file.stat().st_mode
        save_file(contents, file, {"state": json.dumps(state)})
        file.chmod(mode)  # save_file lets only the owner read

    write_atomically(path, write)


def load(path: Path, *, mapped: bool = False) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what :func:`save` wrote.

    Args:
        mapped: map the file into memory, so that tensors are read when they are used; changes to
            them are not written to the file.

    Raises:
        RunError: there is no such file, or it is not a checkpoint.
    """
    try:
        if mapped:
            return _load_mapped(path)
        # One read: safe_open opens the file twice, for state and tensors, and a training run might
        # have replaced it in between.
        content = path.read_bytes()
        tensors = deserialize(content)
        header_size = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + header_size])
        state = json.loads(header["__metadata__"]["state"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise RunError(f"{path} cannot be read as a checkpoint: {error}") from error
    return tensors, state


def _load_mapped(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    while True:
        before = path.stat()
        with safe_open(path, "pt") as file:
            state = json.loads(file.metadata()["state"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        after = path.stat()
        if (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns):
            return tensors, state
