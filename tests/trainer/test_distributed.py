"""emu-train with the entities spread over processes, against emu-train in one process."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from emu_kernels import load
from emu_kernels.trainer import cli
from emu_kernels.trainer.checkpoint import load as load_tensors
from emu_kernels.trainer.config import Config
from emu_kernels.trainer.data import SPLITS
from emu_kernels.trainer.errors import ConfigError, RunError
from emu_kernels.trainer.run import RunFolder
from emu_kernels.trainer.sampling import rows_per_set
from tests.trainer import spread
from tests.trainer.support import QUICK, embeddings, train

distributed = pytest.importorskip("emu_kernels.trainer.distributed", exc_type=ImportError)

ROOT = Path(__file__).resolve().parents[2]
CASES = {
    "distmult": "--rows-per-set 16",
    "complex": "--model ComplEx --loss softmax --regularization 0 --optimizer RowwiseAdagrad "
    "--filter-negatives --subsampling --rows-per-set 4 --weight-column 4",
    "rotate": "--model RotatE --loss expected --inverse-relations --schedule cosine",
    "hake": "--model HAKE --loss selfadv --eval-triples 41 --eval-candidates 7 --rows-per-set 32",
    "transe": "--model TransE --loss uls --corruption bernoulli --rows-per-set 2",
    "protate": "--model pRotatE --loss mixup --sampler strict --warmup 10",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, named_triples: Any) -> Path:
    folder = tmp_path_factory.mktemp("graph")
    for split in SPLITS:
        lines = ["\t".join((*x, f"{i % 7}\n")) for i, x in enumerate(named_triples[split])]
        (folder / f"{split}.txt").write_text("".join(lines))
    return folder


def torchrun(processes: int, *arguments: str) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    return subprocess.Popen(
        [*command, "--nproc-per-node", str(processes), *arguments],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Status, output and errors; fails if the process hangs."""
    try:
        out, err = process.communicate(timeout=500)
    finally:
        process.kill()
    return process.returncode, out, err


def command(data: Path, run: Path, options: str) -> str:
    return f"--data {data} --columns 1,2,3 {' '.join(QUICK)} --run-dir {run} {options}"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """Each case trained by two processes; "resumed", by two and then by three."""
    folder = tmp_path_factory.mktemp("runs")
    commands = [command(data, folder / name, options) for name, options in CASES.items()]
    commands.append(command(data, folder / "resumed", f"{CASES['distmult']} --steps 20"))
    status, out, err = ended(torchrun(2, spread.__file__, *commands))
    assert status == 0, err
    assert out.count("run folder:") == len(commands)  # said once
    shutil.copytree(folder / "resumed", folder / "alone")
    shutil.copytree(folder / "resumed", folder / "stopped")
    again = f"--resume {folder / 'resumed'} --steps 40"
    status, _, err = ended(torchrun(3, spread.__file__, again))
    assert status == 0, err
    return folder


