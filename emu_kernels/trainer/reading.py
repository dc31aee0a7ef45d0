"""Graphs from files, read by Arrow.

===============  ====================================================================
``.txt .tsv``    head, relation and tail, separated by tabs; no quotes
``.csv``         separated by commas, with quotes; a first line ``head,relation,tail``
                 is the header
``.parquet``     columns head, relation and tail, or three columns
``.nt``          N-Triples; triples with a literal are left out
===============  ====================================================================

Text is UTF-8, with or without a byte-order mark; lines may end as on Windows; each format except
Parquet may be compressed by gzip (``.gz``). A graph is three such files, train, valid and test, in
a folder or an archive (tar or zip), which is read in memory; or one file, from which some triples
are held out. A folder for inductive models holds a second graph in its subfolder ``ind``.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import re
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import pyarrow
import pyarrow.compute as pc
import torch
from pyarrow import csv as arrow_csv
from pyarrow import parquet

from .data import INDUCTIVE, PARTS, SPLITS, Columns, Graph
from .errors import DataError

FORMATS = {".txt": "\t", ".tsv": "\t", ".csv": ",", ".parquet": None, ".nt": None}
"""For each suffix what separates fields; None if nothing does."""

_BLOCK = 1 << 24  # bytes parsed at once, and so the longest line
# As in https://www.w3.org/TR/n-triples; with a literal, the group "tail" is missing.
_N_TRIPLE = (
    r"^\s*(?P<head><[^>]+>|_:[^\s<>]+)\s*(?P<relation><[^>]+>)\s*"
    r'(?:(?P<tail><[^>]+>|_:[^\s<>]+)|".*)\s*\.\s*(?:#.*)?$'
)


class File(NamedTuple):
    """A file with triples."""

    where: str  # for messages
    name: str
    content: bytes | pyarrow.Buffer


class Layout(NamedTuple):
    """Where each file has what.

    Args:
        columns: those of head, relation, tail and perhaps a weight, which is read for training
            triples only: names in the first line, or numbers from 1. If empty, there are three.
        numbered: the file holds ids from 0, which are kept; otherwise names, which may be integers.
    """

    columns: tuple[str, ...] = ()
    numbered: bool = False

    @property
    def types(self) -> list[pyarrow.DataType]:
        """The types of the columns; the fourth is the weight."""
        name = pyarrow.int64() if self.numbered else pyarrow.string()
        return [name, name, name, pyarrow.float32()][: len(self.columns) or 3]

    @property
    def unweighted(self) -> Layout:
        return self._replace(columns=self.columns[:3])

    @property
    def none(self) -> Columns:
        """The columns of a file without triples."""
        return [pyarrow.chunked_array([], kind) for kind in self.types]


PLAIN = Layout()


def is_one_file(path: Path) -> bool:
    """Whether this is a file of triples, from which validation and test are held out."""
    return path.is_file() and _kind(path.name)[1] in FORMATS


def load_graph(
    path: Path, layout: Layout = PLAIN, *, hold_out: float = 0.05, split_seed: int = 0
) -> Graph:
    """Read a graph from a folder, from an archive, tar or zip, or from a single file.

    Args:
        hold_out, split_seed: for a single file, the arguments of :meth:`Graph.hold_out`.

    Raises:
        DataError: something is missing, malformed, corrupted or unsafe; says where.
    """
    if is_one_file(path):
        file = File(str(path), path.name, _open(path))
        notes: list[str] = []
        columns = _columns({"train": file}, layout, notes)
        return Graph.from_columns(columns, tuple(notes)).hold_out(hold_out, split_seed)
    files = _files(path)
    for split in SPLITS:
        if split not in files:
            raise DataError(
                f"{path} holds no {split}.txt (or {', '.join(FORMATS)}); it must hold train, valid "
                "and test"
            )
    notes = []
    columns = _columns(files, layout, notes)
    graph = Graph.from_columns(columns, tuple(notes))
    second = path / INDUCTIVE
    return with_inductive(graph, second, layout) if second.is_dir() else graph


def with_inductive(graph: Graph, path: Path, layout: Layout = PLAIN) -> Graph:
    """The graph with a second one to test on: train.txt and test.txt of a folder or an archive.

    Raises:
        DataError: as :func:`load_graph`, and if the second graph has a relation that the first
            graph's train triples lack.
    """
    files = _files(path)
    for split in ("train", "test"):
        if split not in files:
            raise DataError(
                f"{path} holds no {split}.txt; a graph to test on must hold train and test"
            )
    notes: list[str] = []
    columns = _columns(files, layout, notes)
    trained = [graph.relations[i] for i in graph.triples["train"][:, 1].unique().tolist()]
    for split, parts in columns.items():
        names = parts[1].cast(pyarrow.string())
        unknown = pc.invert(pc.is_in(names, value_set=pyarrow.array(trained, pyarrow.string())))
        if (at := pc.index(unknown, True).as_py()) >= 0:
            head, relation, tail = (part[at].as_py() for part in parts)
            raise DataError(
                f"{files[split].where}: the relation {relation!r} of ({head}, {relation}, {tail}) "
                f"is not one of the {len(trained):,} relations that are trained on"
            )
    return replace(graph, inductive=Graph.from_columns(columns, tuple(notes), graph.relations))


def _files(path: Path) -> dict[str, File]:
    """Each split's file in a folder or an archive."""
    if path.is_dir():
        return _collect(path, ((file.name, partial(_open, file)) for file in path.iterdir()))
    if path.is_file():
        return _read_archive(path)
    raise DataError(
        f"{path}: no such folder or archive; expected a folder with train.txt, valid.txt "
        f"and test.txt (or {', '.join(FORMATS)}), an archive of them, tar or zip, or one file"
    )


