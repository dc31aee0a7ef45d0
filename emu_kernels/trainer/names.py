"""Names of entities and relations as one tensor of bytes."""

from __future__ import annotations

import bisect
import difflib
from collections.abc import Iterable, Sequence
from typing import overload

import numpy
import torch
from torch import Tensor

from .errors import TrainerError

_NEAR = 20_000  # names to look for similar ones among: comparing with one takes microseconds


class UnknownNameError(TrainerError):
    """A name that the graph does not hold."""


def encode(names: Iterable[str]) -> Tensor:
    """UTF-8 bytes, a line each: safetensors holds tensors only.

    Names contain no line ends: :mod:`.data` reads them from lines.
    """
    return torch.frombuffer(bytearray("\n".join(names), "utf-8"), dtype=torch.uint8)


class Names(Sequence[str]):
    """What :func:`encode` returned, each name decoded when it is asked for.

    So a mapped file of millions of names takes 8 bytes of memory a name.
    """

    def __init__(self, content: Tensor) -> None:
        self._content = content.numpy()
        ends = numpy.flatnonzero(self._content == ord("\n"))
        self._starts = numpy.concatenate([[0], ends + 1, [len(content) + 1]])

    def __len__(self) -> int:
        return len(self._starts) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        start, end = self._starts[index : index + 2]
        return self._content[start : end - 1].tobytes().decode("utf-8")


def find(kind: str, name: str, names: Sequence[str]) -> int:
    """The place of a name: at once where they are in order, as :mod:`.data` has them.

    Raises:
        UnknownNameError: there is none; says which are similar.
    """
    at = bisect.bisect_left(names, name)
    if at < len(names) and names[at] == name:
        return at
    try:
        return names.index(name)
    except ValueError:
        around = names[max(0, at - _NEAR // 2) : at + _NEAR // 2]
        near = difflib.get_close_matches(name, around, n=3)
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise UnknownNameError(f"the graph holds no {kind} {name!r}{hint}") from None
