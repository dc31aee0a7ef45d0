"""Datasets by name: the local folder, the download, the checksums."""

from __future__ import annotations

import dataclasses
import functools
import http.server
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pooch
import pytest

from emu_kernels.trainer.data import SPLITS
from emu_kernels.trainer.datasets import (
    DATASETS,
    FOLDER_VARIABLE,
    Dataset,
    RemoteFile,
    load_dataset,
)
from emu_kernels.trainer.errors import DataError
from emu_kernels.trainer.reading import load_graph

SIZES = {  # entities, relations, train, valid, test
    "CoDEx-S": (2034, 42, 32888, 1827, 1828),
    "FB15k-237": (14541, 237, 272115, 17535, 20466),
    "WN18RR": (40943, 11, 86835, 3034, 3134),
    "kinship": (104, 25, 8544, 1068, 1074),
    "nations": (14, 55, 1592, 199, 201),
    "umls": (135, 46, 5216, 652, 661),
}
INDUCTIVE_SIZES = {  # the graph to train on, then that to test on
    "WN18RR_v1": ((2746, 9, 5410, 630, 638), (922, 9, 1618, 185, 188)),
    "fb237_v1": ((1594, 180, 4245, 489, 492), (1093, 180, 1993, 206, 205)),
}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty download cache, and no local folder."""
    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)
    monkeypatch.setattr(pooch, "os_cache", lambda project: tmp_path / "cache" / project)
    return tmp_path / "cache" / "emu-kernels"


def move(patch: pytest.MonkeyPatch, url: str) -> None:
    """Change the address of nations."""
    (file,) = DATASETS["nations"].files
    files = (dataclasses.replace(file, url=f"{url}/{file.name}"),)
    patch.setitem(DATASETS, "nations", dataclasses.replace(DATASETS["nations"], files=files))


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that a server provides at the address of nations."""
    folder = tmp_path / "served"
    folder.mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as instance:
        move(monkeypatch, f"http://127.0.0.1:{instance.server_port}")
        thread = threading.Thread(target=instance.serve_forever)
        thread.start()
        yield folder
        instance.shutdown()
        thread.join()


@pytest.mark.parametrize("name", SIZES)
def test_public_datasets_have_their_known_sizes(data_folder, tmp_path, monkeypatch, name):
    if name == "CoDEx-S":  # on a user's machine files of their own
        shutil.unpack_archive(data_folder / "codex-s.tar.gz", tmp_path / name)
        data_folder = tmp_path
    monkeypatch.setenv(FOLDER_VARIABLE, str(data_folder))
    graph = load_dataset(name)
    triples = [len(graph.triples[split]) for split in SPLITS]
    assert (graph.num_entities, graph.num_relations, *triples) == SIZES[name]


@pytest.mark.parametrize("name", INDUCTIVE_SIZES)
def test_inductive_datasets_have_their_known_sizes(data_folder, tmp_path, monkeypatch, name):
    for part in (name, f"{name}_ind"):  # on a user's machine files of their own
        shutil.unpack_archive(data_folder / f"{part}.tar.gz", tmp_path / part)
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    graph = load_dataset(name)
    assert graph.inductive is not None
    for one, sizes in zip((graph, graph.inductive), INDUCTIVE_SIZES[name], strict=True):
        triples = [len(one.triples[split]) for split in SPLITS]
        assert (one.num_entities, one.num_relations, *triples) == sizes


def test_unknown_name_lists_the_known():
    with pytest.raises(DataError, match=r"unknown dataset 'FB15k'; known: FB15k-237, WN18RR"):
        load_dataset("FB15k")


def test_missing_in_the_local_folder(tmp_path, monkeypatch):
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    with pytest.raises(DataError, match=r"(?s)nations\.tar\.gz is missing.*put there https.*feb3"):
        load_dataset("nations")


def test_corrupted_in_the_local_folder(tmp_path, monkeypatch):
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    (tmp_path / "nations.tar.gz").write_bytes(b"something else")
    with pytest.raises(DataError, match=r"corrupted or another file: expected sha256:feb3"):
        load_dataset("nations")


def test_no_network_says_what_to_put_where(cache, monkeypatch):
    move(monkeypatch, "http://127.0.0.1:9")  # no server listens there
    with pytest.raises(DataError) as caught:
        load_dataset("nations")
    for said in ("could not be downloaded", "nations.tar.gz", "feb3e3", FOLDER_VARIABLE, "--data"):
        assert said in str(caught.value)


def test_download_is_verified_and_cached(cache, server, data_folder, capfd):
    shutil.copy(data_folder / "nations.tar.gz", server)
    assert load_dataset("nations").num_entities == 14
    assert "100%" in capfd.readouterr().err  # the progress bar
    (server / "nations.tar.gz").unlink()
    assert load_dataset("nations").num_entities == 14  # from the cache
    assert [path.name for path in cache.iterdir()] == ["nations.tar.gz"]


def test_download_of_another_content_is_refused_and_not_kept(cache, server):
    (server / "nations.tar.gz").write_bytes(b"something else")
    with pytest.raises(DataError, match="corrupted or another file"):
        load_dataset("nations")
    assert list(cache.iterdir()) == []


def test_download_of_nothing(cache, server):
    with pytest.raises(DataError, match="could not be downloaded"):
        load_dataset("nations")


def test_a_dataset_of_several_files_with_its_own_reader(tmp_path, monkeypatch):
    """The checksums are those that sha256sum and `git hash-object` print."""
    content = b"a\tr\tb\n"
    checksums = (
        "sha256:b664af6cca16a3aa9a1e51c01d8c710759a7b326a534b5d92ab4eff03affe72a",
        "git-blob:eb365133a3b6c6ae45e81b5653f5361354170ccb",
        "git-blob:eb365133a3b6c6ae45e81b5653f5361354170ccb",
    )
    files = tuple(
        RemoteFile(f"three/{split}.txt", f"http://127.0.0.1:9/{split}", checksum)
        for split, checksum in zip(SPLITS, checksums, strict=True)
    )
    monkeypatch.setitem(
        DATASETS, "three", Dataset(files, lambda train, valid, test: load_graph(train.parent))
    )
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    (tmp_path / "three").mkdir()
    for file in files:
        (tmp_path / file.name).write_bytes(content)
    assert load_dataset("three").entities == ["a", "b"]
    (tmp_path / "three" / "valid.txt").write_bytes(content * 2)
    with pytest.raises(DataError, match=r"valid\.txt is corrupted .* got git-blob:"):
        load_dataset("three")
