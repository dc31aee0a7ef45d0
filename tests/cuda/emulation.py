"""The CUDA kernels on the CPU, as a backend: their sources, compiled against host_execution.h.

They are compiled once, into a folder named after a digest of the sources and flags,
.pytest_cache/emu-cuda-<digest>.
"""

from __future__ import annotations

import concurrent.futures
import ctypes
import hashlib
import importlib.util
import os
import re
import shlex
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

import pybind11
import torch

from emu_kernels import backends
from emu_kernels._version import __version__
from emu_kernels.backends.cuda import CudaBackend
from emu_kernels.backends.native import NativeBackend

ROOT = Path(__file__).resolve().parents[2]
MODULE = "_cuda_emulated"
PROCESSORS = 1
"""Multiprocessors of the emulated device. With one, small batches still split rows over blocks."""

FLAGS = (
    "-std=c++20 -O1 -fPIC -fvisibility=hidden -ffp-contract=off "
    "-Wall -Wextra -Werror -Wno-unknown-pragmas"
)


def similarities(root: Path = ROOT) -> list[str]:
    """The similarities that csrc/common/similarity.h lists, read as in CMakeLists.txt."""
    text = (root / "csrc/common/similarity.h").read_text()
    return re.findall(r"\w+", re.findall(r"using Similarities = List<([^>]*)>", text)[0])


def build(*extra: str, root: Path = ROOT) -> Path:
    """The extension module compiled from ``root`` with ``extra`` flags."""
    compiler = os.environ.get("CXX", "g++")
    kernels = root / "csrc/cuda"
    sources: list[tuple[Any, ...]] = [
        *((kernels / "similarity.cu", f"-DEMU_SIMILARITY={name}") for name in similarities(root)),
        *((path,) for path in sorted(kernels.glob("*.cu")) if path.name != "similarity.cu"),
        (kernels / "bindings.cpp",),
        (ROOT / "tests/cuda/order.cpp",),
    ]
    headers = [
        *sorted(kernels.glob("*.*h")),
        *sorted((root / "csrc/common").glob("*.h")),
        ROOT / "tests/cuda/host_execution.h",
    ]
    flags = [
        *shlex.split(FLAGS),
        *extra,
        f'-DEMU_VERSION="{__version__}"',
        '-DEMU_CUDA_BUILT_FOR="the CPU"',
        f"-DEMU_CUDA_MODULE={MODULE}",
        f"-I{root / 'csrc'}",
        f"-I{ROOT / 'tests/cuda'}",
        f"-isystem{pybind11.get_include()}",
        f"-isystem{sysconfig.get_path('include')}",
    ]
    common = hashlib.sha256(repr((compiler, flags)).encode())
    for header in headers:
        common.update(header.read_bytes())
    cache = ROOT / ".pytest_cache" / "emulated-cuda"
    cache.mkdir(parents=True, exist_ok=True)

    def compile_one(source: Path, *own: str) -> Path:
        digest = common.copy()
        digest.update(source.read_bytes() + repr(own).encode())
        out = cache / f"{source.stem}-{digest.hexdigest()[:16]}.o"
        if not out.is_file():
            fresh = out.with_suffix(f".{os.getpid()}")
            _run([compiler, "-x", "c++", *flags, *own, "-c", str(source), "-o", str(fresh)])
            fresh.replace(out)
        return out

    with concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        objects = list(pool.map(lambda source: compile_one(*source), sources))
    digest = hashlib.sha256("".join(o.name for o in objects).encode()).hexdigest()[:16]
    module = cache / f"{MODULE}-{digest}.so"
    if not module.is_file():
        fresh = module.with_suffix(f".{os.getpid()}")
        sanitizers = [flag for flag in extra if flag.startswith("-fsanitize")]
        _run([compiler, "-shared", *sanitizers, "-o", str(fresh), *map(str, objects)])
        fresh.replace(module)
    return module


def _run(command: list[str]) -> None:
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)}\n{done.stdout}")


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(MODULE, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class EmulatedCudaBackend(CudaBackend):
    """The CUDA backend with another extension module, for tensors on the CPU."""

    device_types = ("cpu",)

    def __init__(self, native: ModuleType) -> None:
        NativeBackend.__init__(self, native, None)
        self._library = ctypes.CDLL(native.__file__)

    def unavailable(self) -> str | None:
        return None

    def _place(self, device: torch.device) -> dict[str, int]:
        return {"device": 0, "stream": 0, "processors": PROCESSORS}

    def set_order(self, order: str, seed: int = 1) -> None:
        """Choose the order of a block's threads: "forward", "reverse" or "random"."""
        self._library.emu_set_order(order.encode(), ctypes.c_uint64(seed))


def install() -> EmulatedCudaBackend:
    """Register it as this process's ``cuda`` backend, which only calls that name it use."""
    current = backends.get("cuda")
    if isinstance(current, EmulatedCudaBackend):
        return current
    backend = EmulatedCudaBackend(load(build()))
    backends.register(backend)
    return backend
