"""What a command line does where its output cannot go."""

from __future__ import annotations

import io
import os
import sys


def degrade_output() -> None:
    """Print "?" for what the terminal's encoding lacks, instead of ending in a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def say(text: str) -> None:
    """Print at once. A reader that has closed the pipe, as `head` does, ends only the printing."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        discard_output()


def discard_output() -> None:
    """After a closed pipe: nothing more is written to it, not even at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
