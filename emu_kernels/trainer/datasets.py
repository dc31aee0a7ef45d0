"""The public datasets by name: addresses, checksums, formats, and the cache.

With ``EMU_KERNELS_DATA`` set to a folder, files are read from that folder only. Otherwise they are
downloaded once, verified, and kept in the user's cache folder.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pooch

from .data import SPLITS, Graph
from .errors import DataError
from .reading import load_graph, with_inductive

FOLDER_VARIABLE = "EMU_KERNELS_DATA"


@dataclass(frozen=True)
class RemoteFile:
    """A file to download.

    Args:
        name: its path below the data folder or the cache.
        checksum: "algorithm:digest" with one of hashlib's algorithms, or with ``git-blob``, the
            SHA-1 by which git names the content.
    """

    name: str
    url: str
    checksum: str


@dataclass(frozen=True)
class Dataset:
    """A graph in one or more files.

    Args:
        read: reads the graph from the files' local paths; without it, the one file is a tar archive
            of train.txt, valid.txt and test.txt.
    """

    files: tuple[RemoteFile, ...]
    read: Callable[..., Graph] = load_graph


def _conve(name: str, checksum: str) -> Dataset:
    """An archive in the repository of ConvE (Dettmers et al., 2018)."""
    commit = "f3c0eb286025410fa5b4c04696c918264163d0ca"
    url = f"https://raw.githubusercontent.com/TimDettmers/ConvE/{commit}/{name}.tar.gz"
    return Dataset((RemoteFile(f"{name}.tar.gz", url, checksum),))


def _codex(name: str, *blobs: str) -> Dataset:
    """Three files in the repository of CoDEx (Safavi and Koutra, 2020)."""
    commit = "e805ea2f512d7f0f8e44f213bc4db51dac0de118"
    url = f"https://raw.githubusercontent.com/tsafavi/codex/{commit}/data/triples/{name.lower()}"
    files = (
        RemoteFile(f"{name}/{split}.txt", f"{url}/{split}.txt", f"git-blob:{blob}")
        for split, blob in zip(SPLITS, blobs, strict=True)
    )
    return Dataset(tuple(files), lambda train, *_: load_graph(train.parent))


def _grail(name: str, *blobs: str) -> Dataset:
    """Two graphs of three files each in the repository of GraIL (Teru et al., 2020)."""
    url = "https://raw.githubusercontent.com/kkteru/grail/master/data"
    names = (f"{folder}/{split}.txt" for folder in (name, f"{name}_ind") for split in SPLITS)
    files = (
        RemoteFile(file, f"{url}/{file}", f"git-blob:{blob}")
        for file, blob in zip(names, blobs, strict=True)
    )

    def read(*files: Path) -> Graph:
        return with_inductive(load_graph(files[0].parent), files[len(SPLITS)].parent)

    return Dataset(tuple(files), read)


DATASETS = {
    name: _conve(name, checksum)
    for name, checksum in {
        "FB15k-237": "sha256:311df7930f842a02979eaa7a802484a6afe62303c07f915f1e6edbc30cbe05e8",
        "WN18RR": "sha256:1eb9152f804c140d163462c0d49f65e5a0b30ab5fbb375c5e3353c11a6249060",
        "YAGO3-10": "git-blob:be63d16955e1951cb6539710204af43cb38da7d9",
        "kinship": "sha256:a3cb9ca67213eb38133aebc12901195e283d844ebd59f1a6cbf2d4fa12ced4e6",
        "nations": "sha256:feb3e3e027103089934ea7dfb67d2048d8a43e65d6757a86f2e037acb66f640b",
        "umls": "sha256:26223aa91f0ec8db2324e0f489b9a4425e04d1d0df72ce5cfd62af4b91aee6fd",
    }.items()
}
DATASETS["CoDEx-S"] = _codex(
    "CoDEx-S",
    "56aa40d8fb0229a150372cb40096e2f1b5601cef",
    "d5acbd01f35758bda56d1713cc6ed18c358ce746",
    "e3ac6c3c5e56010b1d6d1bc8c3aad742ac453639",
)
DATASETS["fb237_v1"] = _grail(
    "fb237_v1",
    "d38ca521bab6fb8daad8255670abaf9d66dc6dc6",
    "85a17a46e3337798e94a0491b333f9d49b4be90f",
    "e86b371da6b5bf55a87938976d6f8d96391f53fe",
    "0ef0b9eae390e4932a7a33c490209521419c1a0f",
    "4c56465129a66f2df777cac5b02569f2b1072a87",
    "1dcb0a161bcd29c034a54e47a373dc06bd9f6ebe",
)
DATASETS["WN18RR_v1"] = _grail(
    "WN18RR_v1",
    "d7420f95868fa71e6ff123f64d0ddb6fec08e48d",
    "656f8a603922252a657290818a83137781636092",
    "7afbcd243fbdc6ab53128db55f3f4eb8b30f42ed",
    "f20c78f764ea562eb05bd47e30a3849a5f4a9dc9",
    "f05b5e43e5e7f588a4e3ce781725526f44f24bda",
    "007c5054e86b9e64abce0a14d6890e95149d5dc1",
)


def load_dataset(name: str) -> Graph:
    """The named dataset, verified against its checksums.

    Raises:
        DataError: no such dataset, a file that is missing and cannot be downloaded, or one whose
            checksum differs.
    """
    if name not in DATASETS:
        raise DataError(f"unknown dataset {name!r}; known: {', '.join(DATASETS)}")
    dataset = DATASETS[name]
    return dataset.read(*map(fetch, dataset.files))


def fetch(file: RemoteFile) -> Path:
    """The verified file in the user's folder, or in the cache after a download.

    Raises:
        DataError: a file that is missing and cannot be downloaded, or whose checksum differs.
    """
    folder = os.environ.get(FOLDER_VARIABLE)
    path = Path(folder or pooch.os_cache("emu-kernels")) / file.name
    if not path.is_file():
        if folder:
            raise DataError(
                f"{path} is missing: {FOLDER_VARIABLE} is set to {folder}, so put there "
                f"{file.url} ({file.checksum}), or unset it to download the file"
            )
        _download(file, path)
    algorithm = file.checksum.partition(":")[0]
    content = path.read_bytes()
    if algorithm == "git-blob":
        found = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    else:
        found = hashlib.new(algorithm, content).hexdigest()
    if f"{algorithm}:{found}" != file.checksum:
        if not folder:
            path.unlink()  # so that the next call downloads it again
        raise DataError(
            f"{path} is corrupted or another file: expected {file.checksum}, got "
            f"{algorithm}:{found}; remove it and fetch it again"
        )
    return path


def _download(file: RemoteFile, path: Path) -> None:
    pooch.get_logger().setLevel(logging.WARNING)
    try:
        pooch.retrieve(
            file.url,
            known_hash=None,  # verified by the caller: pooch knows no git blob ids
            fname=path.name,
            path=path.parent,
            downloader=pooch.HTTPDownloader(progressbar=True, timeout=30),
        )
    except Exception as error:  # whatever requests, urllib3 or the disk raise
        raise DataError(
            f"{file.name} could not be downloaded from {file.url}: {error}\n"
            f"On a machine without a network, put {file.name} ({file.checksum}) into a folder "
            f"and set {FOLDER_VARIABLE} to that folder; or pass a folder that holds train.txt, "
            "valid.txt and test.txt as --data"
        ) from error
