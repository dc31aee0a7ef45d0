"""Optional libraries: imported only on request; a clear error if one is missing or too old."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from emu_kernels.integrations import _require
from emu_kernels.integrations._require import require

ROOT = Path(__file__).resolve().parents[2]


def test_the_package_imports_no_integration():
    code = (
        "import sys, emu_kernels, emu_kernels.integrations\n"
        "print([name for name in ('pykeen', 'torch_geometric') if name in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


@pytest.mark.parametrize("name", ["pykeen", "pyg"])
def test_a_missing_library_names_its_extra(monkeypatch, name):
    def missing(distribution: str) -> str:
        raise PackageNotFoundError(distribution)

    module = importlib.import_module(f"emu_kernels.integrations.{name}")
    monkeypatch.setattr(_require, "version", missing)
    with pytest.raises(ImportError, match=rf"is not installed; .* 'emu-kernels\[{name}\]'"):
        importlib.reload(module)


def test_a_missing_libkge_is_said_in_words(monkeypatch):
    name = "emu_kernels.integrations.libkge"
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"LibKGE is not installed.* clone https://"):
        importlib.import_module(name)


@pytest.mark.parametrize(("name", "old"), [("pykeen", "1.11.0"), ("pyg", "2.3.1")])
def test_a_version_too_old_for_an_integration(monkeypatch, name, old):
    module = importlib.import_module(f"emu_kernels.integrations.{name}")
    monkeypatch.setattr(_require, "version", lambda distribution: old)
    with pytest.raises(ImportError, match=rf"is needed, {old} is installed; .*\[{name}\]'"):
        importlib.reload(module)


@pytest.mark.parametrize(("name", "library"), [("pykeen", "pykeen"), ("pyg", "torch_geometric")])
def test_the_minimum_is_that_of_the_extra(name, library):
    minimum = importlib.import_module(f"emu_kernels.integrations.{name}").MINIMUM
    line = f'{name} = ["{library}>={".".join(map(str, minimum))}"]'
    assert line in (ROOT / "pyproject.toml").read_text().splitlines()


@pytest.mark.parametrize("found", ["1.11.0", "1.11", "1.9", "0.12", "1", "unknown"])
def test_too_old(monkeypatch, found):
    monkeypatch.setattr(_require, "version", lambda name: found)
    with pytest.raises(ImportError, match=rf"pykeen>=1.11.1 is needed, {found} .*kernels\[extra"):
        require("pykeen", (1, 11, 1), extra="extra")


@pytest.mark.parametrize("found", ["1.11.1", "1.11.1.1", "1.11.2.dev0", "1.12rc1", "2.0+cpu"])
def test_new_enough(monkeypatch, found):
    monkeypatch.setattr(_require, "version", lambda name: found)
    require("pykeen", (1, 11, 1), extra="pykeen")
