"""Triples and their vocabularies, read from ``train.txt``, ``valid.txt`` and ``test.txt``.

A line holds a head, a relation and a tail, separated by tabs, in UTF-8, with or without a
byte-order mark; it may end as on Windows. Files come from a folder or from an archive (tar or zip),
which is read in memory. Names are numbered in the order of their characters, integers too: 0, 1,
10, 2. A folder for inductive models holds a second graph in its subfolder ``ind``.
"""

from __future__ import annotations

import codecs
import stat
import tarfile
import unicodedata
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Literal

import torch
from torch import Tensor

from .errors import DataError

SPLITS = ("train", "valid", "test")
INDUCTIVE = "ind"  # the subfolder of a graph to test on

Direction = Literal["head", "tail"]  # which entity of a triple is predicted
DIRECTIONS: tuple[Direction, Direction] = ("tail", "head")

NamedTriple = tuple[str, str, str]


@dataclass(frozen=True)
class Graph:
    """A knowledge graph: names, and triples of ids into them."""

    entities: Sequence[str]
    relations: Sequence[str]
    triples: dict[str, Tensor]  # split -> (M, 3) int64: head, relation, tail
    inductive: Graph | None = None
    """The graph to test on, of entities of its own and the same relations: its test triples are to
    be predicted from its train triples."""

    @classmethod
    def from_names(
        cls, splits: dict[str, list[NamedTriple]], relations: Sequence[str] | None = None
    ) -> Graph:
        """Number the names in sorted order, whichever split they appear in.

        Names that appear only in validation or test are kept, as LibKGE does: their embeddings
        stay as initialised, and their triples are ranked like all others. See :meth:`unseen`.

        Args:
            relations: the relations' names, where they are another graph's.
        """
        everything = [triple for split in SPLITS for triple in splits[split]]
        entities = sorted({name for head, _, tail in everything for name in (head, tail)})
        if relations is None:
            relations = sorted({relation for _, relation, _ in everything})
        entity_id = {name: i for i, name in enumerate(entities)}
        relation_id = {name: i for i, name in enumerate(relations)}
        triples = {
            split: torch.tensor(
                [(entity_id[h], relation_id[r], entity_id[t]) for h, r, t in splits[split]],
                dtype=torch.int64,
            ).reshape(-1, 3)
            for split in SPLITS
        }
        return cls(entities, relations, triples)

    def of_split(self, split: str) -> Graph:
        """The graph whose entities the triples of a split are about."""
        return self.inductive if split == "test" and self.inductive is not None else self

    @property
    def num_entities(self) -> int:
        return len(self.entities)

    @property
    def num_relations(self) -> int:
        return len(self.relations)

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
        """Lines for a person: sizes, and how many triples are unseen in training."""
        sizes = ", ".join(f"{len(self.triples[split]):,} {split}" for split in SPLITS)
        unseen = [
            f"\n{count:,} of the {split} triples hold an entity or relation unseen in training: "
            "kept, and ranked with its initial embedding"
            for split in SPLITS[1:]
            if (count := self.unseen(split))
        ]
        test = "" if self.inductive is None else f"\ntested on: {self.inductive.summary()}"
        return (
            f"{self.num_entities:,} entities, {self.num_relations:,} relations; "
            f"triples: {sizes}{''.join(unseen)}{test}"
        )

    def doubts(self) -> list[str]:
        """What is probably not meant in this graph: a line for each kind, with its count.

        Names that differ only by blanks or in Unicode's composition are different entities;
        headers are triples; evaluation triples that are trained on are ranked nearly for free.
        """
        lines = []
        for kind, names in (("entities", self.entities), ("relations", self.relations)):
            blank = [name for name in names if name != name.strip()]
            if blank:
                lines.append(
                    f"{_some(len(blank), kind)} with blanks at an end of the name: {blank[0]!r}"
                )
            composed: dict[str, str] = {}
            twins = []
            for name in names:
                if not name.isascii():
                    same = composed.setdefault(unicodedata.normalize("NFC", name), name)
                    twins += [name] if same != name else []
            if twins:
                lines.append(
                    f"{_some(len(twins), kind)} with a name that looks like another's, composed "
                    f"otherwise in Unicode: {twins[0]!r}"
                )
        if header := self._header():
            lines.append(
                "a header, it seems, is read as a triple, in the first line of "
                + ", ".join(f"{split}.txt" for split in header)
            )
        if self._columns_differ():
            lines.append(
                f"{self.num_relations:,} relations, most of which seem to be entities: each line "
                "should be head, relation, tail"
            )
        keys = {split: self._keys(split) for split in SPLITS}
        for split in SPLITS:
            repeated = len(keys[split]) - len(keys[split].unique())
            if repeated:
                lines.append(f"{repeated:,} of the {split} triples repeat another one")
        for split in SPLITS[1:]:
            trained = int(torch.isin(keys[split], keys["train"]).sum())
            if trained:
                lines.append(f"{trained:,} of the {split} triples are train triples too")
        if self.inductive is not None:
            lines += [f"the graph to test on: {line}" for line in self.inductive.doubts()]
        return lines

    def _keys(self, split: str) -> Tensor:
        """(M,) int64: a number for each triple."""
        head, relation, tail = self.triples[split].T
        return (head * self.num_relations + relation) * self.num_entities + tail

    def _header(self) -> list[str]:
        """The splits whose first line has a relation that only first lines have, and that is
        either the same in several files or a word for a relation.
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

    def _columns_differ(self) -> bool:
        """Whether the second column seems to hold entities."""
        if all(name.isdecimal() for name in self.relations):  # which may number both from 0
            tails = torch.cat([x[:, 2] for x in self.triples.values()]).unique()
            return self.num_relations > 2 * len(tails)
        entities = set(self.entities)
        return 2 * sum(name in entities for name in self.relations) > self.num_relations


def _some(count: int, kind: str) -> str:
    return f"{count:,} of the {kind}" if count > 1 else f"one of the {kind}"


_HEADER_WORDS = {"r", "rel", "relation", "relations", "p", "predicate", "edge", "label", "type"}


def split_triples(triples: Tensor, direction: Direction) -> tuple[Tensor, Tensor, Tensor]:
    """(given, relation, target), each (M,): the query's entity and relation, and its answer."""
    head, relation, tail = triples.T
    return (head, relation, tail) if direction == "tail" else (tail, relation, head)


