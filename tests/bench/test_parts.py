"""Rivals compute the same results; timers, byte counts, reports, messages, ``make gpu-check``."""

from __future__ import annotations

import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any, TypeAlias

import pandas as pd
import pytest
import torch

from bench import eager, gpu_cases, gpu_check, measure, report, results, rivals
from bench.__main__ import _parser, main
from bench.gpu_check import FAILED, OK, SKIPPED, TIMEOUT, Stage
from bench.inputs import SIMILARITIES, Shape, make
from bench.measure import Step
from bench.rivals import EMU
from emu_kernels import backends, fused_emu_loss, fused_softmax_loss
from emu_kernels.mask import mutation_mask, rate_to_threshold
from tests.ops.support import Inputs, assert_agree, evaluate

Capture: TypeAlias = pytest.CaptureFixture[str]
TINY = Shape().tiny()


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_eager_losses_are_the_fused_ones(
    similarity: str, backend: str, device: torch.device
) -> None:
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
    if (reason := rivals.BY_NAME["gather-scatter"].unavailable(Shape(*shape))) is not None:
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
    loss, of_backward, of_whole = (prepare(shape, inputs, phase)() for phase in rivals.PHASES)
    assert (loss.shape, of_backward[1].is_sparse) == ((), True)
    for part, whole in zip(of_backward, of_whole, strict=True):
        assert torch.equal(part.to_dense(), whole.to_dense())


def test_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([0.9, 0.3, 0.1, 0.2, 0.4, 100.0])  # the first runs with a cold cache
    monkeypatch.setattr(measure, "wall_clock", lambda step, device: next(ticks))
    turn = measure.turn_of(Step(lambda _: None), "cpu", 1.0)
    assert [turn(), turn()] == pytest.approx([0.25, 100.0])
    place = itertools.count()  # the order rotates
    times = measure.alternate(dict.fromkeys("abc", lambda: float(next(place))), 3)
    assert times == {"a": [0, 5, 7], "b": [1, 3, 8], "c": [2, 4, 6]}


def test_the_report_is_of_the_committed_rows() -> None:
    folder = Path(report.__file__).with_name("results")
    text = (folder / "README.md").read_text(encoding="utf-8")
    tables = report.markdown(results.read(folder))
    between = text.partition(report.MARKERS[0] + "\n")[2].partition("\n" + report.MARKERS[1])[0]
    assert tables == between
    with pytest.raises(ValueError, match="expected one line"):
        report.insert("no markers", tables)


def test_the_report_of_a_gpu() -> None:
    shape = Shape(1024, 256, 512)
    row = dict.fromkeys(results.COLUMNS, "") | shape.columns() | {"threads": 1, "family": "steps"}
    row |= {"device": "GPU", "instruction_set": "sm_90", "phase": "forward + backward"}
    rows = [
        row | {"rival": rival, "what": what, "median": m, "q20": m, "q80": m, "date": date}
        for date, rival, what, m in (
            ("2025", "fused-emu-cuda", results.TIME, 9.0),  # from an older run
            ("2026", "fused-emu-cuda", results.TIME, 2.0),
            ("2026", "fused-emu-cuda", results.MEMORY, 31.4),
            ("2026", "fused-emu-triton", results.TIME, 4.0),
            ("2026", "eager-emu", results.TIME, 20.0),
        )
    ]
    lines = report.markdown(pd.DataFrame(rows)).splitlines()[:5]
    names, _, *cells = ([cell.strip() for cell in line.split("|")] for line in lines)
    columns = [names.index(name) for name in ("rival", "whole ms", "peak MiB")]
    expected = [
        ["**EMU, fused (cuda)**", "2.00", "31.4"],
        ["**EMU, fused (triton)**", "4.00", "–"],
        ["EMU, eager PyTorch", "20.0", "–"],
    ]
    assert [[line[column] for column in columns] for line in cells] == expected


def test_stages(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "GRACE", 1.0)
    sleep = "import subprocess, sys; print('began', flush=True); subprocess.run(['sleep', '60'])"
    told = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('its report')"
    deaf = "import signal, time; signal.signal(2, signal.SIG_IGN); print('deaf'); time.sleep(60)"
    stages = [
        Stage("a", "GIVEN=value env", 60, shown=True),
        Stage("b", f"{sys.executable} -c 'import sys; print(1); sys.exit(4)'", 60),
        Stage("c", f'{sys.executable} -c "{sleep}"', 1.0),
        Stage("d", "no-such-program", 60),
        Stage("e", "true", 60, tools="no_such_tool"),
        Stage("f", f'{sys.executable} -c "{told}"', 1.0),
        Stage("g", f'{sys.executable} -c "{deaf}"', 1.0),
        Stage("h", "echo failed: a rival", 60),
    ]
    start = time.monotonic()
    found = gpu_check.run_stages(stages, tmp_path)
    assert time.monotonic() - start < 30  # the stage's child was killed too
    expected = [OK, FAILED, TIMEOUT, FAILED, SKIPPED, TIMEOUT, TIMEOUT, FAILED]
    assert [r.status for r in found] == expected
    assert found[1].detail == "exit 4: 1"
    assert [r.detail for r in found[5:]] == ["its report", "deaf", "1 failed, failed: a rival"]
    assert "GIVEN=value" in capsys.readouterr().out
    record = json.loads((tmp_path / "summary.json").read_text())
    assert [r["stage"] for r in record] == list("abcdefgh")
    (cut,) = gpu_check.run_stages([stages[0]], tmp_path, minutes=0)
    assert cut.detail == "no time was left for it"


@pytest.mark.parametrize("part", gpu_check.PARTS)
def test_commands_of_gpu_check(part: str, tmp_path: Path, capsys: Capture) -> None:
    for stage in gpu_check.stages(part, tmp_path, "90"):
        command = stage.command.split()
        if command[1:3] == ["-m", "bench"]:
            assert _parser().parse_args(command[3:]).results == tmp_path / "results"
        tests = [word for word in command if word.startswith("tests/")]
        assert all((gpu_check.ROOT / path).exists() for path in tests)
    if not torch.cuda.is_available():
        assert gpu_check.main(["--out", str(tmp_path)]) == 2
        assert "nothing to check" in capsys.readouterr().err


def test_the_cases_run_on_a_cpu(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    assert gpu_cases.main(["--device", "cpu"]) == 0
    monkeypatch.setattr(gpu_cases, "HOT", (gpu_cases.ODD,))
    assert gpu_cases.main(["--device", "cpu", "--hot"]) == 0
    assert gpu_cases.main(["--device", "cpu", "--list", "--backends", "cuda"]) == 1
    out = capsys.readouterr().out
    assert all(text in out for text in (*SIMILARITIES, "shared, padded", "bfloat16"))


def test_messages(capsys: Capture) -> None:
    options = ["--tiny", "--graph", "zipf", "--batch", "2", "--rounds", "1", "--no-memory"]
    assert main(["messages", *options]) == 0
    out = capsys.readouterr().out
    assert out.count("gather, multiply, scatter: time ratio") == 2


def test_backends_are_measured_if_there_are_results() -> None:
    """Once a GPU's backend has rows, it is `measured`, and calls that get it do not warn."""
    measured = set(results.read(results.FOLDER)["rival"])
    for name in rivals.BACKENDS:
        assert backends.get(name).measured == (rivals.ours("emu", name) in measured)