def _columns(files: dict[str, File], layout: Layout, notes: list[str]) -> dict[str, Columns]:
    """Each split's columns, empty if it has no file."""
    layouts = {split: layout if split == "train" else layout.unweighted for split in SPLITS}
    splits = {
        split: _read(files[split], of, notes) if split in files else of.none
        for split, of in layouts.items()
    }
    if not len(splits["train"][0]):
        raise DataError(f"{files['train'].where} holds no triples: there is nothing to train on")
    return splits


def _kind(name: str) -> tuple[str, str]:
    """Stem and suffix of a file's name, without ``.gz``."""
    path = PurePosixPath(name[: -len(".gz")] if name.lower().endswith(".gz") else name)
    return path.stem, path.suffix.lower()


def _open(file: Path) -> pyarrow.Buffer:
    try:
        size = file.stat().st_size  # an empty file cannot be mapped
        return pyarrow.memory_map(str(file)).read_buffer() if size else pyarrow.py_buffer(b"")
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error}") from error


def _collect(
    path: Path, members: Iterator[tuple[str, Callable[[], bytes | pyarrow.Buffer]]], sign: str = "/"
) -> dict[str, File]:
    """Each split's only file, by the names of a folder's or an archive's members."""
    files: dict[str, File] = {}
    for member, read in members:
        name = PurePosixPath(member).name
        stem, suffix = _kind(name)
        if stem not in SPLITS or suffix not in FORMATS:
            continue
        if stem in files:
            before = files[stem].where.removeprefix(f"{path}{sign}")
            raise DataError(f"{path} holds {stem} more than once: {before} and {member}")
        files[stem] = File(f"{path}{sign}{member}", name, read())
    return files


def _read_archive(path: Path) -> dict[str, File]:
    """Each split's file in an archive.

    Archives with members outside their folder are refused: nothing is extracted here, so they would
    do no harm, but no honest dataset has any, and the user may extract the archive later.
    """
    members = _zip_members if zipfile.is_zipfile(path) else _tar_members
    try:
        return _collect(path, _safe(path, members(path)), ":")
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError, RuntimeError, zlib.error) as e:
        raise DataError(
            f"{path} is corrupted or no archive, tar or zip, of train.txt, valid.txt and test.txt "
            f"(a folder that holds the three will do too): {e}"
        ) from e


# Name, whether it is a plain file or folder, and for a file the function that reads it.
_Member = tuple[str, bool, Callable[[], bytes] | None]


def _safe(path: Path, members: Iterator[_Member]) -> Iterator[tuple[str, Callable[[], bytes]]]:
    for member, plain, read in members:
        name = PurePosixPath(member)
        if name.is_absolute() or ".." in name.parts or "\\" in member or not plain:
            raise DataError(
                f"{path} is unsafe: its member {member!r} is not a plain file or "
                "folder inside the archive; nothing was read from it"
            )
        if read is not None:
            yield member, read


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


def _read(file: File, layout: Layout, notes: list[str]) -> Columns:
    """Columns of a file, of the layout's types; what is left out is added to `notes`."""
    suffix = _kind(file.name)[1]
    if file.name.endswith(".gz"):
        try:
            file = file._replace(content=gzip.decompress(file.content))
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{file.where} is corrupted: {error}") from error
    if suffix == ".parquet":
        return _read_parquet(file, layout)
    if suffix == ".nt":
        if layout != PLAIN:
            raise DataError(f"{file.where}: N-Triples have no columns and no ids to choose")
        return _read_n_triples(file, notes)
    return _read_text(file, layout, FORMATS[suffix] or "\t")


