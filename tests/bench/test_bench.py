"""``python -m bench``, its rows and its tables. No time is asserted."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from bench import __main__ as command_line
from bench import gpu_tables, inputs, memory, results, rivals, scale, steps
from bench.__main__ import main
from bench.inputs import DTYPES, GRADIENTS, TINY, Shape
from bench.report import MARKERS
from bench.results import BANDWIDTH, COLUMNS, MEMORY, RATIO, SHARE, SPEED, TIME, UNITS, Row
from bench.rivals import OURS, PHASES, RIVALS, WHOLE
from emu_kernels.similarity import SIMILARITIES
from tests.ops.support import run_python

# Compiling takes a minute and has a test of its own.
NAMES = [r.name for r in RIVALS if r.unavailable(TINY) is None and r.name != "compiled-emu"]
QUICK = ("--tiny", "--memory-runs", 0, "--threads", 1)


def bench(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def row(**changes: object) -> Row:
    base = Row(
        date="2026-01-02T03:04:05+00:00", commit="0123456789ab", family="steps", what=TIME,
        rival="fused-emu", phase=WHOLE, base="", graph="", model="", optimizer="",
        similarity="dot", B=1000, K=256, D=100, N=14541, dtype="float32", gradient="dense",
        threads=2, median=12.5, q20=12.0, q80=13.25, unit="ms",
        device="Some CPU @ 2 GHz, 2 cores", instruction_set="avx2", library="",
        emu_kernels="0.1.0", torch="2.13.0", python="3.11.7",
    )  # fmt: skip
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


def well_formed(row: Row) -> None:
    assert row.unit == UNITS[row.what]
    assert row.threads >= 1
    assert 0 <= row.q20 <= row.median <= row.q80 < math.inf
    assert row.median > 0 or row.what == MEMORY
    assert (row.base != "") == (row.what == RATIO)
    for text in (row.date, row.commit, row.device, row.rival, row.phase, row.torch, row.python):
        assert text


@pytest.fixture(autouse=True)
def _keep_threads(threads: None) -> None:
    """The commands set torch's number of threads."""


@pytest.fixture(autouse=True)
def _no_committed_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "FOLDER", tmp_path / "committed")


# --- steps ----------------------------------------------------------------------------------------


def test_every_rival_writes_its_rows(tmp_path, capsys):
    options = ("steps", *QUICK, "--results", tmp_path, "--phases", *PHASES, "--rivals", *NAMES)
    assert bench(*options) == 0
    rows = results.read(tmp_path)
    for phase in PHASES:
        expected = [
            (name, what)
            for name in NAMES
            if phase in rivals.BY_NAME[name].phases
            for what in (TIME, RATIO, SHARE)
        ]
        found = [(r.rival, r.what) for r in rows if r.phase == phase]
        assert found == [*expected, (steps.COPY, BANDWIDTH)]
    for r in rows:
        well_formed(r)
        shape = Shape(r.B, r.K, r.D, r.N, r.similarity, r.dtype, r.gradient)
        assert (shape, r.family) == (TINY, "steps")
    assert len({r.date for r in rows}) == 1
    for ours in (r for r in rows if r.rival == OURS.name and r.what == RATIO):
        assert (ours.q20, ours.median, ours.q80) == (1, 1, 1)
    out = capsys.readouterr().out
    for name in NAMES:
        assert f"| {rivals.BY_NAME[name].title} " in out

    # A second run adds rows to the same file.
    assert bench("steps", *QUICK, "--results", tmp_path, "--rivals", OURS.name) == 0
    assert results.read(tmp_path)[: len(rows)] == rows
    assert len(results.read(tmp_path)) == len(rows) + 4
    assert [p.name for p in tmp_path.iterdir()] == [f"{results.slug(results.device())}.csv"]