def compare(found: Path, wanted: Path, *, of_steps_after: int = 0) -> None:
    """Metrics and embeddings."""
    metrics = [
        [line for line in RunFolder(run).read_metrics() if line["step"] > of_steps_after]
        for run in (found, wanted)
    ]
    assert len(metrics[0]) == len(metrics[1]) > 3
    for ours, theirs in zip(*metrics, strict=True):
        assert ours.keys() == theirs.keys()
        numbers = theirs.keys() - {"split", "seconds"}
        assert {k: ours[k] for k in numbers} == pytest.approx(
            {k: theirs[k] for k in numbers}, rel=2e-3
        )
    tables = [load_tensors(run / "embeddings.safetensors")[0] for run in (found, wanted)]
    assert tables[0].keys() == tables[1].keys()
    for name, table in tables[1].items():
        torch.testing.assert_close(tables[0][name], table, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_numbers_are_those_of_one_process(runs, data, tmp_path, case):
    config = RunFolder(runs / case).read_config()
    assert config.sharded
    rows = "" if "--rows-per-set" in CASES[case] else f"--rows-per-set {config.rows_per_set}"
    alone = command(data, tmp_path / "run", f"{CASES[case]} {rows}")
    assert train(*alone.split()) == 0
    compare(runs / case, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resumed", "alone"])
def test_another_number_of_processes_goes_on(runs, name):
    """Two until step 20, then three, or one."""
    if name == "alone":
        assert train("--resume", runs / name, "--steps", 40) == 0
    compare(runs / name, runs / "distmult", of_steps_after=20)


@pytest.mark.slow
def test_a_run_that_was_not_finished_predicts(runs, tmp_path):
    """The table is made from the shards of its best step when it is asked for."""
    run = runs / "stopped"
    (exported,) = run.glob("shards-*/entity.safetensors")
    wanted = load_tensors(run / "embeddings.safetensors")[0]["entity"]
    exported.unlink()
    predictor = load(run)
    assert torch.equal(embeddings(predictor.model).entity, wanted)
    assert exported.exists()
    assert [found.rank for found in predictor.predict(head="e1", relation="r1", k=3)] == [1, 2, 3]
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / exported.parent.name / "entity.safetensors").unlink()
    harm = (print, "executed")
    (tmp_path / "run" / exported.parent.name / ".metadata").write_bytes(pickle.dumps(harm))
    with pytest.raises(RunError, match=r"cannot be read as shards: .metadata has builtins\.print"):
        load(tmp_path / "run")
    for part in (tmp_path / "run").glob(f"{exported.parent.name}/*"):
        part.unlink()
    with pytest.raises(RunError, match="cannot be read as shards"):
        load(tmp_path / "run")


@pytest.mark.slow
def test_a_process_that_dies_ends_all(data, tmp_path):
    """And leaves the last checkpoint."""
    run = tmp_path / "run"
    process = torchrun(2, spread.__file__, "die", command(data, run, CASES["distmult"]))
    status, _, err = ended(process)
    assert status != 0
    assert "exitcode  : 3" in err
    assert load_tensors(run / "last.safetensors")[1]["step"] == 20
    assert load(run).step == 20
    assert train("--resume", run) == 0
    assert train(*command(data, tmp_path / "whole", CASES["distmult"]).split()) == 0
    compare(run, tmp_path / "whole")


@pytest.mark.slow
def test_an_error_is_said_once(tmp_path):
    command = ("-m", "emu_kernels.trainer", "--data", str(tmp_path))
    status, out, err = ended(torchrun(2, *command))
    assert status != 0
    assert not out
    assert err.count("emu-train: ") == 1
    assert "holds no train.txt" in err


@pytest.mark.slow
def test_ctrl_c_saves_and_says_how_to_go_on(data, tmp_path):
    run = tmp_path / "run"
    long = command(data, run, "--steps 1000000 --eval-every 1000000").split()
    process = torchrun(2, "-m", "emu_kernels.trainer", *long)
    assert process.stdout is not None
    while not process.stdout.readline().startswith("run folder"):
        assert process.poll() is None
    while not (run / "metrics.jsonl").exists():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, out, _ = ended(process)
    assert out.count(f"go on with: emu-train --resume {run}") == 1
    assert load_tensors(run / "last.safetensors")[1]["step"] > 0
    assert list(run.glob("shards-*/.metadata"))


def test_a_group_of_one(data, tmp_path, capsys):
    """Without torchrun: nothing differs from a run without --sharded."""
    options = f"{CASES['complex']} --tsv"
    assert train(*command(data, tmp_path / "sharded", f"{options} --sharded").split()) == 0
    assert "48 entities in 1 processes" in capsys.readouterr().err
    assert train(*command(data, tmp_path / "plain", options).split()) == 0
    compare(tmp_path / "sharded", tmp_path / "plain")
    assert len((tmp_path / "sharded" / "entities.tsv").read_text().splitlines()) == 48
    assert train("--resume", tmp_path / "sharded") == 0  # it is finished
    compare(tmp_path / "sharded", tmp_path / "plain")


def test_only_the_shards_of_last_and_best_stay(data, tmp_path):
    run = tmp_path / "run"
    options = "--sharded --rows-per-set 16 --steps 60 --eval-every 10"
    assert train(*command(data, run, options).split()) == 0
    kept = {int(folder.name.removeprefix("shards-")) for folder in run.glob("shards-*")}
    best = load_tensors(run / "best.safetensors")[1]["step"]
    assert {best, 60} <= kept
    assert len(kept) <= 3  # with the best one before


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"model": "NBFNet", "dim": 32}, "NBFNet has no table of entities"),
        ({"model": "PairRE"}, "PairRE computes its candidates from all entities"),
        ({"negatives": -1}, "the loss emu touches every entity"),
        ({"loss": "onevsall"}, "the loss onevsall touches every entity"),
        ({"loss": "softmax"}, "regularization touches every entity"),
        ({"optimizer": "Adam"}, "needs Adagrad: Adam moves every entity"),
        ({"switch_to": "RowwiseAdagrad"}, "switch_to needs all entities in one process"),
        ({"init_entities": "x.npz"}, "init_entities needs all entities"),
        ({"dim": 9}, "a multiple of 4 numbers, got dim 9, which gives DistMult rows of 9"),
    ],
)
def test_what_cannot_be_sharded_is_refused(settings, said):
    with pytest.raises(ConfigError, match=f"sharded.*{said}"):
        Config(data="-", sharded=True, **settings)


def test_settings_that_need_one_process(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "4")
    run = tmp_path / "run"
    for more, said in (
        ("--rows-per-set 32", "makes 2 sets of negatives of a batch of 64, too few for 4"),
        ("--seeds 2", "--seeds needs one process"),
    ):
        assert train(*command(data, run, more).split()) == 1
        assert said in capsys.readouterr().err
    monkeypatch.delenv("WORLD_SIZE")
    assert train(*command(data, run, "--steps 20").split()) == 0
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert train("--resume", run) == 1
    assert "not sharded: it goes on in one process" in capsys.readouterr().err


def test_a_set_of_negatives_for_each_process():
    assert rows_per_set({}, 2) == 125
    assert rows_per_set({"batch_size": 64}, 4) == 16
    assert rows_per_set({"batch_size": 62}, 5) == 2
    assert rows_per_set({"batch_size": 3}, 5) == 1
    assert rows_per_set({"sampler": "strict"}, 2) == 1


def test_torchrec_that_is_missing(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "emu_kernels.trainer.distributed", None)
    monkeypatch.delattr("emu_kernels.trainer.distributed")
    assert cli.main(command(data, tmp_path / "run", "--sharded").split()) == 1
    assert "emu-train: sharded: " in capsys.readouterr().err
