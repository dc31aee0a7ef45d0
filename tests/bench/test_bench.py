"""``python -m bench``: every part on tiny sizes; rivals compute the same. No time is asserted."""

from __future__ import annotations

import importlib.util
import itertools
import re
import shlex
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from bench import __main__ as command_line
from bench import eager, measure, report, results, rivals, steps, trainers
from bench.__main__ import main
from bench.inputs import CHOICES, GRADIENTS, SIMILARITIES, Shape, make
from bench.results import MEMORY, RATIO, SPEED, TIME, UNITS
from bench.rivals import EMU, PHASES, WHOLE
from emu_kernels import backends, fused_emu_loss, fused_softmax_loss
from emu_kernels.mask import mutation_mask, rate_to_threshold
from tests.ops.support import Inputs, assert_agree, evaluate, run_python

TINY = Shape().tiny()
TASK = trainers.Task().tiny()
FUSED = rivals.BY_NAME["fused-emu"]
# Compiling takes a minute and is tested separately.
NAMES = [n for n in rivals.DEFAULT if n != "compiled-emu"]
NAMES = [n for n in NAMES if rivals.BY_NAME[n].unavailable(TINY) is None]


pytestmark = pytest.mark.usefixtures("threads")


def bench(command: str, folder: Path) -> pd.DataFrame:
    """The rows that a tiny run adds."""
    given = f"{command} --tiny --threads=1 --no-memory --results={folder}"
    assert main(shlex.split(given)) == 0
    rows = results.read(folder)
    assert (rows["unit"] == rows["what"].map(UNITS)).all()
    assert ((rows["q20"] <= rows["median"]) & (rows["median"] <= rows["q80"])).all()
    assert (rows["median"] > 0).all()
    assert ((rows["base"] != "") == (rows["what"] == RATIO)).all()
    return rows


def pairs(rows: pd.DataFrame, *columns: str) -> list[tuple[Any, ...]]:
    return list(rows[list(columns)].itertuples(index=False, name=None))


def test_steps_of_every_rival(tmp_path: Path, capsys) -> None:
    phases = "forward backward 'forward + backward'"
    rows = bench(f"steps --rivals {' '.join(NAMES)} --phases {phases}", tmp_path)
    for phase in PHASES:
        measured = [name for name in NAMES if phase in rivals.BY_NAME[name].phases]
        expected = [(name, what) for name in measured for what in (TIME, RATIO)]
        assert pairs(rows[rows["phase"] == phase], "rival", "what") == expected
    out = capsys.readouterr().out
    assert all(f"| {rivals.BY_NAME[name].title} " in out for name in NAMES)
    again = bench("steps --rivals fused-emu", tmp_path)
    assert again[:-2].equals(rows)  # they are appended


@pytest.mark.parametrize("option", ["similarity", "dtype", "gradient"])
def test_steps_of_every_kind(option: str, tmp_path: Path, capsys) -> None:
    names = "fused-emu eager-emu eager-softmax gather-scatter"
    command = f"steps --{option} {' '.join(CHOICES[option])} --rivals {names}"
    rows = bench(command, tmp_path)
    timed = rows[rows["what"] == TIME].groupby(option)["rival"].agg(list)
    assert len(timed) == {"similarity": 6, "dtype": 3, "gradient": 2}[option]
    assert all(found[:3] == names.split()[:3] for found in timed)
    skipped = "skipped: gather-scatter: supports only float32" in capsys.readouterr().out
    assert skipped == (option != "similarity")


@pytest.mark.slow
@pytest.mark.skipif(bool(rivals.BY_NAME["compiled-emu"].unavailable(TINY)), reason="no compiler")
def test_the_compiled_rival_runs(tmp_path: Path) -> None:
    assert list(bench("steps --rivals compiled-emu", tmp_path)["what"]) == [TIME]