def with_inverses(triples: Tensor, num_relations: int) -> Tensor:
    """(2M, 3): the triples (M, 3), then each of them the other way, its relation R higher."""
    head, relation, tail = triples.T
    return torch.cat([triples, torch.stack([tail, relation + num_relations, head], dim=1)])


def load_graph(path: Path) -> Graph:
    """Read a graph from a folder or from an archive, tar or zip; a folder may hold a second one.

    Raises:
        DataError: something is missing, malformed, corrupted or unsafe; says where.
    """
    splits = read_splits(path)
    for split in SPLITS:
        if split not in splits:
            raise DataError(f"{path} holds no {split}.txt; it must hold train, valid and test")
    graph = Graph.from_names(splits)
    second = path / INDUCTIVE
    return with_inductive(graph, second) if second.is_dir() else graph


def with_inductive(graph: Graph, path: Path) -> Graph:
    """The graph with a second one to test on: train.txt and test.txt of a folder or an archive.

    Raises:
        DataError: as :func:`load_graph`, and where the second graph has a relation that the first
            graph's train triples lack.
    """
    splits = read_splits(path)
    for split in ("train", "test"):
        if split not in splits:
            raise DataError(
                f"{path} holds no {split}.txt; a graph to test on must hold train and test"
            )
    trained = {graph.relations[i] for i in graph.triples["train"][:, 1].unique().tolist()}
    for split, triples in splits.items():
        for head, relation, tail in triples:
            if relation not in trained:
                raise DataError(
                    f"{path}, {split}.txt: the relation {relation!r} of ({head}, {relation}, "
                    f"{tail}) is not one of the {len(trained):,} relations that are trained on"
                )
    second = Graph.from_names({s: splits.get(s, []) for s in SPLITS}, graph.relations)
    return replace(graph, inductive=second)


