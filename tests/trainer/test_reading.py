"""Formats of files, columns, ids, and one file that is split."""

from __future__ import annotations

import gzip
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow
import pytest
import torch
from pyarrow import parquet

from emu_kernels.trainer import reading
from emu_kernels.trainer.config import Config
from emu_kernels.trainer.data import SPLITS, Graph
from emu_kernels.trainer.errors import ConfigError, DataError
from emu_kernels.trainer.reading import Layout, load_graph

TRIPLES = [("a", "likes", 'b "c"'), ('b "c"', "likes", "Zürich"), ("a", "is", "Zürich")]
ENTITIES = ["Zürich", "a", 'b "c"']
IDS = [[1, 1, 2], [2, 1, 0], [1, 0, 0]]


def tsv(triples: Sequence[tuple[str, ...]], by: str = "\t") -> str:
    return "".join(by.join(triple) + "\n" for triple in triples)


def folder(path: Path, content: bytes, name: str) -> Path:
    path.mkdir()
    for split in SPLITS:
        (path / f"{split}{name}").write_bytes(content)
    return path


def n_triples(triples: Sequence[tuple[str, ...]]) -> str:
    return "".join(f"<{h}> <{r}> <{t}> .\n" for h, r, t in triples)


def as_parquet(path: Path, columns: Mapping[str, object]) -> Path:
    parquet.write_table(pyarrow.table(columns), path)
    return path


QUOTED = [tuple(f'"{x.replace(chr(34), 2 * chr(34))}"' for x in triple) for triple in TRIPLES]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (".txt", tsv(TRIPLES)),
        (".tsv", tsv(TRIPLES)),
        (".csv", tsv(QUOTED, ",")),
        (".csv", "head,relation,tail\r\n" + tsv(QUOTED, ",")),
        (".nt", "# Über\n\n" + n_triples(TRIPLES).replace("> <", ">\t<", 1)),
    ],
)
@pytest.mark.parametrize("zipped", [False, True])
def test_formats_hold_the_same_graph(tmp_path, name, text, zipped):
    content = gzip.compress(text.encode()) if zipped else text.encode()
    graph = load_graph(folder(tmp_path / "graph", content, name + ".gz" * zipped))
    assert graph.entities == ENTITIES
    assert graph.relations == ["is", "likes"]
    assert all(graph.triples[split].tolist() == IDS for split in SPLITS)


@pytest.mark.parametrize("kind", ["string", "large_string", "dictionary"])
def test_parquet_holds_the_same_graph(tmp_path, kind):
    heads, relations, tails = ([*x] for x in zip(*TRIPLES, strict=True))
    columns = {"tail": tails, "head": heads, "relation": relations}
    types = {
        "string": pyarrow.string(),
        "large_string": pyarrow.large_string(),
        "dictionary": pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
    }
    for split in SPLITS:
        arrays = {name: pyarrow.array(x, types[kind]) for name, x in columns.items()}
        as_parquet(tmp_path / f"{split}.parquet", {"more": pyarrow.nulls(3), **arrays})
    graph = load_graph(tmp_path)
    assert graph.entities == ENTITIES
    assert graph.triples["test"].tolist() == IDS


def test_blocks_change_nothing(tmp_path, monkeypatch):
    """Names in several of Arrow's chunks."""
    triples = [(f"e{i * 7919 % 5000}", f"r{i % 7}", f"e{i * 31 % 5000}") for i in range(9000)]
    folder(tmp_path / "graph", tsv(triples).encode(), ".tsv")
    whole = load_graph(tmp_path / "graph")
    monkeypatch.setattr(reading, "_BLOCK", 1 << 10)
    parts = load_graph(tmp_path / "graph")
    assert whole.entities == parts.entities == sorted({x for h, _, t in triples for x in (h, t)})
    assert torch.equal(whole.triples["test"], parts.triples["test"])
    names = [[*whole.entities][i] for i in whole.triples["train"][:, 2].tolist()]
    assert names == [tail for _, _, tail in triples]


