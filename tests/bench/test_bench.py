"""``python -m bench``, its rows and its tables. No time is asserted."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest

from bench import memory, results
from bench.__main__ import main
from bench.inputs import TINY, Shape
from bench.report import MARKERS
from bench.results import COLUMNS, MEMORY, RATIO, TIME, Row
from bench.rivals import OURS, RIVALS
from emu_kernels.reference import SIMILARITIES
from tests.ops.support import run_python

RUNNABLE = [rival.name for rival in RIVALS if rival.unavailable() is None]


def bench(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def row(**changes: object) -> Row:
    base = Row(
        "2026-01-02T03:04:05+00:00", "0123456789ab", TIME, "fused-emu", "dot", 1000, 256, 100,
        14541, "float32", 2, 12.5, 12.0, 13.25, "ms", "Some CPU @ 2 GHz, 2 cores", "avx2", "0.1.0",
        "2.13.0", "3.11.7",
    )  # fmt: skip
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


def well_formed(row: Row) -> None:
    assert row.what in (TIME, RATIO, MEMORY)
    assert row.unit == {TIME: "ms", RATIO: "x", MEMORY: "MiB"}[row.what]
    assert Shape(row.B, row.K, row.D, row.N, row.similarity) == TINY
    assert row.dtype == "float32"
    assert row.threads >= 1
    assert 0 <= row.q20 <= row.median <= row.q80 < math.inf
    assert row.median > 0 or row.what == MEMORY
    for text in (row.date, row.commit, row.device, row.instruction_set, row.torch, row.python):
        assert text


def test_every_rival_writes_its_rows(tmp_path, capsys):
    assert bench("--tiny", "--memory-runs", 0, "--results", tmp_path) == 0
    rows = results.read(tmp_path)
    assert [(r.rival, r.what) for r in rows] == [(n, w) for n in RUNNABLE for w in (TIME, RATIO)]
    for r in rows:
        well_formed(r)
    assert len({r.date for r in rows}) == 1
    ours = next(r for r in rows if r.rival == OURS.name and r.what == RATIO)
    assert (ours.q20, ours.median, ours.q80) == (1, 1, 1)
    out = capsys.readouterr().out
    for rival in RIVALS:
        assert (f"| {rival.title} " in out) == (rival.name in RUNNABLE)
        assert (f"skipped: {rival.name}: " in out) == (rival.name not in RUNNABLE)

    # A second run adds rows to the same file.
    assert bench("--tiny", "--memory-runs", 0, "--results", tmp_path, "--rivals", OURS.name) == 0
    assert results.read(tmp_path)[: len(rows)] == rows
    assert len(results.read(tmp_path)) == len(rows) + 2
    assert [p.name for p in tmp_path.iterdir()] == [f"{results.slug(results.device())}.csv"]


def test_memory_is_measured_in_a_process_of_its_own(tmp_path):
    reason = memory.unavailable()
    if reason is not None:
        pytest.skip(reason)
    options = ("--rivals", "eager-softmax", "--memory-runs", 1, "--results", tmp_path)
    assert bench("--tiny", *options) == 0
    rows = results.read(tmp_path)
    assert [r.what for r in rows] == [TIME, MEMORY]  # no ratio without ours
    well_formed(rows[-1])


def test_peak_memory_counts_what_a_step_allocates():
    """The (B, K, D) rows and their gradient, at the least: 2 × 16 MB of a 2 MB table's."""
    reason = memory.unavailable()
    if reason is not None:
        pytest.skip(reason)
    shape = dataclasses.replace(TINY, batch=100, negatives=400, dim=100, entities=5000)
    rows = 4 * shape.batch * shape.negatives * shape.dim
    peak = memory.peak("eager-softmax", shape, threads=1)
    assert 2 * rows < peak < 6 * rows


def test_memory_of_a_process_that_fails():
    with pytest.raises(RuntimeError, match="no-such-rival"):
        memory.peak("no-such-rival", TINY, threads=1)


def test_no_save_and_tiny_leave_no_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "FOLDER", tmp_path / "kept")
    options = ("--tiny", "--memory-runs", 0, "--rivals", OURS.name)
    assert bench(*options) == 0  # a tiny run is saved only where it is told to be
    assert bench(*options, "--no-save", "--results", tmp_path / "other") == 0
    assert list(tmp_path.iterdir()) == []


def test_shapes_from_the_command_line(tmp_path):
    options = "--batch 3 --negatives 4 --dim 5 --entities 6 --rounds 1 --threads 1 --memory-runs 0"
    assert bench(*options.split(), "--rivals", OURS.name, "--results", tmp_path) == 0
    for r in results.read(tmp_path):
        assert (r.B, r.K, r.D, r.N, r.threads) == (3, 4, 5, 6, 1)


