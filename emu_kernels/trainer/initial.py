"""Given initial vectors of entities, for example a language model's for their descriptions."""

from __future__ import annotations

import zipfile
from collections import Counter
from pathlib import Path

import numpy
import torch
from torch import Tensor

from . import checkpoint
from .data import Graph
from .errors import DataError
from .models import Model
from .names import Names


@torch.no_grad()
def set_entities(model: Model, graph: Graph, file: Path, *, all_needed: bool) -> str:
    """Give the model's entities the vectors that :func:`read_vectors` finds under their names.

    Args:
        all_needed: refuse a file that lacks an entity, which would keep its random values.

    Returns:
        A text: how many entities got vectors, how many did not, how many names are unknown.

    Raises:
        DataError: the file or its vectors do not fit; says what was expected.
    """
    names, vectors = read_vectors(file)
    width = model.entity.shape[1]
    if vectors.shape[1] != width:
        dim, odd = divmod(vectors.shape[1], model.entity_width)
        advice = "" if odd or not dim else f"; --dim {dim} would fit"
        raise DataError(
            f"{file} has vectors of width {vectors.shape[1]}, and with --dim {model.dim} this "
            f"model's entities have width {width} ({model.entity_width} x dim){advice}"
        )
    ids = {name: i for i, name in enumerate(graph.entities)}
    found = torch.tensor([ids.get(name, -1) for name in names])
    used = found >= 0
    count = int(used.sum())
    absent = sorted(ids.keys() - set(names))
    if not count:
        raise DataError(
            f"{file} holds no entity of the graph: its names are like {names[0]!r}, the graph's "
            f"like {graph.entities[0]!r}"
        )
    if absent and all_needed:
        raise DataError(
            f"{file} lacks {len(absent):,} of the {graph.num_entities:,} entities, such as "
            f"{absent[0]!r}: frozen, they would keep random vectors"
        )
    model.entity[found[used].to(model.entity.device)] = vectors[used].to(model.entity)
    return (
        f"{file}: {count:,} of {graph.num_entities:,} entities begin with its vectors"
        + (f", {len(absent):,} are not in it and begin at random" if absent else "")
        + (f"; {len(names) - count:,} of its names are of no entity" if count < len(names) else "")
    )


def read_vectors(file: Path) -> tuple[list[str], Tensor]:
    """Names, each once, and their vectors (M, W), finite, fp32.

    Either from NumPy's ``savez(file, names=names, vectors=vectors)`` or from the
    ``embeddings.safetensors`` of a run.

    Raises:
        DataError: the file is missing or holds something else.
        RunError: it is a safetensors file that is damaged or not a run's.
    """
    try:
        if file.suffix == ".safetensors":
            tensors, _ = checkpoint.load(file)
            names = list(Names(tensors["entity_names"]))
            vectors = tensors["entity"]
        else:
            with numpy.load(file, allow_pickle=False) as arrays:
                names = arrays["names"].astype(str).tolist()
                vectors = torch.from_numpy(arrays["vectors"])
    except (OSError, ValueError, KeyError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise DataError(
            f"{file} cannot be read as vectors by name: expected numpy.savez(file, names=..., "
            "vectors=...) with an array of strings and one of (names, width) numbers, or a run's "
            f"embeddings.safetensors: {error}"
        ) from error
    if vectors.is_complex():
        raise DataError(f"{file} holds complex vectors: expected real parts, then imaginary parts")
    vectors = vectors.to(torch.float32)
    if vectors.ndim != 2 or len(names) != len(vectors) or not names:
        shape = tuple(vectors.shape)
        raise DataError(f"{file}: expected a vector for each of {len(names)} names, got {shape}")
    if len(set(names)) < len(names):
        (twice, _), *_ = Counter(names).most_common(1)
        raise DataError(f"{file} holds {twice!r} more than once")
    if not vectors.isfinite().all():
        raise DataError(f"{file} holds values that are not finite")
    return names, vectors
