"""What the commands do if their output cannot be written, or would be written several times."""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path


def degrade_output() -> None:
    """Print "?" for characters that the terminal's encoding lacks, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def processes() -> int:
    """How many processes ``torchrun`` has started."""
    return int(os.environ.get("WORLD_SIZE", 1))


@contextlib.contextmanager
def only_first_prints() -> Iterator[None]:
    """Print nothing except tracebacks in all processes of ``torchrun`` but the first."""
    if int(os.environ.get("RANK", 0)) == 0:
        yield
        return
    with (
        Path(os.devnull).open("w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield


def say(text: str) -> None:
    """Print at once. If the reader has closed the pipe, as `head` does, or the disk is full, only
    printing ends."""
    try:
        print(text, flush=True)
    except OSError as error:
        if not isinstance(error, BrokenPipeError):
            print(f"the output cannot be written: {error}", file=sys.stderr)
        discard_output()


def discard_output() -> None:
    """Write nothing more to where nothing can be written, not even at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def quoted(path: Path) -> str:
    """A path as a shell takes it."""
    return shlex.quote(str(path))