@pytest.mark.slow
def test_several_sizes_and_scales(tmp_path: Path, capsys) -> None:
    sizes = "--batch 3 --negatives 4 5 --dim 5 --entities 6 7"
    rows = bench(f"steps --rivals fused-emu {sizes}", tmp_path / "sizes")
    found = pairs(rows[rows["what"] == TIME], "B", "K", "D", "N")
    assert found == [(3, 4, 5, 6), (3, 4, 5, 7), (3, 5, 5, 6), (3, 5, 5, 7)]
    rows = bench("scale --axes N D --rivals fused-emu", tmp_path / "scale")
    for axis in "ND":
        timed = rows[(rows["family"] == f"scale-{axis}") & (rows["what"] == TIME)]
        assert pairs(timed, axis, "gradient") == [(n, g) for n in (3, 5) for g in GRADIENTS]
    capsys.readouterr()
    assert main(["report", "--results", str(tmp_path / "scale")]) == 0
    first = [line.split()[1] for line in capsys.readouterr().out.splitlines() if line[:2] == "| "]
    assert first == ["N", "3", "5", "3", "5", "D", "3", "5", "3", "5"]


def test_a_rival_that_does_not_fit_is_left_out(monkeypatch) -> None:
    shape = Shape(entities=1_000_000)
    monkeypatch.setattr(measure, "free_bytes", lambda _: 6 * shape.entities * shape.dim)
    assert "GiB are free" in (FUSED.unavailable(shape) or "")
    assert FUSED.unavailable(shape.replace(gradient="sparse")) is None  # needs the table only
    assert "GiB are free" in (trainers.TRAINERS[0].unavailable(trainers.Task(graph="zipf")) or "")


def test_all_parts(tmp_path: Path, capsys, monkeypatch) -> None:
    commands, parse = command_line.CONTENTS, command_line._parser().parse_args
    of_gpu = [x.shape for c in commands["gpu"] for x in steps.of_steps(parse(shlex.split(c)))]
    assert len({*of_gpu}) == len(of_gpu) == 36 + 10
    parts = [c for c in commands["all on cpu"] if not c.startswith("train")]  # tested separately
    monkeypatch.setitem(commands, "all on cpu", [*parts, "captured", "kernels", "gpu --quick"])
    monkeypatch.setattr(command_line, "CONTENTS", {
        name: [f"{c} --rivals fused-emu" if c.startswith(("steps", "scale")) else c for c in parts]
        for name, parts in commands.items()
    })  # fmt: skip
    rows = bench("", tmp_path)
    assert set(rows["family"]) == {"steps", "closed", "scale-N", "captured", "kernels"}
    assert set(rows["phase"][rows["family"] == "kernels"]) == {*rivals.OPERATORS}
    assert set(rows["similarity"]) == {*SIMILARITIES}
    assert "EMU in closed form, all entities" in capsys.readouterr().out


