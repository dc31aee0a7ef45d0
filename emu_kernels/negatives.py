"""Negatives for a batch, without known triples, drawn by torch on the training device.

:class:`Negatives` draws them, and :class:`KnownTriples` is the index of known triples. The draws
are a function of a seed and the step, so runs can be repeated and resumed without a saved state.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

from emu_kernels import prepare, validate
from emu_kernels.queries import Side
from emu_kernels.values import check_ids

__all__ = ["KnownTriples", "Negatives"]

_BLOCK_IDS = 1 << 22  # negatives drawn at once: 32 MiB of ids
_FRACTION_BITS = 31


def derive_seed(seed: int, stream: str, index: int) -> int:
    """An int in [0, 2⁶³) for item `index` of a named stream of a run's randomness."""
    digest = hashlib.blake2b(f"{seed}/{stream}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(device: torch.device, seed: int, stream: str, index: int = 0) -> torch.Generator:
    return torch.Generator(device).manual_seed(derive_seed(seed, stream, index))


class KnownTriples:
    """Turns negatives that make a known triple into padding (−1).

    Args:
        triples: (M, 3) int64 ids of head, relation, tail: the known triples (usually the training
            split), M > 0, on the device to draw on.

    Raises:
        TypeError: triples that are no tensor of integers.
        ValueError: a graph with N²R ≥ 2⁶³, or another shape.
        IndexError: an id out of range, in triples or, on a CPU, in a call.
    """

    _BUCKETS_PER_TRIPLE = 32
    _SPREAD = 0x1E3779B97F4A7C15  # an odd constant: neighbouring pairs land far apart

    def __init__(self, triples: Tensor, num_entities: int, num_relations: int) -> None:
        num_entities, num_relations = _check_triples(triples, num_entities, num_relations)
        if num_entities**2 * num_relations >= 2**63:
            raise ValueError("the graph is too large for a triple's key to fit in 63 bits")
        self._num_entities = num_entities
        self._num_relations = num_relations
        self._keys: dict[Side, Tensor] = {}
        self._mask = (1 << max(10, (len(triples) * self._BUCKETS_PER_TRIPLE).bit_length())) - 1
        self._maybe: dict[Side, Tensor] = {}
        head, relation, tail = triples.T
        sides: tuple[tuple[Side, Tensor, Tensor], ...] = (
            ("tail", head, tail),
            ("head", tail, head),
        )
        for to, given, target in sides:
            self._keys[to] = (self._pair(given, relation) * num_entities + target).unique()

    def remove(
        self, given: Tensor, relation: Tensor, negative: Tensor, to: Side = "tail"
    ) -> Tensor:
        """`negative` with −1 where (given, relation, negative) is known.

        A row may keep fewer than K negatives; one that keeps none has loss 0. A negative shared by
        a block of rows is removed if it is true for any of them: no row ever has a known triple as
        a negative, but some rows lose negatives that are false for them.

        Args:
            given: (B,) heads where ``to`` is "tail", else tails.
            relation: (B,).
            negative: (G, K), G dividing B: a set for each block of B/G rows. It holds no −1.

        Returns:
            (G, K) int64, a new tensor.
        """
        self._check(given, relation, to)
        _check_ids("negative", negative, self._num_entities)
        validate.dims("negative", negative, (2,), "(G, K)")
        negative = negative.long()
        sets, rows = len(negative), len(given)
        if rows % sets if sets else rows:
            raise ValueError(f"negative: expected (G, K), G dividing {rows}, got {sets} sets")
        return self._without(given, relation, negative, to)

    def _without(self, given: Tensor, relation: Tensor, negative: Tensor, to: Side) -> Tensor:
        """:meth:`remove` of what has been checked."""
        sets, rows = len(negative), len(given)
        if sets < rows:
            negative = negative.repeat_interleave(rows // sets, dim=0)
        negative = self._remove(self._pair(given, relation), negative, to)
        if sets < rows:
            negative = negative.view(sets, rows // sets, -1).amin(dim=1)
        return negative

    def _remove(self, pair: Tensor, negative: Tensor, to: Side) -> Tensor:
        if pair.device.type != "cpu":  # picking out suspects, as below, would wait for the device
            key = pair.unsqueeze(1) * self._num_entities + negative
            return torch.where(self._contains(key, to), -1, negative)
        # index_select: indexing by tensors is many times slower on a CPU.
        bucket = self._stretch(pair).unsqueeze(1) + negative
        suspect = self._suspects(to).index_select(0, bucket.flatten()).nonzero()[:, 0]
        candidate = negative.flatten().index_select(0, suspect)
        row = suspect // max(1, negative.shape[1])
        known = self._contains(pair.index_select(0, row) * self._num_entities + candidate, to)
        negative = negative.clone(memory_format=torch.contiguous_format)
        negative.view(-1).index_fill_(0, suspect.masked_select(known), -1)
        return negative

    def _suspects(self, to: Side) -> Tensor:
        """A table of bits, hashed by the pair, that rules out most candidates without a binary
        search: the bits of a row's candidates are adjacent, so they stay in a CPU's cache."""
        if to not in self._maybe:
            pair, keys = self._keys[to] // self._num_entities, self._keys[to]
            table = pair.new_zeros(self._mask + 1 + self._num_entities, dtype=torch.bool)
            table[self._stretch(pair) + keys % self._num_entities] = True
            self._maybe[to] = table
        return self._maybe[to]

    def holds(self, given: Tensor, relation: Tensor, target: Tensor, to: Side) -> Tensor:
        """(B, K): which of the targets (B, K) are known answers of (B,) entities and relations."""
        self._check(given, relation, to)
        _check_ids("target", target, self._num_entities)
        return self._contains(
            (self._pair(given, relation) * self._num_entities)[:, None] + target, to
        )

    def lists(self, given: Tensor, relation: Tensor, to: Side) -> tuple[Tensor, Tensor]:
        """Offsets (B + 1,) and ids (M,): ``ids[offsets[b]:offsets[b + 1]]`` are all known answers
        of row b's pair, each once."""
        self._check(given, relation, to)
        keys, first = self._keys[to], self._pair(given, relation) * self._num_entities
        start = torch.searchsorted(keys, first)
        counts = torch.searchsorted(keys, first + self._num_entities) - start
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        places = (start - offsets[:-1]).repeat_interleave(counts)
        places += torch.arange(len(places), device=places.device)
        return offsets, keys[places] % self._num_entities

    def _check(self, given: Tensor, relation: Tensor, to: str) -> None:
        _check_query(given, relation, to, self._num_entities, self._num_relations)

    def _pair(self, given: Tensor, relation: Tensor) -> Tensor:
        return given.long() * self._num_relations + relation

    def _stretch(self, pair: Tensor) -> Tensor:
        return pair * self._SPREAD & self._mask

    def _contains(self, key: Tensor, to: Side) -> Tensor:
        keys = self._keys[to]
        place = torch.searchsorted(keys, key).clamp_(max=len(keys) - 1)
        return keys.index_select(0, place.flatten()).view_as(place) == key


class UniformNegatives:
    """Uniform negatives, drawn in bulk: (G, K) int64 ids for each step.

    Args:
        sets: G. The batch size B, for one set of negatives for each row; or a divisor of it, for
            chunk-shared negatives: each block of B/G consecutive rows shares one set, as in
            large-scale trainers (PyTorch-BigGraph, Lerer et al., 2019; DGL-KE, Zheng et al., 2020).
        negatives: K.
    """

    def __init__(
        self, num_entities: int, sets: int, negatives: int, seed: int, device: torch.device
    ) -> None:
        self._num_entities = num_entities
        self._steps = max(1, _BLOCK_IDS // max(1, sets * negatives))
        self._ids = torch.empty((self._steps, sets, negatives), dtype=torch.int64, device=device)
        self._seed = seed
        self._block: int | None = None

    def __call__(self, step: int, batch: object = None) -> Tensor:
        block, offset = divmod(step, self._steps)
        if block != self._block:
            draws = generator(self._ids.device, self._seed, "negatives", block)
            self._ids.random_(0, self._num_entities, generator=draws)
            self._block = block
        return self._ids[offset]


class Negatives:
    """Draws a batch's negatives uniformly, by type, or by weight, and leaves out known triples.

    ::

        draw = Negatives(train, num_entities, num_relations, batch_size=1000, count=256)
        negative = draw(step, head, relation)  # for tails; draw(step, tail, relation, "head")
        loss = fused_emu_loss(query, table, tail, negative, ...)

    Args:
        triples: (M, 3) int64 ids of head, relation, tail: the known triples, M > 0. Negatives are
            drawn on their device.
        batch_size: the rows of a batch, a multiple of ``sets``.
        count: K, the negatives of a set.
        sets: G sets of negatives for a batch, each for a block of B/G rows; None: one for each row.
        candidates: "all", or "typed": the entities that occur on the side to predict in a triple of
            the relation (Krompaß et al., "Type-Constrained Representation Learning in Knowledge
            Graphs", ISWC 2015, by their local closed-world rule). "typed" needs a set for each
            row. For a relation without triples it draws from all entities.
        weight: (N,) ≥ 0, how often each entity is drawn, for "all" (in word2vec an entity's
            frequency to the power 0.75); None is uniform. Drawn by Vose's alias method, exact to
            2⁻³¹.
        filtered: turn negatives that make a known triple into −1, which the losses ignore.
        seed: of all draws.

    Raises:
        TypeError, ValueError: arguments that do not fit.
        IndexError: a triple has an id out of range.
    """

    def __init__(
        self,
        triples: Tensor,
        num_entities: int,
        num_relations: int,
        *,
        batch_size: int,
        count: int,
        sets: int | None = None,
        candidates: str = "all",
        weight: Tensor | None = None,
        filtered: bool = True,
        seed: int = 0,
    ) -> None:
        validate.one_of("candidates", candidates, ("all", "typed"))
        batch_size = validate.at_least(1, "batch_size", batch_size)
        count = validate.at_least(0, "count", count)
        seed = validate.whole("seed", seed)
        num_entities, num_relations = _check_triples(triples, num_entities, num_relations)
        if triples.dtype != torch.int64:
            raise TypeError(f"triples: expected int64, got {triples.dtype}")
        self._sizes = num_entities, num_relations
        self._known = None
        if validate.flag("filtered", filtered):
            self._known = KnownTriples(triples, num_entities, num_relations)
        self._rows = batch_size
        sets = batch_size if sets is None else validate.at_least(1, "sets", sets)
        if batch_size % sets:
            raise ValueError(f"sets: expected a divisor of batch_size {batch_size}, got {sets}")
        if candidates == "typed" and (weight is not None or sets != batch_size):
            raise ValueError("candidates: 'typed' takes no weight, and a set for each row")
        self._pools: dict[Side, tuple[Tensor, Tensor]] = {}
        self._alias: tuple[Tensor, Tensor] | None = None
        values = num_entities
        if candidates == "typed":
            values = 1 << _FRACTION_BITS
            self._pools = {
                "head": _pools(triples[:, 1], triples[:, 0], num_entities, num_relations),
                "tail": _pools(triples[:, 1], triples[:, 2], num_entities, num_relations),
            }
        elif weight is not None:
            validate.tensor("weight", weight)
            if weight.shape != (num_entities,):
                raise ValueError(
                    f"weight: expected shape ({num_entities},), got {tuple(weight.shape)}"
                )
            values = num_entities << _FRACTION_BITS
            self._alias = _alias(weight, triples.device)
        self._draw = UniformNegatives(values, sets, count, seed, triples.device)

    def __call__(self, step: int, given: Tensor, relation: Tensor, to: Side = "tail") -> Tensor:
        """The negatives of a step.

        Args:
            step: 0, 1, ...: the same step draws the same values.
            given: (B,) integers, heads where ``to`` is "tail", else tails. With a set for each row,
                B may be less than ``batch_size``, as in an epoch's last batch.
            relation: (B,) integers.
            to: the entity that is replaced.

        Returns:
            (G, K) int64 ids, a new tensor; −1 where a known triple is left out.

        Raises:
            TypeError, ValueError: an argument that does not fit.
            IndexError: an id out of range, on a CPU.
        """
        _check_query(given, relation, to, *self._sizes)
        drawn = self._draw(validate.at_least(0, "step", step))
        rows = len(given)
        if len(drawn) == self._rows and rows < self._rows:
            drawn = drawn[:rows]
        elif rows != self._rows:
            raise ValueError(f"given: expected {self._rows} rows, got {rows}")
        if self._pools:
            offsets, ids = self._pools[to]
            start = offsets.index_select(0, relation.long()).unsqueeze(1)
            size = offsets.index_select(0, relation.long() + 1).unsqueeze(1) - start
            place = (drawn * size >> _FRACTION_BITS) + start
            drawn = ids.index_select(0, place.flatten()).view_as(place)
        elif self._alias is not None:
            keep, other = self._alias
            column = drawn >> _FRACTION_BITS
            flat = column.flatten()
            kept = (drawn & ((1 << _FRACTION_BITS) - 1)) < keep.index_select(0, flat).view_as(drawn)
            drawn = torch.where(kept, column, other.index_select(0, flat).view_as(drawn))
        if self._known is None:
            return drawn if self._pools or self._alias else drawn.clone()
        return self._known._without(given, relation, drawn, to)


def _check_triples(triples: Tensor, num_entities: int, num_relations: int) -> tuple[int, int]:
    prepare.alone_after_fork()
    num_entities = validate.at_least(1, "num_entities", num_entities)
    num_relations = validate.at_least(1, "num_relations", num_relations)
    validate.tensor("triples", triples)
    validate.integer("triples", triples)
    if triples.ndim != 2 or triples.shape[1] != 3 or not len(triples):
        raise ValueError(f"triples: expected shape (M, 3), M > 0, got {tuple(triples.shape)}")
    check_ids("triples, heads and tails", triples[:, ::2], rows=num_entities, lowest=0)
    check_ids("triples, relations", triples[:, 1], rows=num_relations, lowest=0)
    return num_entities, num_relations


def _check_query(
    given: Tensor, relation: Tensor, to: str, num_entities: int, num_relations: int
) -> None:
    prepare.alone_after_fork()
    validate.one_of("to", to, ("tail", "head"))
    _check_ids("given", given, num_entities)
    _check_ids("relation", relation, num_relations)
    if given.ndim != 1 or given.shape != relation.shape:
        raise ValueError(
            "given and relation: expected the same shape (B,), got "
            f"{tuple(given.shape)} and {tuple(relation.shape)}"
        )


def _check_ids(name: str, ids: Tensor, rows: int) -> None:
    validate.tensor(name, ids)
    validate.integer(name, ids)
    if ids.device.type == "cpu" and not torch.compiler.is_compiling():  # a GPU would wait
        check_ids(name, ids, rows=rows, lowest=0)


def _pools(
    relation: Tensor, entity: Tensor, num_entities: int, num_relations: int
) -> tuple[Tensor, Tensor]:
    """Offsets (R + 1,) and ids: each relation's distinct entities, or all if it has none."""
    missing = torch.ones(num_relations, dtype=torch.bool, device=relation.device)
    missing[relation] = False
    everyone = torch.arange(num_entities, device=relation.device)
    filled = missing.nonzero() * num_entities + everyone
    pairs = torch.cat([relation * num_entities + entity, filled.flatten()]).unique()
    counts = (pairs // num_entities).bincount(minlength=num_relations)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)]), pairs % num_entities


def _alias(weight: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """(N,) in how many of 2³¹ draws a column keeps its own id, and (N,) the id it takes otherwise.

    The tables of Vose's alias method.
    """
    share = weight.detach().double().cpu().numpy()
    if not (np.isfinite(share).all() and (share >= 0).all() and share.sum() > 0):
        raise ValueError("weight: expected finite values of at least 0, not all of them 0")
    share = (share * (len(share) / share.sum())).tolist()
    keep, other = [1.0] * len(share), list(range(len(share)))
    small = [i for i, x in enumerate(share) if x < 1]
    large = [i for i, x in enumerate(share) if x >= 1]
    while small and large:
        low, high = small.pop(), large[-1]
        keep[low], other[low] = share[low], high
        share[high] -= 1 - share[low]
        if share[high] < 1:
            small.append(large.pop())
    for i in small:  # left over by rounding errors
        if share[i] == 0:
            keep[i], other[i] = 0.0, int(weight.argmax())
    scaled = torch.tensor(keep, dtype=torch.float64, device="cpu") * (1 << _FRACTION_BITS)
    return scaled.round().long().to(device), torch.tensor(other, device=device)
