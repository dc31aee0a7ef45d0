"""Triples and their vocabularies, read from ``train.txt``, ``valid.txt`` and ``test.txt``.

A line holds a head, a relation and a tail, separated by tabs. Files come from a folder or from a
tar archive; an archive's members are read in memory and nothing of it is ever extracted to disk.
"""

from __future__ import annotations

import io
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Literal

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

    entities: list[str]
    relations: list[str]
    triples: dict[str, Tensor]  # split -> (M, 3) int64: head, relation, tail

    @classmethod
    def from_names(cls, splits: dict[str, list[NamedTriple]]) -> Graph:
        """Number the names in sorted order, whichever split they appear in.

        What appears only in validation or test is kept, as LibKGE does: its embedding stays as
        initialised, and its triples are ranked like all others. See :meth:`unseen`.
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
        head, relation, tail = self.triples["train"].T
        entity_seen = torch.zeros(self.num_entities, dtype=torch.bool)
        entity_seen[head] = entity_seen[tail] = True
        relation_seen = torch.zeros(self.num_relations, dtype=torch.bool)
        relation_seen[relation] = True
        head, relation, tail = self.triples[split].T
        seen = entity_seen[head] & relation_seen[relation] & entity_seen[tail]
        return int((~seen).sum())

    def summary(self) -> str:
        """Lines for a person: sizes, and what is unseen in training."""
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
    """(given, relation, target), each (M,): what the query is made of, and what it looks for."""
    head, relation, tail = triples.T
    return (head, relation, tail) if direction == "tail" else (tail, relation, head)


def load_graph(path: Path) -> Graph:
    """Read a graph from a folder or from a tar archive.

    Raises:
        DataError: something is missing, malformed, corrupted or unsafe; says what and where.
    """
    if path.is_dir():
        return Graph.from_names(_read_folder(path))
    if path.is_file():
        return Graph.from_names(_read_archive(path))
    raise DataError(
        f"{path}: no such folder or archive; expected a folder with train.txt, valid.txt and "
        "test.txt, or a tar archive of them"
    )


def _read_folder(folder: Path) -> dict[str, list[NamedTriple]]:
    splits = {}
    for split in SPLITS:
        path = folder / f"{split}.txt"
        if not path.is_file():
            raise DataError(
                f"{path} is missing; {folder} must hold train.txt, valid.txt and test.txt"
            )
        with path.open("rb") as stream:
            splits[split] = _read_split(stream, str(path))
    return splits


def _read_archive(path: Path) -> dict[str, list[NamedTriple]]:
    splits: dict[str, list[NamedTriple]] = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                _check_member(member, path)
                split = PurePosixPath(member.name).stem
                if not member.isfile() or PurePosixPath(member.name).name != f"{split}.txt":
                    continue
                if split not in SPLITS:
                    continue
                if split in splits:
                    raise DataError(f"{path} holds {split}.txt more than once")
                stream = archive.extractfile(member)
                assert stream is not None  # a regular file, as checked above
                splits[split] = _read_split(io.BytesIO(stream.read()), f"{path}:{member.name}")
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise DataError(f"{path} is corrupted or not a tar archive: {error}") from error
    for split in SPLITS:
        if split not in splits:
            raise DataError(f"{path} holds no {split}.txt; it must hold train, valid and test")
    return splits


def _check_member(member: tarfile.TarInfo, path: Path) -> None:
    """Refuse an archive that would write outside its folder if someone extracted it.

    Nothing is extracted here, so it could do no harm; but no honest dataset looks like that.
    """
    name = PurePosixPath(member.name)
    escapes = name.is_absolute() or ".." in name.parts or "\\" in member.name
    if escapes or not (member.isfile() or member.isdir()):
        raise DataError(
            f"{path} is unsafe: its member {member.name!r} is not a plain file or folder inside "
            "the archive; nothing was read from it"
        )


def _read_split(stream: BinaryIO, where: str) -> list[NamedTriple]:
    triples = list(_parse(stream, where))
    if not triples and where.endswith("train.txt"):
        raise DataError(f"{where} holds no triples: there is nothing to train on")
    return triples


def _parse(lines: Iterable[bytes], where: str) -> Iterator[NamedTriple]:
    for number, raw in enumerate(lines, start=1):
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
