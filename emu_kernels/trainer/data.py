"""Triples and their vocabularies.

Names are numbered in the order of their characters, also if they are integers: 0, 1, 10, 2. If a
file already holds ids, they are kept.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy
import pyarrow
import pyarrow.compute as pc
import torch
from torch import Tensor

from emu_kernels.negatives import generator

from .errors import DataError
from .names import Names

SPLITS = ("train", "valid", "test")
INDUCTIVE = "ind"  # the subfolder of a graph to test on

Direction = Literal["head", "tail"]  # which entity of a triple is predicted
DIRECTIONS: tuple[Direction, Direction] = ("tail", "head")

PARTS = ("head", "relation", "tail")

KINDS = ("1-1", "1-n", "n-1", "n-n")  # of relations (Bordes et al., 2013): heads - tails
MANY = 1.5  # the mean number of tails per head, or heads per tail, from which on it is "n"

NamedTriple = tuple[str, str, str]
Columns = Sequence[pyarrow.ChunkedArray]  # head, relation, tail, perhaps their weight


@dataclass(frozen=True)
class Graph:
    """A knowledge graph: names, and triples of ids into them.

    Raises:
        DataError: N²R ≥ 2⁶³, so that not every triple has a key of its own.
    """

    entities: Sequence[str]
    relations: Sequence[str]
    triples: dict[str, Tensor]  # split -> (M, 3) int64: head, relation, tail
    notes: tuple[str, ...] = ()  # what was left out of the files
    weights: Tensor | None = None
    """(M,) fp32, of the training triples in the loss; None: all are equal."""

    inductive: Graph | None = None
    """The graph to test on, with its own entities and the same relations: its test triples are to
    be predicted from its train triples."""

    def __post_init__(self) -> None:
        if self.num_entities**2 * self.num_relations >= 2**63:
            raise DataError(
                f"{self.num_entities:,} entities and {self.num_relations:,} relations are too "
                "many: a triple's key would not fit in 63 bits"
            )

    @classmethod
    def from_names(cls, splits: dict[str, list[NamedTriple]]) -> Graph:
        """:meth:`from_columns` for Python strings."""
        return cls.from_columns(
            {
                split: [
                    pyarrow.chunked_array([[triple[part] for triple in splits[split]]], _STRING)
                    for part in range(3)
                ]
                for split in SPLITS
            }
        )

    @classmethod
    def from_columns(
        cls,
        splits: dict[str, Columns],
        notes: tuple[str, ...] = (),
        relations: Sequence[str] | None = None,
    ) -> Graph:
        """Number the names in sorted order, whichever split they appear in.

        Names that appear only in validation or test are kept, as LibKGE does: their embeddings
        stay as initialized, and their triples are ranked like all others. See :meth:`unseen`.

        Args:
            splits: strings, or integers, which are kept as ids from 0 and whose names are their
                digits. Training triples may have weights, finite and at least 0.
            relations: those of another graph, which include all relations of this one.

        Raises:
            DataError: a name contains a tab, a line end or a NUL, which the files of a run could
                not hold; an id is negative; all weights are 0.
        """
        chosen = [splits[split] for split in SPLITS]
        number = _keep if pyarrow.types.is_integer(chosen[0][0].type) else _number
        entities, ends = number([columns[part] for columns in chosen for part in (0, 2)])
        if relations is None:
            relations, kinds = number([columns[1] for columns in chosen])
        elif number is _keep:
            kinds = _keep([columns[1] for columns in chosen])[1]
        else:
            kinds = [_places(columns[1], relations) for columns in chosen]
        triples = zip(ends[::2], kinds, ends[1::2], strict=True)
        stacked = (torch.stack(parts, dim=1) for parts in triples)
        weights = None
        for column in splits["train"][3:]:
            weights = _usable(torch.from_numpy(column.to_numpy().copy()))
        by_split = dict(zip(SPLITS, stacked, strict=True))
        return cls(entities, relations, by_split, notes, weights)

    def hold_out(self, share: float, seed: int) -> Graph:
        """A graph with `share` of the training triples as validation, and as many as test.

        They are drawn by `seed` among the triples that occur once and can be left out so that every
        entity and relation keeps a training triple. If these are too few, each split gets half.

        Raises:
            DataError: there are none, or all weights of the others are 0.
        """
        train = self.triples["train"]
        draws = generator(torch.device("cpu"), seed, "hold out")
        order = torch.randperm(len(train), generator=draws)
        free = torch.ones(len(train), dtype=torch.bool)
        keys, place = self._keys("train")[order].sort()
        same = keys.diff() == 0
        free[place[1:][same]] = False
        free[place[:-1][same]] = False
        for columns, size in (
            (train[order, ::2], self.num_entities),
            (train[order, 1:2], self.num_relations),
        ):
            first = torch.full((size,), len(train))  # each one's first triple stays in training
            at = torch.arange(len(train)).unsqueeze(1).expand_as(columns)
            first.scatter_reduce_(0, columns.flatten(), at.flatten(), "amin")
            free[first[first < len(train)]] = False
        drawn = order[free]
        count = min(int(share * len(train)), len(drawn) // 2)
        if not count:
            raise DataError(
                f"no triples can be held out: share {share:g} of {len(train):,}, of which "
                f"{len(drawn):,} leave other triples to their entities and relations; give "
                "separate files for validation and test"
            )
        kept = torch.ones(len(train), dtype=torch.bool)
        kept[drawn[: 2 * count]] = False
        triples = {
            "train": train[kept],
            "valid": train[drawn[:count]],
            "test": train[drawn[count : 2 * count]],
        }
        weights = None if self.weights is None else _usable(self.weights[kept])
        return replace(self, triples=triples, weights=weights)

    def of_split(self, split: str) -> Graph:
        """The graph that the triples of a split belong to."""
        return self.inductive if split == "test" and self.inductive is not None else self

    @property
    def num_entities(self) -> int:
        return len(self.entities)

    @property
    def num_relations(self) -> int:
        return len(self.relations)

    @cached_property
    def relation_kinds(self) -> Tensor:
        """(R,) int64: the index of each relation's kind in :data:`KINDS`; "1-1" without triples.

        A relation has many tails if its heads have :data:`MANY` or more of them on average, over
        the triples of all splits, and many heads likewise.
        """
        size, count = self.num_entities, self.num_relations
        head, relation, tail = torch.cat([self.triples[split] for split in SPLITS]).T
        triples = ((relation * size + head) * size + tail).unique()  # fits: checked above
        relation, tail = triples // size**2, triples % size
        total = torch.bincount(relation, minlength=count)

        def many(pairs: Tensor) -> Tensor:
            return total >= MANY * torch.bincount(pairs // size, minlength=count).clamp(1)

        heads = (triples // size).unique_consecutive()
        return 2 * many((relation * size + tail).unique()).long() + many(heads).long()

    def unseen(self, split: str) -> int:
        """How many triples of `split` hold an entity or a relation that training never sees."""
        train, triples = self.triples["train"], self.triples[split]
        entity_seen = torch.zeros(self.num_entities, dtype=torch.bool)
        entity_seen[train[:, ::2]] = True
        relation_seen = torch.zeros(self.num_relations, dtype=torch.bool)
        relation_seen[train[:, 1]] = True
        seen = entity_seen[triples[:, ::2]].all(dim=1) & relation_seen[triples[:, 1]]
        return int((~seen).sum())

    def summary(self) -> str:
        """Sizes, and how many triples hold something unseen in training, as text."""
        sizes = ", ".join(f"{len(self.triples[split]):,} {split}" for split in SPLITS)
        unseen = [
            f"\n{count:,} of the {split} triples hold an entity or relation unseen in training: "
            "kept, and ranked although nothing was learned of it"
            for split in SPLITS[1:]
            if (count := self.unseen(split))
        ]
        if self.weights is not None:
            low, high = self.weights.aminmax()
            sizes += f"; weights of train triples: {low:g} to {high:g}"
        test = "" if self.inductive is None else f"\ntested on: {self.inductive.summary()}"
        return (
            f"{self.num_entities:,} entities, {self.num_relations:,} relations; "
            f"triples: {sizes}{''.join(unseen)}{test}"
        )

    def doubts(self) -> list[str]:
        """What is probably a mistake in this graph: a line for each kind, with its count.

        Names that differ only by blanks or in Unicode's composition are different entities;
        headers are read as triples; evaluation triples that are also trained on rank too well.
        """
        lines = [*self.notes]
        for kind, names in (("entities", self.entities), ("relations", self.relations)):
            array = _array(names)
            blank = array.filter(pc.not_equal(array, pc.utf8_trim_whitespace(array)))
            if len(blank):
                lines.append(
                    f"{_some(len(blank), kind)} with blanks at an end of the name: "
                    f"{blank[0].as_py()!r}"
                )
            composed = array.filter(pc.invert(pc.string_is_ascii(array)))
            same = pc.utf8_normalize(composed, form="NFC").dictionary_encode().indices.to_numpy()
            later = numpy.ones(len(same), dtype=bool)
            later[numpy.unique(same, return_index=True)[1]] = False
            if later.any():
                lines.append(
                    f"{_some(int(later.sum()), kind)} with a name that looks like another's, "
                    f"composed differently in Unicode: {composed[int(later.argmax())].as_py()!r}"
                )
        if header := self._header():
            lines.append(
                "a header, it seems, is read as a triple, in the first line of "
                f"{', '.join(header)}: delete it, or name its columns by --columns"
            )
        if differ := self._columns_differ():
            lines.append(f"{differ}: each line should be head, relation, tail")
        trained = self._keys("train").unique()  # sorted
        for split in SPLITS:
            keys = self._keys(split)
            repeated = len(keys) - len(trained if split == "train" else keys.unique())
            if repeated:
                lines.append(f"{repeated:,} of the {split} triples repeat another one")
            if split != "train" and len(trained):
                at = torch.searchsorted(trained, keys).clamp_(max=len(trained) - 1)
                if leaked := int((trained[at] == keys).sum()):
                    lines.append(f"{leaked:,} of the {split} triples are train triples too")
        if self.inductive is not None:
            lines += [f"the graph to test on: {line}" for line in self.inductive.doubts()]
        return lines

    def _keys(self, split: str) -> Tensor:
        """(M,) int64: a number for each triple."""
        head, relation, tail = self.triples[split].T
        return (head * self.num_relations + relation) * self.num_entities + tail

    def _header(self) -> list[str]:
        """The splits whose first line seems to be a header: its relation occurs in first lines
        only, and either in those of several files or it is a usual word for a relation.
        """
        first = {split: int(x[0, 1]) for split, x in self.triples.items() if len(x)}
        uses = torch.cat([x[:, 1] for x in self.triples.values()]).bincount()
        often = Counter(first.values())
        return [
            split
            for split, relation in first.items()
            if uses[relation] == often[relation]
            and (often[relation] > 1 or self.relations[relation].lower() in _HEADER_WORDS)
        ]

    def _columns_differ(self) -> str:
        """Why the second column seems to hold entities; empty if it does not."""
        relations = _array(self.relations)
        if pc.all(pc.utf8_is_decimal(relations)).as_py():  # entities may have the same numbers
            tails = len(torch.cat([x[:, 2] for x in self.triples.values()]).unique())
            many = self.num_relations > 2 * tails
            return f"{self.num_relations:,} relations, but only {tails:,} tails" if many else ""
        entities = pc.is_in(relations, value_set=_array(self.entities))
        if 2 * pc.sum(entities).as_py() > self.num_relations:
            return f"{self.num_relations:,} relations, most of which seem to be entities"
        return ""


_STRING = pyarrow.string()


def _array(names: Sequence[str]) -> pyarrow.Array:
    kind = pyarrow.large_string()
    return names.array() if isinstance(names, Names) else pyarrow.array(names, kind)


def _number(columns: Columns) -> tuple[Names, list[Tensor]]:
    """The names of all columns in sorted order, and each column as ids."""
    whole = pyarrow.chunked_array([x for column in columns for x in column.chunks], _STRING)
    encoded = whole.dictionary_encode()
    names = encoded.chunk(0).dictionary  # all chunks share it
    odd = names.filter(pc.match_substring_regex(names, "[\\t\\n\\r\\x00]"))
    if len(odd):
        raise DataError(f"names may hold no tab, line end or NUL: {odd[0].as_py()!r}")
    order = pc.array_sort_indices(names)
    ids = numpy.empty(len(names), dtype=numpy.int64)
    ids[order.to_numpy()] = numpy.arange(len(names))
    flat = torch.from_numpy(numpy.concatenate([ids[x.indices.to_numpy()] for x in encoded.chunks]))
    return Names.of(names.take(order)), list(flat.split([len(column) for column in columns]))


def _places(column: pyarrow.ChunkedArray, names: Sequence[str]) -> Tensor:
    """The index of each value of a column in the names, which include all of them."""
    places = pc.index_in(column.cast(pyarrow.large_string()), value_set=_array(names))
    return torch.from_numpy(places.to_numpy().astype(numpy.int64))


def _keep(columns: Columns) -> tuple[Names, list[Tensor]]:
    """The names 0, 1, ... up to the largest id, as digits, and each column's ids as they are."""
    ids = [torch.from_numpy(column.to_numpy().astype(numpy.int64)) for column in columns]
    whole = torch.cat(ids)
    low, high = whole.aminmax()
    if low < 0:
        raise DataError(f"ids must be at least 0, got {low}")
    if high > 10**7 and high > 100 * (distinct := len(whole.unique())):
        raise DataError(
            f"the largest of {distinct:,} ids is {high:,}, and the tables would have a row for "
            "each id below it: without --numbered ids are read as names"
        )
    return Names.of(pyarrow.array(numpy.arange(int(high) + 1)).cast(_STRING)), ids


def _some(count: int, kind: str) -> str:
    return f"{count:,} of the {kind}" if count > 1 else f"one of the {kind}"


_HEADER_WORDS = {"r", "rel", "relation", "relations", "p", "predicate", "edge", "label", "type"}


def _usable(weights: Tensor) -> Tensor:
    if not weights.any():
        raise DataError("the weights of all training triples are 0")
    return weights


def split_triples(triples: Tensor, direction: Direction) -> tuple[Tensor, Tensor, Tensor]:
    """(given, relation, target), each (M,): the query's entity and relation, and its answer."""
    head, relation, tail = triples.T
    return (head, relation, tail) if direction == "tail" else (tail, relation, head)


def with_inverses(triples: Tensor, num_relations: int) -> Tensor:
    """(2M, 3): the triples (M, 3), then each of them reversed, with the relation's id plus R."""
    head, relation, tail = triples.T
    return torch.cat([triples, torch.stack([tail, relation + num_relations, head], dim=1)])
