"""Reading graphs: the accepted formats, and the message for each bad input."""

from __future__ import annotations

import io
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

from emu_kernels.trainer.data import SPLITS, Graph, NamedTriple
from emu_kernels.trainer.datasets import load_dataset
from emu_kernels.trainer.errors import DataError
from emu_kernels.trainer.reading import load_graph

GOOD = b"a\tlikes\tb\nb\tlikes\tc\n"


def write_folder(folder: Path, **splits: bytes) -> Path:
    folder.mkdir(exist_ok=True)
    for split in SPLITS:
        (folder / f"{split}.txt").write_bytes(splits.get(split, GOOD))
    return folder


def write_archive(path: Path, members: dict[str, bytes], link: str | None = None) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        if link is not None:
            member = tarfile.TarInfo("train.txt")
            member.type = tarfile.SYMTYPE
            member.linkname = link
            archive.addfile(member)
    return path


def three(prefix: str = "") -> dict[str, bytes]:
    return {f"{prefix}{split}.txt": GOOD for split in SPLITS}


def test_ids_follow_sorted_names(tmp_path):
    graph = load_graph(write_folder(tmp_path, train=b"b\tr\ta\r\n\na\tq\tc d"))
    assert graph.entities == ["a", "b", "c", "c d"]
    assert graph.relations == ["likes", "q", "r"]
    assert graph.triples["train"].tolist() == [[1, 2, 0], [0, 1, 3]]
    assert graph.triples["train"].dtype == torch.int64


def test_empty_validation_and_test_are_allowed(tmp_path):
    graph = load_graph(write_folder(tmp_path, valid=b"", test=b"\n"))
    assert graph.triples["valid"].shape == graph.triples["test"].shape == (0, 3)


def test_what_training_never_sees_is_kept_and_counted(tmp_path):
    test = b"a\tlikes\tnew\na\thates\tb\na\tlikes\tc\n"
    graph = load_graph(write_folder(tmp_path, test=test))
    assert graph.unseen("test") == 2
    assert graph.unseen("valid") == 0
    assert "new" in graph.entities
    assert "2 of the test triples hold an entity or relation unseen" in graph.summary()
    assert "valid triples hold" not in graph.summary()


def test_missing_folder(tmp_path):
    with pytest.raises(DataError, match=r"nowhere: no such folder.*train\.txt"):
        load_graph(tmp_path / "nowhere")


def test_missing_file(tmp_path):
    (write_folder(tmp_path) / "valid.txt").unlink()
    with pytest.raises(DataError, match=r"holds no valid\.txt"):
        load_graph(tmp_path)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"a likes b", "got 1 field"),
        (b"a\tlikes", "got 2 field"),
        (b"a\tlikes\tb\t0.5", "got 4 field"),
        (b"a\t\tb", "got an empty relation: "),
        (b"\tlikes\t", "got an empty head and an empty tail: "),
        (b"a\tlikes\t\xff", "expected UTF-8"),
    ],
)
def test_malformed_line_names_file_and_line(tmp_path, line, said):
    write_folder(tmp_path, valid=GOOD + line + b"\n")
    with pytest.raises(DataError, match=rf"valid\.txt:3: expected .*{said}|valid\.txt:3: {said}"):
        load_graph(tmp_path)


def test_nothing_to_train_on(tmp_path):
    with pytest.raises(DataError, match=r"train\.txt holds no triples"):
        load_graph(write_folder(tmp_path, train=b"\n"))


@pytest.mark.parametrize("prefix", ["", "./", "graph/"])
def test_archive(tmp_path, prefix):
    members = three(prefix) | {f"{prefix}README.txt": b"not a split"}
    graph = load_graph(write_archive(tmp_path / "graph.tar.gz", members))
    assert graph.entities == ["a", "b", "c"]


def test_archive_without_a_split(tmp_path):
    members = three()
    del members["test.txt"]
    with pytest.raises(DataError, match=r"holds no test\.txt"):
        load_graph(write_archive(tmp_path / "graph.tar.gz", members))


@pytest.mark.parametrize(
    "name", ["../outside.txt", "/tmp/outside.txt", "a/../../b.txt", "..\\c.txt"]
)
def test_archive_that_leaves_its_folder_is_refused(tmp_path, name):
    path = write_archive(tmp_path / "graph.tar.gz", {**three(), name: b"gotcha"})
    with pytest.raises(DataError, match="unsafe"):
        load_graph(path)
    assert sorted(tmp_path.iterdir()) == [path]


def test_archive_with_a_link_is_refused(tmp_path):
    members = {"valid.txt": GOOD, "test.txt": GOOD}
    path = write_archive(tmp_path / "graph.tar.gz", members, link="/etc/passwd")
    with pytest.raises(DataError, match="unsafe"):
        load_graph(path)


@pytest.mark.parametrize("keep", [0, 10, 100])
def test_archive_cut_short(tmp_path, keep):
    path = write_archive(tmp_path / "graph.tar.gz", three())
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match="corrupted"):
        load_graph(path)


