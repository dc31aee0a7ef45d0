"""The package as users get it: built without torch, and imported from where it is installed.

Everything is built offline, with the build tools of the test environment. There are two builds:
a wheel from the source tree, and a wheel from the sdist. Both leave out the CUDA kernels, which
take minutes to compile.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pybind11
import pytest
import torch

import emu_kernels
from tools import release

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
EXTENSION = re.compile(r"emu_kernels/_C\.[^/]*\.so")
WITHOUT_CUDA = "-DEMU_CUDA=OFF"


def run(*command: str | Path, cwd: Path, env: dict[str, str] | None = None) -> str:
    """Output of a command that must succeed, including standard error."""
    done = subprocess.run(
        command, cwd=cwd, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert done.returncode == 0, f"{command} exited {done.returncode}:\n{done.stdout}"
    return done.stdout


def python(*arguments: str, cwd: Path, path: Path | None = None) -> str:
    """Output of a separate Python process whose PYTHONPATH is ``path``."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if path is not None:
        env["PYTHONPATH"] = str(path)
    return run(sys.executable, *arguments, cwd=cwd, env=env)


@pytest.fixture(scope="session")
def build_env(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """No package index and no torch."""
    fake = tmp_path_factory.mktemp("without-torch")
    (fake / "torch.py").write_text("raise ImportError('the build must not import torch')\n")
    env = os.environ | {
        "CMAKE_ARGS": WITHOUT_CUDA,
        "PIP_NO_INDEX": "1",
        "PYTHONPATH": str(fake),
    }
    assert subprocess.run([sys.executable, "-c", "import torch"], env=env).returncode != 0
    return env


@pytest.fixture(scope="session")
def strict_env(build_env: dict[str, str]) -> dict[str, str]:
    """No nvcc either, and a compiler warning is an error. -O3 takes three times as long."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    assert compiler is not None
    folders = os.environ["PATH"].split(os.pathsep)
    env = build_env | {
        "CMAKE_ARGS": f"{WITHOUT_CUDA} -DCMAKE_COMPILE_WARNING_AS_ERROR=ON "
        "-DCMAKE_CXX_FLAGS_RELEASE=-O1",
        "CXX": compiler,  # may be in a folder that is removed from PATH
        "PATH": os.pathsep.join(f for f in folders if not shutil.which("nvcc", path=f)),
    }
    env.pop("CUDA_HOME", None)
    assert shutil.which("nvcc", path=env["PATH"]) is None
    return env


def only_file(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(pattern)
    return found


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory, build_env: dict[str, str]) -> Path:
    """A wheel built from the source tree."""
    out = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps")
    run(*pip, "--wheel-dir", out, ROOT, cwd=out, env=build_env)
    return only_file(out, "*.whl")


@pytest.fixture(scope="session")
def sdist(tmp_path_factory: pytest.TempPathFactory, build_env: dict[str, str]) -> Path:
    out = tmp_path_factory.mktemp("sdist")
    build = (sys.executable, "-m", "build", "--no-isolation", "--sdist")
    run(*build, "--outdir", out, ROOT, cwd=out, env=build_env)
    return only_file(out, "*.tar.gz")


@pytest.fixture(scope="session")
def sdist_build(
    tmp_path_factory: pytest.TempPathFactory, sdist: Path, strict_env: dict[str, str]
) -> Path:
    """The sdist, unpacked, with a wheel in dist/ that was built from it."""
    out = tmp_path_factory.mktemp("from-sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(out, filter="data")
    source = out / sdist.name.removesuffix(".tar.gz")
    run(sys.executable, "-m", "build", "--no-isolation", "--wheel", cwd=source, env=strict_env)
    return source


WITHOUT_EDITABLE_INSTALLS = """
import sys
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in getattr(f, "__module__", "")]
"""


def unpack_wheel(wheel: Path, folder: Path) -> Path:
    """Install only the wheel into a folder.

    This environment's editable install would hide that a module is missing from the wheel.
    """
    pip = (sys.executable, "-m", "pip", "install", "--no-deps", "--no-index")
    run(*pip, "--target", folder, wheel, cwd=folder.parent)
    (folder / "sitecustomize.py").write_text(WITHOUT_EDITABLE_INSTALLS)
    return folder


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Path:
    return unpack_wheel(wheel, tmp_path_factory.mktemp("installed") / "site")


TRY_CPU_KERNEL = """
import torch, emu_kernels, emu_kernels._C
generator = torch.Generator().manual_seed(0)
query, table = torch.randn(4, 40, generator=generator), torch.randn(9, 40, generator=generator)
positive, negative = torch.arange(4), torch.arange(12).reshape(4, 3) % 9
options = dict(mutation_rate=0.5, beta=0.3, alpha=0.2, seed=7)
losses = [
    emu_kernels.fused_emu_loss(query, table, positive, negative, backend=backend, **options)
    for backend in ("cpu", "reference")
]
torch.testing.assert_close(*losses)
print(emu_kernels.__file__, emu_kernels._C.__file__, sep="\\n")
"""


def test_wheel_runs_from_where_it_is_installed(installed: Path, tmp_path: Path) -> None:
    files = python("-c", TRY_CPU_KERNEL, cwd=tmp_path, path=installed).splitlines()
    assert [Path(file).parent for file in files] == [installed / "emu_kernels"] * 2


def test_wheel_from_sdist_runs(sdist_build: Path, tmp_path: Path) -> None:
    site = unpack_wheel(only_file(sdist_build, "dist/*.whl"), tmp_path / "site")
    files = python("-c", TRY_CPU_KERNEL, cwd=tmp_path, path=site).splitlines()
    assert [Path(file).parent for file in files] == [site / "emu_kernels"] * 2


def test_instruction_sets_share_no_code(sdist_build: Path) -> None:
    """The linker keeps one copy of a function in several object files: it must not use AVX."""
    objects = {path.name: path for path in sdist_build.glob("build/**/*.o")}
    assert "dispatch.cpp.o" in objects
    mergeable = {
        name: {
            line.split()[-1]
            for line in run("nm", "--defined-only", path, cwd=path.parent).splitlines()
            if line.split()[-2] in "uWV" and not line.split()[-1].startswith("DW.ref.")
        }
        for name, path in objects.items()
    }
    special = [name for name in objects if "avx" in name]
    assert bool(special) == (platform.machine() in ("x86_64", "AMD64"))
    for name in special:
        for other in objects.keys() - {name}:
            assert not mergeable[name] & mergeable[other], (name, other)


def test_wheel_contents(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (info,) = {name.split("/")[0] for name in names if ".dist-info/" in name}
        head = archive.read(f"{info}/METADATA").decode().split("\n\n")[0].splitlines()
        licence = archive.read(f"{info}/licenses/LICENSE").decode()
    modules = {str(path.relative_to(ROOT)) for path in ROOT.glob("emu_kernels/**/*.py")}
    modules |= {f"emu_kernels/triton/{path.name}" for path in ROOT.glob("triton/kernels/*.py")}
    assert "emu_kernels/triton/launch.py" in modules
    modules |= {str(path.relative_to(ROOT)) for path in ROOT.glob("emu_kernels/**/*.yaml")}
    assert modules <= set(names)
    assert "emu_kernels/py.typed" in names
    assert len([name for name in names if EXTENSION.fullmatch(name)]) == 1
    assert {name.split("/")[0] for name in names} == {"emu_kernels", info}
    assert "Apache License" in licence
    assert "License-Expression: Apache-2.0" in head
    assert "Requires-Python: >=3.10" in head
    required = {line for line in head if line.startswith("Requires-Dist:") and ";" not in line}
    assert required == {"Requires-Dist: torch>=2.6", "Requires-Dist: numpy"}


def test_entry_points_load(installed: Path) -> None:
    (distribution,) = metadata.distributions(name="emu-kernels", path=[str(installed)])
    points = {point.name: point for point in distribution.entry_points}
    assert set(points) == {"emu-train", "emu-predict"}
    for point in points.values():
        assert callable(point.load())


def test_sdist_has_all_that_the_build_reads(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*") if path.is_file()}
    assert any(source.endswith(".h") for source in sources)
    sources |= {str(path.relative_to(ROOT)) for path in ROOT.glob("triton/kernels/*.py")}
    assert sources | {"CMakeLists.txt", "setup.py", "pyproject.toml", "LICENSE"} <= names
    assert not [name for name in names if name.endswith(".so")]


def test_extension_needs_no_torch(installed: Path, tmp_path: Path) -> None:
    (extension,) = installed.glob("emu_kernels/_C.*.so")
    code = f"""
