"""What a command line does where its output cannot go, or would be there several times."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path


def degrade_output() -> None:
    """Print "?" for what the terminal's encoding lacks, instead of ending in a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def processes() -> int:
    """How many ``torchrun`` has started."""
    return int(os.environ.get("WORLD_SIZE", 1))


@contextlib.contextmanager
def only_first_prints() -> Iterator[None]:
    """Print nothing in the processes of ``torchrun`` but the first one, other than tracebacks."""
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
    """Print at once. A reader that has closed the pipe, as `head` does, ends only the printing."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        discard_output()


def discard_output() -> None:
    """After a closed pipe: nothing more is written to it, not even at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
