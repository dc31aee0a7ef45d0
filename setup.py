"""Builds the extension modules ``emu_kernels._C`` and, where there is nvcc, ``emu_kernels._cuda``
with CMake and ninja; pyproject.toml has the rest.

Nothing here needs torch: the extensions are compiled without torch's headers. What goes into them
is decided in CMakeLists.txt. From the environment, CMAKE_ARGS goes to CMake's configure step
(-DEMU_CUDA=OFF leaves CUDA out, -DEMU_CUDA_ARCHITECTURES=90 compiles for one target), CUDA_HOME is
where nvcc is looked for first, CXX and CXXFLAGS choose the compiler and its flags,
CMAKE_BUILD_PARALLEL_LEVEL limits the number of jobs.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def find_tool(name: str) -> str:
    """A build tool from PATH, or from beside this Python, whose venv need not be active."""
    path = shutil.which(name) or shutil.which(name, path=sysconfig.get_path("scripts"))
    if path is None:
        raise SystemExit(f"emu-kernels needs {name} to build: pip install {name}")
    return path


def find_pybind11() -> str:
    """Folder of pybind11's CMake package."""
    try:
        import pybind11
    except ImportError:
        raise SystemExit("emu-kernels needs pybind11 to build: pip install pybind11") from None
    return str(pybind11.get_cmake_dir())


def optional(extension: Path) -> Path:
    """Where the CUDA kernels' extension is, beside ``extension``, if there is one."""
    return extension.with_name(extension.name.replace("_C", "_cuda", 1))


class CMakeBuild(build_ext):
    """Has CMake compile the extensions and put them where setuptools looks for the one it knows."""

    def copy_extensions_to_source(self) -> None:
        """Of an editable install, where setuptools copies that one alone."""
        super().copy_extensions_to_source()
        (ext,) = self.extensions
        built = optional(Path(self.build_lib, self.get_ext_filename(ext.name)))
        target = optional(ROOT / self.get_ext_filename(ext.name))
        target.unlink(missing_ok=True)
        if built.is_file():
            shutil.copy2(built, target)

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        folder = Path(self.build_temp).resolve() / "cmake"
        configure = [
            find_tool("cmake"),
            *("-S", str(ROOT), "-B", str(folder), "-G", "Ninja"),
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja')}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            f"-DPYTHON_MODULE_EXTENSION={target.name.removeprefix('_C')}",  # as setuptools has it
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={find_pybind11()}",
            f"-DEMU_VERSION={self.distribution.get_version()}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        build = [configure[0], "--build", str(folder)]
        if self.parallel or "CMAKE_BUILD_PARALLEL_LEVEL" not in os.environ:
            build += ["--parallel", str(self.parallel or available_cores())]

        # CMake's cache outlives what it was made with, such as the tools of an isolated build
        # environment that is gone: keep the folder only for a build with the very same settings.
        settings = repr((configure, *map(os.environ.get, ("CXX", "CXXFLAGS", "CUDA_HOME"))))
        stamp = folder / "settings.txt"
        if not stamp.is_file() or stamp.read_text() != settings:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            stamp.write_text(settings)
        optional(target).unlink(missing_ok=True)  # this build may be one without CUDA
        try:
            subprocess.run(configure, check=True)
            subprocess.run(build, check=True)
        except subprocess.CalledProcessError:
            # The reason is in what CMake or the compiler just printed; a traceback would bury it.
            raise SystemExit("emu-kernels: building the extension failed, see above") from None
        if not target.is_file():
            raise SystemExit(f"emu-kernels: CMake made no {target.name} in {target.parent}")


def available_cores() -> int:
    """Cores this process may use, which in a container can be fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


setup(
    ext_modules=[Extension("emu_kernels._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
    # The sources lie in a folder that must not be a package itself, see triton/kernels/__init__.py.
    packages=[*find_packages(include=["emu_kernels*"]), "emu_kernels.triton"],
    package_dir={"emu_kernels.triton": "triton/kernels"},
)