@pytest.mark.parametrize(
    ("option", "values"),
    [("similarity", SIMILARITIES), ("dtype", DTYPES), ("gradient", GRADIENTS)],
    ids=["similarity", "dtype", "gradient"],
)
def test_every_kind_runs(option, values, tmp_path, capsys):
    names = [OURS.name, "eager-emu", "eager-softmax", "gather-scatter"]
    options = (*QUICK, "--results", tmp_path, "--rivals", *names, f"--{option}", "all")
    assert bench("steps", *options) == 0
    rows = results.read(tmp_path)
    for r in rows:
        well_formed(r)
    timed = [(getattr(r, option), r.rival) for r in rows if r.what == TIME]
    for name in names[:3]:
        assert [value for value, rival in timed if rival == name] == list(values)
    out = capsys.readouterr().out
    alone = option != "similarity"  # the bare movement of rows is of one dtype and gradient
    assert ("skipped: gather-scatter: is written for float32" in out) == alone


@pytest.mark.slow
def test_the_compiled_rival_runs(tmp_path):
    if (reason := rivals.BY_NAME["compiled-emu"].unavailable(TINY)) is not None:
        pytest.skip(reason)
    assert bench("steps", *QUICK, "--results", tmp_path, "--rivals", "compiled-emu") == 0
    assert [r.what for r in results.read(tmp_path)] == [TIME, SHARE, BANDWIDTH]


def test_compiling_is_not_for_sparse_gradients():
    reason = rivals.BY_NAME["compiled-emu"].unavailable(
        dataclasses.replace(TINY, gradient="sparse")
    )
    assert reason is not None
    assert "sparse" in reason


def test_several_sizes_are_each_measured(tmp_path):
    sizes = "--batch 3 --negatives 4 6 --dim 5 --entities 6 7 --rounds 1 --threads 1"
    options = (*sizes.split(), "--memory-runs", 0, "--rivals", OURS.name, "--results", tmp_path)
    assert bench("steps", *options) == 0
    timed = [r for r in results.read(tmp_path) if r.what == TIME]
    assert [(r.B, r.K, r.D, r.N) for r in timed] == [
        (3, 4, 5, 6), (3, 4, 5, 7), (3, 6, 5, 6), (3, 6, 5, 7),
    ]  # fmt: skip


def test_a_large_table_repeats_its_rows(monkeypatch):
    monkeypatch.setattr(inputs, "DISTINCT_ROWS", 4)
    table = inputs.make(Shape(batch=2, negatives=3, dim=5, entities=10)).table
    assert torch.equal(table[4:8], table[:4])
    assert torch.equal(table[8:], table[:2])
    assert len(table[:4].unique(dim=0)) == 4


def test_what_does_not_fit_is_left_out(monkeypatch):
    shape = Shape(entities=1_000_000)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 3 * shape.table_bytes // 2)
    chosen, reasons = steps.runnable([OURS.name], shape)
    assert chosen == []
    assert "GiB are free" in reasons[OURS.name]
    sparse = dataclasses.replace(shape, gradient="sparse")  # needs the table only
    assert [r.name for r in steps.runnable([OURS.name], sparse)[0]] == [OURS.name]


# --- memory ---------------------------------------------------------------------------------------


def test_memory_is_measured_in_a_process_of_its_own(tmp_path):
    if (reason := memory.unavailable()) is not None:
        pytest.skip(reason)
    options = ("--rivals", "eager-softmax", "--memory-runs", 1, "--results", tmp_path)
    assert bench("steps", "--tiny", *options) == 0
    rows = results.read(tmp_path)
    assert [r.what for r in rows] == [TIME, SHARE, BANDWIDTH, MEMORY]  # no ratio without ours
    well_formed(rows[-1])


def test_peak_memory_counts_what_a_step_allocates():
    """The (B, K, D) rows and their gradient, at the least: 2 × 16 MB of a 2 MB table's."""
    if (reason := memory.unavailable()) is not None:
        pytest.skip(reason)
    shape = dataclasses.replace(TINY, batch=100, negatives=400, dim=100, entities=5000)
    rows = 4 * shape.batch * shape.negatives * shape.dim
    peak = memory.peak(1, "step", "eager-softmax", dataclasses.asdict(shape))
    assert 2 * rows < peak < 6 * rows