def test_archive_with_flipped_bits(tmp_path):
    path = write_archive(tmp_path / "graph.tar.gz", three())
    content = bytearray(path.read_bytes())
    content[60] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(DataError, match="corrupted"):
        load_graph(path)


def test_names_survive_a_large_vocabulary():
    triples = [(f"entity {i}", "r", f"entity {i + 1}") for i in range(3000)]
    graph = Graph.from_names({"train": triples, "valid": [], "test": triples[:5]})
    head, _, tail = graph.triples["train"][1234].tolist()
    assert (graph.entities[head], graph.entities[tail]) == ("entity 1234", "entity 1235")


MARK = "\ufeff".encode()


@pytest.mark.parametrize("kind", ["folder", "tar", "zip"])
def test_marks_and_line_ends_make_no_twins(tmp_path, kind):
    """A byte-order mark at the start, another where two files were joined, Windows line ends."""
    good = GOOD.replace(b"\n", b"\r\n")
    contents = {f"{split}.txt": MARK + good + MARK + good for split in SPLITS}
    if kind == "folder":
        path = write_folder(tmp_path, **{name[:-4]: x for name, x in contents.items()})
    elif kind == "tar":
        path = write_archive(tmp_path / "graph.tar", contents)
    else:
        path = tmp_path / "graph.zip"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("graph/", "")
            for name, content in contents.items():
                archive.writestr(f"graph/{name}", content)
    graph = load_graph(path)
    assert graph.entities == ["a", "b", "c"]
    assert graph.triples["train"].tolist() == [[0, 0, 1], [1, 0, 2]] * 2


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf_16_is_named(tmp_path, encoding):
    write_folder(tmp_path, valid=GOOD.decode().encode(encoding))
    with pytest.raises(DataError, match=r"valid\.txt: expected UTF-8 .* UTF-16"):
        load_graph(tmp_path)


def test_zip_that_leaves_its_folder_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "graph.zip", "w") as archive:
        archive.writestr("../train.txt", GOOD)
    with pytest.raises(DataError, match="unsafe"):
        load_graph(tmp_path / "graph.zip")


def test_another_single_file_is_told_what_is_expected(tmp_path):
    (tmp_path / "all.dat").write_bytes(GOOD * 100)
    with pytest.raises(DataError, match=r"all\.dat .* archive, tar or zip, of train\.txt, valid"):
        load_graph(tmp_path / "all.dat")


def doubts(**splits: list[NamedTriple]) -> list[str]:
    return Graph.from_names({split: splits.get(split, []) for split in SPLITS}).doubts()


CHAIN: list[NamedTriple] = [(f"e{i}", f"r{i % 3}", f"e{i + 1}") for i in range(9)]
HEADER: list[NamedTriple] = [("source", "kind", "target")]


@pytest.mark.parametrize(
    ("splits", "said"),
    [
        ({"train": CHAIN[:5], "valid": CHAIN[5:7], "test": CHAIN[7:]}, []),
        (
            {"train": CHAIN, "test": CHAIN[:4]},
            ["4 of the test triples are train triples too"],
        ),
        (
            {"train": [*CHAIN, CHAIN[0], CHAIN[0]]},
            ["2 of the train triples repeat another one"],
        ),
        (
            {"train": HEADER + CHAIN[:6], "test": HEADER + CHAIN[6:]},
            [
                "a header, it seems, is read as a triple, in the first line of train, test: "
                "delete it, or name its columns by --columns",
                "1 of the test triples are train triples too",
            ],
        ),
        (
            {"train": [("h", "Relation", "t"), *CHAIN]},
            [
                "a header, it seems, is read as a triple, in the first line of train: "
                "delete it, or name its columns by --columns"
            ],
        ),
        (
            {"train": [(h, t, r) for h, r, t in CHAIN]},
            [
                "9 relations, most of which seem to be entities: each line should be head, "
                "relation, tail"
            ],
        ),
        (
            {"train": [(str(i), str(i + 1), str(i % 3)) for i in range(9)]},
            ["9 relations, but only 3 tails: each line should be head, relation, tail"],
        ),
        ({"train": [(str(i), str(i % 3), str(i + 1)) for i in range(9)]}, []),
        (
            {"train": [*CHAIN, ("e0 ", "r0", " e1"), ("e2", "r1 ", "e3")]},
            [
                "2 of the entities with blanks at an end of the name: ' e1'",
                "one of the relations with blanks at an end of the name: 'r1 '",
            ],
        ),
        (
            {"train": [*CHAIN, ("caf\u00e9", "r0", "e1"), ("cafe\u0301", "r1", "e1")]},
            [
                "one of the entities with a name that looks like another's, composed differently "
                "in Unicode: 'caf\u00e9'"
            ],
        ),
    ],
)
def test_doubts(splits, said):
    assert doubts(**splits) == said


@pytest.mark.parametrize("name", ["nations", "umls", "kinship", "WN18RR"])
def test_public_datasets_raise_no_doubt(data_folder, monkeypatch, name):
    monkeypatch.setenv("EMU_KERNELS_DATA", str(data_folder))
    assert load_dataset(name).doubts() == []