def test_without_pandas_rows_are_saved(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    options = f"steps --rivals fused-emu --tiny --no-memory --results {tmp_path}"
    assert main(options.split()) == 0
    assert re.search("appended 2 rows.*no tables of 2 rows", capsys.readouterr().out, re.DOTALL)


@pytest.mark.slow
def test_micro_benchmarks_run() -> None:
    done = run_python("-m", "pytest", "-q", "bench", "--benchmark-disable", "-pno:cacheprovider")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("model", ["DistMult", "ComplEx", "TransE", "RotatE", "PairRE"])
def test_every_trainer_trains(model: str, gradient: str) -> None:
    task = TASK.replace(model=model, gradient=gradient)
    for trainer in trainers.TRAINERS if model != "PairRE" else trainers.TRAINERS[:2]:
        if (reason := trainer.unavailable(task)) is not None:
            assert "not installed" in reason or reason == "has no RotatE"
            continue
        can_be_sparse = model != "PairRE" and not trainer.name.startswith(("pykeen", "torchkge"))
        assert trainer.adapt(task).sparse == (task.sparse and can_be_sparse)
        run = trainer.train(trainer.adapt(task), task.load()[1])
        assert run(2) > 0 < run(1)


def test_rows_of_trainers(tmp_path: Path) -> None:
    rows = bench("train --gradient sparse", tmp_path)
    names = [t.name for t in trainers.TRAINERS if t.unavailable(TASK) is None]
    expected = [(name, what) for name in names for what in (TIME, SPEED, RATIO)]
    assert pairs(rows, "rival", "what") == expected
    assert set(pairs(rows, "family", "graph", "N", "D")) == {("train", "zipf", 50, 20)}
    dense = set(rows["rival"][rows["gradient"] == "dense"])
    assert dense == set(names) & {"pykeen", "pykeen-emu", "torchkge"}
    times, speeds = (rows[rows["what"] == what].set_index("rival") for what in (TIME, SPEED))
    assert (speeds["q80"] * times["q80"] > 7999).all()  # of a batch of 8


@pytest.mark.slow
def test_memory_of_fresh_processes() -> None:
    shape = TINY.replace(batch=100, negatives=400, dim=100, entities=5000)
    rows = 4 * shape.batch * shape.negatives * shape.dim / measure.MIB  # and their gradient
    softmax = rivals.BY_NAME["eager-softmax"]
    assert 2 * rows < measure.peak(partial(steps.steps_of, softmax, WHOLE), shape, 1) < 6 * rows
    task = TASK.replace(entities=100_000, dim=10)
    table = 4 * task.entities * task.dim / measure.MIB
    loop = partial(steps.steps_of, trainers.BY_NAME["fused-loop-emu"], "")
    assert 2.8 * table < (peak := measure.peak(loop, task, 1)) < 20 * table
    sparse = measure.peak(loop, task.replace(gradient="sparse"), 1)
    assert 1.8 * table < sparse < peak  # no dense gradient; the system counts pages in batches


def test_a_missing_dataset_is_skipped(monkeypatch, tmp_path: Path, capsys) -> None:
    monkeypatch.setenv("EMU_KERNELS_DATA", str(tmp_path))
    assert main(["train", "--rivals", "loop-emu"]) == 1
    assert "skipped: DistMult on FB15k-237, " in capsys.readouterr().out


def test_bad_files_and_numbers_are_refused(tmp_path: Path, capsys) -> None:
    rows = bench("steps --rivals fused-emu", tmp_path)
    (path,) = tmp_path.glob("*.csv")
    path.write_text(path.read_text().replace(",8,5,20,", ",many,5,20,"))
    with pytest.raises(ValueError, match=r"csv: .*many"):
        results.read(tmp_path)
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="expected the columns date, commit"):
        results.append(tmp_path, rows.to_dict("records"))
    assert path.read_text() == "a,b\n1,2\n"
    assert main(["report", "--results", str(tmp_path)]) == 1
    assert "error: " in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["steps", "--rounds", "0"])
    assert "--rounds: expected a number of at least 1, got 0" in capsys.readouterr().err


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_eager_losses_are_the_fused_ones(similarity, backend, device) -> None:
    """Both EMU losses with the same masks."""
    inputs = Inputs(*make(TINY)).to(device)
    threshold = rate_to_threshold(EMU["mutation_rate"])
    sizes = (TINY.batch, TINY.negatives, TINY.dim)
    mask = mutation_mask(*sizes, seed=torch.tensor(5), row_offset=0, threshold=threshold)
    options: Any = {"backend": backend, "similarity": similarity}
    emu = evaluate(fused_emu_loss, inputs, seed=5, **options, **EMU)
    softmax = evaluate(fused_softmax_loss, inputs, **options)
    for scores in eager.SPELLINGS[similarity]:
        spelled: Any = {"mask": mask.to(device), "scores": scores, "sparse": True}
        assert_agree(evaluate(eager.emu_loss, inputs, **spelled, **EMU), emu)
        assert_agree(evaluate(eager.softmax_loss, inputs, scores=scores), softmax)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (7, 5, 19, 11), (3, 2000, 50, 20)])
def test_the_bare_scatter(shape: tuple[int, int, int, int], threads: None) -> None:
    if reason := rivals.BY_NAME["gather-scatter"].unavailable(Shape(*shape)):
        pytest.skip(reason)
    inputs = make(Shape(*shape))
    rows = inputs.query.repeat_interleave(shape[1], dim=0)
    expected = torch.zeros_like(inputs.table).index_add(0, inputs.negative.flatten(), rows)
    for count in (1, 3):
        torch.set_num_threads(count)
        torch.testing.assert_close(rivals.gather_scatter(*inputs), expected)


