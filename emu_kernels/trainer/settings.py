"""Settings: dataclass fields that carry their help text, choices and limits.

A setting is declared by its field only: :func:`check` validates it, :func:`add_options` adds it to
a command line. If its choices are a registry of :class:`Choice`, their help texts are shown too.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, fields
from types import NoneType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, get_args, get_type_hints

from .errors import ConfigError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T")

_SHORT = 60  # characters of choices that fit in a line of a command's help


class Limit(NamedTuple):
    """The values that a number may have."""

    words: str  # completes "must be ..."
    allows: Callable[[float], bool]


AT_LEAST_1 = Limit("at least 1", lambda x: x >= 1)
AT_LEAST_0 = Limit("a finite number of at least 0", lambda x: 0 <= x < math.inf)
ABOVE_0 = Limit("a finite number above 0", lambda x: 0 < x < math.inf)
SHARE = Limit("in [0, 1]", lambda x: 0 <= x <= 1)


def setting(
    default: T,
    help: str,
    *,
    limit: Limit | None = None,
    choices: Collection[T] | None = None,
    words: Mapping[str, T] | None = None,
    show: Callable[[T, Any], str] = lambda x, _: f"{x:g}" if isinstance(x, float) else f"{x}",
) -> T:
    """A dataclass field.

    Args:
        default: None if it follows from other settings; `help` then says how.
        help: for the command line, which appends the default.
        choices: read at each use, so a registry may still grow.
        words: names of values, for the command line.
        show: formats the value for a summary; it is also given all settings.
    """
    metadata = {"help": help, "limit": limit, "choices": choices, "words": words, "show": show}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Choice:
    """An entry of a registry, with its description."""

    help: str
    options: tuple[str, ...]  # names of the settings that it reads

    def summary(self, settings: DataclassInstance, without: Collection[str] = ()) -> str:
        """The help text and the values of the options, except those in ``without``."""
        show = {f.name: f.metadata["show"] for f in fields(settings)}
        shown = [
            f"{x.replace('_', ' ')} {show[x](getattr(settings, x), settings)}"
            for x in self.options
            if x not in without
        ]
        return f"{self.help} ({', '.join(shown)})" if shown else self.help


def check(settings: DataclassInstance) -> None:
    """Raises: ConfigError: a setting is not among its choices or outside its limit."""
    for f in fields(settings):
        value = getattr(settings, f.name)
        choices, limit = f.metadata["choices"], f.metadata["limit"]
        if value is None:
            continue
        if choices is not None and value not in choices:
            known = ", ".join(map(str, choices))
            raise ConfigError(f"unknown {f.name} {value!r}; known: {known}")
        if limit is not None and not limit.allows(value):
            raise ConfigError(f"{f.name} must be {limit.words}, got {value}")


def unread(given: Collection[str], settings: DataclassInstance) -> dict[str, str]:
    """The given settings that the choices made do not read, with a choice ("loss softmax")."""
    read, unread = set[str](), dict[str, str]()
    for f in fields(settings):
        registry, chosen = f.metadata["choices"], getattr(settings, f.name)
        if not isinstance(registry, Mapping) or chosen not in registry:
            continue
        for name, choice in registry.items():
            own = getattr(choice, "options", ())
            if name == chosen:
                read.update(own)
            else:
                unread |= {x: f"{f.name} {chosen}" for x in own if x in given and x not in unread}
    return {name: chosen for name, chosen in unread.items() if name not in read}


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def add_options(parser: argparse._ActionsContainer, settings: type[DataclassInstance]) -> None:
    """Add an option for each setting. Options that are not given are absent from the result."""
    types = get_type_hints(settings)
    for f in fields(settings):
        help, choices = f.metadata["help"], f.metadata["choices"]
        keywords: dict[str, Any] = {"default": argparse.SUPPRESS}
        if types[f.name] is bool:
            parser.add_argument(flag(f.name), action="store_true", help=help, **keywords)
            continue
        (kind,) = {*(get_args(types[f.name]) or [types[f.name]])} - {NoneType}
        if choices is not None:
            keywords["choices"] = choices
        else:
            keywords["metavar"] = f.name.split("_")[-1].upper() if kind is str else "X"
        if isinstance(choices, Mapping):
            help += ": " + ", ".join(f"{name} ({choice.help})" for name, choice in choices.items())
        elif choices is not None and len(names := ", ".join(map(str, choices))) > _SHORT:
            keywords["metavar"] = "NAME"
            help += f": {names}"
        if f.default is not None and "(default" not in help:
            help += f" (default {f.default})"
        words = f.metadata["words"] or {}
        if kind is str and choices is not None:  # accept any case
            words = {**words, **{name.lower(): name for name in choices}}
        parser.add_argument(flag(f.name), type=_reader(kind, words), help=help, **keywords)


def _reader(kind: type[T], words: Mapping[str, T]) -> Callable[[str], T]:
    """A parser of words, and of other text as ``kind``; argparse names both in its errors."""

    def read(text: str) -> T:
        return words[text.lower()] if text.lower() in words else kind(text)  # type: ignore[call-arg]

    read.__name__ = " or ".join([kind.__name__, *words])
    return read