def test_memory_of_a_process_that_fails():
    with pytest.raises(RuntimeError, match="no-such-rival"):
        memory.peak(1, "step", "no-such-rival", dataclasses.asdict(TINY))


# --- the other parts ------------------------------------------------------------------------------


def test_scale(tmp_path, capsys):
    options = (*QUICK, "--results", tmp_path, "--rivals", "fused-emu", "eager-emu")
    assert bench("scale", *options, "--axes", "N", "D") == 0
    rows = results.read(tmp_path)
    for axis in ("N", "D"):
        timed = [r for r in rows if r.family == scale.family(axis) and r.what == TIME]
        assert [(getattr(r, axis), r.gradient, r.rival) for r in timed] == [
            (size, gradient, name)
            for size in (5, 10)
            for gradient in GRADIENTS
            for name in ("fused-emu", "eager-emu")
        ]
    for r in rows:
        well_formed(r)
    assert "| N " in capsys.readouterr().out
    plots = tmp_path / "plots"
    assert bench("report", "--results", tmp_path) == 0
    assert [p.name.rpartition("-scale-")[2] for p in sorted(plots.iterdir())] == ["d.png", "n.png"]
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in plots.iterdir())
    assert "scale-n.png)" in capsys.readouterr().out


def test_values_belong_to_one_axis(capsys):
    assert bench("scale", *QUICK, "--axes", "N", "K", "--values", 5) == 1
    assert "single axis" in capsys.readouterr().err


def test_scale_at_full_size_is_what_it_says():
    shapes = scale.shapes("N", scale.VALUES["N"], GRADIENTS, "cpu")
    assert [(s.entities, s.gradient) for s in shapes[:2]] == [(10**4, g) for g in GRADIENTS]
    assert shapes[-1].entities == 10**7
    assert {(s.batch, s.negatives, s.dim) for s in shapes} == {(1000, 256, 100)}


def test_captured_without_a_gpu_is_the_plain_step(tmp_path):
    assert bench("captured", *QUICK, "--results", tmp_path) == 0
    rows = results.read(tmp_path)
    names = ["fused-emu", "fused-softmax", "eager-emu", "eager-softmax"]
    assert [(r.rival, r.what) for r in rows] == [
        (n, w) for n in names for w in (TIME, SPEED, RATIO)
    ]
    for r in rows:
        well_formed(r)


def test_the_gpu_settings_in_small(tmp_path, monkeypatch):
    small = gpu_tables.small

    def without_compiling(setting: gpu_tables.Setting, device: str) -> gpu_tables.Setting:
        found = small(setting, device)
        kept = tuple(name for name in found.rivals if name != "compiled-emu")
        return dataclasses.replace(found, rivals=kept)

    monkeypatch.setattr(gpu_tables, "small", without_compiling)
    options = (*QUICK, "--device", "cpu", "--results", tmp_path, "--quick")
    assert bench("gpu", *options, "--tables", "main", "similarities") == 0
    rows = [r for r in results.read(tmp_path) if r.what == TIME and r.phase == WHOLE]
    assert {r.similarity for r in rows} == set(SIMILARITIES)
    assert {r.dtype for r in rows} == {"float32", "bfloat16"}
    assert {r.gradient for r in rows} == set(GRADIENTS)