@pytest.mark.parametrize("by", ["\t", ","])
@pytest.mark.parametrize(
    ("columns", "header"), [(("4", "2", "1"), False), (("subject", "kind", "object"), True)]
)
def test_columns_by_name_and_by_number(tmp_path, by, columns, header):
    lines = [("object", "kind", "year", "subject")] if header else []
    lines += [(t.replace('"', ""), r, "", h.replace('"', "")) for h, r, t in TRIPLES]
    name = ".csv" if by == "," else ".tsv"
    graph = load_graph(
        folder(tmp_path / "graph", tsv(lines, by).encode(), name), Layout(columns=columns)
    )
    assert graph.entities == ["Zürich", "a", "b c"]
    assert graph.triples["valid"].tolist() == IDS


WEIGHTS = ("0.5", "0", "3e2")
WEIGHTED = Layout(("1", "2", "3", "4"))


@pytest.mark.parametrize("by", ["\t", ","])
@pytest.mark.parametrize("header", [False, True])
def test_weights_are_read_of_training_triples(tmp_path, by, header):
    """From the fourth column; the other files need none."""
    quoted = QUOTED if by == "," else TRIPLES
    names: list[tuple[str, ...]] = [("head", "relation", "tail", "count")] if header else []
    lines = [*names, *((*triple, w) for triple, w in zip(quoted, WEIGHTS, strict=True))]
    suffix = ".csv" if by == "," else ".tsv"
    path = folder(tmp_path / "graph", tsv([line[:3] for line in lines], by).encode(), suffix)
    (path / f"train{suffix}").write_text(tsv(lines, by))
    layout = Config(data="-", weight_column="count" if header else "4").layout
    graph = load_graph(path, layout)
    assert graph.triples["train"].tolist() == graph.triples["test"].tolist() == IDS
    assert graph.weights is not None
    assert graph.weights.tolist() == [0.5, 0.0, 300.0]
    assert "weights of train triples: 0 to 300" in graph.summary()
    assert load_graph(path, layout.unweighted).weights is None


@pytest.mark.parametrize("kind", [pyarrow.float64(), pyarrow.int32()])
def test_weights_from_parquet(tmp_path, kind):
    columns = dict(zip(("head", "relation", "tail"), zip(*TRIPLES, strict=True), strict=True))
    file = tmp_path / "all.parquet"
    weights = pyarrow.array([1, 0, 2**24 + 1], kind)
    as_parquet(file, columns | {"count": weights, "note": ["x", "y", "z"]})
    config = Config(data="-", weight_column="count")
    read = reading._read(reading.File("", file.name, file.read_bytes()), config.layout, [])
    assert read[3].to_pylist() == [1, 0, 2**24]  # fp32


def test_ids_are_kept(tmp_path):
    text = "2\t0\t10\n0\t1\t3\n"
    graph = load_graph(folder(tmp_path / "text", text.encode(), ".txt"), Layout(numbered=True))
    assert graph.triples["train"].tolist() == [[2, 0, 10], [0, 1, 3]]
    assert graph.entities == [str(i) for i in range(11)]
    assert graph.relations == ["0", "1"]
    columns = {"head": [2, 0], "relation": [0, 1], "tail": [10, 3]}
    for split in SPLITS:
        as_parquet(tmp_path / f"{split}.parquet", columns)
    kept = load_graph(tmp_path, Layout(numbered=True))
    assert torch.equal(kept.triples["train"], graph.triples["train"])
    assert load_graph(tmp_path).entities == ["0", "10", "2", "3"]  # as names