def read_splits(path: Path) -> dict[str, list[NamedTriple]]:
    """The triples of the files that are there; train.txt, if it is there, has some.

    Raises:
        DataError: as :func:`load_graph`.
    """
    if path.is_dir():
        contents = {
            split: (str(file), file.read_bytes())
            for split in SPLITS
            if (file := path / f"{split}.txt").is_file()
        }
    elif path.is_file():
        contents = _read_archive(path)
    else:
        raise DataError(
            f"{path}: no such folder or archive; expected a folder with train.txt, valid.txt and "
            "test.txt, or an archive of them, tar or zip"
        )
    splits = {split: list(_parse(content, where)) for split, (where, content) in contents.items()}
    if "train" in splits and not splits["train"]:
        raise DataError(
            f"{contents['train'][0]} holds no triples: a graph without edges teaches nothing"
        )
    return splits


def _read_archive(path: Path) -> dict[str, tuple[str, bytes]]:
    """By split, a name for messages, and the content.

    Nothing is extracted, so a member outside the folder could do no harm here, but an honest
    dataset has none, and a person may extract the archive.
    """
    contents: dict[str, tuple[str, bytes]] = {}
    members = _zip_members if zipfile.is_zipfile(path) else _tar_members
    try:
        for member, plain, read in members(path):
            name = PurePosixPath(member)
            if name.is_absolute() or ".." in name.parts or "\\" in member or not plain:
                raise DataError(
                    f"{path} is unsafe: its member {member!r} is not a plain file or "
                    "folder inside the archive; nothing was read from it"
                )
            if read is None or name.suffix != ".txt" or name.stem not in SPLITS:
                continue
            if name.stem in contents:
                raise DataError(f"{path} holds {name.name} more than once")
            contents[name.stem] = (f"{path}:{member}", read())
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError, RuntimeError, zlib.error) as e:
        raise DataError(
            f"{path} is corrupted or no archive, tar or zip, of train.txt, valid.txt and test.txt "
            f"(a folder that holds the three will do too): {e}"
        ) from e
    return contents


# Name, whether it is a plain file or folder, and what reads it where it is a file.
_Member = tuple[str, bool, Callable[[], bytes] | None]


def _tar_members(path: Path) -> Iterator[_Member]:
    with tarfile.open(path) as archive:
        for member in archive:
            stream = archive.extractfile(member) if member.isfile() else None
            plain = member.isfile() or member.isdir()
            yield member.name, plain, stream.read if stream else None


def _zip_members(path: Path) -> Iterator[_Member]:
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            link = stat.S_ISLNK(member.external_attr >> 16)
            yield (
                member.filename,
                not link,
                None if member.is_dir() else partial(archive.read, member),
            )


def _parse(content: bytes, where: str) -> Iterator[NamedTriple]:
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in content:
        raise DataError(
            f"{where}: expected UTF-8 text, and this seems to be UTF-16 or no text at all: "
            "iconv -f UTF-16 -t UTF-8 converts it"
        )
    for number, raw in enumerate(content.split(b"\n"), start=1):
        try:
            # Files joined into one have a byte-order mark at the start of each.
            line = raw.decode("utf-8").lstrip("\ufeff").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise DataError(f"{where}:{number}: expected UTF-8 text: {error}") from error
        if not line:
            continue
        fields = line.split("\t")
        if len(fields) != 3 or not all(fields):
            raise DataError(
                f"{where}:{number}: expected head, relation and tail separated by tabs, "
                f"got {_got(fields)}: {line[:200]!r}"
            )
        yield fields[0], fields[1], fields[2]


def _got(fields: list[str]) -> str:
    empty = [("head", "relation", "tail")[i] for i, x in enumerate(fields) if not x and i < 3]
    if len(fields) == 3:
        return f"an empty {' and an empty '.join(empty)}"
    return f"{len(fields)} field(s)"