def _parse(file: File, delimiter: str, *, header: bool = False, **convert: Any) -> pyarrow.Table:
    """Raises: KeyError, ArrowInvalid: they do not say in which line."""
    return arrow_csv.read_csv(
        pyarrow.BufferReader(file.content),
        read_options=arrow_csv.ReadOptions(autogenerate_column_names=not header, block_size=_BLOCK),
        parse_options=arrow_csv.ParseOptions(
            delimiter=delimiter, quote_char='"' if delimiter == "," else False
        ),
        convert_options=arrow_csv.ConvertOptions(**convert),
    )


def _read_text(file: File, layout: Layout, delimiter: str) -> Columns:
    columns, header = layout.columns, any(not name.isdecimal() for name in layout.columns)
    first = bytes(memoryview(file.content)[:4096])
    if delimiter == "," and not columns:
        line = first.removeprefix(codecs.BOM_UTF8).split(b"\n")[0].strip()
        header = line.decode("utf-8", "replace").replace('"', "").split(",") == [*PARTS]
        columns = PARTS if header else ()
    named = columns if header else [f"f{int(c) - 1}" for c in columns or ("1", "2", "3")]
    try:
        if b"\0" in first:
            raise pyarrow.ArrowInvalid("NUL")
        table = _parse(
            file,
            delimiter,
            header=header,
            include_columns=named if columns else None,
            column_types=dict(zip(named, layout.types, strict=True)),
        )
    except KeyError as error:
        got = first.split(b"\n")[0].decode("utf-8", "replace").strip().split(delimiter)
        raise DataError(
            f"{file.where}: expected columns {', '.join(columns)}, got {', '.join(got)}"
        ) from error
    except pyarrow.ArrowInvalid as error:
        if _check_lines(file, layout, delimiter, header):
            raise DataError(f"{file.where}: {error}") from error
        return layout.none
    found = [table[name] for name in named] if len(named) <= table.num_columns else []
    if found and not layout.numbered and "f0" in named[:3]:
        # A file joined from several has a byte-order mark at the start of each part.
        at = named.index("f0")
        if pc.any(pc.starts_with(found[at], "\ufeff")).as_py():
            found[at] = pc.utf8_ltrim(found[at], "\ufeff")
    if table.num_columns != len(named) or any(map(_has_empty, found)) or _wrong(found[3:]):
        _check_lines(file, layout, delimiter, header)
    return found


def _wrong(weights: Columns) -> list[float]:
    """At most one weight, of one column or none, that is negative or not finite."""
    wrong = [x.filter(pc.invert(pc.and_(pc.is_finite(x), pc.greater_equal(x, 0)))) for x in weights]
    return [x[0].as_py() for x in wrong if len(x)]


def _is_weight(text: str) -> bool:
    try:
        return 0 <= float(text) <= torch.finfo(torch.float32).max
    except ValueError:
        return False


def _has_empty(column: pyarrow.ChunkedArray) -> bool:
    if not pyarrow.types.is_string(column.type):
        return column.null_count > 0
    return pc.min(pc.binary_length(column)).as_py() == 0


def _check_lines(file: File, layout: Layout, delimiter: str, header: bool) -> int:
    """Find what is wrong with a file that Arrow refuses: Arrow does not say in which line.

    Returns:
        How many lines are triples.

    Raises:
        DataError: a line is not as expected; the first one is named.
    """
    count = 0
    wanted = ("1", "2", "3") if header or not layout.columns else layout.columns
    width = 0 if layout.columns else 3  # 0: as many as in the first line
    separated = f"separated by {'commas' if delimiter == ',' else 'tabs'}"
    for where, line in _lines(file):
        try:
            fields = next(csv.reader([line])) if delimiter == "," else line.split(delimiter)
        except csv.Error as error:
            raise DataError(f"{where}: expected CSV: {error}, in {line[:200]!r}") from error
        width = width or len(fields)
        if header and not count:
            wanted = tuple(str(fields.index(name) + 1) for name in layout.columns or PARTS)
        parts = [fields[int(c) - 1] for c in wanted] if len(fields) == width else []
        if len(fields) != width or not all(parts):
            empty = [name for name, x in zip((*PARTS, "weight"), parts, strict=False) if not x]
            got = f"an empty {' and an empty '.join(empty)}" if empty else f"{len(fields)} field(s)"
            expected = f"head, relation and tail {separated}" if width == 3 else f"{width} fields"
            advice = "" if layout.columns else "; columns says where they are among more"
            raise DataError(f"{where}: expected {expected}, got {got}: {line[:200]!r}{advice}")
        names = header and not count
        if layout.numbered and not names and not all(map(str.isdecimal, parts[:3])):
            raise DataError(f"{where}: expected ids, integers from 0, got {line[:200]!r}")
        if not names and not all(map(_is_weight, parts[3:])):
            raise DataError(f"{where}: expected a finite weight of at least 0, got {parts[3]!r}")
        count += 1
    return max(0, count - header)


