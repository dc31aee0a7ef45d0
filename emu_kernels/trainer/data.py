"""Triples and their vocabularies, read from ``train.txt``, ``valid.txt`` and ``test.txt``.

A line holds a head, a relation and a tail, separated by tabs. Files come from a folder or from a
tar archive, which is read in memory.
"""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

import torch
from torch import Tensor

from .errors import DataError

SPLITS = ("train", "valid", "test")

Direction = Literal["head", "tail"]  # which entity of a triple is predicted
DIRECTIONS: tuple[Direction, Direction] = ("tail", "head")

NamedTriple = tuple[str, str, str]


@dataclass(frozen=True)
class Graph:
    """A knowledge graph: names, and triples of ids into them."""

    entities: Sequence[str]
    relations: Sequence[str]
    triples: dict[str, Tensor]  # split -> (M, 3) int64: head, relation, tail

    @classmethod
    def from_names(cls, splits: dict[str, list[NamedTriple]]) -> Graph:
        """Number the names in sorted order, whichever split they appear in.

        Names that appear only in validation or test are kept, as LibKGE does: their embeddings
        stay as initialised, and their triples are ranked like all others. See :meth:`unseen`.
        """
        everything = [triple for split in SPLITS for triple in splits[split]]
        entities = sorted({name for head, _, tail in everything for name in (head, tail)})
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
        return (
            f"{self.num_entities:,} entities, {self.num_relations:,} relations; "
            f"triples: {sizes}{''.join(unseen)}"
        )


def split_triples(triples: Tensor, direction: Direction) -> tuple[Tensor, Tensor, Tensor]:
    """(given, relation, target), each (M,): the query's entity and relation, and its answer."""
    head, relation, tail = triples.T
    return (head, relation, tail) if direction == "tail" else (tail, relation, head)


def load_graph(path: Path) -> Graph:
    """Read a graph from a folder or from a tar archive.

    Raises:
        DataError: something is missing, malformed, corrupted or unsafe; says where.
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
            "test.txt, or a tar archive of them"
        )
    for split in SPLITS:
        if split not in contents:
            raise DataError(f"{path} holds no {split}.txt; it must hold train, valid and test")
    splits = {split: list(_parse(content, where)) for split, (where, content) in contents.items()}
    if not splits["train"]:
        raise DataError(f"{contents['train'][0]} holds no triples: there is nothing to train on")
    return Graph.from_names(splits)


def _read_archive(path: Path) -> dict[str, tuple[str, bytes]]:
    """By split, a name for messages, and the content.

    Nothing is extracted, so a member outside the folder could do no harm here, but an honest
    dataset has none, and a person may extract the archive.
    """
    contents: dict[str, tuple[str, bytes]] = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                name = PurePosixPath(member.name)
                escapes = name.is_absolute() or ".." in name.parts or "\\" in member.name
                if escapes or not (member.isfile() or member.isdir()):
                    raise DataError(
                        f"{path} is unsafe: its member {member.name!r} is not a plain file or "
                        "folder inside the archive; nothing was read from it"
                    )
                if not member.isfile() or name.suffix != ".txt" or name.stem not in SPLITS:
                    continue
                if name.stem in contents:
                    raise DataError(f"{path} holds {name.name} more than once")
                stream = archive.extractfile(member)
                assert stream is not None  # a regular file, as checked above
                contents[name.stem] = (f"{path}:{member.name}", stream.read())
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise DataError(f"{path} is corrupted or not a tar archive: {error}") from error
    return contents


def _parse(content: bytes, where: str) -> Iterator[NamedTriple]:
    for number, raw in enumerate(content.split(b"\n"), start=1):
        try:
            line = raw.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise DataError(f"{where}:{number}: expected UTF-8 text: {error}") from error
        if not line:
            continue
        fields = line.split("\t")
        if len(fields) != 3 or not all(fields):
            raise DataError(
                f"{where}:{number}: expected head, relation and tail separated by tabs, "
                f"got {len(fields)} field(s): {line[:200]!r}"
            )
        yield fields[0], fields[1], fields[2]
