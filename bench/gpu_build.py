"""Compile the extension modules in place, by CMake alone, and link the Triton kernels.

``pip install --editable .`` does the same, but needs a setuptools that knows this repository's
pyproject.toml, which a GPU's machine without a network may not have.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "emu_kernels"


def _tool(name: str) -> str | None:
    """From PATH, or from beside this Python."""
    return shutil.which(name) or shutil.which(name, path=sysconfig.get_path("scripts"))


def _version() -> str:
    found = re.search(r'__version__ = "(.+)"', (PACKAGE / "_version.py").read_text())
    assert found, "emu_kernels/_version.py has no version"
    return found[1]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_build", description=__doc__)
    add = parser.add_argument
    add("--into", type=Path, default=PACKAGE, help="folder of the modules")
    add("--work", type=Path, default=ROOT / "build" / "gpu-check-cmake", help="CMake's folder")
    options = parser.parse_args(arguments)
    cmake = _tool("cmake")
    if cmake is None:
        print("gpu_build: there is no cmake (pip install cmake)", file=sys.stderr)
        return 1
    try:
        import pybind11
    except ImportError:
        print("gpu_build: there is no pybind11 (pip install pybind11)", file=sys.stderr)
        return 1
    ninja = _tool("ninja")
    configure = [
        *(cmake, "-S", str(ROOT), "-B", str(options.work)),
        *(["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []),
        "-DCMAKE_BUILD_TYPE=Release",
        f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={options.into.resolve()}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DEMU_VERSION={_version()}",
        *shlex.split(os.environ.get("CMAKE_ARGS", "")),
    ]
    build = [cmake, "--build", str(options.work), "--parallel", str(os.cpu_count() or 1)]
    for command in (configure, build):
        if code := subprocess.run(command).returncode:
            return code
    kernels = PACKAGE / "triton"
    if options.into == PACKAGE and not kernels.exists():
        kernels.symlink_to(Path("..", "triton", "kernels"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