def _lines(file: File) -> Iterator[tuple[str, str]]:
    """Place and text of each line that is not empty, without byte-order marks and line ends.

    Raises:
        DataError: a line is not UTF-8.
    """
    content = bytes(memoryview(file.content))
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in content:
        raise DataError(
            f"{file.where}: expected UTF-8 text, and this seems to be UTF-16 or no text at all: "
            "iconv -f UTF-16 -t UTF-8 converts it"
        )
    for number, raw in enumerate(content.split(b"\n"), start=1):
        try:
            line = raw.decode("utf-8").lstrip("\ufeff").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise DataError(f"{file.where}:{number}: expected UTF-8 text: {error}") from error
        if line:
            yield f"{file.where}:{number}", line


def _read_n_triples(file: File, notes: list[str]) -> Columns:
    found: list[list[pyarrow.Array]] = [[], [], []]
    literals = 0
    try:
        table = _parse(file, "\1", column_types={"f0": pyarrow.string()})
        lines = table.column(0).chunks if table.num_columns == 1 else None
    except pyarrow.ArrowInvalid:
        lines = None
    for chunk in lines or ():
        triples = chunk.filter(pc.invert(pc.match_substring_regex(chunk, r"^\s*(#.*)?$")))
        parts = pc.extract_regex(triples, _N_TRIPLE)
        if parts.null_count:
            lines = None
            break
        columns = [pc.struct_field(parts, name) for name in PARTS]
        real = pc.not_equal(columns[2], "")
        literals += len(triples) - (pc.sum(real).as_py() or 0)
        for part, column in zip(found, columns, strict=True):
            part.append(pc.utf8_trim(column.filter(real), "<>"))
    if lines is None:
        for where, line in _lines(file):
            if not re.match(r"\s*(#|$)", line) and not re.match(_N_TRIPLE, line):
                raise DataError(f"{where}: expected a triple of N-Triples, got {line[:200]!r}")
    if literals:
        notes.append(f"{literals:,} triples of {file.where} have a literal as tail: left out")
    return [pyarrow.chunked_array(part, pyarrow.string()) for part in found]


def _read_parquet(file: File, layout: Layout) -> Columns:
    found = []
    try:
        table = parquet.ParquetFile(pyarrow.BufferReader(file.content))
        schema = table.schema_arrow
        columns = _choose(schema.names, layout.columns)
        if columns is None:
            wanted = ", ".join(layout.columns or PARTS)
            raise DataError(
                f"{file.where}: expected columns {wanted}, got {', '.join(schema.names)}"
            )
        for name, wanted in zip(columns, layout.types, strict=True):
            if schema.names.count(name) > 1:
                raise DataError(f"{file.where}: expected one column {name}, got several")
            kind, is_weight = schema.field(name).type, pyarrow.types.is_floating(wanted)
            if is_weight and (pyarrow.types.is_integer(kind) or pyarrow.types.is_floating(kind)):
                pass
            elif is_weight or not _holds_names(kind, layout.numbered):
                kinds = "integers" if layout.numbered else "strings or integers"
                kinds = "numbers" if is_weight else kinds
                raise DataError(f"{file.where}: expected {kinds} in {name}, got {kind}")
            column = table.read([name]).column(0).cast(wanted, safe=not is_weight)
            column.validate(full=True)  # that names are UTF-8
            if column.null_count or (len(column) and _has_empty(column)):
                raise DataError(f"{file.where}: column {name} has rows without a value")
            found.append(column)
        if wrong := _wrong(found[3:]):
            raise DataError(
                f"{file.where}: expected finite weights of at least 0 in {name}, got {wrong[0]:g}"
            )
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{file.where} cannot be read as Parquet: {error}") from error
    return found


def _choose(names: Sequence[str], columns: tuple[str, ...]) -> list[str] | None:
    """The names of the columns to read; None if the file lacks any."""
    if not columns:
        return [*PARTS] if {*PARTS} <= {*names} else [*names] if len(names) == 3 else None
    found = [
        names[int(c) - 1] if c.isdecimal() and 0 < int(c) <= len(names) and c not in names else c
        for c in columns
    ]
    return found if {*found} <= {*names} else None


def _holds_names(kind: pyarrow.DataType, numbered: bool) -> bool:
    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    if pyarrow.types.is_integer(kind):
        return True
    texts = (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view())
    return not numbered and kind in texts