@pytest.mark.parametrize(
    ("name", "text", "layout", "said"),
    [
        (".csv", "a,r,b\na,r\n", Layout(), r"train\.csv:2: .*separated by commas, got 2 field"),
        (".csv", 'a,r,"b\nc"\n', Layout(), r"no tab, line end or NUL: 'b\\nc'"),
        (".csv", 'a,r,"b\rc"\n', Layout(), r"no tab, line end or NUL: 'b\\rc'"),
        (".csv", "a,r,b\rc,r\r", Layout(), r"train\.csv:1: expected CSV: new-line"),
        (".csv", f"a,r,{'b' * 200_000}\na,r\n", Layout(), r"train\.csv:1: expected CSV: field"),
        (".tsv", "a\tr\tb\n\ufeff\tr\tb\n", Layout(), r"tsv:2: .*an empty head"),
        (".nt", "# none\n", Layout(), r"train\.nt holds no triples"),
        (".tsv", "a\tr\tb\tc\n", Layout(), r"train\.tsv:1: .*4 field.*columns says where"),
        (".tsv", "a\tr\tb\tc\na\tr\tb\n", Layout(("1", "2", "4")), r"tsv:2: expected 4 fields, "),
        (".tsv", "a\tr\tb\t\n", Layout(("1", "2", "4")), r"tsv:1: .*got an empty tail"),
        (".tsv", "a\tr\tb\n", Layout(("1", "2", "4")), "columns 1, 2, 4, got a, r, b"),
        (".tsv", "h\tr\n", Layout(("h", "r", "t")), r"expected columns h, r, t, got h, r"),
        (".tsv", "0\t0\t1\n0\t0\tx\n", Layout(numbered=True), r"tsv:2: expected ids, integers"),
        (".tsv", "0\t0\t1\n0\t0\t-1\n", Layout(numbered=True), r"ids must be at least 0, got -1"),
        (
            ".tsv",
            "0\t0\t1\n0\t0\t999999999\n",
            Layout(numbered=True),
            r"the largest of 3 ids is 999,999,999, .* without --numbered",
        ),
        (".tsv", "a\tr\tb\t1\na\tr\tb\tx\n", WEIGHTED, r"tsv:2: expected a finite weight .*'x'"),
        (".tsv", "a\tr\tb\t1\na\tr\tb\t-1\n", WEIGHTED, r"tsv:2: expected a finite w.*'-1'"),
        (".tsv", "a\tr\tb\t1\na\tr\tb\tnan\n", WEIGHTED, r"tsv:2: expected a finite .*'nan'"),
        (".tsv", "a\tr\tb\t1\na\tr\tb\t1e39\n", WEIGHTED, r"tsv:2: expected a fin.*'1e39'"),
        (".tsv", "a\tr\tb\t\n", WEIGHTED, r"tsv:1: .*got an empty weight"),
        (".tsv", "a\tr\tb\n", WEIGHTED, "columns 1, 2, 3, 4, got a, r, b"),
        (".tsv", "a\tr\tb\t0\n", WEIGHTED, "weights of all training triples are 0"),
        (".nt", "<a> <r> <b> .\n", WEIGHTED, "have no columns"),
        (".nt", "<a> <r> <b> .\n<a> <r> b .\n", Layout(), r"nt:2: expected a triple of N-Tr"),
        (".nt", "<a> <r> <b> .\n", Layout(numbered=True), "no ids to choose"),
        (".tsv.gz", "no gzip", Layout(), r"train\.tsv\.gz is corrupted"),
        (".parquet", "no parquet", Layout(), "cannot be read as Parquet"),
    ],
)
def test_what_is_wrong_is_said(tmp_path, name, text, layout, said):
    with pytest.raises(DataError, match=said):
        load_graph(folder(tmp_path / "graph", text.encode(), name), layout)


@pytest.mark.parametrize(
    ("columns", "layout", "said"),
    [
        ({"a": ["x"], "b": ["y"]}, Layout(), "expected columns head, relation, tail, got a, b"),
        ({"a": ["x"], "b": [0.5], "c": ["z"]}, Layout(), "strings or integers in b, got double"),
        ({"a": ["x"], "b": ["y"], "c": [None]}, Layout(), "in c, got null"),
        ({"a": ["x", "x"], "b": ["y", "y"], "c": ["z", None]}, Layout(), "c has rows without"),
        ({"a": ["x"], "b": ["y"], "c": [""]}, Layout(), "c has rows without"),
        ({"a": ["x"], "b": ["y"], "c": ["z"]}, Layout(numbered=True), "integers in a, got string"),
        ({"a": ["x"], "b": ["y"], "c": ["z"], "w": ["1"]}, WEIGHTED, "numbers in w, got string"),
        ({"a": ["x"], "b": ["y"], "c": ["z"], "w": [-2.0]}, WEIGHTED, "at least 0 in w, got -2"),
        ({"a": ["x"], "b": ["y"], "c": ["z"], "w": [1e39]}, WEIGHTED, "at least 0 in w, got inf"),
        ({"a": ["x"] * 2, "b": ["y"] * 2, "c": ["z"] * 2, "w": [1, None]}, WEIGHTED, "w has rows"),
        ({"a": ["x"], "b": ["y"], "c": ["z\n"]}, Layout(), r"no tab, line end or NUL: 'z\\n'"),
    ],
)
def test_what_is_wrong_in_parquet_is_said(tmp_path, columns, layout, said):
    with pytest.raises(DataError, match=said):
        load_graph(as_parquet(tmp_path / "graph.parquet", columns), layout)