import importlib.util, sys
sys.modules["torch"] = None
spec = importlib.util.spec_from_file_location("emu_kernels._C", {str(extension)!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(module.instruction_sets())
"""
    assert python("-c", code, cwd=tmp_path).startswith("['")


def test_version_stands_in_one_place(wheel: Path, sdist: Path) -> None:
    version = emu_kernels.__version__
    assert wheel.name.startswith(f"emu_kernels-{version}-")
    assert sdist.name == f"emu_kernels-{version}.tar.gz"
    files = [ROOT / name for name in ("pyproject.toml", "setup.py", "CMakeLists.txt", "Makefile")]
    files += ROOT.glob("csrc/**/*.[ch]*")
    files += ROOT.glob("emu_kernels/**/*.py")
    holders = [file for file in files if f'"{version}"' in file.read_text()]
    assert holders == [ROOT / "emu_kernels" / "_version.py"]


def test_a_release_of_another_version_is_refused() -> None:
    with pytest.raises(SystemExit, match=r"is 99\.0, CITATION.cff has \d"):
        release.check_versions("99.0")


def test_import_from_the_source_tree() -> None:
    output = python("-c", "import emu_kernels._C as c; print(c.__file__)", cwd=ROOT)
    assert Path(output.strip()).parent == ROOT / "emu_kernels"


def report_lines(report: str) -> dict[str, str]:
    lines = re.sub(r"\n +", " ", report).splitlines()  # some are wrapped
    return dict(re.split(r"  +", line, maxsplit=1) for line in lines)


def test_report(installed: Path, tmp_path: Path) -> None:
    lines = report_lines(python("-m", "emu_kernels", cwd=tmp_path, path=installed))
    assert lines["emu_kernels"] == emu_kernels.__version__
    assert lines["torch"] == torch.__version__
    assert "in use: " in lines["extension"]
    assert "threads: " in lines["extension"]
    assert lines["backend reference"] == "can run"
    assert lines["backend cpu"] == "can run"
    assert "built without CUDA" in lines["backend cuda"]
    assert "CUDA_HOME" in lines["backend cuda"]


def test_report_without_the_extension(installed: Path, tmp_path: Path) -> None:
    code = """
import runpy, sys
sys.modules["emu_kernels._C"] = None
runpy.run_module("emu_kernels", run_name="__main__")
"""
    lines = report_lines(python("-c", code, cwd=tmp_path, path=installed))
    assert "pip install" in lines["extension"]
    assert lines["backend reference"] == "can run"
    assert lines["backend cpu"].startswith("cannot run: emu_kernels is imported from ")
    assert "run Python in another folder" in lines["backend cpu"]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"CXX": "/nonexistent/c++"}, "needs a C++17 compiler"),
        (
            {"CMAKE_ARGS": "-DCMAKE_CXX_COMPILER_ID_RUN=1 -DCMAKE_CXX_COMPILER_ID=MSVC"},
            "vector extensions of GCC and Clang",
        ),
    ],
    ids=["none", "msvc"],
)
def test_unusable_compiler_is_said_in_words(
    setting: dict[str, str], message: str, build_env: dict[str, str], tmp_path: Path
) -> None:
    build = ("setup.py", "build_ext", "--build-temp", tmp_path / "tmp", "--build-lib", tmp_path)
    done = subprocess.run(
        [sys.executable, *build], cwd=ROOT, env=build_env | setting, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("wanted", ["AUTO", "ON"])
def test_old_nvcc_is_said_in_words(wanted: str, build_env: dict[str, str], tmp_path: Path) -> None:
    """CUDA_HOME takes precedence; if CUDA is requested, its nvcc must be recent enough."""
    nvcc = tmp_path / "cuda/bin/nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 11.8, V11.8.89'\n")
    nvcc.chmod(0o755)
    scripts = Path(sysconfig.get_path("scripts"))
    configure = [
        shutil.which("cmake") or scripts / "cmake",
        *("-S", ROOT, "-B", tmp_path / "build", "-G", "Ninja", f"-DEMU_CUDA={wanted}"),
        f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja') or scripts / 'ninja'}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
    ]
    env = build_env | {"CUDA_HOME": str(tmp_path / "cuda")}
    done = subprocess.run(configure, env=env, capture_output=True, text=True)
    said = " ".join((done.stdout + done.stderr).split())
    assert (done.returncode == 0) == (wanted == "AUTO")
    assert f"{nvcc} is of CUDA 11.8, and they need 12.4" in said


def test_the_pages_build(tmp_path: Path) -> None:
    """Every link and anchor leads somewhere, and every documented name exists."""
    env = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    site = tmp_path / "site"
    run(sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", site, cwd=ROOT, env=env)
    page = (site / "api" / "index.html").read_text()
    for name in (*emu_kernels.__all__, "Negatives", "Predictor"):
        assert name.startswith("__") or f'"emu_kernels.{name}"' in page or f'.{name}"' in page
    assert ":func:" not in page
    assert "--mutation-rate" in (site / "commands/index.html").read_text()
    notebook = (site / "notebook/index.html").read_text()
    assert "after 1,200 steps" in notebook  # what a cell printed
    (figure,) = re.findall(r'src="\.\./(output[^"]+\.png)"', notebook)
    assert (site / figure).read_bytes().startswith(b"\x89PNG")


def test_the_workflows_are_valid() -> None:
    for kind, files in (
        ("vendor.github-workflows", ".github/workflows"),
        ("vendor.github-issue-forms", ".github/ISSUE_TEMPLATE"),
    ):
        paths = sorted((ROOT / files).glob("*.yml"))
        assert len(paths) == 2
        check = (sys.executable, "-m", "check_jsonschema", "--builtin-schema", kind)
        run(*check, *paths, cwd=ROOT)
