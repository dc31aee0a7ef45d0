"""``python -m bench``: every part on tiny sizes, with its rows and files. No time is asserted."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, TypeAlias

import pandas as pd
import pytest

from bench import __main__ as command_line
from bench import measure, results, rivals, steps, trainers
from bench.__main__ import main
from bench.inputs import CHOICES, GRADIENTS, SIMILARITIES, Shape
from bench.results import RATIO, SPEED, TIME, UNITS
from bench.rivals import PHASES, RIVALS
from bench.trainers import Task
from tests.ops.support import run_python

Capture: TypeAlias = pytest.CaptureFixture[str]
Patch: TypeAlias = pytest.MonkeyPatch
TINY = Shape().tiny()
TASK = Task().tiny()
# Compiling takes a minute and is tested separately.
NAMES = [r.name for r in RIVALS if r.unavailable(TINY) is None and r.name != "compiled-emu"]


@pytest.fixture(autouse=True)
def _apart(tmp_path: Path, monkeypatch: Patch, threads: None) -> None:
    monkeypatch.setattr(results, "FOLDER", tmp_path / "committed")
    results.FOLDER.mkdir()


def bench(command: str, *options: object, folder: Path | None = None) -> pd.DataFrame:
    """The rows that a tiny run adds."""
    given = [*command.split(), *map(str, options), "--tiny", "--threads=1", "--no-memory"]
    where = "--no-save" if folder is None else f"--results={folder}"
    assert main([*given, where]) == 0
    rows = results.read(folder or results.FOLDER)
    assert (rows["unit"] == rows["what"].map(UNITS)).all()
    assert ((rows["q20"] <= rows["median"]) & (rows["median"] <= rows["q80"])).all()
    assert (rows["median"] > 0).all()
    assert ((rows["base"] != "") == (rows["what"] == RATIO)).all()
    return rows


def pairs(rows: pd.DataFrame, *columns: str) -> list[tuple[Any, ...]]:
    return list(rows[list(columns)].itertuples(index=False, name=None))


def test_steps_of_every_rival(tmp_path: Path, capsys: Capture) -> None:
    rows = bench("steps --rivals", *NAMES, "--phases", *PHASES, folder=tmp_path)
    for phase in PHASES:
        measured = [name for name in NAMES if phase in rivals.BY_NAME[name].phases]
        expected = [(name, what) for name in measured for what in (TIME, RATIO)]
        here = rows[rows["phase"] == phase]
        assert pairs(here, "rival", "what") == expected
    out = capsys.readouterr().out
    assert all(f"| {rivals.BY_NAME[name].title} " in out for name in NAMES)
    # A second run appends to the same file.
    again = bench("steps --rivals fused-emu", folder=tmp_path)
    assert again[:-2].equals(rows)
    assert len(list(tmp_path.glob("*.csv"))) == 1


@pytest.mark.parametrize("option", ["similarity", "dtype", "gradient"])
def test_steps_of_every_kind(option: str, tmp_path: Path, capsys: Capture) -> None:
    names = ["fused-emu", "eager-emu", "eager-softmax", "gather-scatter"]
    rows = bench(f"steps --{option}", *CHOICES[option], "--rivals", *names, folder=tmp_path)
    timed = rows[rows["what"] == TIME].groupby(option)["rival"].agg(list)
    assert len(timed) == {"similarity": 6, "dtype": 3, "gradient": 2}[option]
    assert all(found[:3] == names[:3] for found in timed)
    skipped = "skipped: gather-scatter: supports only float32" in capsys.readouterr().out
    assert skipped == (option != "similarity")


@pytest.mark.slow
def test_the_compiled_rival_runs(tmp_path: Path) -> None:
    if (reason := rivals.BY_NAME["compiled-emu"].unavailable(TINY)) is not None:
        pytest.skip(reason)
    rows = bench("steps --rivals compiled-emu", folder=tmp_path)
    assert list(rows["what"]) == [TIME]


def test_several_sizes_and_scales(tmp_path: Path, capsys: Capture) -> None:
    sizes = "--batch 3 --negatives 4 6 --dim 5 --entities 6 7 --rounds 1 --no-memory"
    options = ["--rivals", "fused-emu", "--results", str(tmp_path / "sizes")]
    assert main(["steps", *sizes.split(), *options]) == 0
    rows = results.read(tmp_path / "sizes")
    expected = [(3, k, 5, n) for k in (4, 6) for n in (6, 7)]
    assert pairs(rows[rows["what"] == TIME], "B", "K", "D", "N") == expected
    folder = tmp_path / "scale"
    rows = bench("scale --axes N D --rivals fused-emu", folder=folder)
    for axis in "ND":
        timed = rows[(rows["family"] == f"scale-{axis}") & (rows["what"] == TIME)]
        assert pairs(timed, axis, "gradient") == [(n, g) for n in (5, 10) for g in GRADIENTS]
    capsys.readouterr()
    assert main(["report", "--results", str(folder)]) == 0
    lines = [line.split("|") for line in capsys.readouterr().out.splitlines()]
    first = [cells[1].strip() for cells in lines if len(cells) > 1 and cells[1][0] != ":"]
    assert first == ["N", "5", "10", "5", "10", "D", "5", "10", "5", "10"]


def test_a_rival_that_does_not_fit_is_left_out(monkeypatch: Patch) -> None:
    shape = Shape(entities=1_000_000)
    monkeypatch.setattr(measure, "free_bytes", lambda device: 1.5 * shape.table_bytes)
    fused = rivals.BY_NAME["fused-emu"]
    assert "GiB are free" in (fused.unavailable(shape) or "")
    assert fused.unavailable(shape.replace(gradient="sparse")) is None  # needs the table only
    assert "GiB are free" in (trainers.TRAINERS[0].unavailable(Task(graph="zipf")) or "")


def test_settings_of_a_gpu_run_on_a_cpu(tmp_path: Path, monkeypatch: Patch) -> None:
    every = list(steps.gpu_settings(argparse.Namespace(quick=False)))
    assert len({setting.shape for setting in every}) == len(every) == 36 + 10
    monkeypatch.setattr(steps, "DEFAULT", ("fused-emu",))
    rows = bench("gpu --device cpu --quick", folder=tmp_path)
    assert set(rows["similarity"]) == set(SIMILARITIES)


def test_all_parts(tmp_path: Path, capsys: Capture, monkeypatch: Patch) -> None:
    parts = tuple(
        (*part, "--rivals", "fused-emu") if part[0] in ("steps", "scale") else part
        for part in command_line.DEFAULTS["cpu"]
        if part[0] != "train"  # tested separately
    )
    monkeypatch.setitem(command_line.DEFAULTS, "cpu", (*parts, ("captured",)))
    rows = bench("", folder=tmp_path)
    assert set(rows["family"]) == {"steps", "closed", "scale-N", "captured"}
    out = capsys.readouterr().out
    assert "EMU in closed form, all entities" in out.partition("== all")[2]


def test_without_pandas_rows_are_saved(tmp_path: Path, capsys: Capture, monkeypatch: Patch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    options = ["--tiny", "--no-memory", "--results", str(tmp_path)]
    assert main(["steps", "--rivals", "fused-emu", *options]) == 0
    out = capsys.readouterr().out
    assert "appended 2 rows" in out
    assert "no tables of 2 rows" in out


def test_micro_benchmarks_run() -> None:
    done = run_python("-m", "pytest", "-q", "bench", "--benchmark-disable", "-pno:cacheprovider")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("model", ["DistMult", "ComplEx", "TransE", "RotatE", "PairRE"])
def test_every_trainer_trains(model: str, gradient: str) -> None:
    task = TASK.replace(model=model, gradient=gradient)
    names = [n for n in trainers.BY_NAME if model != "PairRE" or n.startswith("trainer-")]
    for name in names:
        trainer = trainers.BY_NAME[name]
        if (reason := trainer.unavailable(task)) is not None:
            assert "not installed" in reason or reason == "has no RotatE"
            continue
        can_be_sparse = model != "PairRE" and not trainer.name.startswith(("pykeen", "torchkge"))
        assert trainer.adapt(task).sparse == (task.sparse and can_be_sparse)
        run = trainer.start(trainer.adapt(task), task.load())
        assert run(2) > 0 < run(1)


def test_rows_of_trainers(tmp_path: Path) -> None:
    rows = bench("train --gradient sparse", folder=tmp_path)
    names = [t.name for t in trainers.TRAINERS if t.unavailable(TASK) is None]
    expected = [(name, what) for name in names for what in (TIME, SPEED, RATIO)]
    assert pairs(rows, "rival", "what") == expected
    assert set(pairs(rows, "family", "graph", "N", "D")) == {("train", "zipf", 50, 20)}
    dense = set(rows["rival"][rows["gradient"] == "dense"])
    assert dense == set(names) & {"pykeen", "pykeen-emu", "torchkge"}
    times, speeds = (rows[rows["what"] == what].set_index("rival") for what in (TIME, SPEED))
    assert list(speeds["median"]) == pytest.approx(list(1000 * 8 / times["median"]), rel=1e-4)
    assert list(speeds["q20"]) == pytest.approx(list(1000 * 8 / times["q80"]), rel=1e-4)


def test_memory_of_fresh_processes() -> None:
    shape = TINY.replace(batch=100, negatives=400, dim=100, entities=5000)
    rows = 4 * shape.batch * shape.negatives * shape.dim / measure.MIB  # and their gradient
    assert 2 * rows < measure.peak(steps.for_memory, "eager-softmax", shape, 1) < 6 * rows
    task = TASK.replace(entities=100_000, dim=10)
    table = 4 * task.entities * task.dim / measure.MIB
    peak = measure.peak(trainers.for_memory, "trainer-emu", task, 1)
    assert 3 * table < peak < 20 * table
    sparse = measure.peak(trainers.for_memory, "fused-loop-emu", task.replace(gradient="sparse"), 1)
    assert 1.8 * table < sparse < peak  # no dense gradient; the system counts pages in batches
    with pytest.raises(KeyError, match="no-such-rival"):
        measure.peak(steps.for_memory, "no-such-rival", shape, 1)


def test_a_missing_dataset_is_skipped(monkeypatch: Patch, tmp_path: Path, capsys: Capture) -> None:
    monkeypatch.setenv("EMU_KERNELS_DATA", str(tmp_path))
    assert main(["train", "--rivals", "loop-emu", "--no-save"]) == 1
    assert "skipped: DistMult on FB15k-237, " in capsys.readouterr().out


def test_files_of_another_form_are_refused(tmp_path: Path, capsys: Capture) -> None:
    rows = bench("steps --rivals fused-emu", folder=tmp_path)
    (path,) = tmp_path.glob("*.csv")
    text = path.read_text()
    path.write_text(f"{text}{text.splitlines()[1].replace(',8,5,20,', ',many,5,20,')}\n")
    with pytest.raises(ValueError, match=r"csv: .*many"):
        results.read(tmp_path)
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="expected the columns date, commit"):
        results.append(tmp_path, rows.to_dict("records"))
    assert path.read_text() == "a,b\n1,2\n"
    assert main(["report", "--results", str(tmp_path)]) == 1
    assert "error: " in capsys.readouterr().err