def test_what_parquet_itself_allows_is_refused(tmp_path):
    column = pyarrow.array(["a"])
    twice = pyarrow.table([column] * 4, names=["head", "relation", "tail", "tail"])
    parquet.write_table(twice, tmp_path / "twice.parquet")
    with pytest.raises(DataError, match="expected one column tail, got several"):
        load_graph(tmp_path / "twice.parquet")
    byte = pyarrow.py_buffer(b"\xe9")
    latin = pyarrow.Array.from_buffers(
        pyarrow.string(), 1, [None, pyarrow.array([0, 1], pyarrow.int32()).buffers()[1], byte]
    )
    table = pyarrow.table([latin, column, column], names=["head", "relation", "tail"])
    parquet.write_table(table, tmp_path / "latin.parquet")
    with pytest.raises(DataError, match=r"latin\.parquet cannot be read as Parquet: .*UTF8"):
        load_graph(tmp_path / "latin.parquet")


def test_byte_order_marks_of_joined_files_are_no_part_of_names(tmp_path):
    text = "\ufeffb\tr\ta\n\ufeffc\tr\ta\n"
    for columns in ((), ("3", "2", "1")):
        graph = load_graph(
            folder(tmp_path / str(len(columns)), text.encode(), ".tsv"), Layout(columns)
        )
        assert graph.entities == ["a", "b", "c"]
    path = folder(tmp_path / "inside", "a\tr\tb\nc\tr\t\ufeffb\n".encode(), ".tsv")
    assert load_graph(path).entities == ["a", "b", "c", "\ufeffb"]


def test_a_quoted_header_is_one(tmp_path):
    text = '"head","relation","tail"\n"a","r","b"\n'
    assert load_graph(folder(tmp_path / "graph", text.encode(), ".csv")).entities == ["a", "b"]


def test_an_empty_split_with_a_header(tmp_path):
    path = folder(tmp_path / "graph", b"h,r,t\na,r,b\n", ".csv")
    (path / "valid.csv").write_text("")
    assert len(load_graph(path, Layout(("h", "r", "t"))).triples["valid"]) == 0


def test_two_files_of_a_split_are_refused(tmp_path):
    folder(tmp_path / "graph", tsv(TRIPLES).encode(), ".tsv")
    (tmp_path / "graph" / "train.csv").write_text("a,b,c\n")
    with pytest.raises(DataError, match="holds train more than once: train"):
        load_graph(tmp_path / "graph")


def test_two_files_of_a_split_in_an_archive_are_told_apart(tmp_path):
    graph = folder(tmp_path / "graph", tsv(TRIPLES).encode(), ".txt")
    shutil.copytree(graph, graph / "ind")
    archive = shutil.make_archive(str(tmp_path / "graph"), "zip", graph)
    with pytest.raises(DataError, match=r"more than once: (.*) and (.*)") as error:
        load_graph(Path(archive))
    named = str(error.value).partition("once: ")[2].split(" and ")
    assert sorted(named) == ["ind/train.txt", "train.txt"]


def test_literals_are_left_out_and_counted(tmp_path):
    text = n_triples(TRIPLES[:1]) + '<a> <r> "\\"5\\" . "^^<int> .\n_:a <r> _:b.\n<a> <r> "x"@en .'
    graph = load_graph(folder(tmp_path / "graph", text.encode(), ".nt"))
    assert graph.entities == ["_:a", "_:b", "a", 'b "c"']
    assert len(graph.triples["train"]) == 2
    assert graph.doubts()[0].startswith("2 triples of ")


