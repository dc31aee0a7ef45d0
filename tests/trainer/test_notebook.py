"""The notebook of the docs, run as a reader runs it."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from emu_kernels.trainer.datasets import FOLDER_VARIABLE

FILE = Path(__file__).parents[2] / "docs/notebook.ipynb"
NUMBER = re.compile(r"[\d,]*\d(?:\.\d+)?(?:e[-+]\d+)?")


def printed(notebook: nbformat.NotebookNode) -> str:
    outputs = [x for cell in notebook.cells if cell.cell_type == "code" for x in cell.outputs]
    assert any("image/png" in x.get("data", {}) for x in outputs)
    return "".join(x.text for x in outputs if x.output_type == "stream" and x.name == "stdout")


@pytest.mark.slow
def test_it_prints_what_it_shows(data_folder, tmp_path, monkeypatch):
    """The same words, and MRRs that are close. Times and roundings depend on the machine."""
    shutil.unpack_archive(data_folder / "codex-s.tar.gz", tmp_path / "CoDEx-S")
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    notebook = nbformat.read(FILE, nbformat.NO_CONVERT)
    shown = printed(notebook)
    NotebookClient(notebook, kernel_name="python3", timeout=600).execute()
    now = printed(notebook)
    assert NUMBER.sub("0", now) == NUMBER.sub("0", shown)
    before, after = (re.findall(r"MRR (0\.\d+)", text) for text in (shown, now))
    assert len(before) == 3
    assert [*map(float, after)] == pytest.approx([*map(float, before)], abs=0.02)
