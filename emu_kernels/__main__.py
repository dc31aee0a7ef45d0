"""``python -m emu_kernels``: versions, and for each backend whether it can run here or why not."""

from __future__ import annotations

import platform
from textwrap import TextWrapper

import numpy
import torch

from emu_kernels import __version__, backends


def extension() -> str:
    """One line on the compiled extension, or how to get it."""
    try:
        import emu_kernels._C as native
    except ImportError as error:
        return f"cannot be loaded ({error}); build it with: pip install --editable ."
    runnable = ", ".join(native.instruction_sets())
    try:
        used = native.instruction_set()
        threads = "torch's" if native.joins_torch() else "one"
    except ValueError as error:  # EMU_KERNELS_CPU names a set that cannot run here
        used, threads = f"none ({error})", "none"
    return f"{native.compiler().strip()}; can use {runnable}; in use: {used}; threads: {threads}"


def report() -> str:
    """What a bug report should begin with."""
    lines = [
        ("emu_kernels", __version__),
        ("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("torch", torch.__version__),
        ("numpy", numpy.__version__),
        ("extension", extension()),
    ]
    for name, reason in backends.describe():
        lines.append((f"backend {name}", "can run" if reason is None else f"cannot run: {reason}"))
    width = max(len(name) for name, _ in lines) + 2
    hanging = TextWrapper(79, subsequent_indent=" " * width, break_long_words=False)
    return "\n".join(hanging.fill(f"{name:<{width}}{value}") for name, value in lines)


if __name__ == "__main__":
    print(report())
