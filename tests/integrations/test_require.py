"""Optional libraries: never imported unasked, and a clear word where one is missing or too old."""

from __future__ import annotations

import subprocess
import sys

import pytest

from emu_kernels.integrations import _require
from emu_kernels.integrations._require import require


def test_the_package_imports_no_integration():
    code = (
        "import sys, emu_kernels, emu_kernels.integrations\n"
        "print([name for name in ('pykeen', 'torch_geometric') if name in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


@pytest.mark.parametrize("name", ["pykeen", "pyg"])
def test_a_missing_library_names_its_extra(name):
    code = (
        "import importlib.metadata as metadata\n"
        "def missing(name): raise metadata.PackageNotFoundError(name)\n"
        "metadata.version = missing\n"
        f"import emu_kernels.integrations.{name}"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert out.returncode == 1
    assert f"is not installed; install it with: pip install 'emu-kernels[{name}]'" in out.stderr
    assert "ImportError" in out.stderr.splitlines()[-1]


@pytest.mark.parametrize("found", ["1.11.0", "1.11", "1.9", "0.12", "1", "unknown"])
def test_too_old(monkeypatch, found):
    monkeypatch.setattr(_require, "version", lambda name: found)
    with pytest.raises(ImportError, match=rf"pykeen>=1.11.1 is needed, {found} .*kernels\[extra"):
        require("pykeen", (1, 11, 1), extra="extra")


@pytest.mark.parametrize("found", ["1.11.1", "1.11.1.1", "1.11.2.dev0", "1.12rc1", "2.0+cpu"])
def test_new_enough(monkeypatch, found):
    monkeypatch.setattr(_require, "version", lambda name: found)
    require("pykeen", (1, 11, 1), extra="pykeen")