def test_the_gpu_settings_are_those_of_the_goals():
    settings = gpu_tables.main_table(quick=False)
    shapes = {
        (s.shape.negatives, s.shape.dim, s.shape.entities, s.shape.gradient, s.shape.dtype)
        for s in settings
    }
    assert shapes == {
        (k, d, n, g, t)
        for k in (64, 256, 1024)
        for d in (100, 512, 1000)
        for n, g in ((14541, "dense"), (2_500_000, "sparse"))
        for t in ("float32", "bfloat16")
    }
    assert {s.shape.batch for s in settings} == {1024}
    every = {"eager-emu", "compiled-emu", "eager-softmax", "fused-emu-triton", "fused-emu-cuda"}
    assert all(every <= set(s.rivals) and s.phases == PHASES for s in settings)
    of_each = gpu_tables.similarities(quick=False)
    assert {(s.shape.negatives, s.shape.dim) for s in of_each} == {(256, 512)}
    assert {s.shape.similarity for s in of_each} == set(SIMILARITIES) - {"dot"}
    plans = gpu_tables.plans(quick=False)
    assert {s.shape.entities for s in plans} == {14541, 2_500_000}
    assert {(s.shape.gradient, s.family) for s in plans} == {("dense", "plans")}
    assert {n for s in plans for n in s.rivals} == {
        f"fused-emu-{backend}-{plan}" for backend in ("cuda", "triton")
        for plan in ("segments", "atomics")
    }  # fmt: skip


def test_everything_in_small(tmp_path, capsys, monkeypatch):
    """Without a command: the list, then each part, then all tables."""
    parts = tuple(
        (*part, "--rivals", "fused-emu") if part[0] in ("steps", "scale") else part
        for part in command_line.DEFAULTS["cpu"]
        if part[0] != "train"  # tested on its own
    )
    monkeypatch.setitem(command_line.DEFAULTS, "cpu", parts)
    assert bench(*QUICK, "--results", tmp_path) == 0
    out = capsys.readouterr().out
    assert "fused-emu                  can run" in out
    families = {r.family for r in results.read(tmp_path)}
    assert families == {"steps", "scale-N", "sampling"}
    assert "walks of 3 hops" in out.partition("== all")[2]