@pytest.fixture(scope="module")
def one_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    draws = torch.Generator().manual_seed(0)
    ids = torch.stack([torch.randint(n, (2000,), generator=draws) for n in (300, 7, 300)], 1)
    lines = [(f"e{h}", f"r{r}", f"e{t}") for h, r, t in ids.unique(dim=0).tolist()]
    lines += [("once", "r1", "e1"), ("e1", "rare", "e2"), *lines[:50]]
    path = tmp_path_factory.mktemp("data") / "all.tsv"
    path.write_text(tsv(lines))
    return path


def rows(graph: Graph, split: str) -> set[tuple[int, ...]]:
    return set(map(tuple, graph.triples[split].tolist()))


@pytest.mark.parametrize("share", [0.1, 0.49])
def test_one_file_is_split(one_file, share):
    graph = load_graph(one_file, hold_out=share)
    total = sum(len(graph.triples[split]) for split in SPLITS)
    assert total == len(one_file.read_text().splitlines())
    held = len(graph.triples["valid"])
    assert held == len(graph.triples["test"])
    assert held == int(share * total) if share == 0.1 else 0.3 * total < held < 0.49 * total
    assert graph.unseen("valid") == graph.unseen("test") == 0
    train, valid, test = (rows(graph, split) for split in SPLITS)
    assert not train & valid
    assert not train & test
    assert not valid & test
    again = load_graph(one_file, hold_out=share)
    assert torch.equal(again.triples["test"], graph.triples["test"])
    other = load_graph(one_file, hold_out=share, split_seed=1)
    assert rows(other, "test") != test


def test_held_out_triples_take_their_weights_along(one_file, tmp_path):
    lines = [line.split("\t") for line in one_file.read_text().splitlines()]

    def weight(triple: Sequence[str]) -> int:
        return sum(map(ord, "".join(triple)))

    path = tmp_path / "all.tsv"
    path.write_text(tsv([(*line, str(weight(line))) for line in lines]))
    graph = load_graph(path, WEIGHTED, hold_out=0.1)
    assert graph.weights is not None
    assert torch.equal(graph.triples["train"], load_graph(one_file, hold_out=0.1).triples["train"])
    kinds = (graph.entities, graph.relations, graph.entities)
    for ids, found in zip(graph.triples["train"].tolist(), graph.weights.tolist(), strict=True):
        assert found == weight([names[i] for names, i in zip(kinds, ids, strict=True)])


def test_weights_of_0_alone_are_refused_also_after_holding_out(tmp_path):
    lines = [f"e{i % 5},r{i % 2},e{(i * 3 + i // 5) % 7},{int(i == 0)}\n" for i in range(40)]
    (tmp_path / "all.csv").write_text("".join(lines))
    with pytest.raises(DataError, match="weights of all training triples are 0"):
        load_graph(tmp_path / "all.csv", WEIGHTED, hold_out=0.3)


def test_every_part_of_one_file_may_be_needed(tmp_path):
    (tmp_path / "all.csv").write_text("a,r,b\nc,r,d\n")
    with pytest.raises(DataError, match=r"no triples can be held out: .*2, of which 0"):
        load_graph(tmp_path / "all.csv", hold_out=0.4)


def test_too_many_names_are_refused():
    triples = {split: torch.zeros((0, 3), dtype=torch.int64) for split in SPLITS}
    with pytest.raises(DataError, match="would not fit in 63 bits"):
        Graph(range(1 << 25), range(1 << 14), triples)  # type: ignore[arg-type]


@pytest.mark.parametrize("columns", ["a,b", "a,b,b", "0,1,2", "a,,b"])
def test_columns_are_checked(columns):
    with pytest.raises(ConfigError, match="columns must be three"):
        Config(data="-", columns=columns)
    with pytest.raises(ConfigError, match="are for data, not for a dataset"):
        Config(dataset="nations", columns="1,2,3")


@pytest.mark.parametrize(
    ("columns", "weight"),
    [(None, "3"), (None, "0"), (None, ""), (None, "tail"), ("a,b,c", "4"), ("1,2,3", "w")],
)
def test_the_weight_column_is_checked(columns, weight):
    with pytest.raises(ConfigError, match="weight_column must be one beside"):
        Config(data="-", columns=columns, weight_column=weight)
    with pytest.raises(ConfigError, match="are for data, not for a dataset"):
        Config(dataset="nations", weight_column="w")
