"""The benchmark of a large graph, on a small one."""

from __future__ import annotations

import csv

import pytest

from bench.__main__ import main
from bench.large import WHOLE


@pytest.mark.slow
def test_each_part_is_measured(tmp_path):
    options = ["--entities=2000", "--triples=9000", "--steps=20", "--ranked=5", "--threads=1"]
    rows = tmp_path / "rows"
    assert main(["large", *options, f"--folder={tmp_path}", f"--results={rows}"]) == 0
    assert list(tmp_path.iterdir()) == [rows]  # nothing of the run is left
    (file,) = rows.iterdir()
    with file.open() as lines:
        measured = {row["part"]: row for row in csv.DictReader(lines)}
    assert next(iter(measured)) == "read"
    assert [*measured][-1] == "predict many"
    assert all(float(row["seconds"]) > 0 for row in measured.values())
    assert all(float(row["peak_mib"]) > 50 for row in measured.values())  # torch itself
    steps, whole = (float(measured[part]["seconds"]) for part in ("steps of these", WHOLE))
    assert 0 < steps < whole
    assert "steps, 250 triples a set of negatives" in measured
