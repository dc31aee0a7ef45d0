"""Names of entities and relations as one tensor of bytes."""

from __future__ import annotations

import bisect
import difflib
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar, overload

import numpy
import pyarrow
import pyarrow.compute as pc
import torch
from torch import Tensor

from .errors import TrainerError

T = TypeVar("T")

_NEAR = 20_000  # names among which similar ones are sought: each comparison takes microseconds
_DECODED = 1 << 16  # names that an iterator decodes at a time


class UnknownNameError(TrainerError):
    """A name that the graph does not hold."""


def encode(names: Iterable[str]) -> Tensor:
    """The names as UTF-8 bytes, one name a line, as safetensors holds tensors only.

    Names contain no line ends: :mod:`.data` refuses them.
    """
    if isinstance(names, Names):
        return names.content
    return torch.frombuffer(bytearray("\n".join(names), "utf-8"), dtype=torch.uint8)


class Names(Sequence[str]):
    """Names as :func:`encode` returns them; each is decoded when it is asked for.

    So a mapped file of millions of names takes only 8 bytes of memory per name.
    """

    def __init__(self, content: Tensor) -> None:
        self.content = content
        self._bytes = content.numpy()
        ends = numpy.flatnonzero(self._bytes == ord("\n"))
        self._starts = numpy.concatenate([[0], ends + 1, [len(content) + 1]])

    @classmethod
    def of(cls, names: pyarrow.Array) -> Names:
        """Args: names: strings, at least one."""
        kind = pyarrow.large_string()
        ends = (pyarrow.scalar(text, kind) for text in ("", "\n"))
        lines = pc.binary_join_element_wise(names.cast(kind), *ends)
        size = pc.sum(pc.binary_length(lines)).as_py() - 1  # without the last line's end
        return cls(torch.from_numpy(numpy.frombuffer(lines.buffers()[2], "u1", size).copy()))

    def array(self) -> pyarrow.Array:
        """A copy as an Arrow array of strings, to compute with all names at once."""
        offsets = self._starts - numpy.arange(len(self._starts))
        joined = self._bytes[self._bytes != ord("\n")]
        buffers = (pyarrow.py_buffer(offsets), pyarrow.py_buffer(joined))
        return pyarrow.LargeStringArray.from_buffers(len(self), *buffers)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __eq__(self, other: object) -> bool:
        return list(self) == list(other) if isinstance(other, Sequence) else NotImplemented

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), _DECODED):
            yield from self[start : start + _DECODED]

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            first, last, step = index.indices(len(self))
            if step != 1 or first >= last:
                return [self[i] for i in range(first, last, step)]
            return self._text(first, last).split("\n")
        index = range(len(self))[index]
        return self._text(index, index + 1)

    def _text(self, first: int, last: int) -> str:
        return self._bytes[self._starts[first] : self._starts[last] - 1].tobytes().decode("utf-8")


def visible(name: T) -> T | str:
    """A name for people to read: quoted if it holds blanks at an end or what cannot be printed."""
    if isinstance(name, str) and (name != name.strip() or not name.isprintable()):
        return repr(name)
    return name


def find(kind: str, name: str, names: Sequence[str]) -> int:
    """The index of a name; fast if the names are sorted, as in :mod:`.data`.

    Raises:
        TypeError: the name is no str.
        UnknownNameError: there is no such name; says which are similar.
    """
    if not isinstance(name, str):
        raise TypeError(f"{kind}: expected a name (str), got {type(name).__name__}")
    at = bisect.bisect_left(names, name)
    if at < len(names) and names[at] == name:
        return at
    try:
        return names.index(name)
    except ValueError:
        around = names[max(0, at - _NEAR // 2) : at + _NEAR // 2]
        near = difflib.get_close_matches(name, around, n=3)
        hint = f"; did you mean {', '.join(map(visible, near))}?" if near else ""
        raise UnknownNameError(f"the graph holds no {kind} {name!r}{hint}") from None