def test_phases_are_parts_of_the_whole() -> None:
    shape = TINY.replace(gradient="sparse")
    inputs, prepare = make(shape), rivals.BY_NAME["eager-softmax"].prepare
    loss, of_backward, of_whole = (prepare(shape, inputs, phase)()() for phase in PHASES)
    assert (loss.shape, of_backward[1].is_sparse) == ((), True)
    for part, whole in zip(of_backward, of_whole, strict=True):
        assert torch.equal(part.to_dense(), whole.to_dense())


def test_turns(monkeypatch, capsys) -> None:
    ticks = iter([0.04, 0.015, 0.005, 0.01, 0.02, 0.06])  # the first runs with a cold cache
    monkeypatch.setattr(measure, "wall_clock", lambda step: next(ticks))
    turn = measure.turn_of(lambda: lambda: None, "cpu")
    assert [turn(), turn()] == pytest.approx([0.0125, 0.06])
    place = itertools.count()  # the order rotates

    def start(name: str) -> measure.Turn:
        if name == "d":
            raise RuntimeError("no d:\nhere\n\nSet a flag.")
        return lambda: float(next(place))

    times = measure.alternate({name: partial(start, name) for name in "abdc"}, 3)
    assert times == {"a": [0, 5, 7], "b": [1, 3, 8], "c": [2, 4, 6]}
    assert capsys.readouterr().out == "failed: d: RuntimeError: no d: here\n"


def test_committed_rows() -> None:
    folder = Path(report.__file__).with_name("results")
    text = (folder / "README.md").read_text(encoding="utf-8")
    rows = results.read(folder)
    assert report.insert(text, report.markdown(rows)) == text
    with pytest.raises(ValueError, match="expected one line"):
        report.insert("no markers", "")
    for name in rivals.BACKENDS:  # once a GPU's backend has rows, calls that get it do not warn
        measured = (rows["rival"] == rivals.ours("emu", name)).any()
        assert backends.get(name).measured == measured


def test_the_report_of_a_gpu() -> None:
    row = dict.fromkeys(results.COLUMNS, "") | Shape(1024, 256, 512).columns() | {"threads": 1}
    row |= {"device": "GPU", "instruction_set": "sm_90", "family": "steps", "phase": WHOLE}
    rows = [
        row | {"date": date} | results.of_values(what, [value], rival=rival)
        for date, rival, what, value in (
            ("2025", "fused-emu-cuda", TIME, 9.0),  # from an older run
            ("2026", "fused-emu-cuda", TIME, 2.0),
            ("2026", "fused-emu-cuda", MEMORY, 31.4),
            ("2026", "eager-emu", TIME, 20.0),
        )
    ]
    lines = report.markdown(pd.DataFrame(rows)).splitlines()[2:4]
    cells = [[cell.strip() for cell in line.split("|")] for line in lines]
    assert [[row[8], row[9], row[-2]] for row in cells] == [
        ["**EMU, fused (cuda)**", "2.00", "31.4"],
        ["EMU, eager PyTorch", "20.0", "–"],
    ]


def test_messages(capsys) -> None:
    command = "messages --tiny --graph zipf --batch 2 --rounds 1 --no-memory --aggregate"
    assert main([*command.split(), "sum", "pna", "nbfnet"]) == 0
    out = capsys.readouterr().out
    assert out.count("gather, multiply, scatter: time ratio") == 2
    assert out.count("a training step of NBFNet: time ratio") == 1


@pytest.mark.slow
def test_each_part_of_a_large_graph(tmp_path: Path) -> None:
    several = importlib.util.find_spec("torchrec") is not None
    options = "large --entities 2000 --triples 9000 --steps 20 --ranked 5 --threads 1"
    options += f" --processes {1 + several} --folder {tmp_path} --results {tmp_path / 'rows'}"
    assert main(options.split()) == 0
    assert [*tmp_path.iterdir()] == [tmp_path / "rows"]  # nothing of the run is left
    (file,) = (tmp_path / "rows").iterdir()
    measured = pd.read_csv(file).set_index("part")
    last = "steps on 2 processes" if several else "predict many"
    assert [*measured.index[[0, -1]]] == ["read", last]
    assert (measured["seconds"] > 0).all()
    assert (measured["peak_mib"] > 50).all()  # torch itself
    assert measured["seconds"]["steps of these"] < measured["seconds"]["train, checkpoint, rank"]
    assert "steps, 250 triples a set of negatives" in measured.index
