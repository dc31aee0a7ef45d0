"""The package with Triton, without it, and with an old one.

The repository has a folder triton/, which must not be taken for Triton.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

import pytest

from emu_kernels.backends import triton as backend

ROOT = Path(__file__).resolve().parents[2]
INSTALLED = backend._missing() is None


def python(*arguments: str, path: list[Path], site: bool = True) -> str:
    """Output of a Python started at the repository's root, which ``python -c`` puts on sys.path."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")}
    env["PYTHONPATH"] = os.pathsep.join(map(str, path))
    done = subprocess.run(
        [sys.executable, *([] if site else ["-S"]), *arguments],
        cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def without(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with links to everything installed except Triton."""
    folder = tmp_path_factory.mktemp("without-triton")
    for name in ("purelib", "platlib"):
        for entry in Path(sysconfig.get_path(name)).iterdir():
            link = folder / entry.name
            if "triton" not in entry.name.lower() and not link.exists():
                link.symlink_to(entry)
    return folder


def test_the_folder_is_no_package() -> None:
    assert (ROOT / "triton" / "kernels" / "__init__.py").exists()
    assert not (ROOT / "triton" / "__init__.py").exists()


@pytest.mark.skipif(not INSTALLED, reason="Triton is not installed")
def test_the_real_one_is_imported_from_the_root() -> None:
    code = "import triton, triton.language as tl; print(triton.__file__, tl.__file__, sep='\\n')"
    for file in python("-c", code, path=[ROOT]).splitlines():
        assert ROOT / "triton" not in Path(file).parents


TRY = """
import importlib.util, sys
{before}
import torch, emu_kernels
from emu_kernels import backends
torch.optim.Adam([torch.nn.Parameter(torch.ones(2))])  # looks for Triton, and must find none
inputs = torch.ones(2, 3), torch.ones(4, 3), torch.tensor([0, 1]), torch.tensor([[2, 3]])
print(backends.get("triton").unavailable())
print(float(emu_kernels.fused_emu_loss(*inputs, mutation_rate=0.5, beta=0.3, alpha=0.2, seed=1)))
try:
    emu_kernels.fused_softmax_loss(*inputs, backend="triton")
except RuntimeError as error:
    print(error)
"""


@pytest.mark.parametrize("before", ["", "import triton", "importlib.util.find_spec('triton')"])
def test_the_package_works_without_triton(before: str, without: Path) -> None:
    """Also if the folder triton/ was already imported, as a namespace package."""
    out = python("-c", TRY.format(before=before), path=[ROOT, without], site=False)
    reason, loss, refusal = out.splitlines()
    assert reason == "Triton is not installed (pip install triton)"
    assert float(loss) > 0
    assert refusal == f"backend: 'triton' cannot run here: {reason}"


def test_the_report_says_why(without: Path) -> None:
    report = python("-m", "emu_kernels", path=[ROOT, without], site=False)
    reason = "cannot run: Triton is not installed (pip install triton)"
    assert f"backend triton {reason} backend " in " ".join(report.split())  # lines are wrapped


@pytest.mark.skipif(not INSTALLED, reason="Triton is not installed")
def test_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: "3.5.1")
    reason = backend._missing.__wrapped__()
    assert reason == "Triton 3.5.1 is too old: 3.6 or newer is needed"
    monkeypatch.setattr(metadata, "version", lambda name: "3.6.0")
    assert backend._missing.__wrapped__() is None


@pytest.mark.skipif(not INSTALLED, reason="Triton is not installed")
def test_without_a_gpu_it_says_so() -> None:
    code = """
import torch
torch.cuda.is_available = lambda: False
from emu_kernels import backends
print(backends.get("triton").unavailable(), backends.default_backend("cpu"))
"""
    assert python("-c", code, path=[ROOT]) == "there is no GPU that torch can use cpu\n"


@pytest.mark.skipif(not INSTALLED, reason="Triton is not installed")
def test_importing_the_package_imports_no_triton() -> None:
    code = "import sys, emu_kernels; print('triton' in sys.modules)"
    assert python("-c", code, path=[ROOT]) == "False\n"