def test_rows_survive_the_file(tmp_path):
    rows = [row(), row(what=MEMORY, unit="MiB", rival="eager, “emu”"), row(device="Other, 1 core")]
    paths = results.append(tmp_path, rows)
    assert [p.name for p in paths] == ["some-cpu-2-ghz-2-cores.csv", "other-1-core.csv"]
    assert results.read(paths[0]) == rows[:2]
    assert results.read(paths[1]) == rows[2:]
    assert paths[0].read_text().splitlines()[0] == ",".join(COLUMNS)


def test_a_file_of_another_form_is_refused_and_kept(tmp_path, capsys):
    path = results.append(tmp_path, [row()])[0]
    path.write_text(path.read_text() + path.read_text().splitlines()[1].replace("12.5", "fast"))
    with pytest.raises(ValueError, match=r"line 3: could not convert string to float: 'fast'"):
        results.read(path)
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="expected the columns date, commit"):
        results.append(tmp_path, [row()])
    assert path.read_text() == "a,b\n1,2\n"
    assert bench("report", "--results", tmp_path) == 1
    assert "expected the columns" in capsys.readouterr().err


REPORT = """\
| forward + backward   |   median ms |   20–80 % |   × ours |   20–80 % |   peak MiB |
|:---------------------|------------:|----------:|---------:|----------:|-----------:|
| **EMU, fused**       |        12.5 | 12.0–13.2 |     1.00 | 1.00–1.00 |       9.00 |
| EMU, eager PyTorch   |         800 |   790–812 |     64.1 | 62.0–66.0 |          – |

dot, B=1000, K=256, D=100, N=14541, float32. Some CPU @ 2 GHz, 2 cores (2 threads, avx2); \
emu-kernels 0.1.0 (0123456789ab), torch 2.13.0, Python 3.11.7; 2026-01-02.
"""


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """Rows of an old run and of the one after it."""
    one = {"median": 1.0, "q20": 1.0, "q80": 1.0}
    eager = {"rival": "eager-emu", "instruction_set": "avx512"}
    old = [row(date="2026-01-01T00:00:00+00:00", median=99.0, q80=99.0)]
    new = [
        row(),
        row(what=RATIO, unit="x", **one),
        row(**eager, median=800.4, q20=790.0, q80=812.0),
        row(**eager, what=RATIO, unit="x", median=64.06, q20=62.0, q80=66.0),
        row(what=MEMORY, unit="MiB", median=9.0, q20=9.0, q80=9.0),
    ]
    return results.append(tmp_path, old + new)[0]


def test_report_is_the_latest_run_and_nothing_else(kept, capsys):
    assert bench("report", "--results", kept.parent) == 0
    assert capsys.readouterr().out == REPORT
    results.append(kept.parent, [row(B=8)])
    assert bench("report", "--results", kept) == 0
    out = capsys.readouterr().out
    assert out.startswith(REPORT)  # another shape has a table of its own
    assert "B=8, K=256" in out.removeprefix(REPORT)


def test_similarities_share_a_table(kept, capsys):
    for similarity in ("l1", "rotate"):
        options = {"similarity": similarity, "date": "2026-01-03T00:00:00+00:00"}
        results.append(kept.parent, [row(**options, median=21.0)])
        ratio = row(**options, rival="eager-emu", what=RATIO, unit="x", median=55.0)
        results.append(kept.parent, [ratio])
    assert bench("report", "--results", kept) == 0
    out = capsys.readouterr().out
    assert out.startswith(REPORT)
    for similarity in ("l1", "rotate"):
        assert f"| {similarity} " in out
    line = next(line for line in out.splitlines() if line.startswith("| l1 "))
    assert line.split("|")[2].strip() == "21.0"
    assert line.split("|")[4].strip() == "55.0"


def test_every_similarity_runs(tmp_path):
    options = ("--tiny", "--memory-runs", 0, "--results", tmp_path, "--rivals", OURS.name)
    assert bench(*options, "--similarity", "all") == 0
    assert {r.similarity for r in results.read(tmp_path)} == set(SIMILARITIES)


def test_report_into_a_file(kept, tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text(f"# before\n\n{MARKERS[0]}\nan old table\n{MARKERS[1]}\n\nafter\n")
    for _ in range(2):
        assert bench("report", "--results", kept, "--into", readme) == 0
        between = f"{MARKERS[0]}\n{REPORT}{MARKERS[1]}"
        assert readme.read_text() == f"# before\n\n{between}\n\nafter\n"
    readme.write_text("no markers\n")
    assert bench("report", "--results", kept, "--into", readme) == 1
    assert readme.read_text() == "no markers\n"
    assert MARKERS[0] in capsys.readouterr().err


def test_report_without_results(tmp_path, capsys):
    assert bench("report", "--results", tmp_path) == 1
    assert "python -m bench" in capsys.readouterr().err


def test_micro_benchmarks_run():
    done = run_python(
        "-m", "pytest", "-q", "bench", "--benchmark-disable", "-p", "no:cacheprovider"
    )
    assert done.returncode == 0, done.stdout + done.stderr
