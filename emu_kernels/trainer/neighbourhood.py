"""Structure-aware negatives (SAN): negatives from the neighbourhood of the given entity.

Ahrabian et al., "Structure Aware Negative Sampling in Knowledge Graphs", EMNLP 2020. For a query
(h, r, ?) the negatives are drawn uniformly from the k-hop neighbourhood of h (for (?, r, t), of t)
in the training graph without its relations and directions. The neighbourhoods are computed once,
exactly or by random walks, and kept in a cache.

In its authors' program (github.com/kahrabian/SANS) the exact neighbourhood is the support of
A^k + A^(k−1), for adjacency matrix A: all entities within k hops, the entity itself included. The
approximation consists of the entities where walks of k hops *end*, so a nearer entity is found only
if a walk turned back. This module does the same, with three differences:

- an entity is not its own neighbour, and triples that link an entity to itself are not edges;
- all walks of an entity start from it: in the program, each starts where the previous one ended;
- an entity without neighbours has an empty neighbourhood, and the sampler draws its negatives
  uniformly at every step, not from one fixed sample.

The positive and all other true answers are neighbours of the given entity, at one hop, so use
:class:`.sampling.FilteredNegatives`, as that program does.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag
from tqdm import tqdm

from emu_kernels.negatives import generator

from . import checkpoint
from .batches import Batch
from .errors import RunError

FORMAT_VERSION = 1  # of the cache and of how walks are drawn; another version ignores old files

_CHUNK_IDS = 1 << 19  # walkers that move at once: few enough to stay in a cache
_CHUNK_REACH = 1 << 23  # entries of the dense matrix of an exact chunk: 32 MiB
_RANDOM_BITS = 31


@dataclass(frozen=True)
class Neighbourhoods:
    """A set of entities for each entity, sparse (CSR).

    The neighbours of entity i, ascending, are indices[indptr[i] : indptr[i + 1]].
    """

    indptr: Tensor  # (N + 1,) int64
    indices: Tensor  # (E,) int32

    @property
    def sizes(self) -> Tensor:
        """(N,) int64."""
        return self.indptr.diff()


class StructureAwareNegatives:
    """Negatives drawn uniformly, with replacement, from the neighbourhood of the given entity.

    (B, K) int64 ids for each step; uniform over all entities if the neighbourhood is empty.

    Args:
        negatives: K.
        device: where to draw; the neighbourhoods are copied to it.
    """

    def __init__(
        self, neighbourhoods: Neighbourhoods, negatives: int, seed: int, device: torch.device
    ) -> None:
        sizes, count = neighbourhoods.sizes, len(neighbourhoods.sizes)
        # An empty neighbourhood points to a list of all entities, after the neighbourhoods.
        empty = sizes == 0
        everyone = torch.arange(count, dtype=torch.int32)
        start = torch.where(empty, len(neighbourhoods.indices), neighbourhoods.indptr[:-1])
        self._indices = torch.cat([neighbourhoods.indices, everyone]).to(device)
        self._start = start.to(device)
        self._size = torch.where(empty, count, sizes).to(device)
        self._negatives = negatives
        self._seed = seed

    def __call__(self, step: int, batch: Batch) -> Tensor:
        shape = (len(batch.given), self._negatives)
        draws = generator(self._indices.device, self._seed, "structure-aware negatives", step)
        place = _draw_below(self._size[batch.given].unsqueeze(1), shape, draws)
        place += self._start[batch.given].unsqueeze(1)
        return self._indices.index_select(0, place.flatten()).view(shape).long()


def adjacency(triples: Tensor, num_entities: int) -> Neighbourhoods:
    """Pairs of entities that share a triple: each once, in both directions, without loops.

    Args:
        triples: (M, 3) on the CPU.
    """
    head, _, tail = triples.T
    differ = head != tail
    head, tail = head[differ], tail[differ]
    pairs = torch.cat([head * num_entities + tail, tail * num_entities + head]).unique()
    counts = (pairs // num_entities).bincount(minlength=num_entities)
    return Neighbourhoods(_offsets(counts), (pairs % num_entities).int())


def k_hop(graph: Neighbourhoods, hops: int) -> Neighbourhoods:
    """All entities within `hops` hops of each entity, except the entity itself.

    The result is large if the graph is dense (0.8 GB for 3 hops on FB15k-237, which reach nearly
    all entities from nearly everywhere); :func:`random_walks` keeps a bounded number.
    """
    count = len(graph.sizes)
    indices = graph.indices.long()

    def chunk(sources: Tensor) -> tuple[Tensor, Tensor]:
        column = torch.arange(len(sources))
        reached = torch.zeros(count, len(sources))
        reached[sources, column] = 1
        for _ in range(hops):
            # Row i of A · reached is the sum of its neighbours' rows: a bag of them.
            reached += embedding_bag(
                indices, reached, graph.indptr, mode="sum", include_last_offset=True
            )
            reached.clamp_(max=1)
        reached[sources, column] = 0
        row, found = reached.T.contiguous().nonzero(as_tuple=True)
        return row.bincount(minlength=len(sources)), found

    return _collect(graph, chunk, max(1, _CHUNK_REACH // count), f"{hops}-hop neighbourhoods")


def random_walks(graph: Neighbourhoods, hops: int, walks: int, seed: int) -> Neighbourhoods:
    """The ends of `walks` random walks of `hops` hops from each entity, except the entity itself.

    A hop goes to each neighbour with equal probability, however many triples lead there.
    """
    chunk_size = max(1, _CHUNK_IDS // walks)
    degree, start, indices = graph.sizes, graph.indptr[:-1], graph.indices

    def chunk(sources: Tensor) -> tuple[Tensor, Tensor]:
        draws = generator(sources.device, seed, f"{hops} hops from", int(sources[0]))
        walker = sources.int().repeat_interleave(walks)
        for _ in range(hops):
            choice = _draw_below(degree.index_select(0, walker), walker.shape, draws)
            walker = indices.index_select(0, choice.add_(start.index_select(0, walker)))
        ends = walker.view(-1, walks).sort(dim=1).values
        new = ends != sources.unsqueeze(1)
        new[:, 1:] &= ends[:, 1:] != ends[:, :-1]
        return new.sum(dim=1), ends[new]

    return _collect(graph, chunk, chunk_size, f"{walks} walks of {hops} hops")


def cached_neighbourhoods(
    triples: Tensor, num_entities: int, *, hops: int, walks: int, seed: int, folder: Path
) -> Neighbourhoods:
    """The neighbourhoods of a graph's entities, computed the first time, on the CPU.

    Args:
        triples: (M, 3), the training triples.
        hops: at least 1.
        walks: random walks an entity, or 0 for the exact neighbourhood.
        seed: of the walks; an exact neighbourhood does not depend on it.
        folder: where to keep the result, made if missing. A folder that cannot be written causes
            a warning, and the next call computes the result again.
    """
    triples = triples.cpu()
    settings = [FORMAT_VERSION, num_entities, hops, walks, seed if walks else 0]
    digest = hashlib.sha256(json.dumps(settings).encode())
    digest.update(triples.contiguous().numpy().astype("<i8", copy=False).tobytes())
    path = folder / f"neighbourhoods-{digest.hexdigest()[:32]}.safetensors"
    found = _read(path, num_entities)
    if found is None:
        graph = adjacency(triples, num_entities)
        found = random_walks(graph, hops, walks, seed) if walks else k_hop(graph, hops)
        _write(path, found)
    return found


def _draw_below(limit: Tensor, shape: tuple[int, ...], draws: torch.Generator) -> Tensor:
    """int64 of `shape`, uniform in [0, limit); limit < 2³¹ broadcasts to it.

    By multiplication and shift, several times as fast as a remainder; the relative error of the
    probabilities is at most limit / 2³¹.
    """
    bits = torch.empty(shape, dtype=torch.int64, device=limit.device)
    bits.random_(0, 1 << _RANDOM_BITS, generator=draws)
    return bits.mul_(limit).bitwise_right_shift_(_RANDOM_BITS)


def _collect(
    graph: Neighbourhoods,
    chunk: Callable[[Tensor], tuple[Tensor, Tensor]],  # (C,) -> sizes (C,), all their neighbours
    chunk_size: int,
    description: str,
) -> Neighbourhoods:
    """Compute the neighbourhoods of the entities that have neighbours, chunk by chunk."""
    sources = graph.sizes.nonzero().flatten()
    sizes = torch.zeros_like(graph.sizes)
    indices = [graph.indices.new_empty(0)]
    parts = sources.split(chunk_size) if len(sources) else ()
    for part in tqdm(parts, desc=description, disable=None):  # shown on a terminal only
        sizes[part], found = chunk(part)
        indices.append(found.int())
    return Neighbourhoods(_offsets(sizes), torch.cat(indices))


def _offsets(counts: Tensor) -> Tensor:
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def _read(path: Path, num_entities: int) -> Neighbourhoods | None:
    """The file's neighbourhoods; None if it is missing or damaged."""
    try:
        tensors, _ = checkpoint.load(path)
        indptr, indices = tensors["indptr"], tensors["indices"]
    except (RunError, KeyError):
        return None
    # Otherwise an id out of range would go unnoticed until training.
    sound = (
        indptr.shape == (num_entities + 1,)
        and int(indptr[0]) == 0
        and int(indptr[-1]) == len(indices)
        and bool((indptr.diff() >= 0).all())
        and bool(((indices >= 0) & (indices < num_entities)).all())
    )
    return Neighbourhoods(indptr, indices) if sound else None


def _write(path: Path, found: Neighbourhoods) -> None:
    # First under this process's own name: two runs may compute the same neighbourhoods at once.
    own = path.with_name(f"{path.stem}.{os.getpid()}.safetensors")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.save(own, {"indptr": found.indptr, "indices": found.indices}, {})
        own.replace(path)
    except (OSError, RunError) as error:
        warnings.warn(f"the neighbourhoods are not cached: {error}", stacklevel=3)