def test_no_gpu_is_said(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert bench("steps", *QUICK, "--device", "cuda") == 1
    assert "error: " in capsys.readouterr().err


def test_no_save_and_tiny_leave_no_rows(tmp_path):
    options = ("steps", *QUICK, "--rivals", OURS.name)
    assert bench(*options, "--results", results.FOLDER) == 0  # tiny runs are not kept there
    assert bench(*options, "--no-save", "--results", tmp_path / "other") == 0
    assert list(tmp_path.iterdir()) == []


# --- rows and files -------------------------------------------------------------------------------


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


def test_the_committed_rows_can_be_read():
    folder = Path(results.__file__).with_name("results")
    rows = results.read(folder)
    assert rows
    for r in rows:
        assert r.unit == UNITS[r.what]


# --- the report -----------------------------------------------------------------------------------


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
    one = {"median": 1.0, "q20": 1.0, "q80": 1.0, "base": OURS.name}
    eager = {"rival": "eager-emu", "instruction_set": "avx512"}
    old = [row(date="2026-01-01T00:00:00+00:00", median=99.0, q80=99.0)]
    new = [
        row(),
        row(what=RATIO, unit="x", **one),
        row(**eager, median=800.4, q20=790.0, q80=812.0),
        row(**eager, what=RATIO, unit="x", base=OURS.name, median=64.06, q20=62.0, q80=66.0),
        row(what=MEMORY, unit="MiB", median=9.0, q20=9.0, q80=9.0),
    ]
    return results.append(tmp_path, old + new)[0]


def test_report_is_the_latest_run_and_nothing_else(kept, capsys):
    assert bench("report", "--results", kept.parent) == 0
    assert capsys.readouterr().out == REPORT
    results.append(kept.parent, [row(B=8)])
    assert bench("report", "--results", kept) == 0
    out = capsys.readouterr().out
    assert out.startswith(REPORT)  # another shape has a line in a table of its own
    assert "B=8, K=256" in out.removeprefix(REPORT)


def test_variations_share_a_table(kept, capsys):
    for similarity in ("l1", "rotate"):
        options = {"similarity": similarity, "date": "2026-01-03T00:00:00+00:00"}
        results.append(kept.parent, [row(**options, median=21.0)])
        ratio = row(**options, rival="eager-emu", what=RATIO, unit="x", base="fused-emu", median=55)
        results.append(kept.parent, [ratio])
    results.append(kept.parent, [row(gradient="sparse", median=33.0)])
    assert bench("report", "--results", kept) == 0
    out = capsys.readouterr().out
    assert out.startswith(REPORT)
    cells = [[c.strip() for c in line.split("|")[1:-1]] for line in out.splitlines() if "|" in line]
    assert ["l1", "dense", "21.0"] in [c[:3] for c in cells]
    assert ["rotate", "dense", "21.0"] in [c[:3] for c in cells]
    assert ["dot", "sparse", "33.0"] in [c[:3] for c in cells]
    assert next(c for c in cells if c[0] == "l1")[4] == "55.0"


def test_a_gpu_has_a_line_for_each_backend(tmp_path, capsys):
    common = {"device": "Some GPU", "instruction_set": "sm_90", "B": 1024, "D": 512}
    rows = []
    for backend, median in (("cuda", 2.0), ("triton", 4.0)):
        ours = {"rival": f"fused-emu-{backend}", **common}
        whole = {"median": median, "q20": median, "q80": median}
        rows += [
            row(**ours, **whole),
            row(**ours, phase="forward", median=0.5, q20=0.5, q80=0.5),
            row(**ours, what=SHARE, unit="share", median=0.65, q20=0.6, q80=0.7),
            row(**ours, what=MEMORY, unit="MiB", median=31.4, q20=31.4, q80=31.4),
        ]
    rows.append(row(**common, rival="eager-emu", median=20.0, q20=20.0, q80=20.0))
    results.append(tmp_path, rows)
    assert bench("report", "--results", tmp_path) == 0
    out = capsys.readouterr().out
    cells = [[c.strip() for c in line.split("|")[1:-1]] for line in out.splitlines() if "|" in line]
    header, first, second = cells[0], cells[2], cells[3]
    assert [dict(zip(header, c, strict=True))["ours"] for c in (first, second)] == [
        "cuda",
        "triton",
    ]
    assert [dict(zip(header, c, strict=True))["eager EMU ×"] for c in (first, second)] == [
        "10.0", "5.00",
    ]  # fmt: skip
    # 31.4 MiB less a dense gradient of 14541 × 512 × 4 bytes
    assert dict(zip(header, first, strict=True))["peak MiB"] == "3.00"
    assert "65 %" in first


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


def test_report_of_some_parts(kept, capsys):
    results.append(kept.parent, [row(family="scale-N", N=5), row(family="plans")])
    assert bench("report", "--results", kept, "--parts", "steps", "--no-plots") == 0
    assert capsys.readouterr().out == REPORT
    assert bench("report", "--results", kept, "--parts", "train") == 1
    assert "no results of train" in capsys.readouterr().err


def test_report_of_one_graph(kept, capsys):
    training = {"family": "train", "phase": "training step", "rival": "trainer-emu"}
    for graph in ("WN18RR", "nations"):
        results.append(kept.parent, [row(**training, model="DistMult", graph=graph)])
    assert bench("report", "--results", kept, "--parts", "train:WN18RR", "--no-plots") == 0
    out = capsys.readouterr().out
    assert "DistMult on WN18RR" in out
    assert "nations" not in out
    assert "dot, B=" not in out


def test_report_without_results(tmp_path, capsys):
    assert bench("report", "--results", tmp_path) == 1
    assert "python -m bench" in capsys.readouterr().err


def test_micro_benchmarks_run():
    done = run_python(
        "-m", "pytest", "-q", "bench", "--benchmark-disable", "-p", "no:cacheprovider"
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_copy_without_git_is_told_its_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "ROOT", tmp_path)
    monkeypatch.delenv("BENCH_COMMIT", raising=False)
    assert results.commit() == "unknown"
    monkeypatch.setenv("BENCH_COMMIT", "0123456789ab")
    assert results.commit() == "0123456789ab"
