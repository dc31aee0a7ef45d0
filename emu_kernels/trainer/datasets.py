"""The public datasets by name: where they come from, their checksums, and the cache.

With ``EMU_KERNELS_DATA`` set to a folder, archives come from there and nowhere else; otherwise
they are downloaded once, verified, and kept in the user's cache folder.
"""

from __future__ import annotations

import hashlib
import logging
import os
from dataclasses import dataclass
from pathlib import Path

import pooch

from .data import Graph, load_graph
from .errors import DataError

BASE_URL = (
    "https://raw.githubusercontent.com/TimDettmers/ConvE/f3c0eb286025410fa5b4c04696c918264163d0ca"
)
FOLDER_VARIABLE = "EMU_KERNELS_DATA"


@dataclass(frozen=True)
class Checksum:
    """A digest of a file; ``git-blob`` is the SHA-1 by which git itself names the content."""

    algorithm: str  # "sha256" or "git-blob"
    digest: str

    def of(self, path: Path) -> str:
        content = path.read_bytes()
        if self.algorithm == "git-blob":
            return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        return hashlib.new(self.algorithm, content).hexdigest()

    def __str__(self) -> str:
        return f"{self.algorithm} {self.digest}"


CHECKSUMS = {
    "FB15k-237": Checksum(
        "sha256", "311df7930f842a02979eaa7a802484a6afe62303c07f915f1e6edbc30cbe05e8"
    ),
    "WN18RR": Checksum(
        "sha256", "1eb9152f804c140d163462c0d49f65e5a0b30ab5fbb375c5e3353c11a6249060"
    ),
    "YAGO3-10": Checksum("git-blob", "be63d16955e1951cb6539710204af43cb38da7d9"),
    "kinship": Checksum(
        "sha256", "a3cb9ca67213eb38133aebc12901195e283d844ebd59f1a6cbf2d4fa12ced4e6"
    ),
    "nations": Checksum(
        "sha256", "feb3e3e027103089934ea7dfb67d2048d8a43e65d6757a86f2e037acb66f640b"
    ),
    "umls": Checksum("sha256", "26223aa91f0ec8db2324e0f489b9a4425e04d1d0df72ce5cfd62af4b91aee6fd"),
}


def load_dataset(name: str) -> Graph:
    """The named dataset, verified against its checksum.

    Raises:
        DataError: no such dataset, no file and no network, or a file with another content.
    """
    if name not in CHECKSUMS:
        raise DataError(f"unknown dataset {name!r}; known: {', '.join(CHECKSUMS)}")
    folder = os.environ.get(FOLDER_VARIABLE)
    archive = _from_folder(name, Path(folder)) if folder else _from_cache(name)
    return load_graph(archive)


def _from_folder(name: str, folder: Path) -> Path:
    path = folder / f"{name}.tar.gz"
    if not path.is_file():
        raise DataError(
            f"{path} is missing: {FOLDER_VARIABLE} is set to {folder}, so put there "
            f"{BASE_URL}/{name}.tar.gz ({CHECKSUMS[name]}), or unset it to download the archive"
        )
    _verify(path, CHECKSUMS[name])
    return path


def _from_cache(name: str) -> Path:
    cache = Path(pooch.os_cache("emu-kernels"))
    path = cache / f"{name}.tar.gz"
    if not path.is_file():
        _download(name, cache)
    try:
        _verify(path, CHECKSUMS[name])
    except DataError:
        path.unlink()  # so that the next call downloads it again
        raise
    return path


def _download(name: str, cache: Path) -> None:
    url = f"{BASE_URL}/{name}.tar.gz"
    pooch.get_logger().setLevel(logging.WARNING)
    try:
        pooch.retrieve(
            url,
            known_hash=None,  # verified by the caller: pooch knows no git blob ids
            fname=f"{name}.tar.gz",
            path=cache,
            downloader=pooch.HTTPDownloader(progressbar=True, timeout=30),
        )
    except Exception as error:  # whatever requests, urllib3 or the disk raise
        raise DataError(
            f"{name} could not be downloaded from {url}: {error}\n"
            f"On a machine without a network, put {name}.tar.gz ({CHECKSUMS[name]}) into a folder "
            f"and set {FOLDER_VARIABLE} to that folder; or pass a folder that holds train.txt, "
            "valid.txt and test.txt as --data"
        ) from error


def _verify(path: Path, checksum: Checksum) -> None:
    if (found := checksum.of(path)) != checksum.digest:
        raise DataError(
            f"{path} is corrupted or another file: expected {checksum}, got {found}; "
            "remove it and fetch it again"
        )
